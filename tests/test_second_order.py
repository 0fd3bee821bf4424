"""batch_norm_double_backward: the gradient of the gradient, against finite differences and torch."""

# ruff: noqa: E501 - the tables have one case a line

import re
import tracemalloc

import numpy as np
import pytest
from conftest import (
    BF16,
    COPIES,
    DTYPES,
    F32,
    F64,
    HALF,
    ORDERS,
    computed,
    load_kernels,
    parameters,
    runnable_sets,
    same_bits,
    sample,
    unit,
    wide,
)

import fastbn
from fastbn import backends
from fastbn import second_order as second_order_module
from fastbn.second_order import batch_norm_double_backward

SHAPES = [((9, 3), 1), ((4, 3, 5), 1), ((2, 3, 3, 2), 1), ((3, 2, 4, 3), -1), ((3, 7), 0)]
KINDS = [{}, {"activation": "relu"}, {"activation": "leaky_relu", "negative_slope": 0.3}]


def make(shape, dtype=F64, axis=1, *, channels=None):
    """x, dy, ddx; weight, bias, ddweight, ddbias; running_mean, running_var."""
    channels = shape[axis]
    x, dy, v = (sample(shape, dtype, axis, seed) for seed in range(3))
    weight, bias, mean, var = parameters(channels, computed(dtype))
    a, b, *_ = parameters(channels, computed(dtype), seed=5)
    return (x, dy, v), (weight, bias, a, b), (mean, var)


def forward(batch, x, weight, bias, statistics, axis=1, **settings):
    if batch:
        return fastbn.batch_norm_forward(x, weight, bias, axis=axis, **settings)[1]
    return fastbn.batch_norm_eval_forward(x, *statistics, weight, bias, axis=axis, **settings)[1]


batch_or_eval = pytest.mark.parametrize("batch", [True, False], ids=["batch", "eval"])
kinds = pytest.mark.parametrize("settings", KINDS, ids=str)


# ---- right numbers ----


@batch_or_eval
@kinds
@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
def test_finite_differences(shape, axis, settings, batch):
    """Of J = Σ ddx·dx + Σ ddweight·dweight + Σ ddbias·dbias, by way of the backward pass; bias changes nothing."""
    (x, dy, v), (weight, bias, a, b), statistics = make(shape, F64, axis)

    def loss():
        saved = forward(batch, x, weight, bias, statistics, axis, eps=1e-2, **settings)
        dx, dweight, dbias = fastbn.batch_norm_backward(dy, saved)
        return float((v * dx).sum() + (a * dweight).sum() + (b * dbias).sum())

    saved = forward(batch, x, weight, bias, statistics, axis, eps=1e-2, **settings)
    got = batch_norm_double_backward(v, a, b, dy, saved)
    for gradient, argument in zip((*got, np.zeros_like(bias)), (dy, x, weight, bias), strict=True):
        numeric = np.empty_like(argument)
        for i in np.ndindex(argument.shape):
            here = argument[i]
            argument[i] = here + 1e-5
            above = loss()
            argument[i] = here - 1e-5
            numeric[i] = (above - loss()) / 2e-5
            argument[i] = here
        np.testing.assert_allclose(gradient, numeric, rtol=1e-6, atol=1e-7)


@batch_or_eval
@kinds
@pytest.mark.parametrize(("shape", "axis"), [((9, 3), 1), ((4, 3, 5), 1), ((6, 3, 7, 8), 1)], ids=str)
def test_torch(shape, axis, settings, batch):
    torch = pytest.importorskip("torch", reason="torch is not installed: make peers")
    (x, dy, v), (weight, bias, a, b), statistics = make(shape)
    leaves = [torch.tensor(value, requires_grad=True) for value in (x, weight, bias, dy)]
    z = torch.nn.functional.batch_norm(leaves[0], *map(torch.tensor, statistics), *leaves[1:3], training=batch)
    y = {None: lambda z: z, "relu": torch.relu, "leaky_relu": lambda z: torch.nn.functional.leaky_relu(z, 0.3)}[
        settings.get("activation")
    ](z)
    gradients = torch.autograd.grad(y, leaves[:3], leaves[3], create_graph=True)
    want = torch.autograd.grad(gradients, [leaves[3], leaves[0], leaves[1]], [torch.tensor(u) for u in (v, a, b)])
    got = batch_norm_double_backward(v, a, b, dy, forward(batch, x, weight, bias, statistics, **settings))
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other.numpy(), rtol=1e-10, atol=1e-12 * np.abs(other.numpy()).max())


