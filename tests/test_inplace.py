"""InplaceBatchNorm: y over x, and back from y."""

# ruff: noqa: E501 - the tables have one case a line

import re
import tracemalloc

import numpy as np
import pytest
from conftest import (
    DTYPES,
    F16,
    F32,
    F64,
    HALF,
    ORDERS,
    WIDE,
    column,
    computed,
    gaps,
    generator,
    load_kernels,
    misaligned,
    negative,
    oracle_backward,
    oracle_forward,
    padded,
    parameters,
    read_only,
    runnable_sets,
    same_bits,
    sample,
    unaligned,
    unit,
    wide,
)

import fastbn
from fastbn import backends
from fastbn import inplace as inplace_module
from fastbn.inplace import InplaceBatchNorm

LEAKY = {"activation": "leaky_relu", "negative_slope": 0.1}
KINDS = [{}, LEAKY, {"activation": "leaky_relu", "negative_slope": 3.0}]
NAMES = ("weight", "bias", "running_mean", "running_var")
SHAPES = {
    "rows": ((37, 5), 1),
    "small planes": ((9, 5, 17), 1),
    "planes": ((3, 5, 40, 41), 1),
    "NHWC": ((3, 7, 9, 5), -1),
    "CN": ((5, 23), 0),
    "one channel": ((6, 1, 50), 1),
}


def filled(kind=InplaceBatchNorm, channels=5, **settings):
    """Some weights negative, none small."""
    bn, rng = kind(channels, **settings), generator(6)
    _, bias, mean, var = parameters(channels, F64)
    for name, value in zip(
        NAMES, (rng.uniform(0.3, 2, channels) * rng.choice([-1, 1], channels), bias, mean, var), strict=True
    ):
        if getattr(bn, name) is not None:
            getattr(bn, name)[...] = value
    return bn


def plain(**settings):
    return filled(fastbn.BatchNorm, **settings)


# ---- the kernels ----


def check_dx_over_x(kernels, dtype, shape, batch):
    """The same bits."""
    outer, channels, inner = shape
    x, dy = sample(shape, dtype), sample(shape, dtype, seed=2)
    weight, bias, mean, var = parameters(channels, F64)
    results = []
    for dx in (np.empty_like(x), x):
        gradients = np.empty(channels), np.empty(channels)
        given = mean, var, weight, bias, 0.0, *gradients, batch, None, None, 1.0
        kernels.backward(dy, x, dx, outer, channels, inner, *given, 2)
        results.append((dx, *gradients))
    for one, other in zip(*results, strict=True):
        same_bits(one, other)


@pytest.mark.parametrize("batch", [True, False], ids=["batch", "eval"])
@pytest.mark.parametrize("shape", [(37, 5, 1), (3, 5, 1640), (9, 5, 17), (3001, 130, 1), (3, 2, 90000)], ids=str)
@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_dx_may_be_x(compiled, dtype, shape, batch):
    """What dx over y rests on."""
    check_dx_over_x(compiled, dtype, shape, batch)


@pytest.mark.parametrize("batch", [True, False], ids=["batch", "eval"])
def test_dx_may_be_x_in_each_backend(kernels, batch):
    """Rows alone: one form for Numba to compile."""
    check_dx_over_x(kernels, F32, (300, 5, 1), batch)


# ---- forward ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_y_is_batch_norms(settings, dtype):
    """Bit for bit, in x's place; statistics and evaluation, too."""
    bn, other = filled(**settings), plain(**settings)
    for seed in range(2):
        x = sample((9, 5, 17), dtype, seed=seed)
        here = x.copy()
        assert bn(here) is here
        same_bits(here, other(x))
        np.testing.assert_equal(bn.state_dict(), other.state_dict())
    here = x.copy()
    assert bn.eval()(here, out=here) is here
    same_bits(here, other.eval()(x))
    np.testing.assert_equal(bn.state_dict(), other.state_dict())
    with pytest.raises(ValueError, match="training mode"):
        bn.backward(here)


