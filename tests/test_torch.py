"""torch on the CPU, as an outside oracle."""

import numpy as np
import pytest
from conftest import F16, WIDE, parameters, sample, unit

import fastbn

torch = pytest.importorskip("torch", reason="torch is not installed: make peers")

SHAPES = {
    "NC": ((61, 7), 1),
    "NCL": ((11, 7, 23), 1),
    "NCHW": ((5, 7, 12, 11), 1),
    "NHWC": ((5, 12, 11, 7), -1),
    "NCDHW": ((3, 7, 4, 5, 6), 1),
}

# rtol is the issue's. atol, times the largest value of the tensor: y and dx are differences of terms of that size, so a
# value near 0 has their rounding error, here and in torch. The data's means are near 0: torch's float32 loses digits
# where they are not.
TOLERANCE = {"float32": (1e-5, 2e-6), "float64": (1e-12, 1e-14)}


def agree(got, want, dtype):
    want = want.detach().numpy()
    assert got.shape == want.shape
    rtol, atol = TOLERANCE[str(dtype)]
    np.testing.assert_allclose(got, want, rtol=rtol, atol=atol * np.abs(want).max())


def channels_first(array, axis):
    """A torch tensor on the same memory: of an NHWC array, torch sees a channels-last tensor."""
    return torch.from_numpy(np.moveaxis(array, axis, 1))


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("shape", "axis"), SHAPES.values(), ids=SHAPES)
def test_functions(kernels, dtype, shape, axis, training):
    x, dy = sample(shape, dtype, axis), sample(shape, dtype, axis, seed=2)
    weight, bias, mean, var = parameters(7, dtype)
    theirs = [torch.tensor(v) for v in (mean, var, weight, bias)]
    x_t = channels_first(x.copy(), axis).requires_grad_()
    for parameter in theirs[2:]:
        parameter.requires_grad_()
    y_t = torch.nn.functional.batch_norm(x_t, *theirs, training=training, momentum=0.3, eps=1e-4)
    y_t.backward(channels_first(dy, axis))

    if training:
        y, saved = fastbn.batch_norm_forward(x, weight, bias, eps=1e-4, axis=axis)
    else:
        y, saved = fastbn.batch_norm_eval_forward(x, mean, var, weight, bias, eps=1e-4, axis=axis)
    dx, dweight, dbias = fastbn.batch_norm_backward(dy, saved)
    again = fastbn.batch_norm(x, mean, var, weight, bias, training=training, momentum=0.3, eps=1e-4, axis=axis)
    np.testing.assert_array_equal(again, y)
    agree(np.moveaxis(y, axis, 1), y_t, dtype)
    agree(np.moveaxis(dx, axis, 1), x_t.grad, dtype)
    agree(dweight, theirs[2].grad, dtype)
    agree(dbias, theirs[3].grad, dtype)
    agree(mean, theirs[0], dtype)  # in training, updated
    agree(var, theirs[1], dtype)


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("slope", [0.0, 0.2], ids=["relu", "leaky_relu"])
@pytest.mark.parametrize("added", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("shape", "axis"), SHAPES.values(), ids=SHAPES)
def test_activation(kernels, dtype, shape, axis, training, added, slope):
    """torch adds the residual and applies the activation in steps of their own, and differentiates them."""
    x, dy, residual = (sample(shape, dtype, axis, seed=seed) for seed in (0, 2, 5))
    weight, bias, mean, var = parameters(7, dtype)
    theirs = [torch.tensor(v) for v in (mean, var, weight, bias)]
    x_t, r_t = (channels_first(array.copy(), axis).requires_grad_() for array in (x, residual))
    for parameter in theirs[2:]:
        parameter.requires_grad_()
    z_t = torch.nn.functional.batch_norm(x_t, *theirs, training=training)
    if added:
        z_t = z_t + r_t
    y_t = torch.nn.functional.leaky_relu(z_t, slope) if slope else torch.nn.functional.relu(z_t)
    y_t.backward(channels_first(dy, axis))

    settings = {"activation": "leaky_relu" if slope else "relu", "negative_slope": slope, "axis": axis}
    settings["residual"] = residual if added else None
    if training:
        y, saved = fastbn.batch_norm_forward(x, weight, bias, **settings)
    else:
        y, saved = fastbn.batch_norm_eval_forward(x, mean, var, weight, bias, **settings)
    dx, dweight, dbias, *rest = fastbn.batch_norm_backward(dy, saved)
    agree(np.moveaxis(y, axis, 1), y_t, dtype)
    agree(np.moveaxis(dx, axis, 1), x_t.grad, dtype)
    agree(dweight, theirs[2].grad, dtype)
    agree(dbias, theirs[3].grad, dtype)
    assert len(rest) == added
    if added:
        agree(np.moveaxis(rest[0], axis, 1), r_t.grad, dtype)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("shape", "axis"), SHAPES.values(), ids=SHAPES)
def test_half(kernels, half, shape, axis, training):
    """torch, too, computes half data in float32 by float32 parameters: each rounds once, at most to the next number."""
    x, dy = sample(shape, half, axis), sample(shape, half, axis, seed=2)
    weight, bias, mean, var = parameters(7, np.float32)
    theirs = [torch.tensor(v) for v in (mean, var, weight, bias)]
    kind = torch.float16 if half == F16 else torch.bfloat16
    x_t, dy_t = (channels_first(array.view(np.int16), axis).view(kind) for array in (x, dy))
    x_t.requires_grad_()
    y_t = torch.nn.functional.batch_norm(x_t, *theirs, training=training)
    y_t.backward(dy_t)
    if training:
        y, saved = fastbn.batch_norm_forward(x, weight, bias, axis=axis)
    else:
        y, saved = fastbn.batch_norm_eval_forward(x, mean, var, weight, bias, axis=axis)
    dx, *_ = fastbn.batch_norm_backward(dy, saved)
    for got, want in ((y, y_t), (dx, x_t.grad)):
        got, want = np.moveaxis(got, axis, 1).astype(np.float64), want.detach().to(torch.float64).numpy()
        np.testing.assert_allclose(got, want, rtol=unit(half), atol=1e-6 * np.abs(want).max())


@pytest.mark.parametrize("settings", [{}, {"affine": False}, {"track_running_stats": False}], ids=str)
def test_layer(kernels, settings):
    """Three steps of training, the state handed over both ways, and evaluation."""
    ours, theirs = fastbn.BatchNorm(7, momentum=0.3, **settings), torch.nn.BatchNorm2d(7, momentum=0.3, **settings)
    for step in range(3):
        x, dy = sample((5, 7, 6, 4), np.float32, seed=step), sample((5, 7, 6, 4), np.float32, seed=step + 9)
        x_t = torch.tensor(x, requires_grad=True)
        y_t = theirs(x_t)
        agree(ours(x), y_t, "float32")
        theirs.zero_grad()
        y_t.backward(torch.from_numpy(dy))
        agree(ours.backward(dy), x_t.grad, "float32")
        if ours.weight is not None:
            agree(ours.grad_weight, theirs.weight.grad, "float32")
            agree(ours.grad_bias, theirs.bias.grad, "float32")

    state, state_t = ours.state_dict(), theirs.state_dict()
    assert list(state) == list(state_t)
    for name in state:
        agree(state[name], state_t[name], "float32")
        assert state[name].dtype == state_t[name].numpy().dtype
    fastbn.BatchNorm(7, **settings).load_state_dict(state_t)
    theirs.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()})
    agree(ours.eval()(x), theirs.eval()(torch.from_numpy(x)), "float32")
