"""y = act(bn(x) + residual): against the reference, against the same in steps, and where z is no ordinary number."""

# ruff: noqa: E501 - the tables have one case a line

import re
from itertools import product
from typing import NamedTuple

import numpy as np
import pytest
from conftest import (
    COPIES,
    F64,
    ORDERS,
    WIDE,
    close,
    close_gradients,
    column,
    computed,
    oracle_backward,
    oracle_forward,
    oracle_normalize,
    parameters,
    same_bits,
    sample,
)
from test_backward import central_differences

import fastbn


class Kind(NamedTuple):
    """An activation, its slope under 0, and whether a residual is added."""

    name: str | None
    slope: float
    added: bool

    def __str__(self):
        return f"{self.name or 'none'} {self.slope}{' + residual' if self.added else ''}"

    @property
    def settings(self):
        return {"activation": self.name, "negative_slope": self.slope} if self.name else {}


ACTIVATIONS = [(None, 1.0), ("relu", 0.0), *(("leaky_relu", slope) for slope in (0.0, 0.01, 0.25, 1.0, 2.5))]
KINDS = [Kind(*activation, added) for activation, added in product(ACTIVATIONS, (False, True))]
RELU, LEAKY, RELU_ADDED, LEAKY_ADDED = (
    Kind(*a, added) for added in (False, True) for a in (("relu", 0.0), ("leaky_relu", 0.25))
)
ADDED = Kind(None, 1.0, True)

SHAPES = {
    "rows": ((31, 17), 1),
    "rows, more channels than a tile": ((9, 2053), 1),
    "rows in chunks": ((5001, 3), 1),
    "small planes": ((61, 5, 7, 6), 1),
    "planes as columns": ((9, 5, 17, 19), 1),
    "few small planes": ((3, 4, 5), 1),
    "planes of 513": ((9, 2, 3, 171), 1),
    "planes of more than a block": ((2, 3, 91, 91), 1),
    "NHWC": ((3, 5, 7, 6), -1),
    "one channel": ((5, 1, 13), 1),
}


@pytest.fixture(params=SHAPES)
def shape_axis(request):
    return SHAPES[request.param]


@pytest.fixture(params=[True, False], ids=["train", "eval"])
def training(request):
    return request.param


@pytest.fixture(params=KINDS, ids=str)
def kind(request):
    return request.param


def make(shape, dtype, axis=1):
    """x, dy, residual and parameters, of what parameters of this data are by default."""
    x, dy, residual = (sample(shape, dtype, axis, seed=seed) for seed in (0, 2, 5))
    return x, dy, residual, parameters(shape[axis], computed(dtype))


def forward(training, x, residual, given, kind, axis=1, **to):
    """y and saved. Without its residual a kind takes none."""
    weight, bias, mean, var = given
    settings = kind.settings | {"axis": axis, "residual": residual if kind.added else None} | to
    if training:
        return fastbn.batch_norm_forward(x, weight, bias, **settings)
    return fastbn.batch_norm_eval_forward(x, mean, var, weight, bias, **settings)


def normalized(training, x, residual, given, kind, axis=1, **to):
    """batch_norm's y."""
    weight, bias, mean, var = given
    settings = kind.settings | {"axis": axis, "residual": residual if kind.added else None, "training": training} | to
    mean, var = (None, None) if training else (mean, var)
    return fastbn.batch_norm(x, mean, var, weight, bias, **settings)


def act(z, slope):
    """What the activation makes of z, and its gradient of dy: gate(dy, z, slope)."""
    return gate(z, z, slope)


def gate(values, z, slope):
    with np.errstate(all="ignore"):
        return np.where(z <= 0, values * values.dtype.type(slope) if slope else values.dtype.type(0), values)


# ---- against the reference ----