@pytest.mark.parametrize(
    "settings",
    [
        {"momentum": None},
        {"unbiased": False},
        {"track_running_stats": False},
        {"affine": "bias"},
        {"trainable": False},
        {"nan_policy": "skip_update"},
    ],
    ids=str,
)
def test_settings(settings):
    bn, other = filled(**settings), plain(**settings)
    for seed in range(3):
        x, dy = sample((9, 5, 17), F32, seed=seed), sample((9, 5, 17), F32, seed=seed + 5)
        if settings == {"nan_policy": "skip_update"} and seed == 1:
            x[0, 0, 0] = np.nan
        here = x.copy()
        bn(here)
        same_bits(here, other(x))
        np.testing.assert_equal(bn.state_dict(), other.state_dict())
        dx, want = bn.backward(dy), other.backward(dy)
        np.testing.assert_allclose(dx, want, rtol=0, atol=1e-5)
        assert (bn.grad_weight is None) == (other.grad_weight is None)
    x = sample((9, 5, 17), F32)
    here = x.copy()
    same_bits(bn.eval()(here), other.eval()(x))


@pytest.mark.parametrize("memory", [*ORDERS, gaps, padded, negative, misaligned, unaligned], ids=lambda f: f.__name__)
@pytest.mark.parametrize("settings", KINDS[:2], ids=str)
def test_any_writeable_memory(memory, settings):
    """Overwritten where it lies; the elements between are left alone."""
    x, dy = sample((9, 5, 17), F32), sample((9, 5, 17), F32, seed=2)
    here, bn, other = memory(x), filled(**settings), filled(**settings)
    around = here.base.copy() if memory in (gaps, padded) else None
    assert bn(here) is here
    compact = np.empty_like(here)
    compact[...] = x
    other(compact)
    same_bits(np.ascontiguousarray(here), np.ascontiguousarray(compact))
    dx = bn.backward(memory(dy))
    same_bits(np.ascontiguousarray(dx), np.ascontiguousarray(other.backward(dy)))
    if around is not None:
        window = np.full(here.base.shape, True)
        window[tuple(slice(1, 1 + n) for n in x.shape) if memory is padded else (..., slice(None, None, 2))] = False
        np.testing.assert_array_equal(here.base[window], around[window])
    assert bn.backward(dy, out=here) is here  # over y, gaps or not
    same_bits(np.ascontiguousarray(here), np.ascontiguousarray(dx))


# ---- backward ----


def check_backward(bn, x, dy, axis, slope):
    """Against the oracle, which has x. The bound is the head's: a few units of |x̂| + 1 + |bias/weight| in x̂.

    y is rounded, after an error of at most ULPS["y"]; z and x̂ are worked out in float32 or float64.
    """
    weight, bias = (
        np.full(bn.num_features, o) if p is None else wide(p) for p, o in ((bn.weight, 1.0), (bn.bias, 0.0))
    )
    want_y, mean, var = oracle_forward(x, weight, bias, axis, slope=slope)
    here = x.copy()
    bn(here)
    # What the activation cut is seen from y: where z is near 0, the oracle's sign may be another one.
    want = oracle_backward(dy, x, mean, var, weight, axis, True, y=here, slope=slope)
    dx = bn.backward(dy)
    same_bits(dx, bn.backward(dy))  # y is still there
    sigma, ndim = np.sqrt(var + 1e-5), x.ndim
    xhat = np.abs(wide(x) - column(mean, ndim, axis)) / column(sigma, ndim, axis)
    rounded = (6 if computed(x.dtype) == F32 else 14) * unit(computed(x.dtype)) + (
        0.51 * unit(x.dtype) if x.dtype in HALF else 0
    )
    off = rounded * (xhat + 1 + column(np.abs(bias / weight), ndim, axis)) + 2.0**-24 / slope * (x.dtype == F16)
    dz, others = np.abs(want[3]), tuple(i for i in range(ndim) if i != axis % ndim)
    terms = dz + dz.mean(others, keepdims=True) + xhat * (dz * xhat).mean(others, keepdims=True)
    through = off * (dz * xhat).mean(others, keepdims=True) + (xhat + off) * (dz * off).mean(others, keepdims=True)
    scale = column(np.abs(weight) / sigma, ndim, axis)
    ulp = 12 * unit(computed(x.dtype)) + (0.51 * unit(x.dtype) if x.dtype in HALF else 0)
    assert (np.abs(wide(dx) - want[0]) <= scale * (ulp * terms + through) + 2.0**-24 * (x.dtype == F16)).all()
    if bn.weight is not None:
        allowed = (dz * off).sum(others) + ulp * (dz * (xhat + 1)).sum(others)
        assert (np.abs(bn.grad_weight - want[1]) <= allowed).all()
    if bn.bias is not None:
        np.testing.assert_allclose(
            bn.grad_bias, want[2], rtol=0, atol=(8 * unit(computed(x.dtype)) * dz.sum(others)).max()
        )
    return want_y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("settings", KINDS, ids=str)
