"""Hard data: means far from 0, constants, extremes, NaN, blocks whose first values mislead."""

import ml_dtypes
import numpy as np
import pytest
from conftest import (
    WIDE,
    close_gradients,
    close_statistics,
    close_y,
    computed,
    oracle_backward,
    oracle_forward,
    oracle_normalize,
    parameters,
    same_bits,
    sample,
)

import fastbn

F32 = np.dtype(np.float32)
LAYOUTS = {
    "planes": ((8, 3, 70, 70), 1),
    "small planes": ((200, 3, 14, 14), 1),
    "few small planes": ((5, 3, 7, 9), 1),
    "NHWC": ((8, 70, 70, 3), -1),
    "rows": ((5000, 3), 1),
    "few rows": ((7, 3), 1),
}


@pytest.fixture(params=LAYOUTS)
def layout(request):
    return LAYOUTS[request.param]


@pytest.mark.parametrize("ratio", [0, 1, 1e2, 1e3, 1e4, 1e5, 1e6, -1e6], ids=str)
def test_mean_over_deviation(kernels, layout, ratio):
    """The issue's bound: y is within 2e-6 of float64's, however far the mean lies."""
    shape, axis = layout
    x = (np.random.default_rng(3).standard_normal(shape) + ratio).astype(F32)
    y, saved = fastbn.batch_norm_forward(x, axis=axis)
    want, mean, var = oracle_forward(x, None, None, axis)
    assert np.abs(y - want).max() <= 2e-6
    close_statistics(saved.mean, saved.var, mean, var, F32)


@pytest.mark.parametrize("ratio", [1e2, 1e4, 1e6], ids=str)
def test_gradients_far_from_zero(kernels, layout, ratio):
    shape, axis = layout
    x = (np.random.default_rng(3).standard_normal(shape) + ratio).astype(F32)
    dy = sample(shape, F32, axis, seed=2)
    weight, bias, *_ = parameters(3, F32)
    _, saved = fastbn.batch_norm_forward(x, weight, bias, axis=axis)
    _, mean, var = oracle_forward(x, weight, bias, axis)
    want = oracle_backward(dy, x, mean, var, weight, axis, True)
    close_gradients(fastbn.batch_norm_backward(dy, saved), want, dy, x, mean, var, weight, axis, True)


@pytest.mark.parametrize("value", [0.0, 1.0, 1e-40, 1e30, -3e38, -7.3, 16777217 / 3], ids=str)
def test_constant_channel_is_bias(kernels, dtype, layout, value):
    shape, axis = layout
    largest = float(ml_dtypes.finfo(dtype).max)
    x = np.full(shape, np.clip(value, -largest, largest), dtype)
    bias = np.array([0.1, -3.7, 1e5 if largest > 1e5 else 6e4], computed(dtype))
    y, saved = fastbn.batch_norm_forward(x, np.array([2.0, -1e3, 0.1], computed(dtype)), bias, axis=axis)
    assert (saved.var == 0).all()
    assert (saved.mean == x.flat[0]).all()
    assert (np.moveaxis(y, axis, -1) == bias.astype(dtype)).all()


def test_constant_channel_with_the_least_eps(kernels, dtype, layout):
    """1/√eps may be more than the data's type can hold."""
    shape, axis = layout
    y, _ = fastbn.batch_norm_forward(np.full(shape, 3.3, dtype), eps=1e-80, axis=axis)
    assert (y == 0).all()


@pytest.mark.parametrize("scale", [1e-12, 1e12, 1e18, 1e30, 1e36], ids=str)
def test_scale(kernels, layout, scale):
    """Squares in float32 would overflow or vanish; results do not."""
    shape, axis = layout
    x = (sample(shape, F32, axis) * scale).astype(F32)
    eps = 1e-30 if scale < 1 else 1e-5
    y, saved = fastbn.batch_norm_forward(x, eps=eps, axis=axis)
    want, mean, var = oracle_forward(x, None, None, axis, eps)
    close_statistics(saved.mean, saved.var, mean, var, F32)
    close_y(y, want, None, None, axis)