def test_forward(kernels, dtype, shape_axis, training):
    shape, axis = shape_axis
    x, _, residual, given = make(shape, dtype, axis)
    weight, bias, mean, var = given
    for kind in KINDS:
        y, saved = forward(training, x, residual, given, kind, axis)
        added = {"residual": residual if kind.added else None}
        if training:
            z, mean, var = oracle_forward(x, weight, bias, axis, **added)
            want, *_ = oracle_forward(x, weight, bias, axis, slope=kind.slope, **added)
        else:
            z = oracle_normalize(x, mean, var, weight, bias, axis, **added)
            want = oracle_normalize(x, mean, var, weight, bias, axis, slope=kind.slope, **added)
        assert y.dtype == dtype and y.shape == shape and saved.residual == kind.added
        # As close_y: the sum of the sizes of z's terms, which an activation makes larger where its slope is over 1.
        w, b, r = np.abs(column(weight, x.ndim, axis)), column(bias, x.ndim, axis), added["residual"]
        r = 0 if r is None else r.astype(F64)
        close("y", y, want, (np.abs(z - b - r) + w + np.abs(b) + np.abs(r)) * max(kind.slope, 1), dtype)
        same_bits(normalized(training, x, residual, given, kind, axis), y)


def test_backward(kernels, dtype, shape_axis, training):
    """The gradient is cut where y was, element for element: z's sign is found again without an error."""
    shape, axis = shape_axis
    x, dy, residual, given = make(shape, dtype, axis)
    weight, bias, mean, var = given
    if training:
        _, mean, var = oracle_forward(x, weight, bias, axis)
    for kind in KINDS:
        y, saved = forward(training, x, residual, given, kind, axis)
        got = fastbn.batch_norm_backward(dy, saved)
        assert len(got) == 3 + kind.added
        assert got[0].dtype == dtype and got[1].dtype == weight.dtype and got[2].dtype == bias.dtype
        want = oracle_backward(dy, x, mean, var, weight, axis, training, y=y, slope=kind.slope)
        close_gradients(got, want, want[3], x, mean, var, weight, axis, training, cut=True)
        if kind.added:
            if kind.slope in (0, 1):
                same_bits(got[3], want[3].astype(dtype))
            else:
                close("dx", got[3], want[3], np.abs(want[3]), dtype)


@pytest.mark.parametrize("parameter_dtype", [None, *WIDE], ids=str)
def test_parameters(kernels, dtype, parameter_dtype):
    """With and without weight and bias, of either dtype: the backward pass finds z's sign from them too."""
    x, dy, residual, given = make((9, 5, 7), dtype)
    weight, bias, mean, var = given
    for weight_, bias_ in product((None, weight), (None, bias)):
        w, b = (None if p is None or parameter_dtype is None else p.astype(parameter_dtype) for p in (weight_, bias_))
        for kind in (RELU, LEAKY, RELU_ADDED, LEAKY_ADDED):
            y, saved = forward(True, x, residual, (w, b, None, None), kind)
            dx, dweight, dbias, *_ = fastbn.batch_norm_backward(dy, saved)
            assert (dweight is None) == (w is None) and (dbias is None) == (b is None)
            _, mean, var = oracle_forward(x, None, None, 1)
            want = oracle_backward(dy, x, mean, var, w, 1, True, y=y, slope=kind.slope)
            close_gradients((dx, dweight, dbias), want, want[3], x, mean, var, w, 1, True, cut=True)


@pytest.mark.parametrize(("shape", "axis"), [((5, 3), 1), ((3, 2, 4), 1), ((2, 2, 2, 3), -1)])
def test_finite_differences(kernels, training, kind, shape, axis):
    """Away from the kink: the seed is one for which no z comes near 0."""
    x, cotangent, residual, given = make(shape, F64, axis)
    z, _ = forward(training, x, residual, given, Kind(None, 1.0, kind.added), axis)
    residual = residual + 0.05 * np.sign(z)  # |z| is then at least 0.05, if there is a residual
    if not kind.added:
        assert np.abs(z).min() > 1e-3
    weight, bias, *_ = given

    def loss():
        return float((forward(training, x, residual, given, kind, axis)[0] * cotangent).sum())

    gradients = fastbn.batch_norm_backward(cotangent, forward(training, x, residual, given, kind, axis)[1])
    arguments = (x, weight, bias, residual)[: len(gradients)]
    for got, argument in zip(gradients, arguments, strict=True):
        np.testing.assert_allclose(got, central_differences(loss, argument), rtol=1e-7, atol=1e-8)


# ---- against the same in steps ----


