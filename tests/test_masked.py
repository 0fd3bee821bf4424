"""masked_batch_norm and MaskedBatchNorm: statistics and gradients of the elements that a mask leaves."""

# ruff: noqa: E501 - the tables have one case a line

import re

import ml_dtypes
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
    close_gradients,
    close_statistics,
    close_y,
    computed,
    generator,
    load_kernels,
    oracle_backward,
    oracle_forward,
    parameters,
    runnable_sets,
    same_bits,
    sample,
    unit,
    wide,
)

import fastbn
from fastbn import backends
from fastbn import masked as masked_module
from fastbn.masked import MaskedBatchNorm, masked_batch_norm_backward, masked_batch_norm_forward

SHAPES = {
    "NC": ((37, 5), 1),
    "NCL": ((6, 5, 17), 1),
    "NCHW": ((3, 5, 7, 9), 1),
    "NHWC": ((3, 7, 9, 5), -1),
    "CN": ((5, 23), 0),
    "the middle of NDHWC": ((3, 2, 5, 4, 3), -3),
}


def positions(shape, axis):
    return tuple(n for i, n in enumerate(shape) if i != axis % len(shape))


def make_mask(shape, axis, seed=7):
    """About half are valid."""
    return generator(seed).random(positions(shape, axis)) < 0.55


def make_weights(shape, axis, seed=8):
    """Fractions, some of them 0."""
    rng = generator(seed)
    return np.where(rng.random(positions(shape, axis)) < 0.3, 0.0, rng.uniform(0.1, 3, positions(shape, axis)))


def rows_of(x, mask, axis):
    """What is valid, in the order of the positions: (count, channels)."""
    return np.ascontiguousarray(np.moveaxis(x, axis, -1)[np.asarray(mask) != 0])


def nothing_elsewhere(array, mask, axis):
    assert (np.moveaxis(array, axis, -1)[np.asarray(mask) == 0] == 0).all()


def spoil(x, mask, axis):
    """NaN and infinities where the mask is off."""
    x = x.copy()
    off = np.moveaxis(x, axis, -1)[np.asarray(mask) == 0]
    off[::2], off[1::2] = np.nan, -np.inf
    np.moveaxis(x, axis, -1)[np.asarray(mask) == 0] = off
    return x


# ---- boolean ----


def check_compact(x, dy, mask, axis, weight, bias, **settings):
    """The bits of the ordinary functions, of the compact rows; whatever lies where the mask is off."""
    y, saved = masked_batch_norm_forward(spoil(x, mask, axis), mask, weight, bias, axis=axis, **settings)
    want, kept = fastbn.batch_norm_forward(rows_of(x, mask, axis), weight, bias, **settings)
    same_bits(rows_of(y, mask, axis), want)
    nothing_elsewhere(y, mask, axis)
    same_bits(saved.mean, kept.mean)
    same_bits(saved.var, kept.var)
    assert saved.count == mask.sum()
    dx, *gradients = masked_batch_norm_backward(spoil(dy, mask, axis), saved)
    want_dx, *want_gradients = fastbn.batch_norm_backward(rows_of(dy, mask, axis), kept)
    same_bits(rows_of(dx, mask, axis), want_dx)
    nothing_elsewhere(dx, mask, axis)
    for got, gradient in zip(gradients, want_gradients, strict=True):
        assert (got is None) == (gradient is None)
        if got is not None:
            same_bits(got, gradient)
    for result in (y, dx):
        assert result.dtype == x.dtype and result.shape == x.shape
    return y, dx


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "axis"), SHAPES.values(), ids=SHAPES)
def test_compact_rows(shape, axis, dtype):
    x, dy = sample(shape, dtype, axis), sample(shape, dtype, axis, seed=2)
    weight, bias, *_ = parameters(5, computed(dtype))
    mask = make_mask(shape, axis)
    check_compact(x, dy, mask, axis, weight, bias)
    check_compact(x, dy, mask, axis, weight, None, activation="leaky_relu", eps=1e-3)
    check_compact(x, dy, np.ones_like(mask), axis, None, bias, activation="relu")


def test_compact_rows_of_each_backend(kernels):
    shape, axis = SHAPES["NCL"]  # masked, it is rows: one form for Numba to compile
    x, dy = sample(shape, F32, axis), sample(shape, F32, axis, seed=2)
    check_compact(x, dy, make_mask(shape, axis), axis, *parameters(5, F32)[:2])


