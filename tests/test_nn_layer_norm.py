"""LayerNorm: values, gradients, accuracy, memory, errors."""

import tracemalloc

import numpy as np
import pytest
from test_nn_layers import check_gradients

import fastbn
from fastbn import nn
from fastbn.nn.layer_norm import LayerNorm

F64 = np.float64


def perturbed(layer, seed=0):
    rng = np.random.default_rng(seed)
    for parameter, _ in layer.parameters():
        parameter += (0.3 * rng.standard_normal(parameter.shape)).astype(parameter.dtype)
    return layer


@pytest.mark.parametrize("affine", [True, False, "weight", "bias"])
@pytest.mark.parametrize("shape", [(6, 5), (1, 5), (3, 2, 4)], ids=str)
def test_gradients(shape, affine):
    layer = perturbed(LayerNorm(shape[-1], affine=affine, dtype=F64))
    assert layer.affine == affine and len(list(layer.parameters())) == {True: 2, False: 0}.get(affine, 1)
    check_gradients(layer, np.random.default_rng(1).standard_normal(shape))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(7, 64), (5, 3, 33)], ids=str)
def test_it_is_torchs(shape, dtype, compiled):
    torch = pytest.importorskip("torch")
    layer = perturbed(LayerNorm(shape[-1], eps=1e-3, dtype=dtype))
    theirs = torch.nn.LayerNorm(shape[-1], eps=1e-3, dtype=getattr(torch, np.dtype(dtype).name))
    theirs.load_state_dict({name: torch.tensor(value) for name, value in layer.state_dict().items()})
    rng = np.random.default_rng(2)
    x = torch.tensor((3 + 2 * rng.standard_normal(shape)).astype(dtype), requires_grad=True)
    dy = rng.standard_normal(shape).astype(dtype)
    y = theirs(x)
    y.backward(torch.tensor(dy))
    same = {"rtol": 1e-5, "atol": 1e-5} if dtype == np.float32 else {"rtol": 1e-12, "atol": 1e-12}
    np.testing.assert_allclose(layer(x.detach().numpy()), y.detach().numpy(), **same)
    for _ in range(2):  # going back twice is the same
        np.testing.assert_allclose(layer.backward(dy), x.grad.numpy(), **same)
        np.testing.assert_allclose(layer.grad_weight, theirs.weight.grad.numpy(), **same)
        np.testing.assert_allclose(layer.grad_bias, theirs.bias.grad.numpy(), **same)


def test_rows_far_from_zero_are_normalized_as_well():
    """A mean of 10⁴ deviations: float32's own rounding of x is all that is lost, and x is what is given."""
    rng = np.random.default_rng(3)
    x = (1e4 + rng.standard_normal((50, 200))).astype(np.float32)
    exact = x.astype(F64)
    exact -= exact.mean(axis=1, keepdims=True)
    exact /= np.sqrt((exact**2).mean(axis=1, keepdims=True) + 1e-5)
    layer = LayerNorm(200)
    np.testing.assert_allclose(layer(x), exact, rtol=0, atol=3e-6)
    dy = rng.standard_normal(x.shape).astype(np.float32)
    layer.backward(dy)
    np.testing.assert_allclose(layer.grad_weight, (dy * exact).sum(axis=0), rtol=0, atol=2e-5)