@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_fused_is_unfused(native, dtype, shape_axis, training):
    """batch_norm, then NumPy; and backward the mask, then batch_norm_backward: bit for bit."""
    shape, axis = shape_axis
    x, dy, residual, given = make(shape, dtype, axis)
    plain, plain_saved = forward(training, x, None, given, Kind(None, 1.0, False), axis)
    for kind in KINDS:
        y, saved = forward(training, x, residual, given, kind, axis)
        z = plain + residual if kind.added else plain
        same_bits(y, act(z, kind.slope))
        dz = gate(dy, z, kind.slope)
        got = fastbn.batch_norm_backward(dy, saved)
        for gradient, want in zip(got, (*fastbn.batch_norm_backward(dz, plain_saved), dz), strict=False):
            same_bits(gradient, want)


def test_slope_one_is_no_activation(kernels, dtype, shape_axis, training):
    shape, axis = shape_axis
    x, dy, residual, given = make(shape, dtype, axis)
    for added in (False, True):
        leaky, plain = (
            forward(training, x, residual, given, Kind(name, 1.0, added), axis) for name in ("leaky_relu", None)
        )
        same_bits(leaky[0], plain[0])
        gradients = (fastbn.batch_norm_backward(dy, saved) for _, saved in (leaky, plain))
        for got, want in zip(*gradients, strict=True):
            same_bits(got, want)


def test_slope_zero_is_relu(kernels, dtype, training):
    x, dy, residual, given = make((9, 5, 7), dtype)
    for added in (False, True):
        leaky, relu = (forward(training, x, residual, given, Kind(name, 0.0, added)) for name in ("leaky_relu", "relu"))
        same_bits(leaky[0], relu[0])
        gradients = (fastbn.batch_norm_backward(dy, saved) for _, saved in (leaky, relu))
        for got, want in zip(*gradients, strict=True):
            same_bits(got, want)


@pytest.mark.parametrize("slope", [0.0, 0.3])
def test_none_cut_and_all_cut(kernels, dtype, shape_axis, training, slope):
    """A bias of 100 is above what x̂ is below; of -100, nothing passes."""
    shape, axis = shape_axis
    x, dy, _, (weight, bias, mean, var) = make(shape, dtype, axis)
    mean, weight = mean * 0, np.minimum(np.abs(weight), 1)
    above, under = (weight, bias * 0 + 100, mean, var), (weight, bias * 0 - 100, mean, var)
    kind, zeros = Kind("leaky_relu" if slope else "relu", slope, False), np.zeros_like(x)
    for added in (False, True):
        kind = kind._replace(added=added)
        y, saved = forward(training, x, zeros, above, kind, axis)
        plain, plain_saved = forward(training, x, zeros, above, Kind(None, 1.0, added), axis)
        same_bits(y, plain)
        for got, want in zip(
            fastbn.batch_norm_backward(dy, saved), fastbn.batch_norm_backward(dy, plain_saved), strict=True
        ):
            same_bits(got, want)
        y, saved = forward(training, x, zeros, under, kind, axis)
        gradients = fastbn.batch_norm_backward(dy, saved)
        if slope:
            assert (y < 0).all()
        else:
            for nothing in (y, *gradients):
                assert (nothing == 0).all()
            assert not np.signbit(y).any()


# ---- values that are no ordinary numbers ----

SPECIAL = np.array([-np.inf, -2.0, -0.0, 0.0, 1.5, np.inf, np.nan, -1e-7, 1e-7, 3e4, -3e4])
# With these statistics and eps, and a bias of -0, bn(x) is x to the bit.
IDENTITY = {"eps": 2.0**-10}


def identity(channels):
    """weight, bias, running_mean, running_var."""
    return None, np.full(channels, -0.0), np.zeros(channels), np.full(channels, 1 - 2.0**-10)


def rounded(values, dtype):
    with np.errstate(over="ignore"):
        return values.astype(dtype)


def bits_or_nan(got, want, kernels):
    """Of Numba's kernels a zero may have the other sign."""
    if kernels.NAME == "numba":
        got, want = got + got.dtype.type(0), want + want.dtype.type(0)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    same_bits(np.where(np.isnan(want), got.dtype.type(0), got), np.where(np.isnan(want), want.dtype.type(0), want))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.slope != 0.01], ids=str)
