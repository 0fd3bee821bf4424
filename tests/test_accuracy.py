"""Hard data: means far from 0, constants, extremes, NaN, blocks whose first values mislead.

What holds, for float32 data (the bounds are those measured over all backends, times 2 to 4):

- y: 2e-6 for data normalized to unit variance, mean/std up to 1e6.
- dx: 2e-6 · |weight|/σ for dy of unit variance.
- dweight: 3e-7 of Σ|dy·x̂|; dbias: 3e-7 of Σ|dy|; with 10⁷ values a channel 1e-9 and 1e-10.
- Where all terms are equal every addition rounds alike, and 64 of them follow each other: 2e-6 of the sum.
- A result that float32 can hold is right wherever the data lies: up to the largest numbers, whose differences overflow,
  and down to denormals, whose products vanish: dweight is then within n·2⁻¹⁴⁹·|dy|/σ, and a variance within 2⁻¹⁴⁹.

float64 data has no wider type to go to: sums of the values and of the squared deviations must be float64 numbers. Past
that (deviations over 1e153) the variance is ∞ and y is the bias, as the formula says.
"""

import ml_dtypes
import numpy as np
import pytest
from conftest import (
    BF16,
    F16,
    F32,
    F64,
    ULPS,
    WIDE,
    canonical,
    close_gradients,
    close_statistics,
    close_y,
    column,
    computed,
    generator,
    oracle_backward,
    oracle_forward,
    oracle_normalize,
    parameters,
    same_bits,
    sample,
    unit,
)

import fastbn

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


def test_no_ratio_is_unlucky(native, layout):
    """Between 1e4 and 1e5 deviations are few units of x's last place. Their squares are 0 or 1 modulo 4: sums that drop
    just these bits would drop them all the same way."""
    shape, axis = layout
    z = np.random.default_rng(3).standard_normal(shape)
    for ratio in 2.0 ** np.arange(11.5, 18, 1):
        x = (z + ratio).astype(F32)
        y, saved = fastbn.batch_norm_forward(x, axis=axis)
        want, _, var = oracle_forward(x, None, None, axis)
        assert np.abs(y - want).max() <= 2e-6, ratio
        assert np.abs(saved.var / var - 1).max() <= 5e-7, ratio


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


@pytest.mark.parametrize(("ratio", "shift"), [(0, 1), (1e2, 0), (1e4, 1), (2.0**14.5, 0), (1e6, 1)])
def test_gradient_bounds(kernels, layout, ratio, shift):
    """See above. shift: dy's mean over its deviation."""
    shape, axis = layout
    x = (np.random.default_rng(3).standard_normal(shape) + ratio).astype(F32)
    dy = (np.random.default_rng(4).standard_normal(shape) + shift).astype(F32)
    weight = np.array([1.7, -0.3, 40], F32)
    _, saved = fastbn.batch_norm_forward(x, weight, np.zeros(3, F32), axis=axis)
    got = fastbn.batch_norm_backward(dy, saved)
    _, mean, var = oracle_forward(x, None, None, axis)
    want = oracle_backward(dy, x, mean, var, weight, axis, True)
    sigma = np.sqrt(var + 1e-5)
    bounds_hold(got, want, dy, x, mean, sigma, weight, axis, (2e-6, 3e-7, 3e-7))


def bounds_hold(got, want, dy, x, mean, sigma, weight, axis, bounds):
    """dx, dweight and dbias."""
    g, xhat = canonical(dy, axis)[0], (canonical(x, axis)[0] - mean[:, None]) / sigma[:, None]
    unit_dx = np.abs(weight) / sigma * g.std(axis=1)
    scales = column(unit_dx, x.ndim, axis), np.abs(g * xhat).sum(axis=1), np.abs(g).sum(axis=1)
    for name, a, b, scale, bound in zip(("dx", "dweight", "dbias"), got, want, scales, bounds, strict=False):
        worst = (np.abs(a - b) / scale).max()
        assert worst <= bound, f"{name}: {worst:.3g}"


@pytest.fixture(scope="module")
def ten_million():
    """One channel: x, dy, and the results in float64."""
    rng = generator(10)
    x = rng.standard_normal(10_000_000, F32) + F32.type(2.0**14.5)
    dy = rng.standard_normal(x.size, F32)
    xhat = x.astype(F64)
    mean = xhat.mean()
    xhat -= mean
    rest = xhat.mean()
    xhat -= rest
    sigma = np.sqrt(np.square(xhat).mean() + 1e-5)
    xhat /= sigma
    dweight, dbias = float((dy * xhat).sum()), float(dy.sum(dtype=F64))
    sizes = float(np.abs(dy * xhat).sum()), float(np.abs(dy).sum(dtype=F64))
    dx = (dy - dbias / x.size - xhat * (dweight / x.size)) / sigma
    return x, dy, xhat, dx, (dweight, dbias), sizes, mean + rest, sigma