def test_no_row_depends_on_another_and_modes_are_the_same():
    layer = perturbed(LayerNorm(6))
    x = np.random.default_rng(4).standard_normal((4, 6), np.float32)
    y = layer(x).copy()
    for row in range(4):
        np.testing.assert_allclose(layer(x[row : row + 1]), y[row : row + 1], rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(layer.eval()(x), y)
    assert np.isfinite(layer.backward(y.copy())).all()


def test_a_constant_row_is_the_bias():
    layer = perturbed(LayerNorm(5))
    np.testing.assert_array_equal(layer(np.full((2, 5), 1234.567, np.float32)), [layer.bias] * 2)


@pytest.mark.parametrize("order", [np.asfortranarray, lambda x: np.repeat(x, 2, axis=-1)[..., ::2]])
@pytest.mark.parametrize("shape", [(6, 5), (3, 2, 4)], ids=str)
def test_any_memory_order_gives_the_same(shape, order):
    layer = perturbed(LayerNorm(shape[-1], dtype=F64))
    x = np.random.default_rng(5).standard_normal(shape)
    y = layer(x).copy()
    dx = layer.backward(y).copy()
    np.testing.assert_allclose(layer(order(x)), y, rtol=1e-13, atol=1e-14)
    np.testing.assert_allclose(layer.backward(order(y)), dx, rtol=1e-12, atol=1e-13)


def test_batches_of_other_sizes():
    layer = perturbed(LayerNorm(5, dtype=F64))
    x = np.random.default_rng(6).standard_normal((4, 5))
    y = layer(x).copy()
    for rows in (2, 0, 4):
        np.testing.assert_allclose(layer(x[:rows]), y[:rows], rtol=1e-13)
        assert layer.backward(x[:rows]).shape == (rows, 5)
        assert layer.grad_bias.any() == (rows > 0)


@pytest.mark.skipif(fastbn.backends.kernels().NAME == "reference", reason="the reference kernels work in new arrays")
def test_a_steady_step_allocates_nothing_of_a_batchs_size():
    layer = LayerNorm(256)
    x = np.random.default_rng(7).standard_normal((512, 256), np.float32)

    def epoch():
        for rows in (512, 300):
            layer.backward(layer(x[:rows]))

    epoch()
    epoch()
    tracemalloc.start()
    try:
        epoch()
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        epoch()
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert peak < 40_000  # vectors of rows and of features; 300 rows of 256 are 307 kB


def test_one_dtype_and_state():
    for dtype in (np.float32, np.float64):
        layer = LayerNorm(4, dtype=dtype)
        y = layer(np.ones((2, 4), dtype))
        seen = [y, layer.backward(y), *(array for pair in layer.parameters() for array in pair)]
        assert {array.dtype for array in seen} == {np.dtype(dtype)}
    one, other = perturbed(LayerNorm(4)), LayerNorm(4)
    other.load_state_dict(one.state_dict())
    np.testing.assert_array_equal(other.weight, one.weight)
    assert list(LayerNorm(4, affine="bias").state_dict()) == ["bias"] and LayerNorm(4, affine=False).state_dict() == {}
    assert isinstance(one, nn.Layer) and repr(one) == "LayerNorm(4, eps=1e-05, affine=True, dtype=float32)"


X = np.zeros((2, 4), np.float32)


def called(layer):
    layer(X)
    return layer


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: LayerNorm(1), ValueError, "num_features is 1, and must be at least 2"),
        (lambda: LayerNorm((4,)), TypeError, r"num_features is \(4,\), and must be an integer"),
        (lambda: LayerNorm(4, eps=0), ValueError, "eps is 0"),
        (lambda: LayerNorm(4, affine="scale"), ValueError, "affine is 'scale'"),
        (lambda: LayerNorm(4, dtype=np.float16), TypeError, "dtype is float16"),
        (lambda: LayerNorm(4)(X.astype(F64)), TypeError, "x has dtype float64.*float32"),
        (lambda: LayerNorm(4)(X.tolist()), TypeError, "x is a list"),
        (lambda: LayerNorm(3)(X), ValueError, r"x has shape \(2, 4\), and must have shape \(batch, ..., 3\)"),
        (lambda: LayerNorm(4)(X[0]), ValueError, r"x has shape \(4,\)"),
        (lambda: LayerNorm(4).backward(X), ValueError, "call the layer first"),
        (lambda: called(LayerNorm(4)).backward(X[:1]), ValueError, r"dy has shape \(1, 4\), and must .*\(2, 4\)"),
        (lambda: called(LayerNorm(4)).backward(X.astype(F64)), TypeError, "dy has dtype float64"),
        (lambda: LayerNorm(4).load_state_dict({"weight": np.ones(4)}), ValueError, r"state lacks \['bias'\]"),
    ],
)
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()