@pytest.mark.parametrize("memory", [*ORDERS, *COPIES], ids=lambda f: f.__name__)
def test_any_memory(memory):
    """The output has the input's memory order."""
    x, dy = sample((4, 5, 6), F32), sample((4, 5, 6), F32, seed=2)
    mask = make_mask((4, 5, 6), 1)
    want, saved = masked_batch_norm_forward(x, mask)
    y, other = masked_batch_norm_forward(memory(x), memory(mask))
    same_bits(y, want)
    dx = masked_batch_norm_backward(memory(dy), other)[0]
    same_bits(dx, masked_batch_norm_backward(dy, saved)[0])
    ordinary = fastbn.batch_norm_forward(memory(x))[0]
    assert y.strides == ordinary.strides and dx.strides == ordinary.strides


def test_against_the_oracle():
    """Not only the rows' own bits: the numbers, of data that the ordinary layout would split."""
    x, dy = sample((9, 5, 31, 33), F32), sample((9, 5, 31, 33), F32, seed=2)
    weight, bias, *_ = parameters(5, F32)
    mask = make_mask(x.shape, 1)
    y, saved = masked_batch_norm_forward(x, mask, weight, bias)
    rows, dy_rows = rows_of(x, mask, 1), rows_of(dy, mask, 1)
    want, mean, var = oracle_forward(rows, weight, bias, 1)
    close_y(rows_of(y, mask, 1), want, weight, bias, 1)
    close_statistics(saved.mean, saved.var, mean, var, F32)
    dx, dweight, dbias = masked_batch_norm_backward(dy, saved)
    gradients = oracle_backward(dy_rows, rows, mean, var, weight, 1, True)
    close_gradients((rows_of(dx, mask, 1), dweight, dbias), gradients, dy_rows, rows, mean, var, weight, 1, True)


def test_shapes_of_a_mask():
    """With 1 for a length, and with a 1 in the channel axis."""
    x = sample((4, 3, 5, 6), F32)
    rows, places = generator(1).random((4, 1, 1)) < 0.6, generator(2).random((1, 5, 6)) < 0.6
    rows[0] = places[0, 0, 0] = True
    for mask in (rows, places, np.array([[[True]]])):
        full = np.broadcast_to(mask, (4, 5, 6))
        want = masked_batch_norm_forward(x, full.copy())[0]
        for given in (mask, full, mask[:, np.newaxis], full[:, np.newaxis], mask.tolist()):
            same_bits(masked_batch_norm_forward(x, given)[0], want)
        turned = np.ascontiguousarray(np.moveaxis(x, 1, -1))
        same_bits(np.moveaxis(masked_batch_norm_forward(turned, mask[..., None], axis=-1)[0], -1, 1).copy(), want)
    flat = sample((7, 3), F64)
    keep = np.array([1, 0, 1, 1, 0, 1, 1], bool)
    same_bits(masked_batch_norm_forward(flat, keep)[0], masked_batch_norm_forward(flat, keep[:, None])[0])


@pytest.mark.parametrize("weighted", [False, True], ids=["boolean", "weights"])
def test_out(weighted):
    """Anything there is overwritten; x itself may be the place, or overlap it."""
    x, dy = sample((4, 3, 5), F32), sample((4, 3, 5), F32, seed=2)
    mask = make_weights(x.shape, 1) if weighted else make_mask(x.shape, 1)
    want, saved = masked_batch_norm_forward(x, mask)
    want_dx = masked_batch_norm_backward(dy, saved)[0]
    out = np.full_like(x, np.nan)
    assert masked_batch_norm_forward(x, mask, out=out)[0] is out
    same_bits(out, want)
    assert masked_batch_norm_backward(dy, saved, out=out)[0] is out
    same_bits(out, want_dx)
    turned = np.full_like(x, np.nan, order="F")
    assert masked_batch_norm_forward(x, mask, out=turned)[0] is turned
    same_bits(turned.copy(order="C"), want)
    room = np.zeros(67, F32)
    near = room[7:].reshape(x.shape)
    near[...] = x
    y, kept = masked_batch_norm_forward(near, mask, out=room[:60].reshape(x.shape))
    same_bits(y.copy(), want)
    here = x.copy()
    masked_batch_norm_forward(here, mask, out=here)
    same_bits(here, want)
    here = dy.copy()
    masked_batch_norm_backward(here, kept, out=here)  # x is no more, and not needed
    same_bits(here, want_dx)