@pytest.mark.parametrize("shape", [(23, 11, 1), (3, 11, 37), (2, 11, 613)], ids=str)
def test_special_values(kernels, dtype, kind, shape):
    """Every z with every dy. -∞ and -0 are cut, NaN passes; what is cut is exactly 0 for relu, whatever it was."""
    count = int(np.prod(shape))
    z = np.resize(SPECIAL, count).astype(dtype).reshape(shape)
    dy = np.resize(np.repeat(SPECIAL, len(SPECIAL) + 1), count).astype(dtype).reshape(shape)
    nothing = np.full(shape, -0.0, dtype)
    for x, residual in ((z, nothing), (nothing, z)) if kind.added else ((z, None),):
        y, saved = forward(False, x, residual, identity(11), kind, **IDENTITY)
        want = rounded(act(z.astype(computed(dtype)), kind.slope), dtype)
        bits_or_nan(y, want, kernels)
        dx, _, _, *rest = fastbn.batch_norm_backward(dy, saved)
        want = rounded(gate(dy.astype(computed(dtype)), z, kind.slope), dtype)
        for got in (dx, *rest):
            bits_or_nan(got, want, kernels)


def test_infinity_against_infinity(kernels, dtype):
    """∞ - ∞ is NaN, which no activation hides."""
    x = np.array([[np.inf, -np.inf, 1.0]] * 5, dtype)
    y = normalized(False, x, -x, identity(3), RELU_ADDED, **IDENTITY)
    assert np.isnan(y[:, :2]).all() and (y[:, 2] == 0).all()


@pytest.mark.parametrize(
    ("bad", "where"), [(np.nan, "x"), (-np.inf, "x"), (np.inf, "residual"), (np.nan, "dy")], ids=str
)
@pytest.mark.parametrize(("shape", "axis"), [s for s in SHAPES.values() if s[0][s[1]] > 1], ids=[*SHAPES][:-1])
def test_nonfinite_stays_in_its_channel(kernels, dtype, shape, axis, where, bad):
    x, dy, residual, given = make(shape, dtype, axis)
    for kind in (RELU, LEAKY_ADDED):
        results = []
        for spoilt in (False, True):
            arrays = {"x": x.copy(), "residual": residual.copy(), "dy": dy.copy()}
            if spoilt:
                np.moveaxis(arrays[where], axis, 0)[1].flat[0] = bad  # moveaxis is a view
            with np.errstate(invalid="ignore"):
                y, saved = forward(True, arrays["x"], arrays["residual"], given, kind, axis)
                results.append([y, *fastbn.batch_norm_backward(arrays["dy"], saved)])
        for clean, got in zip(*results, strict=True):
            same_bits(*(np.delete(a, 1, axis if a.ndim > 1 else 0) for a in (clean, got)))


# ---- memory ----


def test_dresidual_is_not_dy(kernels, dtype, shape_axis, training):
    """Without an activation the residual's gradient is dy: the same values in memory of its own."""
    shape, axis = shape_axis
    x, dy, residual, given = make(shape, dtype, axis)
    _, saved = forward(training, x, residual, given, ADDED, axis)
    dx, _, _, dresidual = fastbn.batch_norm_backward(dy, saved)
    same_bits(dresidual, dy)
    assert not np.shares_memory(dresidual, dy) and not np.shares_memory(dresidual, dx)


def test_what_is_kept(training):
    """y only where it alone tells what was cut."""
    x, _, residual, given = make((9, 5, 7), np.float32)
    for kind in KINDS:
        y, saved = forward(training, x, residual, given, kind)
        if kind.added and kind.slope != 1:
            assert np.shares_memory(saved.y, y)
        else:
            assert saved.y is None


MEMORIES = [np.copy, *ORDERS, *(m for m in COPIES if m.__name__ != "read_only")]


@pytest.mark.parametrize("memory", [np.copy, *ORDERS, *COPIES])
@pytest.mark.parametrize("which", ["x", "residual", "dy", "all"])
def test_memory_orders(kernels, dtype, memory, which, training):
    """x, residual and dy may each lie in memory as they like. The order of x decides the sums' order."""
    shape = (9, 5, 6, 7)
    x, dy, residual, given = make(shape, dtype)
    lain = {"x": x, "residual": residual, "dy": dy}
    for name in lain if which == "all" else [which]:
        lain[name] = memory(lain[name])
    ordered = memory(x) if which in ("x", "all") else x
    for kind in (RELU, LEAKY_ADDED, ADDED):
        y, saved = forward(training, lain["x"], lain["residual"], given, kind)
        got = [y, *fastbn.batch_norm_backward(lain["dy"], saved)]
        want_y, want_saved = forward(training, ordered, residual, given, kind)
        for result, want in zip(got, [want_y, *fastbn.batch_norm_backward(dy, want_saved)], strict=True):
            np.testing.assert_array_equal(result, want)
        if memory in ORDERS and which == "all":
            for result in (got[0], got[1], *got[4:]):
                assert result.strides == lain["x"].strides


