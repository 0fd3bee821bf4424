"""fold and scale_shift: a BatchNorm in eval mode as part of the layer before it."""

# ruff: noqa: E501 - the tables have one case a line

import numpy as np
import pytest
from conftest import BF16, DTYPES, F16, F32, F64, column, generator, oracle_normalize, same_bits, sample, unit, wide

import fastbn
from fastbn.folding import fold, scale_shift

C = 6
AFFINE = [True, "weight", "bias", False]


def filled(dtype=np.float64, **settings):
    layer, rng = fastbn.BatchNorm(C, dtype=dtype, eps=1e-3, **settings), generator(4)
    for name in ("weight", "bias", "running_mean", "running_var"):
        if getattr(layer, name) is not None:
            getattr(layer, name)[...] = rng.uniform(0.2, 2, C) * (
                rng.choice([-1, 1], C) if name != "running_var" else 1
            )
    return layer


def normalized(x, bn, axis=1):
    """The oracle's eval mode, without the activation."""
    return oracle_normalize(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, axis, bn.eps)


def linear(x, weight, bias):
    return x @ weight.T + (0 if bias is None else bias)


def convolution(x, weight, bias, groups=1):
    """(N, I, H, W) by (O, I/groups, h, w), valid, stride 1: written out."""
    outputs, inputs, h, w = weight.shape
    rows, columns = x.shape[2] - h + 1, x.shape[3] - w + 1
    y = np.zeros((x.shape[0], outputs, rows, columns), x.dtype)
    for o in range(outputs):
        first = o // (outputs // groups) * inputs
        for i in range(h):
            for j in range(w):
                window = x[:, first : first + inputs, i : i + rows, j : j + columns]
                y[:, o] += np.einsum("nchw,c->nhw", window, weight[o, :, i, j])
    return y if bias is None else y + column(bias, 4, 1).astype(x.dtype)


def transposed(x, weight, bias):
    """(N, I, H, W) by (I, O, h, w), stride 2: each input value spreads a copy of its kernel."""
    _, outputs, h, w = weight.shape
    n, _, rows, columns = x.shape
    y = np.zeros((n, outputs, 2 * (rows - 1) + h, 2 * (columns - 1) + w), x.dtype)
    for i in range(rows):
        for j in range(columns):
            y[:, :, 2 * i : 2 * i + h, 2 * j : 2 * j + w] += np.einsum("nc,cohw->nohw", x[:, :, i, j], weight)
    return y if bias is None else y + column(bias, 4, 1).astype(x.dtype)


LAYERS = {  # the layer, x's shape, weight's shape, weight's axis of output channels
    "linear": (linear, (7, 4), (C, 4), 0),
    "linear, (in, out)": (lambda x, w, b: linear(x, w.T, b), (7, 4), (4, C), -1),
    "convolution": (convolution, (2, 4, 5, 6), (C, 4, 3, 2), 0),
    "grouped": (lambda x, w, b: convolution(x, w, b, 2), (2, 4, 5, 6), (C, 2, 3, 2), 0),
    "depthwise": (lambda x, w, b: convolution(x, w, b, C), (2, C, 5, 6), (C, 1, 3, 2), 0),
    "transposed convolution": (transposed, (2, 4, 3, 4), (4, C, 3, 2), 1),
}


@pytest.mark.parametrize("affine", AFFINE)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(("layer", "x_shape", "shape", "axis"), LAYERS.values(), ids=LAYERS)
def test_is_layer_and_batch_norm(layer, x_shape, shape, axis, with_bias, affine):
    """In float64: what the layer gives, normalized. The scale of errors is that of the terms which nearly cancel."""
    rng, bn = generator(1), filled(affine=affine)
    x, weight = rng.standard_normal(x_shape), rng.standard_normal(shape)
    bias = rng.standard_normal(C) if with_bias else None
    before = [v if v is None else v.copy() for v in (weight, bias)], bn.state_dict()
    want = normalized(layer(x, weight, bias), bn)
    folded = fold(weight, bias, bn, axis)
    np.testing.assert_allclose(layer(x, *folded), want, rtol=1e-12, atol=1e-12 * np.abs(want).max())
    np.testing.assert_allclose(layer(x, *folded), bn.eval()(layer(x, weight, bias)), rtol=1e-12, atol=1e-11)
    for value, shape_ in zip(folded, (shape, (C,)), strict=True):
        assert value.dtype == F64 and value.shape == shape_
        assert not np.shares_memory(value, weight) and value.flags.writeable
    np.testing.assert_equal((before[0], before[1]), ([weight, bias], bn.state_dict()))  # nothing is changed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer_dtype", [F32, F64], ids=str)