def test_the_mask_is_copied():
    x, dy, mask = sample((4, 3, 5), F32), sample((4, 3, 5), F32, seed=2), make_mask((4, 3, 5), 1)
    _, saved = masked_batch_norm_forward(x, mask)
    want = masked_batch_norm_backward(dy, saved)[0]
    mask[...] = ~mask
    same_bits(masked_batch_norm_backward(dy, saved)[0], want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "mask", [np.zeros((4, 5), bool), np.zeros((4, 5)), np.zeros((1, 1), np.uint8)], ids=lambda m: str(m.dtype)
)
def test_all_masked(mask, dtype):
    """An empty batch: zeros, and nothing learnt."""
    x = np.full((4, 3, 5), np.nan, dtype)
    weight, bias, *_ = parameters(3, F32)
    y, saved = masked_batch_norm_forward(x, mask, weight, bias, activation="relu")
    assert (y == 0).all() and saved.count == 0
    dx, dweight, dbias = masked_batch_norm_backward(x, saved)
    assert (dx == 0).all() and (dweight == 0).all() and (dbias == 0).all()
    bn = MaskedBatchNorm(3)
    before = bn.state_dict()
    assert (bn(x, mask) == 0).all() and (bn.backward(x) == 0).all() and (bn.grad_weight == 0).all()
    np.testing.assert_equal(bn.state_dict(), before)
    assert (bn.eval()(x, mask) == 0).all()


@pytest.mark.parametrize("shape", [(0, 3, 5), (4, 3, 0), (4, 0, 5), (0, 0)])
def test_nothing_there(shape):
    x = np.empty(shape, F32)
    for mask in (np.ones(positions(shape, 1), bool), np.full(positions(shape, 1), 0.5)):
        y, saved = masked_batch_norm_forward(x, mask)
        assert y.shape == shape and masked_batch_norm_backward(y, saved)[0].shape == shape


def test_one_value():
    """Has no variance."""
    mask = np.zeros((4, 5))
    mask[2, 3] = 1
    bn, x, out = MaskedBatchNorm(3), sample((4, 3, 5), F32), np.full((4, 3, 5), 7, F32)
    before = bn.state_dict()
    words = re.escape("x has shape (4, 3, 5) and mask leaves one value a channel, and training must have at least 2")
    for one in (mask, mask.astype(bool)):
        for call in (lambda one=one: bn(x, one, out=out), lambda one=one: masked_batch_norm_forward(x, one, out=out)):
            with pytest.raises(ValueError, match=words):
                call()
    assert (out == 7).all()
    np.testing.assert_equal(bn.state_dict(), before)
    assert np.count_nonzero(bn.eval()(x, mask)) == 3


# ---- weights ----


@pytest.mark.parametrize(
    "kind", [np.int64, np.uint8, np.float16, BF16, np.float32, np.float64, np.longdouble, ">f4"], ids=str
)
def test_zeros_and_ones_are_a_boolean_mask(kind):
    x, dy, mask = sample((4, 3, 5), F32), sample((4, 3, 5), F32, seed=2), make_mask((4, 3, 5), 1)
    want, saved = masked_batch_norm_forward(x, mask)
    y, other = masked_batch_norm_forward(x, mask.astype(kind))
    same_bits(y, want)
    same_bits(masked_batch_norm_backward(dy, other)[0], masked_batch_norm_backward(dy, saved)[0])