@pytest.mark.parametrize("memory", MEMORIES)
def test_out(kernels, dtype, memory, training):
    """Whatever the order of `out` and `out_residual`: filled, returned, and what would have been returned."""
    shape = (3, 5, 6, 4)
    x, dy, residual, given = make(shape, dtype)
    for kind in (RELU, LEAKY, ADDED, RELU_ADDED, LEAKY_ADDED):
        want_y, saved = forward(training, x, residual, given, kind)
        want = fastbn.batch_norm_backward(dy, saved)
        for call in (forward, normalized):
            out = memory(np.full(shape, np.nan, dtype))
            got = call(training, x, residual, given, kind, out=out)
            assert (got[0] if call is forward else got) is out
            np.testing.assert_array_equal(out, want_y)
        _, saved = forward(training, x, residual, given, kind, out=memory(np.full(shape, np.nan, dtype)))
        out, out_residual = memory(np.full(shape, np.nan, dtype)), memory(np.full(shape, np.nan, dtype))
        got = fastbn.batch_norm_backward(dy, saved, out=out, out_residual=out_residual if kind.added else None)
        assert got[0] is out and (not kind.added or got[3] is out_residual)
        for result, expected in zip(got, want, strict=True):
            np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("shape", [(9, 5), (9, 5, 7), (2, 3, 30, 23)], ids=str)
def test_in_place(kernels, dtype, memory, shape, training):
    """Over x, over the residual, and where both are one array; the gradients over dy."""
    x, dy, residual, given = make(shape, dtype)
    lay = lambda array: memory(array.copy())  # noqa: E731 - what is in this order already is not copied by `memory`
    for kind in (RELU, LEAKY, ADDED, RELU_ADDED, LEAKY_ADDED):
        want, _ = forward(training, memory(x), residual, given, kind)
        here = lay(x)
        assert normalized(training, here, residual, given, kind, out=here) is here
        np.testing.assert_array_equal(here, want)
        if not kind.added:
            continue
        for call in (forward, normalized):
            here = lay(residual)
            call(training, memory(x), here, given, kind, out=here)
            np.testing.assert_array_equal(here, want)
        here = lay(x)
        want_twice, _ = forward(training, memory(x), memory(x), given, kind)
        normalized(training, here, here, given, kind, out=here)
        np.testing.assert_array_equal(here, want_twice)

        _, saved = forward(training, memory(x), residual, given, kind)
        gradients = fastbn.batch_norm_backward(memory(dy), saved)
        for to in ("out", "out_residual"):
            here = lay(dy)
            got = fastbn.batch_norm_backward(here, saved, **{to: here})
            assert got[0 if to == "out" else 3] is here
            for result, expected in zip(got, gradients, strict=True):
                np.testing.assert_array_equal(result, expected)


def test_arguments_are_left_alone(kernels, dtype, kind, training):
    x, dy, residual, given = make((9, 5, 7), dtype)
    arrays = [x, dy, residual, *given]
    before = [a.copy() for a in arrays]
    y, saved = forward(training, x, residual, given, kind)
    was = y.copy()
    first, second = fastbn.batch_norm_backward(dy, saved), fastbn.batch_norm_backward(dy, saved)
    for a, b in zip([*arrays, y, *first], [*before, was, *second], strict=True):
        same_bits(a, b)


@pytest.mark.parametrize("shape", [(0, 3), (4, 3, 0)], ids=str)
def test_empty_batch(kernels, dtype, kind, training, shape):
    x = np.empty(shape, dtype)
    y, saved = forward(training, x, x.copy(), parameters(3, F64), kind)
    dx, dweight, dbias, *rest = fastbn.batch_norm_backward(y, saved)
    assert y.shape == dx.shape == shape and (dweight == 0).all() and (dbias == 0).all()
    assert [r.shape for r in rest] == [shape] * kind.added