def test_ten_million_values(kernels, ten_million):
    """In either layout: an array of one channel is one run, wherever its axis stands."""
    x, dy, xhat, dx, gradients, sizes, mean, sigma = ten_million
    parameters_ = np.ones(1, F32), np.zeros(1, F32)
    y, saved = fastbn.batch_norm_forward(x.reshape(-1, 1), *parameters_)
    assert np.abs(y.ravel() - xhat).max() <= 2e-6
    assert abs(saved.mean[0] - mean) <= 1e-8 * sigma and abs(saved.var[0] + 1e-5 - sigma**2) <= 1e-7 * sigma**2
    got, *others = fastbn.batch_norm_backward(dy.reshape(-1, 1), saved, out=y)
    assert np.abs(got.ravel() - dx).max() <= 2e-6 / sigma
    for a, b, size, bound in zip(others, gradients, sizes, (1e-9, 1e-10), strict=True):
        assert abs(float(a[0]) - b) <= bound * size + unit(F32) * abs(b)


@pytest.mark.parametrize("shape", [(4, 3, 128, 128), (8, 3, 70, 70), (256, 3, 5, 7), (40000, 3)], ids=str)
def test_equal_terms(kernels, shape):
    """Where every addition rounds alike, errors add up: a loss that is y's mean has such a gradient, and two-valued
    data such squares."""
    rng = generator(11)
    x, sign = sample(shape, F32), rng.choice([-1, 1], shape)
    _, saved = fastbn.batch_norm_forward(x, np.ones(3, F32), np.zeros(3, F32))
    count = x.size // 3
    for value in np.float32([1 / 3, 1.3333334, 1.6, 1.9990001, *rng.uniform(1, 2, 4)]):
        *_, dbias = fastbn.batch_norm_backward(np.full(shape, value), saved)
        assert np.abs(dbias / (float(value) * count) - 1).max() <= 2e-6
        two = (sign * value).astype(F32)
        m = fastbn.moments(two)
        _, mean, var = oracle_forward(two, None, None, 1)
        assert np.abs(m.var() / var - 1).max() <= 2e-6
        assert np.abs(m.mean - mean).max() <= 1e-6


CONSTANTS = [0.0, -0.0, 1.0, 0.1, -7.3, 16777217 / 3, 1e-45, 1e-40, 65504, 1e20, 1e30, -3e38, 1e300]