@pytest.mark.parametrize("scale", [1e-12, 1e12, 1e18, 1e30], ids=str)
def test_gradient_scale(kernels, layout, scale):
    """dx = (dy - …)/σ is small where σ is large, and still a normal number: so must be what it is computed by."""
    shape, axis = layout
    x, dy = (sample(shape, F32, axis) * scale).astype(F32), sample(shape, F32, axis, seed=2)
    eps = 1e-30 if scale < 1 else 1e-5
    _, saved = fastbn.batch_norm_forward(x, eps=eps, axis=axis)
    _, mean, var = oracle_forward(x, None, None, axis, eps)
    want = oracle_backward(dy, x, mean, var, None, axis, True, eps)
    close_gradients(fastbn.batch_norm_backward(dy, saved), want, dy, x, mean, var, None, axis, True, eps)


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("shape", [(40, 3, 31, 30), (5000, 3), (3, 3, 9000), (300, 3, 5)], ids=str)
@pytest.mark.parametrize("kind", ["trend", "first values", "outlier", "steps"])
def test_misleading_first_values(kernels, dtype, shape, kind):
    """A block's pivot comes from its first values; here they are far from its mean."""
    rng = np.random.default_rng(5)
    x = rng.standard_normal(shape)
    flat = np.moveaxis(x, 1, 0).reshape(3, -1)  # a copy, a channel a row
    n = flat.shape[1]
    if kind == "trend":
        flat += np.linspace(0, 1e4, n)
    elif kind == "first values":
        flat[:, :16] += 1e5
    elif kind == "outlier":
        flat[:, 0] = -1e6
    else:
        flat += 1e4 * (np.arange(n) * 7 // n)
    x = np.moveaxis(flat.reshape(3, *np.moveaxis(x, 1, 0).shape[1:]), 0, 1).astype(dtype, order="C")
    m = fastbn.moments(x)
    y, saved = fastbn.batch_norm_forward(x)
    # Not the reference, whose own pivot is the first value: longer floats where the machine has them.
    exact = x.astype(np.longdouble)
    rest = tuple(i for i in range(x.ndim) if i != 1)
    mean = exact.mean(rest)
    var = np.square(exact - exact.mean(rest, keepdims=True)).mean(rest)
    close_statistics(saved.mean, saved.var, mean, var, dtype)
    close_statistics(m.mean, m.var(), mean, var, dtype)
    close_y(y, oracle_normalize(x, mean, var, None, None, 1), None, None, 1)


@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_variance_is_never_negative(kernels, dtype, layout):
    """Values that differ in their last bit at most."""
    shape, axis = layout
    rng = np.random.default_rng(7)
    for value in (1.0, 0.1, -1e6, 1e20, 1e-30):
        x = np.where(rng.random(shape) < 0.1, np.nextafter(dtype.type(value), dtype.type(0)), dtype.type(value))
        m = fastbn.moments(x, axis=axis)
        assert (m.m2 >= 0).all()
        assert (fastbn.batch_norm_forward(x, axis=axis)[1].var >= 0).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
def test_nonfinite_stays_in_its_channel(kernels, dtype, layout, bad):
    shape, axis = layout
    x, dy = sample(shape, dtype, axis), sample(shape, dtype, axis, seed=2)
    weight, bias, mean, var = parameters(3, computed(dtype))

    def results():
        y, saved = fastbn.batch_norm_forward(x, weight, bias, axis=axis)
        return [y, *fastbn.batch_norm_backward(dy, saved), fastbn.batch_norm(x, mean, var, axis=axis)]

    clean = results()
    np.moveaxis(x, axis, 0)[1].flat[0] = bad  # moveaxis is a view
    with np.errstate(invalid="ignore"):  # the reference is NumPy, which warns
        spoilt = results()
    for got, want in zip(spoilt, clean, strict=True):
        which = axis if got.ndim > 1 else 0
        for c in (0, 2):
            same_bits(np.take(got, c, which), np.take(want, c, which))
    assert np.isnan(np.take(spoilt[0], 1, axis)).all()
    assert np.isnan(np.take(spoilt[1], 1, axis)).all()
    assert (~np.isfinite(np.take(spoilt[4], 1, axis))).sum() == 1


def test_gradient_sums_do_not_overflow(kernels, layout):
    """dy·(x - mean) is more than float32 holds; its sum times 1/σ is not."""
    shape, axis = layout
    x, dy = (sample(shape, F32, axis) * 1e10).astype(F32), (sample(shape, F32, axis, seed=2) * 1e30).astype(F32)
    _, saved = fastbn.batch_norm_forward(x, np.ones(3), np.zeros(3), axis=axis)
    _, mean, var = oracle_forward(x, None, None, axis)
    want = oracle_backward(dy, x, mean, var, None, axis, True)
    close_gradients(fastbn.batch_norm_backward(dy, saved), want, dy, x, mean, var, None, axis, True)