def test_rounded_once(dtype, layer_dtype):
    """Of weight's dtype, whatever the others have; each number within half a unit of float64's."""
    rng, bn = generator(2), filled(layer_dtype)
    weight, bias = rng.standard_normal((C, 4, 3)).astype(dtype), rng.standard_normal(C).astype(np.float32)
    folded = fold(weight, bias, bn)
    scale = wide(bn.weight) / np.sqrt(wide(bn.running_var) + bn.eps)
    wanted = wide(weight) * scale[:, None, None], (wide(bias) - wide(bn.running_mean)) * scale + wide(bn.bias)
    for got, want in zip(folded, wanted, strict=True):
        assert got.dtype == dtype and got.shape == want.shape
        allowed = (0.51 if dtype != F64 else 2) * unit(dtype) * np.abs(want)
        assert (np.abs(wide(got) - want) <= allowed + 1e-15).all()


def test_float32_bound():
    """A folded convolution in float32, against the layers in float64: the sum's own rounding, and half a unit a weight."""
    rng, bn = generator(3), filled(np.float32)
    x, weight = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 16, 9, 9), (C, 16, 3, 3)))
    bias = rng.standard_normal(C).astype(np.float32)
    want = normalized(convolution(wide(x), wide(weight), wide(bias)), bn)
    folded = fold(weight, bias, bn)
    got = convolution(x, *folded)
    assert got.dtype == F32
    terms = convolution(np.abs(wide(x)), np.abs(wide(folded[0])), np.abs(wide(folded[1])))
    assert (np.abs(got - want) <= (9 + 16 + 2) * unit(F32) * terms).all()


def test_bias_near_a_large_mean():
    """bias - mean is exact where both are large; bias·scale + shift would lose seven digits."""
    bn = fastbn.BatchNorm(1, dtype=np.float64)
    bn.running_mean[...], bn.running_var[...] = 1e9 + 0.5, 3.0
    _, bias = fold(np.ones((1, 1)), np.array([1e9 + 0.75]), bn)
    np.testing.assert_allclose(bias, 0.25 / np.sqrt(3 + 1e-5), rtol=1e-15)


def test_activation_remains():
    """It is the caller's to apply."""
    rng, plain, bn = generator(1), filled(), filled(activation="relu")
    x, weight = rng.standard_normal((9, 4)), rng.standard_normal((C, 4))
    for a, b in zip(fold(weight, None, bn), fold(weight, None, plain), strict=True):
        same_bits(a, b)
    y = linear(x, *fold(weight, None, bn))
    assert (y < 0).any()
    np.testing.assert_allclose(np.maximum(y, 0), bn.eval()(linear(x, weight, None)), rtol=1e-12, atol=1e-12)


def test_training_mode_makes_no_difference():
    bn, weight = filled(), np.ones((C, 2))
    same_bits(fold(weight, None, bn.train())[0], fold(weight, None, bn.eval())[0])


