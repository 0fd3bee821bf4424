"""float16 and bfloat16 data: read and written exactly, computed on in float32, rounded once."""

import re

import ml_dtypes
import numpy as np
import pytest
from conftest import (
    BF16,
    F16,
    F32,
    F64,
    HALF,
    WIDE,
    cache_sizes,
    close_statistics,
    computed,
    oracle_backward,
    oracle_forward,
    oracle_normalize,
    parameters,
    runnable_sets,
    same_bits,
    sample,
    unit,
)

import fastbn
from fastbn import backends

# Scale exactly 1 and shift exactly 0: 1 - eps + eps is 1, and a bias of -0 keeps the sign of a zero.
EPS = 2.0**-10

# Memory of a channel's values: one by one, in vectors of all widths, before and after an aligned stretch.
SHAPES = {
    "rows": ((256, 256), 1),
    "short rows": ((13108, 5), 1),
    "one long row": ((1, 65536), 1),
    "one channel": ((8, 1, 8192), 1),
    "small planes": ((64, 4, 257), 1),
    "few small planes": ((4, 256, 64), 1),
    "planes": ((3, 5, 4399), 1),
    "NHWC": ((2, 8, 64, 67), -1),
}


@pytest.fixture(autouse=True)
def quiet():
    """Signalling NaNs are among what goes through here, and make NumPy and ml_dtypes warn."""
    with np.errstate(invalid="ignore"):
        yield


@pytest.fixture(params=SHAPES)
def shape_axis(request):
    return SHAPES[request.param]


def patterns(half, shape):
    """Every bit pattern, again from the first where the shape has room."""
    return np.resize(np.arange(65536, dtype=np.uint16), int(np.prod(shape))).view(half).reshape(shape)


def exact(channels, bias=-0.0):
    """Arguments by which y is x + bias, in float32."""
    return {
        "running_mean": np.zeros(channels), "running_var": np.full(channels, 1 - EPS), "weight": np.ones(channels),
        "bias": np.full(channels, bias, F64), "eps": EPS,
    }  # fmt: skip


def same_or_nan(got, want, kernels=None):
    """The same bits; a NaN may be another one, and of Numba's kernels a zero may have the other sign."""
    assert got.dtype == want.dtype and got.shape == want.shape
    if kernels is not None and kernels.NAME == "numba":
        got, want = got + got.dtype.type(0), want + want.dtype.type(0)
    bits, nan = np.uint16 if got.itemsize == 2 else np.uint32, np.isnan(want)
    np.testing.assert_array_equal(np.isnan(got), nan)
    np.testing.assert_array_equal(np.where(nan, 0, got.view(bits)), np.where(nan, 0, want.view(bits)))


def to_half(values, half):
    """NumPy's and ml_dtypes' own rounding, of float32."""
    with np.errstate(over="ignore"):
        return values.astype(half)


# ---- conversion ----


def test_identity():
    """What the tests of conversion rest on."""
    assert (1 - EPS) + EPS == 1 and 1 / np.sqrt((1 - EPS) + EPS) == 1


@pytest.mark.parametrize("shift", [0, 5])
def test_every_number_goes_through(kernels, half, shape_axis, shift):
    """Loaded and stored, all 65536 patterns are what they were: normal, denormal, ±0, ±∞; NaN is NaN."""
    shape, axis = shape_axis
    x = patterns(half, shape)
    out = np.empty(x.size + shift, half)[shift:].reshape(shape)
    given = exact(shape[axis])
    same_or_nan(fastbn.batch_norm(x, axis=axis, out=out, **given), x, kernels)
    y, saved = fastbn.batch_norm_eval_forward(x, axis=axis, **given)
    same_or_nan(fastbn.batch_norm_backward(x, saved, out=out)[0], x, kernels)
    relu = fastbn.batch_norm(x, axis=axis, activation="relu", out=out, **given)
    same_or_nan(relu, np.where(x <= 0, half.type(0), x), kernels)
    nothing = np.full(shape, -0.0, half)
    for a, b in ((x, nothing), (nothing, x)):
        y, saved = fastbn.batch_norm_eval_forward(
            a, axis=axis, residual=b, activation="relu", out=out, **given
        )  # fmt: skip
        same_or_nan(y, np.where(x <= 0, half.type(0), x), kernels)
    _, _, _, dresidual = fastbn.batch_norm_backward(x, saved)
    same_or_nan(dresidual, np.where(x <= 0, half.type(0), x), kernels)