def test_penalty_on_a_gradients_norm():
    """WGAN-GP's use: the parameters' gradient of (|dx| - 1)², where dx is a critic's gradient with respect to its input."""
    (x, dy, _), (weight, bias, *_), _ = make((8, 3))

    def norms(weight, dy=dy):
        dx = fastbn.batch_norm_backward(dy, fastbn.batch_norm_forward(x, weight, bias)[1])[0]
        return dx, np.sqrt((dx**2).sum(1, keepdims=True))

    dx, norm = norms(weight)
    _, saved = fastbn.batch_norm_forward(x, weight, bias)
    _, _, gradient = batch_norm_double_backward(2 * (norm - 1) * dx / norm, None, None, dy, saved)
    for c in range(3):
        step = np.zeros(3)
        step[c] = 1e-6
        change = ((norms(weight + step)[1] - 1) ** 2).sum() - ((norms(weight - step)[1] - 1) ** 2).sum()
        assert gradient[c] == pytest.approx(change / 2e-6, rel=1e-6)


@batch_or_eval
@kinds
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_types(dtype, settings, batch):
    """float64 inside: what is rounded is the result, once, and the statistics it begins with."""
    (x, dy, v), (weight, bias, a, b), statistics = make((40, 3, 5), dtype)
    saved = forward(batch, x, weight, bias, statistics, **settings)
    got = batch_norm_double_backward(v, a, b, dy, saved)
    assert [gradient.dtype for gradient in got] == [dtype, dtype, computed(dtype)]
    exact = forward(batch, *map(wide, (x, weight, bias)), statistics, **settings)
    want = batch_norm_double_backward(wide(v), wide(a), wide(b), wide(dy), exact)
    for gradient, exactly in zip(got, want, strict=True):
        rounded = 0.51 * unit(gradient.dtype) * np.abs(exactly)
        statistics_off = (4 * unit(F32) if batch and dtype != F64 else 1e-13) * np.abs(exactly).max()
        assert (np.abs(wide(gradient) - exactly) <= rounded + statistics_off + 2.0**-24 * (dtype in HALF)).all()


@batch_or_eval
@pytest.mark.parametrize("given", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 0, 0)], ids=str)
def test_none_is_zero(given, batch):
    (x, dy, v), (weight, bias, a, b), statistics = make((4, 3, 5))
    saved = forward(batch, x, weight, bias, statistics)
    some = [u if g else None for u, g in zip((v, a, b), given, strict=True)]
    zeros = [u if g else np.zeros_like(u) for u, g in zip((v, a, b), given, strict=True)]
    got = batch_norm_double_backward(*some, dy, saved)
    for one, other in zip(got, batch_norm_double_backward(*zeros, dy, saved), strict=True):
        np.testing.assert_array_equal(one, other)
    if given == (0, 0, 0):
        assert all((gradient == 0).all() for gradient in got)


@batch_or_eval
def test_absent_parameters(batch):
    (x, dy, v), (weight, bias, a, b), statistics = make((4, 3, 5))
    ones, zeros = np.ones(3), np.zeros(3)
    for w, beta in ((None, None), (weight, None), (None, bias)):
        saved = forward(batch, x, w, beta, statistics)
        arguments = v, None if w is None else a, None if beta is None else b, dy
        got = batch_norm_double_backward(*arguments, saved)
        full = forward(batch, x, ones if w is None else w, zeros if beta is None else beta, statistics)
        want = batch_norm_double_backward(*arguments, full)
        for one, other in zip(got[:2], want[:2], strict=True):
            same_bits(one, other)
        assert got[2] is None if w is None else got[2].dtype == F64