@pytest.mark.parametrize("activation", [None, "leaky_relu"])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("kind", [np.int8, np.float64], ids=lambda k: k.__name__)
def test_integers_are_repetitions(kind, dtype, activation):
    """An element of weight 3 is three elements, each with a third of its gradient."""
    shape, axis = SHAPES["NCL"]
    x, dy, (weight, bias, *_) = sample(shape, dtype), sample(shape, dtype, seed=2), parameters(5, dtype)
    times = generator(3).integers(0, 4, positions(shape, axis))
    y, saved = masked_batch_norm_forward(x, times.astype(kind), weight, bias, activation=activation)
    dx, dweight, dbias = masked_batch_norm_backward(dy, saved)

    n = times.ravel()
    everywhere = np.ones_like(times, bool)
    flat, flat_dy = (np.repeat(rows_of(a, everywhere, axis).astype(F64), n, axis=0) for a in (x, dy))
    flat_dy /= np.repeat(n, n)[:, None]
    want, kept = fastbn.batch_norm_forward(flat, wide(weight), wide(bias), activation=activation)
    want_dx, want_dweight, want_dbias = fastbn.batch_norm_backward(flat_dy, kept)
    tolerance = {"rtol": 0, "atol": 40 * unit(dtype)}
    np.testing.assert_allclose(saved.mean, kept.mean, rtol=1e-14)
    np.testing.assert_allclose(saved.var, kept.var, rtol=1e-14)
    assert saved.count == n.sum()
    np.testing.assert_allclose(np.repeat(rows_of(y, everywhere, axis), n, axis=0), want, **tolerance)
    summed = np.zeros((n.size, 5))
    np.add.at(summed, np.repeat(np.arange(n.size), n), want_dx)
    np.testing.assert_allclose(rows_of(dx, everywhere, axis), summed, **tolerance)
    assert dweight.dtype == dbias.dtype == dtype
    np.testing.assert_allclose(dweight, want_dweight, rtol=0, atol=400 * unit(dtype))
    np.testing.assert_allclose(dbias, want_dbias, rtol=0, atol=400 * unit(dtype))


@pytest.mark.parametrize("memory", [*ORDERS, *COPIES], ids=lambda f: f.__name__)
def test_weights_and_any_memory(memory):
    x, dy, weights = sample((4, 5, 6), F32), sample((4, 5, 6), F32, seed=2), make_weights((4, 5, 6), 1)
    want, saved = masked_batch_norm_forward(x, weights)
    y, other = masked_batch_norm_forward(memory(spoil(x, weights, 1)), memory(weights))
    same_bits(y, want)
    same_bits(
        masked_batch_norm_backward(memory(spoil(dy, weights, 1)), other)[0], masked_batch_norm_backward(dy, saved)[0]
    )
    nothing_elsewhere(y, weights, 1)


def weighted_reference(x, dy, weights, weight, axis, eps=1e-5):
    """y without bias, dx, mean, var: the head's formulas, in float64, on rows."""
    rows, g, w = rows_of(wide(x), weights, axis), rows_of(wide(dy), weights, axis), weights[weights > 0][:, None]
    total = w.sum()
    mean = (w * rows).sum(0) / total
    mean = mean + (w * (rows - mean)).sum(0) / total
    var = (w * (rows - mean) ** 2).sum(0) / total
    xhat, scale = (rows - mean) / np.sqrt(var + eps), wide(weight) / np.sqrt(var + eps)
    dx = scale * (g - w / total * (g.sum(0) + xhat * (g * xhat).sum(0)))
    return xhat * weight, dx, mean, var, xhat, scale, g, w / total


@pytest.mark.parametrize(("dtype", "ratio"), [*((d, 0) for d in DTYPES), (F32, 1e3), (F32, 1e6), (F64, 1e6)], ids=str)
def test_weights_far_from_zero(ratio, dtype, monkeypatch):
    """A mean of a million deviations costs nothing; half types are rounded once. In blocks, too."""
    x = (generator(4).standard_normal((300, 3)) + ratio).astype(dtype)
    dy, weights = sample(x.shape, dtype, seed=2), make_weights(x.shape, 1)
    weight, bias = np.array([1.5, -0.5, 2.0]), np.array([0.25, -3.0, 0.5])
    want, want_dx, mean, var, xhat, scale, g, share = weighted_reference(x, dy, weights, weight, 1)
    half = 0.51 * unit(dtype) if dtype in HALF else 0
    # In float64 mean and oracle are rounded to a unit of the mean itself.
    rounding = (1 + 2 * ratio if dtype == F64 else 1) * unit(computed(dtype))
    size = np.abs(want) + np.abs(weight) + np.abs(bias)
    terms = np.abs(scale) * (np.abs(g) + share * (np.abs(g).sum(0) + np.abs(xhat) * np.abs(g * xhat).sum(0)))
    for piece in (masked_module.PIECE, 64):
        monkeypatch.setattr(masked_module, "PIECE", piece)
        y, saved = masked_batch_norm_forward(x, weights, weight, bias)
        np.testing.assert_allclose(saved.mean, mean, rtol=4e-16, atol=4e-16)
        np.testing.assert_allclose(saved.var, var, rtol=1e-15 * max(ratio, 4))
        assert (np.abs(rows_of(wide(y), weights, 1) - bias - want) <= (half + 4 * rounding) * size).all()
        dx, dweight, dbias = masked_batch_norm_backward(dy, saved)
        assert (np.abs(rows_of(wide(dx), weights, 1) - want_dx) <= (half + 6 * rounding) * terms).all()
        assert (np.abs(dweight - (g * xhat).sum(0)) <= 8 * rounding * np.abs(g * xhat).sum(0)).all()
        assert (np.abs(dbias - g.sum(0)) <= 8 * rounding * np.abs(g).sum(0)).all()