@pytest.mark.parametrize(("shape", "axis"), SHAPES.values(), ids=SHAPES)
def test_backward(shape, axis, settings, dtype):
    x, dy = sample(shape, dtype, axis), sample(shape, dtype, axis, seed=2)
    bn = filled(channels=shape[axis], axis=axis, dtype=computed(dtype), **settings)
    check_backward(bn, x, dy, axis, settings.get("negative_slope", 1.0))


def test_each_backend(kernels):
    """Rows alone, as above; without an activation there is nothing but the kernel of `test_dx_may_be_x`."""
    check_backward(filled(**LEAKY), sample((300, 5), F32), sample((300, 5), F32, seed=2), 1, 0.1)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("settings", [{}, LEAKY], ids=str)
def test_large_bias(dtype, settings):
    """The error grows with bias/weight, as the head says; a negative weight and one without either."""
    x, dy = sample((200, 5), dtype), sample((200, 5), dtype, seed=2)
    for affine in (True, "bias", "weight", False):
        bn = filled(dtype=dtype, affine=affine, **settings)
        if bn.bias is not None:
            bn.bias[...] = [0, 100, -100, 1e4, -1e4]
        check_backward(bn, x, dy, 1, settings.get("negative_slope", 1.0))


@pytest.mark.parametrize("frozen", [False, True], ids=["batch", "frozen"])
@pytest.mark.parametrize("settings", KINDS, ids=str)
@pytest.mark.parametrize(("shape", "axis"), [((7, 3), 1), ((4, 3, 2), 1), ((3, 2, 3), -1)], ids=str)
def test_finite_differences(shape, axis, settings, frozen):
    x, cotangent = sample(shape, F64, axis), sample(shape, F64, axis, seed=2)
    bn = filled(channels=3, axis=axis, dtype=F64, trainable=not frozen, **settings)

    def loss():
        return float((bn(x.copy()) * cotangent).sum())

    loss()
    gradients = bn.backward(cotangent), bn.grad_weight, bn.grad_bias
    for got, argument in zip(gradients, (x, bn.weight, bn.bias), strict=True):
        numeric = np.empty_like(argument)
        for i in np.ndindex(argument.shape):
            here = argument[i]
            argument[i] = here + 1e-5
            above = loss()
            argument[i] = here - 1e-5
            numeric[i] = (above - loss()) / 2e-5
            argument[i] = here
        np.testing.assert_allclose(got, numeric, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("piece", [7, 100, 3000])
@pytest.mark.parametrize("dtype", [F32, F64, F16], ids=str)
@pytest.mark.parametrize(("shape", "axis"), [((9, 5, 17), 1), ((3, 7, 9, 5), -1), ((3, 5, 40, 41), 1)], ids=str)
def test_in_pieces(shape, axis, dtype, piece, monkeypatch):
    """The bound holds wherever the scratch's pieces are cut."""
    monkeypatch.setattr(inplace_module, "PIECE", piece)
    x, dy = sample(shape, dtype, axis), sample(shape, dtype, axis, seed=2)
    check_backward(filled(axis=axis, dtype=computed(dtype), **LEAKY), x, dy, axis, 0.1)


@pytest.mark.parametrize("settings", KINDS[:2], ids=str)
@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_same_bits_for_any_number_of_threads_and_instruction_set(settings, dtype, monkeypatch):
    x, dy = sample((33, 7, 31, 29), dtype), sample((33, 7, 31, 29), dtype, seed=2)
    results = []
    for isa in runnable_sets():
        monkeypatch.setattr(backends, "_backend", load_kernels(f"cython {isa}"))
        for threads in (1, 3):
            with fastbn.config_context(num_threads=threads):
                bn, here = filled(channels=7, **settings), x.copy()
                results.append((bn(here), bn.backward(dy), bn.grad_weight, bn.grad_bias))
    for other in results[1:]:
        for one, first in zip(other, results[0], strict=True):
            same_bits(one, first)


@pytest.mark.parametrize("settings", KINDS[:2], ids=str)
@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_dx_over_dy_and_over_y(settings, dtype):
    x, dy, bn = sample((9, 5, 17), dtype), sample((9, 5, 17), dtype, seed=2), filled(**settings)
    want = (bn(x) is x) and bn.backward(dy)
    y, gradients = x.copy(), (bn.grad_weight, bn.grad_bias)
    here = dy.copy()
    assert bn.backward(here, out=here) is here
    same_bits(here, want)
    same_bits(x, y)  # y is left alone
    turned = np.empty_like(x, order="F")
    same_bits(bn.backward(dy, out=turned).copy(order="C"), want)
    assert bn.backward(dy, out=x) is x
    same_bits(x, want)
    np.testing.assert_equal((bn.grad_weight, bn.grad_bias), gradients)
    with pytest.raises(ValueError, match="nothing to go back over"):  # y is gone
        bn.backward(dy)


def test_gradients_are_of_what_forward_saw():
    """A step of the optimizer between forward and backward does not change how y is undone."""
    x, dy, bn = sample((9, 5, 17), F32), sample((9, 5, 17), F32, seed=2), filled(**LEAKY)
    bn(x)
    want = bn.backward(dy)
    bn.weight += 1
    bn.bias -= 1
    same_bits(bn.backward(dy), want)


def test_empty_batch():
    bn = filled()
    bn.weight[...] = 0  # harms nothing where there is nothing to divide
    x = np.empty((0, 5, 3), F32)
    assert bn(x) is x and bn.backward(x).shape == x.shape and (bn.grad_weight == 0).all()


# ---- memory ----


def held(*objects):
    """Bytes of the arrays of a tensor's size that objects hold, each memory once."""
    owners, seen = {}, set()

    def look(value):
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, np.ndarray):
            while isinstance(value.base, np.ndarray):
                value = value.base
            owners[id(value)] = value.nbytes
        elif isinstance(value, (list, tuple)):
            for item in value:
                look(item)
        elif hasattr(value, "__slots__") and not isinstance(value, type):
            for name in value.__slots__:
                look(getattr(value, name))
        elif hasattr(value, "__dict__"):
            look(list(vars(value).values()))

    look(list(objects))
    return sum(n for n in owners.values() if n > 10_000)