def test_far_from_zero():
    """A large mean of x, of dy and of ddx takes nothing away."""
    (x, dy, v), (weight, bias, a, b), _ = make((50, 3))
    far = np.round(x * 2**20) / 2**20 + 1e6
    near = np.round(x * 2**20) / 2**20
    got = batch_norm_double_backward(v + 1e4, a, b, dy + 1e4, fastbn.batch_norm_forward(far, weight, bias)[1])
    want = batch_norm_double_backward(v, a, b, dy, fastbn.batch_norm_forward(near, weight, bias)[1])
    shift = fastbn.batch_norm_backward(np.ones_like(dy), fastbn.batch_norm_forward(near, weight, bias)[1])
    assert np.abs(shift[0]).max() < 1e-12  # a constant changes neither P g nor P v
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=3e-8 * np.abs(other).max())


# ---- memory, layout, pieces ----


@pytest.mark.parametrize("memory", [*ORDERS, *COPIES], ids=lambda f: f.__name__)
def test_any_memory(memory):
    (x, dy, v), (weight, bias, a, b), _ = make((4, 3, 5), F32)
    _, saved = fastbn.batch_norm_forward(memory(x), weight, bias)
    got = batch_norm_double_backward(memory(v), a, b, memory(dy), saved)
    want = batch_norm_double_backward(v, a, b, dy, fastbn.batch_norm_forward(x, weight, bias)[1])
    ordinary = fastbn.batch_norm_backward(dy, saved)[0]
    for one, other in zip(got[:2], want[:2], strict=True):
        assert one.strides == ordinary.strides
        # In another order the batch's statistics are other sums.
        allowed = 0 if memory in COPIES else unit(F32) * np.abs(other).max()
        np.testing.assert_allclose(one, other, rtol=0, atol=allowed)


@batch_or_eval
@pytest.mark.parametrize("settings", KINDS[1:], ids=str)
@pytest.mark.parametrize(("shape", "axis"), [((50, 3), 1), ((6, 3, 7, 8), 1), ((2, 3, 300), 1)], ids=str)
def test_in_pieces(shape, axis, settings, batch, monkeypatch):
    (x, dy, v), (weight, bias, a, b), statistics = make(shape, F32)
    saved = forward(batch, x, weight, bias, statistics, **settings)
    want = batch_norm_double_backward(v, a, b, dy, saved)
    for piece in (14, 200, 3000):
        monkeypatch.setattr(second_order_module, "PIECE", piece)
        for one, other in zip(batch_norm_double_backward(v, a, b, dy, saved), want, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=unit(F32) * np.abs(other).max())


def test_each_backend(kernels):
    """An activation's signs are the kernel's own: with the same bits as its backward pass sees."""
    (x, dy, v), (weight, bias, a, b), statistics = make((40, 3), F32)
    y, saved = fastbn.batch_norm_eval_forward(x, *statistics, weight, bias, activation="relu")
    grad_dy, *_ = batch_norm_double_backward(v, a, b, dy, saved)
    np.testing.assert_array_equal(grad_dy != 0, y > 0)


def test_same_bits_for_any_number_of_threads_and_instruction_set(monkeypatch):
    (x, dy, v), (weight, bias, a, b), _ = make((16, 7, 33, 31), F32)
    results = []
    for isa in runnable_sets():
        monkeypatch.setattr(backends, "_backend", load_kernels(f"cython {isa}"))
        for threads in (1, 3):
            _, saved = fastbn.batch_norm_forward(x, weight, bias, activation="leaky_relu", num_threads=threads)
            results.append(batch_norm_double_backward(v, a, b, dy, saved, num_threads=threads))
    for other in results[1:]:
        for one, first in zip(other, results[0], strict=True):
            same_bits(one, first)


def test_temporaries_are_small():
    (x, dy, v), (weight, bias, a, b), _ = make((64, 8, 40, 40), F32)
    _, saved = fastbn.batch_norm_forward(x, weight, bias, activation="relu")
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        results = batch_norm_double_backward(v, a, b, dy, saved)
        most = tracemalloc.get_traced_memory()[1] - before - sum(r.nbytes for r in results)
    finally:
        tracemalloc.stop()
    assert most < 4e6 < 13e6 < 4 * x.nbytes