def test_weights_of_a_constant_channel():
    """Exactly bias, also far from 0 and by weights that round."""
    x = np.full((1000, 3), 1e30, F64)
    x[:, 1], x[:, 2] = 0.1, -1e6
    bias = np.array([0.1, -7, 3])
    y, saved = masked_batch_norm_forward(x, make_weights(x.shape, 1), np.full(3, 2, F32), bias)
    assert (saved.var == 0).all() and (saved.mean == x[0]).all()
    assert set(y[:, 0]) == {0, bias[0]} and set(y[:, 1]) == {0, bias[1]} and set(y[:, 2]) == {0, bias[2]}


def test_same_bits_for_any_number_of_threads_and_instruction_set(monkeypatch):
    """The weights' part is NumPy's own, in one order."""
    x, dy = sample((16, 7, 33, 31), F32), sample((16, 7, 33, 31), F32, seed=2)
    weights, results = make_weights(x.shape, 1), []
    for isa in runnable_sets():
        monkeypatch.setattr(backends, "_backend", load_kernels(f"cython {isa}"))
        for threads in (1, 3):
            y, saved = masked_batch_norm_forward(x, weights, num_threads=threads)
            results.append((y, *masked_batch_norm_backward(dy, saved, num_threads=threads)))
    for other in results[1:]:
        same_bits(other[0], results[0][0])
        same_bits(other[1], results[0][1])


# ---- gradients ----


@pytest.mark.parametrize("activation", [None, "leaky_relu"])
@pytest.mark.parametrize("kind", ["boolean", "weights", "integers"])
@pytest.mark.parametrize(("shape", "axis"), [((9, 3), 1), ((3, 2, 4), 1), ((2, 2, 3, 2), -1)], ids=str)
def test_finite_differences(shape, axis, kind, activation):
    """Of x everywhere (0 where the mask is off), weight and bias."""
    x, cotangent = sample(shape, F64, axis), sample(shape, F64, axis, seed=2)
    weight, bias, *_ = parameters(shape[axis], F64)
    mask = {
        "boolean": make_mask(shape, axis), "weights": make_weights(shape, axis),
        "integers": generator(3).integers(0, 4, positions(shape, axis)),
    }[kind]  # fmt: skip
    assert 2 < np.count_nonzero(mask) < mask.size

    def forward():
        return masked_batch_norm_forward(x, mask, weight, bias, axis=axis, activation=activation, negative_slope=0.2)

    def loss():
        return float((forward()[0] * cotangent).sum())

    gradients = masked_batch_norm_backward(cotangent, forward()[1])
    for got, argument in zip(gradients, (x, weight, bias), strict=True):
        numeric = np.empty_like(argument)
        for i in np.ndindex(argument.shape):
            here = argument[i]
            argument[i] = here + 1e-5
            above = loss()
            argument[i] = here - 1e-5
            numeric[i] = (above - loss()) / 2e-5
            argument[i] = here
        np.testing.assert_allclose(got, numeric, rtol=1e-6, atol=1e-8)


def test_absent_parameters():
    x, weights = sample((4, 3, 5), F32), make_weights((4, 3, 5), 1)
    for weight, bias in ((None, None), (np.ones(3), None), (None, np.zeros(3, F32))):
        _, saved = masked_batch_norm_forward(x, weights, weight, bias)
        _, dweight, dbias = masked_batch_norm_backward(x, saved)
        for parameter, gradient in ((weight, dweight), (bias, dbias)):
            assert (parameter is None and gradient is None) or gradient.dtype == parameter.dtype


# ---- the layer ----