def test_what_is_kept():
    """One tensor less: between forward and backward there are y and nothing else, where BatchNorm has x beside y."""
    x = sample((64, 5, 40), F32)
    other = plain(**LEAKY)
    y = other(x)
    assert held(other, y) == 2 * x.nbytes
    bn, size = filled(**LEAKY), x.nbytes
    y = bn(x)
    assert held(bn, y) == size and held(bn) == size


@pytest.mark.parametrize("settings", KINDS[:2], ids=str)
def test_what_backward_allocates(compiled, settings, monkeypatch):
    """Nothing of the tensor's size; a little scratch."""
    monkeypatch.setattr(inplace_module, "PIECE", 1000)
    x, dy, bn = sample((64, 5, 400), F32), sample((64, 5, 400), F32, seed=2), filled(**settings)
    bn(x)
    bn.backward(dy, out=dy)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        bn(x)
        bn.backward(dy, out=dy)
        most = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert most < 40_000 < x.nbytes / 10


# ---- what is refused ----

BAD_SETTINGS = {
    "relu": ({"activation": "relu"}, ValueError, "activation is 'relu', and must be None or 'leaky_relu' in place"),
    "slope 0": ({"activation": "leaky_relu", "negative_slope": 0}, ValueError, "negative_slope is 0.0, and must be at least 1.18e-38 in place"),
    "slope 0 in float32": ({"activation": "leaky_relu", "negative_slope": 1e-50}, ValueError, "negative_slope is 1e-50, and must be at least 1.18e-38"),
    "slope negative": ({"activation": "leaky_relu", "negative_slope": -1}, ValueError, "negative_slope is -1"),
    "another": ({"activation": "elu"}, ValueError, "activation is 'elu', and must be None"),
}  # fmt: skip