def test_any_memory():
    rng, bn = generator(5), filled()
    weight, bias = rng.standard_normal((C, 4, 3)), rng.standard_normal(C)
    want = fold(weight, bias, bn)
    for other in (np.asfortranarray(weight), np.flip(np.flip(weight).copy()), np.repeat(weight, 2, -1)[..., ::2]):
        other.flags.writeable = False
        for a, b in zip(fold(other, bias[::-1].copy()[::-1], bn, -3), want, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("affine", AFFINE)
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("axis", [1, -1])
def test_scale_shift(axis, dtype, affine):
    bn = filled(dtype, affine=affine, axis=axis, activation="leaky_relu")
    before = bn.state_dict()
    scale, shift = scale_shift(bn)
    assert scale.dtype == shift.dtype == F64 and scale.shape == shift.shape == (C,)
    x = sample((4, 5, C) if axis == -1 else (4, C, 5), F64, axis)
    z = x * column(scale, 3, axis) + column(shift, 3, axis)
    np.testing.assert_allclose(z, normalized(x, bn, axis), rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(np.where(z > 0, z, 0.01 * z), bn.eval()(x), rtol=1e-12, atol=1e-12)
    np.testing.assert_equal(before, bn.state_dict())
    scale[...] = 0
    np.testing.assert_equal(before, bn.state_dict())


def test_large_means_lose_what_the_docstring_says():
    """At a ratio of 10⁴ between mean and deviation, in float32: about 10⁻³; bn itself loses nothing."""
    bn = fastbn.BatchNorm(C).eval()
    bn.running_mean[...], bn.running_var[...] = 3e3 + np.arange(C), 0.09
    x = (3e3 + 0.3 * generator(1).standard_normal((4096, C))).astype(np.float32)
    want = normalized(x, bn)
    scale, shift = (v.astype(np.float32) for v in scale_shift(bn))
    assert 1e-4 < np.abs(x * scale + shift - want).max() < 3e-3
    assert np.abs(bn(x) - want).max() < 1e-5


W, B = np.ones((C, 4)), np.ones(C)
BAD = {
    "no statistics": ((W, B), {"track_running_stats": False}, ValueError, "bn has no running statistics"),
    "channels": ((np.ones((4, C)), B), {}, ValueError, "weight has shape (4, 6), and must have 6 (bn's num_features) along axis 0"),
    "axis": ((W, B, 1), {}, ValueError, "weight has shape (6, 4), and must have 6 (bn's num_features) along axis 1"),
    "axis above": ((W, B, 2), {}, ValueError, "axis is 2, and must be from -2 to 1 for weight of shape (6, 4)"),
    "axis below": ((W, B, -3), {}, ValueError, "axis is -3, and must be from -2 to 1"),
    "axis float": ((W, B, 0.0), {}, TypeError, "axis is 0.0, and must be an integer"),
    "scalar": ((np.float64(1), B), {}, ValueError, "axis is 0, and must be"),
    "integers": ((np.ones((C, 4), int), B), {}, TypeError, "weight has dtype int64, and must be float16, bfloat16, float32"),
    "complex": ((W.astype(complex), B), {}, TypeError, "weight has dtype complex128, and must be"),
    "objects": ((W.astype(object), B), {}, TypeError, "weight has dtype object, and must be"),
    "None": ((None, B), {}, TypeError, "weight is a NoneType, and must be an array"),
    "bias short": ((W, np.ones(4)), {}, ValueError, "bias has shape (4,), and must have shape (6,)"),
    "bias rank": ((W, np.ones((C, 1))), {}, ValueError, "bias has shape (6, 1), and must have shape (6,)"),
    "bias integers": ((W, np.ones(C, int)), {}, TypeError, "bias has dtype int64, and must be"),
    "overflow": ((np.full((C, 4), 6e4, F16), B), {}, ValueError, "weight when folded has … and must fit weight's dtype float16"),
    "bias overflow": ((W.astype(F16), 1e6 * B), {}, ValueError, "bias when folded has … and must fit weight's dtype float16"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "settings", "error", "words"), BAD.values(), ids=BAD)
def test_bad_arguments(arguments, settings, error, words):
    weight, bias, *axis = arguments
    with pytest.raises(error) as caught:
        fold(weight, bias, filled(**settings), *axis)
    for word in words.split(" … "):
        assert word in str(caught.value)


def test_bad_layer():
    for bn in (None, W):
        with pytest.raises(TypeError, match="and must be a BatchNorm"):
            fold(W, B, bn)
        with pytest.raises(TypeError, match="and must be a BatchNorm"):
            scale_shift(bn)
    with pytest.raises(ValueError, match="bn has no running statistics"):
        scale_shift(filled(track_running_stats=False))


def test_statistics_that_are_no_numbers():
    """Show in the result, as in eval mode, in their channel alone, and without a warning."""
    bn = filled()
    bn.running_var[1], bn.running_mean[2] = np.nan, np.inf
    weight, bias = fold(W.astype(BF16), None, bn)
    assert np.isnan(wide(weight)).any(1).tolist() == [False, True, False, False, False, False]
    assert np.isfinite(wide(bias)).tolist() == [True, False, False, True, True, True]