def filled(**settings):
    bn = MaskedBatchNorm(3, **settings)
    for name, value in zip(("weight", "bias", "running_mean", "running_var"), parameters(3, F64), strict=True):
        if getattr(bn, name) is not None:
            getattr(bn, name)[...] = value
    return bn


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"momentum": None},
        {"unbiased": False},
        {"momentum": 0.3, "dtype": F64},
        {"track_running_stats": False},
        {"affine": "bias", "activation": "relu"},
    ],
    ids=str,
)
@pytest.mark.parametrize("axis", [1, -1])
def test_layer_is_the_ordinary_one_on_rows(axis, settings):
    """Training, backward, running statistics, evaluation: bit for bit."""
    shape = (4, 3, 5) if axis == 1 else (4, 5, 3)
    bn, other = filled(axis=axis, **settings), fastbn.BatchNorm(3, **settings)
    other.load_state_dict(bn.state_dict())
    for seed in range(3):
        x, dy, mask = sample(shape, F32, axis, seed), sample(shape, F32, axis, seed + 9), make_mask(shape, axis, seed)
        y = bn(spoil(x, mask, axis), mask)
        same_bits(rows_of(y, mask, axis), other(rows_of(x, mask, axis)))
        nothing_elsewhere(y, mask, axis)
        same_bits(rows_of(bn.backward(dy), mask, axis), other.backward(rows_of(dy, mask, axis)))
        np.testing.assert_equal((bn.grad_weight, bn.grad_bias), (other.grad_weight, other.grad_bias))
        np.testing.assert_equal(bn.state_dict(), other.state_dict())
    assert bn.eval() is bn
    before = bn.state_dict()
    y = bn(spoil(x, mask, axis), mask)
    same_bits(rows_of(y, mask, axis), other.eval()(rows_of(x, mask, axis)))
    nothing_elsewhere(y, mask, axis)
    np.testing.assert_equal(bn.state_dict(), before)
    with pytest.raises(ValueError, match="training mode"):
        bn.backward(dy)


@pytest.mark.parametrize("settings", [{}, {"momentum": None}, {"unbiased": False}], ids=str)
def test_layer_with_weights(settings):
    """The running variance is unbiased by W/(W - 1)."""
    bn, x = MaskedBatchNorm(3, dtype=F64, **settings), sample((4, 3, 5), F64)
    means, variances = [], []
    for seed in range(3):
        weights = make_weights(x.shape, 1, seed)
        _, saved = masked_batch_norm_forward(x, weights)
        total = weights.sum()
        assert saved.count == pytest.approx(total, rel=1e-15)
        means.append(saved.mean)
        variances.append(saved.var * (1 if settings == {"unbiased": False} else total / (total - 1)))
        bn(x, weights)
    rates = [0.1] * 3 if "momentum" not in settings else [1, 1 / 2, 1 / 3]
    mean, var = np.zeros(3), np.ones(3)
    for rate, m, v in zip(rates, means, variances, strict=True):
        mean, var = mean + rate * (m - mean), var + rate * (v - var)
    np.testing.assert_allclose(bn.running_mean, mean, rtol=1e-13)
    np.testing.assert_allclose(bn.running_var, var, rtol=1e-13)
    assert bn.num_batches_tracked == 3
    y = bn.eval()(x, weights)
    same_bits(y, bn(x, weights > 0))


def test_frozen_layer():
    """The running statistics are constants; a weight above 0 is a True."""
    bn, other = filled(trainable=False), fastbn.BatchNorm(3, trainable=False)
    other.load_state_dict(bn.state_dict())
    x, dy, mask = sample((4, 3, 5), F32), sample((4, 3, 5), F32, seed=2), make_mask((4, 3, 5), 1)
    for given in (mask, mask * 2.5):
        y = bn(spoil(x, mask, 1), given)
        same_bits(rows_of(y, mask, 1), other(rows_of(x, mask, 1)))
        dx = bn.backward(spoil(dy, mask, 1))
        same_bits(rows_of(dx, mask, 1), other.backward(rows_of(dy, mask, 1)))
        np.testing.assert_equal((bn.grad_weight, bn.grad_bias), (other.grad_weight, other.grad_bias))
        nothing_elsewhere(y, mask, 1)
        nothing_elsewhere(dx, mask, 1)
    np.testing.assert_equal(bn.state_dict(), other.state_dict())