def test_every_number_streamed(compiled, half, shape_axis):
    """Past the cache, from any alignment."""
    shape, axis = shape_axis
    x, given = patterns(half, shape), exact(shape[axis])
    with cache_sizes(1, 1):
        for shift in (0, 1, 3, 4, 8, 16):
            out = np.empty(x.size + shift, half)[shift:].reshape(shape)
            same_or_nan(fastbn.batch_norm(x, axis=axis, out=out, **given), x)


def test_nan_bits(monkeypatch, half):
    """Which NaN comes of a NaN is the same for every instruction set: quiet, with its payload."""
    x = patterns(half, (256, 256))
    want = np.where(np.isnan(x), x.view(np.uint16) | (0x200 if half == F16 else 0x40), x.view(np.uint16))
    for isa in runnable_sets():
        monkeypatch.setattr(backends, "_backend", backends._load_instruction_set(isa))
        for shape in ((256, 256), (1, 1, 65536), (1, 65536), (4, 256, 64), (65536 // 3, 3)):
            part = x.reshape(-1)[: np.prod(shape)].reshape(shape)
            got = fastbn.batch_norm(part, **exact(shape[1]))
            np.testing.assert_array_equal(got.view(np.uint16).ravel(), want.ravel()[: got.size])


@pytest.mark.parametrize("rows", [1, 3, 4, 9, 70])
def test_every_number_is_read(kernels, half, rows):
    """A constant channel's mean is its value, in float64: a mistaken load cannot hide behind a mistaken store."""
    x = patterns(half, (65536,))
    x = x[np.isfinite(x)]
    for values in (np.repeat(x[np.newaxis], rows, 0), np.repeat(x[np.newaxis, :, np.newaxis], rows, 2)):
        m = fastbn.moments(values)
        np.testing.assert_array_equal(m.mean, x.astype(F64))
        np.testing.assert_array_equal(m.m2, 0)


def near_ties(half):
    """float32 values at, just under and just over what lies in the middle of two half ones, and those themselves."""
    x = patterns(half, (65536,))
    x = np.sort(x[np.isfinite(x)].astype(F32))
    largest = float(ml_dtypes.finfo(half).max)
    beyond = F32.type(largest + largest * unit(half) / 4)  # rounds to the largest, or, at the tie, to ∞
    middles = np.concatenate([x[:-1] / 2 + x[1:] / 2, [beyond, -beyond]]).astype(F32)
    with np.errstate(over="ignore"):
        around = [np.nextafter(middles, F32.type(to)) for to in (-np.inf, np.inf)]
    return np.concatenate([x, middles, *around])


def anything(half):
    """A million float32 bit patterns; of those that float16 can hold, more."""
    bits = np.random.default_rng(0).integers(0, 1 << 32, 1 << 19, np.uint32)
    near = (bits & 0x807FFFFF) | ((bits >> 24) % 48 + 95 << 23)
    return np.concatenate([bits, near]).astype(np.uint32).view(F32)


@pytest.mark.parametrize("values", [near_ties, anything])
@pytest.mark.parametrize("inner", [1, 17], ids=["rows", "planes"])
def test_stores_round_to_nearest_even(kernels, half, values, inner):
    """y is the bias where x is 0: every float32 can be had, and is rounded as NumPy and ml_dtypes round it."""
    bias = values(half)
    zeros = np.zeros((5, len(bias)) if inner == 1 else (1, len(bias) // 8, inner), half)
    bias = bias[: zeros.shape[1]] if inner == 1 else bias[::8][: zeros.shape[1]]
    want = to_half(bias, half)
    got = fastbn.batch_norm(zeros, **exact(len(bias)) | {"bias": bias})
    each = np.ascontiguousarray(np.moveaxis(got, 1, -1)).reshape(-1, len(bias))
    same_or_nan(each[0] + half.type(0), want + half.type(0))  # of a bias of -0 comes +0
    np.testing.assert_array_equal(each.view(np.uint16), np.broadcast_to(each[0].view(np.uint16), each.shape))


def test_overflow(kernels):
    """float16 ends at 65504; from 65520 on, it is ∞."""
    x = np.array([[1.0, -1.0, 1.0, -1.0, 2.0, 2.0]] * 5, F16)
    weight = np.array([65504, 65519.99, 65520, 65520, 1e30, 32752], F32)
    given = exact(6) | {"weight": weight}
    want = np.array([[65504, -65504, np.inf, -np.inf, np.inf, 65504]] * 5, F16)
    y, saved = fastbn.batch_norm_eval_forward(x, **given)
    same_bits(y, want)
    same_bits(fastbn.batch_norm_backward(x, saved)[0], want)


def test_denormal_results(kernels):
    """Results under 2⁻¹⁴ are multiples of 2⁻²⁴, to nearest; of half of that comes 0."""
    x = np.full((5, 4), 2.0**-10, F16)
    given = exact(4) | {"weight": np.array([2.0**-6, 1.25 * 2**-14, 1.75 * 2**-14, 2.0**-15])}
    np.testing.assert_array_equal(fastbn.batch_norm(x, **given)[0].astype(F64), [2.0**-16, 2.0**-24, 2.0**-23, 0])


# ---- what is computed ----


def steps_apart(a, b):
    """How many numbers of their type lie between."""
    order = [np.where(v.view(np.int16) < 0, -(v.view(np.int16) & 0x7FFF).astype(int), v.view(np.int16)) for v in (a, b)]
    return np.abs(order[0].astype(int) - order[1])


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    ("shape", "axis"), [((3001, 13), 1), ((61, 5, 14, 14), 1), ((3, 5, 91, 91), 1), ((5, 31, 30, 13), -1)], ids=str
)
def test_rounded_once(kernels, half, shape, axis, training):
    """float64's result, rounded: but where float32's errors cross the middle of two numbers, and then the next one."""
    x, dy, residual = (sample(shape, half, axis, seed=seed) for seed in (0, 2, 5))
    weight, bias, mean, var = parameters(shape[axis], F32)
    given = {"residual": residual, "slope": 0.25}
    settings = {"axis": axis, "residual": residual, "activation": "leaky_relu", "negative_slope": 0.25}
    if training:
        y, saved = fastbn.batch_norm_forward(x, weight, bias, **settings)
        want, mean, var = oracle_forward(x, weight, bias, axis, **given)
        _, plain = fastbn.batch_norm_forward(x, weight, bias, axis=axis)
    else:
        y, saved = fastbn.batch_norm_eval_forward(x, mean, var, weight, bias, **settings)
        want = oracle_normalize(x, mean, var, weight, bias, axis, **given)
        _, plain = fastbn.batch_norm_eval_forward(x, mean, var, weight, bias, axis=axis)
    dx = fastbn.batch_norm_backward(dy, plain)[0]
    want_dx = oracle_backward(dy, x, mean, var, weight, axis, training)[0]
    for got, exactly in ((y, want), (dx, want_dx)):
        rounded = exactly.astype(half)
        apart = steps_apart(got, rounded)
        assert (apart != 0).mean() < 2e-3
        # A number that is a small difference of large ones has float32's error in units of the large ones.
        large = np.abs(exactly) > 2.0**-6
        assert apart[large].max() <= 1
        assert np.abs(got.astype(F64) - exactly)[~large].max() < 2.0**-6 * unit(half)
    # The residual's gradient is rounded to data's type, and once.
    _, _, _, dresidual = fastbn.batch_norm_backward(dy, saved)
    same_bits(dresidual, np.where(y <= 0, dy.astype(F32) * F32.type(0.25), dy.astype(F32)).astype(half))


@pytest.mark.parametrize("ratio", [0, 10, 1000], ids=str)
def test_statistics_far_from_zero(kernels, half, ratio):
    """As accurate as float32's: the data's type limits what values there are, not what is computed from them."""
    for shape in ((8, 3, 70, 70), (200, 3, 14, 14), (5, 3, 7, 9), (5000, 3)):
        x = (sample(shape, F64) + ratio).astype(half)
        m = fastbn.moments(x)
        _, mean, var = oracle_forward(x, None, None, 1)
        close_statistics(m.mean, m.var(), mean, var, half)


def test_bits_of_float32(kernels, half):
    """The statistics of half data are those of the same values in float32, where blocks and sums are the same."""
    for shape in ((8, 3, 70, 70), (5000, 3)):
        x = sample(shape, half)
        m, wide = fastbn.moments(x), fastbn.moments(x.astype(F32))
        close_statistics(m.mean, m.var(), wide.mean, wide.var(), half)


def test_parameter_gradients(kernels, half):
    """Of the parameters' dtype, never half; None where there are none."""
    x, dy = sample((9, 5, 7), half), sample((9, 5, 7), half, seed=2)
    for dtype in (*WIDE, None):
        weight, bias = (None, None) if dtype is None else parameters(5, dtype)[:2]
        _, saved = fastbn.batch_norm_forward(x, weight, bias)
        dx, dweight, dbias = fastbn.batch_norm_backward(dy, saved)
        assert dx.dtype == half
        if dtype is None:
            assert dweight is None and dbias is None
        else:
            assert dweight.dtype == dbias.dtype == dtype
        assert saved.mean.dtype == saved.var.dtype == F64


def test_a_gradient_beyond_float16(kernels):
    """dweight and dbias are sums, and more than float16 holds."""
    x = np.tile(np.array([[1.0], [-1.0]], F16), (4000, 3))
    _, saved = fastbn.batch_norm_forward(x, np.ones(3, F32), np.zeros(3, F32))
    _, dweight, dbias = fastbn.batch_norm_backward(np.full_like(x, 60000), saved)
    assert (dbias == 60000 * 8000).all() and np.isfinite(dweight).all()


def test_running_statistics(kernels, half):
    """They are wider than the data, and not rounded to it."""
    x = sample((5, 3, 7), half)
    layer = fastbn.BatchNorm(3)
    y = layer(x)
    assert y.dtype == half and layer.running_mean.dtype == F32
    np.testing.assert_allclose(layer.running_mean, 0.1 * x.astype(F64).mean((0, 2)), rtol=1e-6, atol=1e-7)
    dx = layer.backward(y)
    assert dx.dtype == half and layer.grad_weight.dtype == layer.grad_bias.dtype == F32
    assert layer.eval()(x).dtype == half


# ---- what is refused ----


@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
@pytest.mark.parametrize("x_dtype", [F32, *HALF], ids=str)
def test_half_parameters(half, x_dtype, name):
    x, arguments = sample((4, 3), x_dtype), {"running_mean": np.zeros(3), "running_var": np.ones(3)}
    arguments[name] = np.ones(3, half)
    for training in (True, False):
        with pytest.raises(TypeError, match=f"{name} has dtype {half}, and must be float32 or float64"):
            fastbn.batch_norm(x, training=training, **arguments)


def test_half_layer(half):
    with pytest.raises(TypeError, match=f"dtype is {half}, and must be float32 or float64"):
        fastbn.BatchNorm(3, dtype=half)


def test_other_byte_order(half):
    """NumPy gives bfloat16 the same name in either order."""
    x, good = sample((4, 3), half), sample((4, 3), half)
    swapped = x.byteswap().view(half.newbyteorder())
    for call in (
        lambda: fastbn.moments(swapped),
        lambda: fastbn.batch_norm(swapped, training=True),
        lambda: fastbn.batch_norm_forward(good, residual=swapped),
        lambda: fastbn.batch_norm_backward(swapped, fastbn.batch_norm_forward(good)[1]),
    ):
        with pytest.raises(TypeError, match=r"(x|dy|residual) has dtype .*other byte order"):
            call()
    with pytest.raises(TypeError, match="out has dtype"):
        fastbn.batch_norm(good, training=True, out=swapped)


@pytest.mark.parametrize("other", ["float8_e4m3fn", "float8_e5m2", "int4"])
def test_other_types_of_ml_dtypes(other):
    words = f"x has dtype {other}, and must be float16, bfloat16, float32 or float64"
    with pytest.raises(TypeError, match=re.escape(words)):
        fastbn.moments(np.zeros((4, 3), getattr(ml_dtypes, other)))


def test_one_half_type_is_not_the_other():
    x, y = sample((4, 3), F16), sample((4, 3), BF16)
    _, saved = fastbn.batch_norm_forward(x)
    with pytest.raises(TypeError, match="dy has dtype bfloat16, and must have x's dtype float16"):
        fastbn.batch_norm_backward(y, saved)
    with pytest.raises(TypeError, match="out has dtype bfloat16, and must have x's dtype float16"):
        fastbn.batch_norm(x, training=True, out=y)
    assert computed(F16) == computed(BF16) == F32