def test_constant_channel_is_bias(kernels, dtype, layout):
    shape, axis = layout
    largest, least = float(ml_dtypes.finfo(dtype).max), float(ml_dtypes.finfo(dtype).smallest_subnormal)
    bias = np.array([0.1, -3.7, 1e5 if largest > 1e5 else 6e4], computed(dtype))
    for value in [*CONSTANTS, least, least * 5]:
        x = np.full(shape, np.clip(value, -largest, largest), dtype)
        y, saved = fastbn.batch_norm_forward(x, np.array([2.0, -1e3, 0.1], computed(dtype)), bias, axis=axis)
        assert (saved.var == 0).all(), value
        assert (saved.mean == x.flat[0]).all(), value
        assert (np.moveaxis(y, axis, -1) == bias.astype(dtype)).all(), value


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
@pytest.mark.parametrize("shape", [(40, 3, 31, 30), (5000, 3), (5000, 40), (3, 3, 9000), (300, 3, 5)], ids=str)
@pytest.mark.parametrize("kind", ["trend", "first values", "outlier", "steps"])
def test_misleading_first_values(kernels, dtype, shape, kind):
    """A block's pivot comes from its first values; here they are far from its mean."""
    rng = np.random.default_rng(5)
    x = rng.standard_normal(shape)
    flat = np.moveaxis(x, 1, 0).reshape(shape[1], -1)  # a copy, a channel a row
    n = flat.shape[1]
    if kind == "trend":
        flat += np.linspace(0, 1e4, n)
    elif kind == "first values":
        flat[:, :16] += 1e5
    elif kind == "outlier":
        flat[:, 0] = -1e6
    else:
        flat += 1e4 * (np.arange(n) * 7 // n)
    x = np.moveaxis(flat.reshape(shape[1], *np.moveaxis(x, 1, 0).shape[1:]), 0, 1).astype(dtype, order="C")
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


def test_variance_is_never_negative(kernels, dtype, layout):
    """Values that differ in their last bit at most."""
    shape, axis = layout
    rng = np.random.default_rng(7)
    which = rng.random(shape) < 0.1
    largest = float(ml_dtypes.finfo(dtype).max)
    for value in (1.0, 0.1, -1e6, 1e20, 1e-30, 3e38):
        value = np.clip(value, -largest, largest)
        x = np.where(which, value * (1 - unit(dtype)), value).astype(dtype)
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


# ---- where a type ends ----


# Data from normal values and from signs of which a tenth are +; weight and eps. By what its largest number is like.
EXTREMES = {
    "1e30": lambda z, rare: (1e30 * z, 1.0, 1e-5),
    "1e30, far from 0": lambda z, rare: (1e30 + 1e28 * z, 1.0, 1e-5),
    "5e37": lambda z, rare: (5e37 * z, 1.0, 1e-5),
    "3e38, far from 0": lambda z, rare: (np.clip(3e38 + 1e36 * z, -3.3e38, 3.3e38), 1.0, 1e-5),
    "differences of 6e38": lambda z, rare: (3e38 * rare, 1.0, 1e-5),
    "weight/σ of 1e-40": lambda z, rare: (1e36 * z, 1e-4, 1e-5),
    "weight/σ of 1e-26": lambda z, rare: (1e36 * z, 1e10, 1e-5),
    "weight/σ of 1e39": lambda z, rare: (1e-37 * z, 1e2, 1e-80),
    "weight/σ of 1e41": lambda z, rare: (1e-39 * (z + 3), 1e1, 1e-90),
    "denormals": lambda z, rare: (1e-39 * (z + 3), 1.0, 1e-5),
    "the least denormal": lambda z, rare: (1.5e-45 * (rare > 0), 1.0, 1e-100),
}
EXTREME_LAYOUTS = {
    "planes": ((2, 9, 35, 33), 1),
    "planes, split": ((3, 3, 40, 41), 1),
    "small planes": ((40, 3, 7, 9), 1),
    "planes as columns": ((9, 3, 14, 14), 1),
    "rows": ((300, 5), 1),
}
extreme_layouts = pytest.mark.parametrize(("shape", "axis"), EXTREME_LAYOUTS.values(), ids=EXTREME_LAYOUTS)


def hardest(name, shape, dtype, axis):
    """x, weight and eps: every other channel of the named kind, those between of ordinary numbers."""
    rng = generator(12)
    z, hard = rng.standard_normal(shape), np.arange(shape[axis]) % 2 == 0
    x, weight, eps = EXTREMES[name](z, np.where(rng.random(shape) < 0.1, 1.0, -1.0))
    weight = np.where(hard, weight * (-1.0) ** (np.arange(hard.size) // 2), 0.7)
    return np.where(column(hard, x.ndim, axis), x, z).astype(dtype), weight.astype(F32), eps


def holds(what, got, want, scale, bound, spare=0.0):
    """As conftest's close, where a result may be a denormal, or too large and then ∞."""
    with np.errstate(over="ignore"):
        nearest = want.astype(got.dtype).astype(F64)
    infinite = np.isinf(nearest)
    assert (got[infinite] == nearest[infinite]).all(), what
    allowed = bound * scale + float(ml_dtypes.finfo(got.dtype).smallest_subnormal) + spare
    worst = (np.abs(np.where(infinite, 0, got) - np.where(infinite, 0, want)) / allowed).max()
    assert worst <= 1, f"{what}: the error is {worst:.3g} times what is allowed"


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@extreme_layouts
def test_extremes(kernels, dtype, shape, axis):
    """What float32 holds is right, though its differences and coefficients be numbers that it does not hold."""
    dy = sample(shape, dtype, axis, seed=2)
    bias = generator(15).standard_normal(shape[axis]).astype(F32)
    g = np.abs(canonical(dy, axis)[0])
    for name in EXTREMES:
        if name == "the least denormal" and dtype == BF16:
            continue  # float32's
        x, weight, eps = hardest(name, shape, dtype, axis)
        y, saved = fastbn.batch_norm_forward(x, weight, bias, eps=eps, axis=axis)
        dx, dweight, dbias = fastbn.batch_norm_backward(dy, saved)
        want, mean, var = oracle_forward(x, weight, bias, axis, eps)
        close_statistics(saved.mean, saved.var, mean, var, dtype)
        w, b = (np.abs(column(p, x.ndim, axis)) for p in (weight, bias))
        holds(f"y, {name}", y, want, np.abs(want) + w + b, ULPS["y"][dtype] * unit(dtype))
        want = oracle_backward(dy, x, mean, var, weight, axis, True, eps)
        sigma = np.sqrt(var + eps)
        xhat = np.abs(canonical(x, axis)[0] - mean[:, None]) / sigma[:, None]
        terms = g + g.mean(axis=1, keepdims=True) + xhat * (g * xhat).mean(axis=1, keepdims=True)
        terms = np.moveaxis(terms.reshape(np.moveaxis(x, axis, 0).shape), 0, axis)
        scale = terms * column(np.abs(weight) / sigma, x.ndim, axis)
        holds(f"dx, {name}", dx, want[0], scale, ULPS["dx"][dtype] * unit(dtype))
        vanishing = 2.0**-149 * g.max() * g.shape[1] / sigma  # what products of denormals may have lost
        holds(f"dweight, {name}", dweight, want[1], (g * xhat).sum(axis=1), 3e-7, vanishing)
        holds(f"dbias, {name}", dbias, want[2], g.sum(axis=1), 3e-7)


@pytest.mark.parametrize("name", ["differences of 6e38", "weight/σ of 1e-40", "weight/σ of 1e41"])
@extreme_layouts
def test_extremes_fused(native, shape, axis, name):
    """Fused is unfused there too, on any number of threads; and channels between have the bits they always have."""
    x, weight, eps = hardest(name, shape, F32, axis)
    dy, residual = (sample(shape, F32, axis, seed=seed) for seed in (2, 5))
    bias = np.zeros_like(weight)
    plain, plain_saved = fastbn.batch_norm_forward(x, weight, bias, eps=eps, axis=axis)
    assert np.isfinite(plain).all()
    for slope, added in ((0.0, None), (0.25, None), (0.0, residual), (0.25, residual)):
        settings = {"activation": "leaky_relu", "negative_slope": slope, "residual": added, "eps": eps, "axis": axis}
        z, cut = plain if added is None else plain + added, F32.type(slope)
        dz = np.where(z <= 0, dy * cut if slope else cut, dy)
        unfused = fastbn.batch_norm_backward(dz, plain_saved)
        for threads in (1, 2, 3):
            y, saved = fastbn.batch_norm_forward(x, weight, bias, num_threads=threads, **settings)
            same_bits(y, np.where(z <= 0, z * cut if slope else cut, z))
            for a, b in zip(fastbn.batch_norm_backward(dy, saved, num_threads=threads), unfused, strict=False):
                same_bits(a, b)
    calm = np.where(column(np.arange(weight.size) % 2, x.ndim, axis), x, sample(shape, F32, axis)).astype(F32)
    y, saved = fastbn.batch_norm_forward(calm, weight, bias, eps=eps, axis=axis)
    odd = range(1, weight.size, 2)
    same_bits(y.take(odd, axis), plain.take(odd, axis))
    for a, b in zip(
        fastbn.batch_norm_backward(dy, saved), fastbn.batch_norm_backward(dy, plain_saved), strict=True
    ):  # fmt: skip
        which = axis if a.ndim > 1 else 0
        same_bits(a.take(odd, which), b.take(odd, which))


@extreme_layouts
def test_extreme_statistics(kernels, shape, axis):
    """Given ones: x - mean overflows, weight/σ is a denormal; and the gradient by them."""
    dy, channel = sample(shape, F32, axis, seed=2), np.arange(shape[axis]) % 3
    x = np.where(column(channel == 1, dy.ndim, axis), sample(shape, F32, axis), 3e38).astype(F32)
    mean, var = np.array([-3e38, 0.5, -3e38])[channel], np.array([1e76, 2, 1e78])[channel]
    weight, bias = np.array([1, 2, 1e-3], F32)[channel], np.array([0, 1, 2], F32)[channel]
    want = oracle_normalize(x, mean, var, weight, bias, axis)
    y = fastbn.batch_norm(x, mean, var, weight, bias, axis=axis)
    size = np.abs(want) + column(weight, x.ndim, axis) + np.abs(column(bias, x.ndim, axis))
    holds("y", y, want, size, 4 * unit(F32))
    y, saved = fastbn.batch_norm_eval_forward(x, mean, var, weight, bias, axis=axis)
    holds("y", y, want, size, 4 * unit(F32))
    got = fastbn.batch_norm_backward(dy, saved)
    want = oracle_backward(dy, x, mean, var, weight, axis, False)
    holds("dx", got[0], want[0], np.abs(want[0]), 4 * unit(F32))
    g, xhat = canonical(dy, axis)[0], (canonical(x, axis)[0] - mean[:, None]) / np.sqrt(var + 1e-5)[:, None]
    holds("dweight", got[1], want[1], np.abs(g * xhat).sum(axis=1), 3e-7)
    holds("dbias", got[2], want[2], np.abs(g).sum(axis=1), 3e-7)


@extreme_layouts
def test_small_gradients_by_large_deviations(kernels, shape, axis):
    """Σ(dy·(x - mean))/n/σ² is a denormal, though all that goes in and comes out is not."""
    x, dy = (sample(shape, F32, axis) * 1e30).astype(F32), (sample(shape, F32, axis, seed=2) * 1e-12).astype(F32)
    weight = np.full(shape[axis], 1e12, F32)
    _, saved = fastbn.batch_norm_forward(x, weight, np.zeros_like(weight), axis=axis)
    _, mean, var = oracle_forward(x, None, None, axis)
    want = oracle_backward(dy, x, mean, var, weight, axis, True)
    close_gradients(fastbn.batch_norm_backward(dy, saved), want, dy, x, mean, var, weight, axis, True)


@extreme_layouts
def test_large_gradients(kernels, shape, axis):
    """dy - Σdy/n overflows; times weight/σ it is a number."""
    x, weight = sample(shape, F32, axis), np.full(shape[axis], 1e-5, F32)
    dy = np.where(generator(13).random(shape) < 0.1, 3e38, -3e38).astype(F32)
    _, saved = fastbn.batch_norm_forward(x, weight, np.zeros_like(weight), axis=axis)
    _, mean, var = oracle_forward(x, None, None, axis)
    want = oracle_backward(dy, x, mean, var, weight, axis, True)
    dx, dweight, _ = fastbn.batch_norm_backward(dy, saved)
    close_gradients((dx, None, None), want, dy, x, mean, var, weight, axis, True)
    xhat = (canonical(x, axis)[0] - mean[:, None]) / np.sqrt(var + 1e-5)[:, None]
    holds("dweight", dweight, want[1], np.abs(canonical(dy, axis)[0] * xhat).sum(axis=1), 3e-7)


@extreme_layouts
def test_float16_extremes(kernels, shape, axis):
    """Its largest numbers and its least, computed on in float32, are ordinary."""
    rng = generator(14)
    rare, z = np.where(rng.random(shape) < 0.1, 1, -1), rng.standard_normal(shape)
    for values, eps in ((65504 * rare, 1e-5), (np.clip(6e4 + 1e3 * z, -65504, 65504), 1e-5), (6e-8 * rare, 1e-20)):
        x, dy = values.astype(F16), sample(shape, F16, axis, seed=2)
        y, saved = fastbn.batch_norm_forward(x, eps=eps, axis=axis)
        want, mean, var = oracle_forward(x, None, None, axis, eps)
        close_statistics(saved.mean, saved.var, mean, var, F16)
        close_y(y, want, None, None, axis)
        if eps == 1e-5:
            got = fastbn.batch_norm_backward(dy, saved)
            want = oracle_backward(dy, x, mean, var, None, axis, True)
            close_gradients(got, want, dy, x, mean, var, None, axis, True)


@extreme_layouts
def test_float64_extremes(kernels, shape, axis):
    """Right as long as squared deviations are float64 numbers, of whatever mean."""
    z, dy, bias = sample(shape, F64, axis), sample(shape, F64, axis, seed=2), generator(15).standard_normal(shape[axis])
    for scale, eps in ((1e150, 1e-5), (1e-150, 1e-300)):
        x = z * scale
        y, saved = fastbn.batch_norm_forward(x, None, bias, eps=eps, axis=axis)
        want, mean, var = oracle_forward(x, None, bias, axis, eps)
        close_statistics(saved.mean, saved.var, mean, var, F64)
        close_y(y, want, None, bias, axis)
        want = oracle_backward(dy, x, mean, var, None, axis, True, eps)
        close_gradients(fastbn.batch_norm_backward(dy, saved), want, dy, x, mean, var, None, axis, True, eps)
    for x in (z * 1e300, z * 1e290 + 1e300):  # past that: the variance is ∞, and what is divided by it vanishes
        y, saved = fastbn.batch_norm_forward(x, np.ones_like(bias), bias, axis=axis)
        assert (saved.var == np.inf).all() and np.isfinite(saved.mean).all()
        assert (np.moveaxis(y, axis, -1) == bias).all()
        dx, dweight, _ = fastbn.batch_norm_backward(dy, saved)
        assert (dx == 0).all() and (dweight == 0).all()