@pytest.mark.parametrize("weighted", [False, True], ids=["boolean", "weights"])
def test_nan_policies(weighted):
    """NaN where the mask is on; where it is off there is nothing to decide."""
    x = sample((4, 3, 5), F32)
    mask = make_weights(x.shape, 1) if weighted else make_mask(x.shape, 1)
    bad, at = x.copy(), tuple(np.argwhere(mask)[0])
    bad[at[0], 1, at[1]] = np.nan
    for policy in ("propagate", "skip_update", "raise"):
        bn, out = filled(nan_policy=policy), np.full_like(x, 7)
        bn(spoil(x, mask, 1), mask)
        assert bn.num_batches_tracked == 1 and np.isfinite(bn.running_var).all()
        before = bn.state_dict()
        if policy == "raise":
            with pytest.raises(ValueError, match=r"x has NaN.*in 1 channels, the first is 1"):
                bn(bad, mask, out=out)
            assert (out == 7).all()
        else:
            bn(bad, mask, out=out)
            assert np.isnan(out[:, 1]).sum() == np.count_nonzero(mask) and np.isfinite(out[:, [0, 2]]).all()
            nothing_elsewhere(out, mask, 1)
        if policy == "propagate":
            assert np.isnan(bn.running_mean).tolist() == [False, True, False]
        else:
            np.testing.assert_equal(bn.state_dict(), before)


def test_evaluation_without_statistics():
    """By those of what is valid; a NaN policy is for what is learnt."""
    bn, x, weights = (
        MaskedBatchNorm(3, track_running_stats=False, nan_policy="raise"),
        X.copy(),
        make_weights(X.shape, 1),
    )
    x[0, 1] = np.nan
    with pytest.raises(ValueError, match="x has NaN"):
        bn(x, weights)
    same_bits(bn.eval()(x, weights), masked_batch_norm_forward(x, weights)[0])
    with pytest.raises(ValueError, match="training mode"):
        bn.backward(x)


def test_state_and_copies():
    bn, x, mask = filled(), sample((4, 3, 5), F32), make_mask((4, 3, 5), 1)
    other = MaskedBatchNorm(3)
    bn(x, mask)
    other.load_state_dict(bn.state_dict())
    same_bits(bn.eval()(x, mask), other.eval()(x, mask))
    assert repr(bn).startswith("MaskedBatchNorm(3, ")


# ---- what is refused ----

X, MASK = sample((4, 3, 5), F32), make_mask((4, 3, 5), 1)
NEGATIVE, INFINITE, NAN = (np.where(MASK, 2.0, value) for value in (-1, np.inf, np.nan))
MUST = "and must have shape (4, 5) (x's (4, 3, 5) without its channel axis)"
BAD_MASKS = {
    "None": (None, TypeError, "mask has dtype object, and must be bool, or real numbers (weights)"),
    "x's shape": (np.ones((4, 3, 5), bool), ValueError, f"mask has shape (4, 3, 5), {MUST}"),
    "too few axes": (np.ones(5, bool), ValueError, f"mask has shape (5,), {MUST}"),
    "too many axes": (np.ones((1, 4, 1, 5), bool), ValueError, f"mask has shape (1, 4, 1, 5), {MUST}"),
    "other lengths": (np.ones((4, 4), bool), ValueError, f"mask has shape (4, 4), {MUST}"),
    "0": (np.ones((4, 0), bool), ValueError, f"mask has shape (4, 0), {MUST}"),
    "1 in the wrong axis": (np.ones((1, 3, 5), bool), ValueError, f"mask has shape (1, 3, 5), {MUST}"),
    "a number": (True, ValueError, f"mask has shape (), {MUST}"),
    "complex": (MASK * 1j, TypeError, "mask has dtype complex128, and must be bool"),
    "strings": (MASK.astype(str), TypeError, "mask has dtype <U5, and must be bool"),
    "objects": (MASK.astype(object), TypeError, "mask has dtype object, and must be bool"),
    "dates": (MASK.astype("m8[s]"), TypeError, "mask has dtype timedelta64[s], and must be bool"),
    "float8": (MASK.astype(ml_dtypes.float8_e4m3fn), TypeError, "mask has dtype float8_e4m3fn, and must be bool"),
    "ragged": ([[True], [True, False]], TypeError, "mask is a ragged list"),
    "masked array": (np.ma.masked_less(MASK * 1.0, 1), TypeError, "mask is a masked array"),
    "matrix": (np.ones((4, 5)).view(np.matrix), TypeError, "mask is a numpy.matrix"),
    "negative": (NEGATIVE, ValueError, "mask has a weight of -1.0, and must have weights of at least 0 that are finite"),
    "infinite": (INFINITE, ValueError, "mask has a weight of inf, and must have weights of at least 0 that are finite"),
    "NaN": (NAN, ValueError, "mask has a weight of nan, and must have weights of at least 0 that are finite"),
    "negative integers": (np.where(MASK, 1, -3), ValueError, "mask has a weight of -3.0, and must have"),
    "a sum of 1": (np.full((4, 5), 1 / 32), ValueError, "mask has weights that sum to 0.625, and must in training have such as sum to more than 1"),
    "an infinite sum": (np.full((4, 5), 1e308), ValueError, "mask has weights that sum to inf, and must in training"),
}  # fmt: skip