@pytest.mark.parametrize(("settings", "error", "words"), BAD_SETTINGS.values(), ids=BAD_SETTINGS)
def test_bad_settings(settings, error, words):
    with pytest.raises(error, match=re.escape(words)):
        InplaceBatchNorm(3, **settings)
    bn, x = filled(), sample((9, 5), F32)
    for name, value in settings.items():  # set later
        setattr(bn, name, value)
    before = x.copy()
    for mode in (bn.train(), bn.eval()):
        with pytest.raises(error, match=re.escape(words)):
            mode(x)
    same_bits(x, before)


BAD_WEIGHTS = {
    "0": (F32, 0.0, 0.5, "weight is 0 where bias is 0.5 (in 1 channels, the first is 2), and must be at least 9.54e-07 in size there"),
    "small against bias": (F32, 1e-6, 1.0, "weight is 1e-06 where bias is 1"),
    "negative": (F32, -1e-6, -1.0, "weight is -1e-06 where bias is -1"),
    "small itself": (F32, 1e-32, 0.0, "and must be at least 1e-30 in size there"),
    "float64": (F64, 1e-15, 1.0, "and must be at least 3.55e-15 in size there"),
    "small itself in float64": (F64, 1e-160, 0.0, "and must be at least 1e-150 in size there"),
    "float16": (F16, 0.01, 1.0, "must be at least 0.0156 in size there: backward divides what is left of y in float16 by it"),
    "float16's least number": (F16, 5e-7, 0.0, "must be at least 9.54e-07 in size there"),
}  # fmt: skip


@pytest.mark.parametrize("frozen", [False, True], ids=["batch", "frozen"])
@pytest.mark.parametrize(("dtype", "weight", "bias", "words"), BAD_WEIGHTS.values(), ids=BAD_WEIGHTS)
def test_weights_that_cannot_be_undone(dtype, weight, bias, words, frozen):
    """x and the layer are as they were; evaluation needs no way back."""
    bn, x = filled(dtype=F64, trainable=not frozen), sample((9, 5, 3), dtype)
    bn.weight[2], bn.bias[2] = weight, bias
    before, state = x.copy(), bn.state_dict()
    with pytest.raises(ValueError, match=re.escape(words)):
        bn(x)
    same_bits(x, before)
    np.testing.assert_equal(bn.state_dict(), state)
    bn.eval()(x.copy())
    bn.weight[2] = 0.5
    bn.train()(x)


def test_bias_alone_can_be_too_large():
    bn = filled(affine="bias")
    bn.bias[3] = 1e6
    with pytest.raises(ValueError, match=re.escape("weight is 1 where bias is 1e+06 (in 1 channels, the first is 3)")):
        bn(sample((9, 5), F32))


def test_the_slope_counts():
    """What a small slope leaves of z may be next to nothing in the type."""
    bn, x = filled(activation="leaky_relu", negative_slope=1e-6), sample((9, 5), F16)
    bn.bias[...] = 0
    with pytest.raises(ValueError, match=r"and must be at least 0\.954 in size there"):
        bn(x)