@batch_or_eval
@pytest.mark.parametrize("shape", [(0, 3, 5), (4, 3, 0), (4, 0, 5)])
def test_empty(shape, batch):
    x, channels = np.empty(shape, F32), np.ones(shape[1], F32)
    saved = forward(batch, x, channels, channels, (channels, channels), activation="relu")
    grad_dy, grad_x, grad_weight = batch_norm_double_backward(x, channels, channels, x, saved)
    assert grad_dy.shape == grad_x.shape == shape and (grad_weight == 0).all()


def test_not_finite():
    """Shows, in its channel alone, and without a warning."""
    (x, dy, v), (weight, bias, a, b), _ = make((9, 3))
    v[2, 1] = np.inf
    for result in batch_norm_double_backward(v, a, b, dy, fastbn.batch_norm_forward(x, weight, bias)[1])[:2]:
        assert np.isfinite(result).all(0).tolist() == [True, False, True]


# ---- what is refused ----

(X, DY, V), (W, B, DW, DB), _ = make((4, 3, 5), F32)
BAD = {
    "ddx's shape": ({"ddx": V[:3]}, ValueError, "ddx has shape (3, 3, 5), and must have x's shape (4, 3, 5)"),
    "ddx's dtype": ({"ddx": V.astype("f8")}, TypeError, "ddx has dtype float64, and must have x's dtype float32"),
    "ddx is no array": ({"ddx": "x"}, TypeError, "ddx has dtype <U1, and must be float16"),
    "dy is None": ({"dy": None}, TypeError, "dy is a NoneType, and must be an array"),
    "dy's shape": ({"dy": DY.transpose(0, 2, 1)}, ValueError, "dy has shape (4, 5, 3), and must have x's shape (4, 3, 5)"),
    "dy's dtype": ({"dy": DY.astype(BF16)}, TypeError, "dy has dtype bfloat16, and must have x's dtype float32"),
    "ddweight's shape": ({"ddweight": np.ones(4)}, ValueError, "ddweight has shape (4,), and must have shape (3,)"),
    "ddweight's dtype": ({"ddweight": np.ones(3, int)}, TypeError, "ddweight has dtype int64, and must be float32 or float64"),
    "ddbias's shape": ({"ddbias": np.ones((3, 1))}, ValueError, "ddbias has shape (3, 1), and must have shape (3,)"),
    "ddbias is half": ({"ddbias": np.ones(3, np.float16)}, TypeError, "ddbias has dtype float16, and must be float32 or float64"),
    "no weight": ({"saved": fastbn.batch_norm_forward(X, None, B)[1]}, ValueError, "ddweight is given, and must be None where the forward pass had no weight"),
    "no bias": ({"saved": fastbn.batch_norm_forward(X, W)[1]}, ValueError, "ddbias is given, and must be None where the forward pass had no bias"),
    "residual": ({"saved": fastbn.batch_norm_forward(X, W, B, residual=X)[1]}, ValueError, "saved is of a forward pass with a residual, and must be of one without"),
    "saved": ({"saved": None}, TypeError, "saved is a NoneType, and must be what batch_norm_forward or batch_norm_eval_forward returned beside y"),
    "threads": ({"num_threads": 0}, ValueError, "num_threads is 0, and must be at least 1"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "error", "words"), BAD.values(), ids=BAD)
def test_bad_arguments(arguments, error, words):
    saved = fastbn.batch_norm_forward(X, W, B)[1]
    given = {"ddx": V, "ddweight": DW, "ddbias": DB, "dy": DY, "saved": saved} | arguments
    with pytest.raises(error, match=re.escape(words)):
        batch_norm_double_backward(**given)


def test_a_z_of_exactly_0_is_cut():
    """As in the forward pass: the slope applies where z ≤ 0, also where a constant channel's z is bias, and that is 0."""
    x, dy, ddx = np.ones((5, 1)), np.arange(5.0)[:, np.newaxis] + 1, np.ones((5, 1))
    zero = np.zeros(1)
    _, saved = fastbn.batch_norm_eval_forward(x, zero + 1, zero + 1, zero + 2, zero, activation="relu")
    for result in fastbn.batch_norm_double_backward(ddx, zero + 1, zero + 1, dy, saved):
        assert not np.any(result)