@pytest.mark.parametrize(("mask", "error", "words"), BAD_MASKS.values(), ids=BAD_MASKS)
def test_bad_mask(mask, error, words):
    bn, out = filled(), np.full_like(X, 7)
    before = bn.state_dict()
    with np.errstate(over="ignore"):  # what sums to infinity
        for call in (lambda: masked_batch_norm_forward(X, mask, out=out), lambda: bn(X, mask, out=out)):
            with pytest.raises(error, match=re.escape(words)):
                call()
    assert (out == 7).all()
    np.testing.assert_equal(bn.state_dict(), before)


OVER = np.zeros(63, F32)
BAD = {
    "x": ({"x": X.astype(int)}, TypeError, "x has dtype int64"),
    "axis": ({"axis": 3}, ValueError, "axis is 3, and must be from -3 to 2"),
    "eps": ({"eps": 0}, ValueError, "eps is 0.0, and must be greater than 0"),
    "weight": ({"weight": np.ones(4)}, ValueError, "weight has shape (4,), and must have shape (3,)"),
    "bias": ({"bias": np.ones(3, np.float16)}, TypeError, "bias has dtype float16, and must be float32 or float64"),
    "activation": ({"activation": "tanh"}, ValueError, "activation is 'tanh', and must be None, 'relu' or 'leaky_relu'"),
    "slope": ({"activation": "leaky_relu", "negative_slope": -1}, ValueError, "negative_slope is -1"),
    "threads": ({"num_threads": 0}, ValueError, "num_threads is 0, and must be at least 1"),
    "out's shape": ({"out": OVER[:60].reshape(4, 5, 3)}, ValueError, "out has shape (4, 5, 3), and must have x's shape (4, 3, 5)"),
    "out's dtype": ({"out": X.astype("f8")}, TypeError, "out has dtype float64, and must have x's dtype float32"),
    "out over weight": ({"out": OVER[:60].reshape(4, 3, 5), "weight": OVER[57:60]}, ValueError, "out overlaps weight in memory"),
    "out over bias": ({"out": OVER[3:].reshape(4, 3, 5), "bias": OVER[2:5]}, ValueError, "out overlaps bias in memory"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "error", "words"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("weighted", [False, True], ids=["boolean", "weights"])
def test_bad_argument(arguments, error, words, weighted):
    out = np.full_like(X, 7)
    given = {"x": X, "mask": make_weights(X.shape, 1) if weighted else MASK, "out": out} | arguments
    with pytest.raises(error, match=re.escape(words)):
        masked_batch_norm_forward(**given)
    assert (out == 7).all() and (OVER == 0).all()


def test_bad_backward():
    _, saved = masked_batch_norm_forward(X, MASK)
    for dy, error, words in [
        (X[:3], ValueError, "dy has shape (3, 3, 5), and must have x's shape (4, 3, 5)"),
        (X.astype("f8"), TypeError, "dy has dtype float64, and must have x's dtype float32"),
        (None, TypeError, "dy is a NoneType"),
    ]:
        with pytest.raises(error, match=re.escape(words)):
            masked_batch_norm_backward(dy, saved)
    for wrong in (None, fastbn.batch_norm_forward(X)[1]):
        with pytest.raises(TypeError, match=r"saved is a .*, and must be what masked_batch_norm_forward returned"):
            masked_batch_norm_backward(X, wrong)
    bn = filled()
    with pytest.raises(ValueError, match="training mode"):
        bn.backward(X)
    bn(X, MASK)
    with pytest.raises(ValueError, match="out_residual is given, and must be None"):
        bn.backward(X, out_residual=X.copy())
    with pytest.raises(ValueError, match="num_features"):
        bn(X.transpose(0, 2, 1), MASK)
    with pytest.raises(TypeError, match="mask"):
        bn(X)
    for mode in (bn.train(), bn.eval(), bn.train().freeze()):
        out = np.zeros(63, F32)
        mode.weight = out[60:]
        with pytest.raises(ValueError, match="out overlaps weight"):
            mode(X, MASK, out=out[3:].reshape(X.shape))