def windows():
    """Overlapping in memory, and writeable."""
    return np.lib.stride_tricks.as_strided(np.zeros(20, F32), (6, 5), (8, 4))


BAD_X = {
    "a list": (lambda: sample((4, 5), F32).tolist(), TypeError, "x is a list, and must be an ndarray"),
    "read-only": (lambda: read_only(sample((4, 5), F32)), ValueError, "x is read-only, and must be writeable"),
    "broadcast": (lambda: np.broadcast_to(np.float32(1), (4, 5)), ValueError, "x is read-only"),
    "integers": (lambda: np.ones((4, 5), int), TypeError, "x has dtype int64"),
    "overlapping": (windows, ValueError, "x has elements that overlap in memory (strides (8, 4)), and must not"),
    "one value": (lambda: sample((1, 5), F32), ValueError, "x has shape (1, 5): one value a channel"),
    "channels": (lambda: sample((4, 3), F32), ValueError, "num_features"),
    "rank": (lambda: np.ones(5, F32), ValueError, "x has shape (5,), and must have 2 to 5 axes"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "error", "words"), BAD_X.values(), ids=BAD_X)
def test_bad_x(make, error, words):
    bn, x = filled(), make()
    before, state = np.array(x), bn.state_dict()
    with pytest.raises(error, match=re.escape(words)):
        bn(x)
    np.testing.assert_array_equal(x, before)
    np.testing.assert_equal(bn.state_dict(), state)


def test_bad_calls():
    bn, x, dy = filled(**LEAKY), sample((9, 5, 3), F32), sample((9, 5, 3), F32, seed=2)
    before = x.copy()
    for arguments, words in [
        ({"residual": dy}, "residual is given, and must be None"),
        ({"out": np.empty_like(x)}, "out is another array than x, and must be None or x itself"),
        ({"out": x[:]}, "out is another array than x"),
    ]:
        with pytest.raises(ValueError, match=words):
            bn(x, **arguments)
    bn.nan_policy = "raise"
    spoilt = x.copy()
    spoilt[3, 2, 1] = np.nan
    kept = spoilt.copy()
    with pytest.raises(ValueError, match="x has NaN"):
        bn(spoilt)
    same_bits(spoilt, kept)
    same_bits(x, before)
    with pytest.raises(ValueError, match="nothing to go back over"):
        bn.backward(dy)
    bn(x)
    y, out = x.copy(), np.full_like(x, 7)
    room = np.zeros(150, F32)
    room[:135] = dy.ravel()
    for arguments, error, words in [
        ({"dy": dy[:8]}, ValueError, "dy has shape (8, 5, 3), and must have x's shape (9, 5, 3)"),
        ({"dy": dy.astype("f8")}, TypeError, "dy has dtype float64"),
        ({"dy": "dy"}, TypeError, "dy has dtype"),
        ({"out": out.astype("f8")}, TypeError, "out has dtype float64"),
        ({"out": read_only(x)}, ValueError, "out is read-only"),
        ({"dy": room[:135].reshape(x.shape), "out": room[9:144].reshape(x.shape)}, ValueError, "out overlaps dy in memory, and must not, or be dy itself"),
        ({"out": x[::-1]}, ValueError, "out overlaps y in memory, and must not, or be y itself"),
        ({"out_residual": out}, ValueError, "out_residual is given, and must be None"),
    ]:  # fmt: skip
        with pytest.raises(error, match=re.escape(words)):
            bn.backward(**({"dy": dy, "out": out} | arguments))
    assert (out == 7).all()
    same_bits(x, y)
    bn.backward(dy)  # and what was kept still serves


def test_a_slope_of_nearly_0():
    with pytest.raises(
        ValueError, match=r"negative_slope is 1e-50, and must be .* in place: what is 0 cannot be undone"
    ):
        fastbn.InplaceBatchNorm(3, activation="leaky_relu", negative_slope=1e-50)