# ---- what is refused ----

X = sample((4, 3, 5), np.float32)
D3 = np.ones(3)
CALLS = {
    "batch_norm in training": lambda x=X, **a: fastbn.batch_norm(x, D3.copy(), D3.copy(), training=True, **a),
    "batch_norm": lambda x=X, **a: fastbn.batch_norm(x, D3, D3, **a),
    "batch_norm_forward": lambda x=X, **a: fastbn.batch_norm_forward(x, **a),
    "batch_norm_eval_forward": lambda x=X, **a: fastbn.batch_norm_eval_forward(x, D3, D3, **a),
}
LEAK = {"activation": "leaky_relu"}
BAD = {
    "activation unknown": ({"activation": "gelu"}, ValueError, "activation is 'gelu', and must be None, 'relu' or 'leaky_relu'"),
    "activation empty": ({"activation": ""}, ValueError, "activation is '', and must be None, 'relu'"),
    "activation case": ({"activation": "ReLU"}, ValueError, "activation is 'ReLU', and must be None, 'relu'"),
    "activation number": ({"activation": 0}, ValueError, "activation is 0, and must be None, 'relu'"),
    "activation False": ({"activation": False}, ValueError, "activation is False, and must be None, 'relu'"),
    "activation bytes": ({"activation": b"relu"}, ValueError, "activation is b'relu', and must be None, 'relu'"),
    "activation function": ({"activation": np.abs}, ValueError, "activation is <ufunc 'absolute'>, and must be None, 'relu'"),
    "activation list": ({"activation": ["relu"]}, ValueError, "activation is ['relu'], and must be None, 'relu'"),
    "activation array": ({"activation": np.zeros(2)}, ValueError, "activation is array([0., 0.]), and must be None, 'relu'"),
    "slope negative": (LEAK | {"negative_slope": -0.1}, ValueError, "negative_slope is -0.1, and must be at least 0 and finite"),
    "slope NaN": (LEAK | {"negative_slope": np.nan}, ValueError, "negative_slope is nan, and must be at least 0 and finite"),
    "slope infinite": (LEAK | {"negative_slope": np.inf}, ValueError, "negative_slope is inf, and must be at least 0 and finite"),
    "slope huge": (LEAK | {"negative_slope": 10**400}, ValueError, "negative_slope is inf, and must be at least 0 and finite"),
    "slope str": (LEAK | {"negative_slope": "0.1"}, TypeError, "negative_slope is '0.1', and must be a number"),
    "slope None": (LEAK | {"negative_slope": None}, TypeError, "negative_slope is None, and must be a number"),
    "slope complex": (LEAK | {"negative_slope": 1j}, TypeError, "negative_slope is 1j, and must be a number"),
    "slope array": (LEAK | {"negative_slope": D3}, TypeError, "negative_slope is array([1., 1., 1.]), and must be a number"),
    "residual shape": ({"residual": X[:3]}, ValueError, "residual has shape (3, 3, 5), and must have x's shape (4, 3, 5)"),
    "residual broadcast": ({"residual": X[:1]}, ValueError, "residual has shape (1, 3, 5), and must have x's shape (4, 3, 5)"),
    "residual number": ({"residual": np.float32(1)}, ValueError, "residual has shape (), and must have x's shape (4, 3, 5)"),
    "residual order of axes": ({"residual": X.transpose(0, 2, 1)}, ValueError, "residual has shape (4, 5, 3), and must have x's shape"),
    "residual wider": ({"residual": X.astype("f8")}, TypeError, "residual has dtype float64, and must have x's dtype float32"),
    "residual half": ({"residual": X.astype("f2")}, TypeError, "residual has dtype float16, and must have x's dtype float32"),
    "residual int": ({"residual": X.astype(int)}, TypeError, "residual has dtype int64, and must be float16, bfloat16, float32 or float64"),
    "residual byte order": ({"residual": X.astype(X.dtype.newbyteorder())}, TypeError, "residual has dtype"),
    "residual masked": ({"residual": np.ma.masked_less(X, 0)}, TypeError, "residual is a masked array"),
    "residual matrix": ({"residual": np.ones((4, 3), "f4").view(np.matrix)}, TypeError, "residual is a numpy.matrix"),
    "residual str": ({"residual": "x"}, TypeError, "residual has dtype <U1, and must be"),
    "residual True": ({"residual": True}, TypeError, "residual has dtype bool, and must be"),
    "residual list": ({"residual": [[1.0], [1.0, 2.0]]}, TypeError, "residual is a ragged list"),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
@pytest.mark.parametrize("call", CALLS)
def test_bad_argument(call, bad):
    """`out` is what it was."""
    arguments, error, words = bad
    out = np.full(X.shape, 7, X.dtype)
    with pytest.raises(error, match=re.escape(words)):
        CALLS[call](out=out, **arguments)
    assert (out == 7).all()


def test_statistics_stay_after_a_bad_argument():
    mean, var = D3.copy(), D3.copy()
    for arguments, error, _ in BAD.values():
        with pytest.raises(error):
            fastbn.batch_norm(X, mean, var, training=True, **arguments)
    assert (mean == 1).all() and (var == 1).all()


def test_a_slope_that_is_not_used_is_not_looked_at():
    for activation in (None, "relu"):
        same_bits(
            fastbn.batch_norm(X, D3, D3, activation=activation, negative_slope=-1.0),
            fastbn.batch_norm(X, D3, D3, activation=activation),
        )


@pytest.mark.parametrize("call", CALLS)
def test_out_overlaps_residual(call):
    """Exactly the residual, or none of it."""
    buffer = sample((2, 60), np.float32).ravel()
    before = buffer.copy()
    residual, out = buffer[:60].reshape(X.shape), buffer[7:67].reshape(X.shape)
    with pytest.raises(ValueError, match=r"out overlaps residual in memory, and must not, or be .*residual itself"):
        CALLS[call](residual=residual, out=out)
    square = sample((3, 3), np.float32)
    with pytest.raises(ValueError, match="out overlaps residual"):
        CALLS[call](square.copy(), residual=square, out=square.T)
    np.testing.assert_array_equal(buffer, before)


@pytest.mark.parametrize("call", ["batch_norm_forward", "batch_norm_eval_forward"])
def test_kept_input_must_not_be_overwritten(call):
    """Not even where it is the residual, too."""
    x = X.copy()
    with pytest.raises(ValueError, match="out overlaps x in memory, and must not"):
        CALLS[call](x, residual=x, out=x, activation="relu")
    np.testing.assert_array_equal(x, X)


def test_bad_out_residual(training):
    x, dy, residual, (weight, *rest) = make((4, 3, 5), np.float32)
    block = np.zeros(60 + 60, np.float32)
    weight = block[100:103] = weight
    weight = block[100:103]
    y, saved = forward(training, x, residual, (weight, *rest), RELU_ADDED)
    buffer = np.concatenate([dy.ravel(), dy.ravel()])
    shifted = buffer[3:63].reshape(x.shape)
    out, fresh = np.full(x.shape, 7, x.dtype), np.full(x.shape, 7, x.dtype)
    here = dy.copy()
    kept = [a.copy() for a in (x, y, residual, buffer, block)]
    for arguments, words in [
        ({"out": out, "out_residual": out}, "out_residual overlaps out in memory, and must not"),
        ({"out": out, "out_residual": out[::-1]}, "out_residual overlaps out in memory"),
        ({"out": here, "out_residual": here, "dy": here}, "out_residual overlaps out in memory"),
        ({"dy": buffer[:60].reshape(x.shape), "out_residual": shifted}, "out_residual overlaps dy in memory, and must not, or be dy itself"),
        ({"out_residual": x}, "out_residual overlaps x in memory"),
        ({"out_residual": y}, "out_residual overlaps y in memory"),
        ({"out_residual": block[60:].reshape(x.shape)}, "out_residual overlaps weight in memory"),
        ({"out": y}, "out overlaps y in memory"),
        ({"out": x}, "out overlaps x in memory"),
        ({"out_residual": fresh[:3]}, "out_residual has shape (3, 3, 5), and must have x's shape (4, 3, 5)"),
        ({"out_residual": np.broadcast_to(np.float32(7), x.shape)}, "out_residual is read-only, and must be writeable"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=re.escape(words)):
            fastbn.batch_norm_backward(**{"dy": dy, "saved": saved} | arguments)
    for wrong, words in [
        (fresh.astype("f8"), "out_residual has dtype float64, and must have x's dtype float32"),
        (fresh.tolist(), "out_residual is a list, and must be an ndarray"),
    ]:
        with pytest.raises(TypeError, match=re.escape(words)):
            fastbn.batch_norm_backward(dy, saved, out_residual=wrong)
    assert (out == 7).all() and (fresh == 7).all()
    for array, before in zip((x, y, residual, buffer, block, here), [*kept, dy], strict=True):
        same_bits(array, before)


def test_out_residual_without_a_residual(training):
    x, dy, _, given = make((4, 3, 5), np.float32)
    for kind in (Kind(None, 1.0, False), RELU):
        _, saved = forward(training, x, None, given, kind)
        with pytest.raises(ValueError, match="out_residual is given, and must be None where the forward pass had no"):
            fastbn.batch_norm_backward(dy, saved, out_residual=np.empty_like(x))


# ---- the layer ----


def test_layer(kernels, dtype, kind):
    """Training, backward and evaluation are the functions', bit for bit."""
    x, dy, residual, (weight, bias, mean, var) = make((6, 5, 7), dtype)
    layer = fastbn.BatchNorm(5, dtype=computed(dtype), **kind.settings)
    for name, value in (("weight", weight), ("bias", bias), ("running_mean", mean), ("running_var", var)):
        getattr(layer, name)[...] = value
    arguments = (x, residual) if kind.added else (x,)
    want, saved = forward(True, x, residual, (weight, bias, None, None), kind)
    same_bits(layer(*arguments), want)
    gradients = fastbn.batch_norm_backward(dy, saved)
    dx = layer.backward(dy)
    for got, gradient in zip((dx, layer.grad_weight, layer.grad_bias, layer.grad_residual), gradients, strict=False):
        same_bits(got, gradient)
    assert (layer.grad_residual is None) == (not kind.added)
    fastbn.batch_norm(x, mean, var, training=True)  # what the layer's statistics are by now
    same_bits(layer.running_mean, mean)
    same_bits(
        layer.eval()(*arguments), normalized(False, x, residual, (weight, bias, mean, var), kind)
    )  # fmt: skip


def test_layer_out(kernels, dtype):
    x, dy, residual, _ = make((6, 3, 7), dtype)
    layer, other = (fastbn.BatchNorm(3, activation="relu") for _ in range(2))
    here, out, out_residual = residual.copy(), np.empty_like(x), np.empty_like(x)
    assert layer(x, here, out=here) is here
    same_bits(here, other(x, residual))
    assert layer.backward(dy, out=out, out_residual=out_residual) is out and layer.grad_residual is out_residual
    same_bits(out, other.backward(dy))
    same_bits(out_residual, other.grad_residual)
    here = x.copy()
    same_bits(layer.eval()(here, residual, out=here), other.eval()(x, residual))
    layer.train()(x)
    layer.backward(dy)
    assert layer.grad_residual is None  # not the last but one's


def test_layer_is_left_by_a_bad_residual():
    layer = fastbn.BatchNorm(3, activation="relu")
    y, before = layer(X), layer.state_dict()
    for mode, (wrong, error) in product(
        (True, False), ((X[:3], ValueError), (X.astype("f8"), TypeError), ("x", TypeError))
    ):
        with pytest.raises(error, match="residual has"):
            layer.train(mode)(X, wrong)
    np.testing.assert_equal(layer.state_dict(), before)
    layer.backward(y)  # what the last good call left still serves


@pytest.mark.parametrize("bad", [bad for name, bad in BAD.items() if not name.startswith("residual")])
def test_layer_bad_settings(bad):
    arguments, error, words = bad
    with pytest.raises(error, match=re.escape(words)):
        fastbn.BatchNorm(3, **arguments)


def test_slope_too_small_for_the_type_is_relu(compiled):
    """In float32 1e-50 is 0: exactly 0 then, at z = -∞ too, wherever the output lies."""
    x = sample((37, 8), np.float32)
    x[3] = -np.inf
    mean, var = np.zeros(8), np.ones(8)
    shifted = np.empty(x.size + 1, np.float32)[1:].reshape(x.shape)
    want = fastbn.batch_norm(x, mean, var, activation="relu")
    for out in (None, shifted):
        same_bits(fastbn.batch_norm(x, mean, var, activation="leaky_relu", negative_slope=1e-50, out=out), want)
