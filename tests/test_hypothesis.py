"""Shapes, axes, memory and parameters drawn by Hypothesis; properties that hold for all of them."""

import numpy as np
import pytest
from conftest import (
    COPIES,
    DTYPES,
    ORDERS,
    WIDE,
    close,
    close_gradients,
    close_y,
    column,
    computed,
    generator,
    oracle_backward,
    oracle_forward,
    oracle_normalize,
    parameters,
    sample,
    unit,
)
from hypothesis import assume, given
from hypothesis import strategies as st

import fastbn


@st.composite
def arrays(draw):
    """x, dy, axis."""
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=2, max_size=5)))
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    assume(np.prod(shape) > shape[axis])
    dtype, seed = draw(st.sampled_from(DTYPES)), draw(st.integers(0, 99))
    memory = draw(st.sampled_from([np.copy, *ORDERS, *COPIES]))
    order = draw(st.permutations(range(len(shape))))

    def lay(x):
        """Any order of axes in memory, and gaps or odd addresses besides."""
        return memory(x.transpose(order)).transpose(np.argsort(order))

    return lay(sample(shape, dtype, axis, seed)), sample(shape, dtype, axis, seed + 100), axis


@given(drawn=arrays(), affine=st.sampled_from([None, *WIDE]))
def test_forward_and_backward(kernels, drawn, affine):
    x, dy, axis = drawn
    weight, bias = (None, None) if affine is None else parameters(x.shape[axis], affine)[:2]
    eps = 0.1  # a few values may be nearly equal; then x̂ is what rounding makes it
    y, saved = fastbn.batch_norm_forward(x, weight, bias, axis=axis, eps=eps)
    want, mean, var = oracle_forward(x, weight, bias, axis, eps)
    m = fastbn.moments(x, axis=axis)
    # With few values the spread may be small beside the values themselves, whose own rounding then counts.
    step = unit(computed(x.dtype)) * np.abs(x).max()
    np.testing.assert_allclose(saved.mean, mean, rtol=0, atol=4 * step)
    np.testing.assert_array_equal(m.mean, saved.mean)
    np.testing.assert_array_equal(m.var(), saved.var)
    np.testing.assert_allclose(saved.var, var, rtol=8 * unit(computed(x.dtype)), atol=8 * step * np.sqrt(var.max()))
    close_y(y, want, weight, bias, axis)
    got = fastbn.batch_norm_backward(dy, saved)
    want = oracle_backward(dy, x, mean, var, weight, axis, True, eps)
    close_gradients(got, want, dy, x, mean, var, weight, axis, True, eps)


@given(drawn=arrays())
def test_output_is_normalized(kernels, drawn):
    """Mean 0 and variance v/(v + eps), whatever the layout."""
    x, _, axis = drawn
    y, saved = fastbn.batch_norm_forward(x.astype(np.float64), axis=axis)
    m = fastbn.moments(y, axis=axis)
    np.testing.assert_allclose(m.mean, 0, atol=1e-10)
    np.testing.assert_allclose(m.var(), saved.var / (saved.var + 1e-5), rtol=1e-7, atol=1e-10)


@given(drawn=arrays(), seed=st.integers(0, 99))
def test_order_of_the_batch_does_not_matter(kernels, drawn, seed):
    x, _, axis = drawn
    moved = np.moveaxis(x, axis, 1)
    shuffled = moved[generator(seed).permutation(len(moved))]
    a, b = fastbn.moments(moved), fastbn.moments(shuffled)
    step = unit(computed(x.dtype)) * np.abs(x).max()
    np.testing.assert_allclose(a.mean, b.mean, rtol=0, atol=8 * step)
    np.testing.assert_allclose(a.m2, b.m2, rtol=1e-12 if x.dtype == np.float64 else 1e-5, atol=a.count * step**2)


SLOPES = {None: 1.0, "relu": 0.0, "leaky_relu": 0.01}


@st.composite
def calls(draw):
    """Any good call: sizes of 0 and 1 too; each array has a memory, each parameter a dtype of its own, or is absent."""
    shape = tuple(draw(st.lists(st.integers(0, 7), min_size=2, max_size=5)))
    axis, dtype = draw(st.integers(-len(shape), len(shape) - 1)), draw(st.sampled_from(DTYPES))
    memories = st.sampled_from([np.copy, *(ORDERS if len(shape) > 1 else []), *COPIES])
    channels = shape[axis]
    given = [draw(st.sampled_from([None, *WIDE])) for _ in range(2)] + [draw(st.sampled_from(WIDE))] * 2
    given = [p.astype(d) if d else None for p, d in zip(parameters(channels, np.float64), given, strict=True)]
    x, dy, residual = (draw(memories)(sample(shape, dtype, axis, seed)) for seed in (0, 1, 2))
    settings = {
        "axis": axis,
        "eps": 0.1,
        "activation": draw(st.sampled_from([*SLOPES])),
        "residual": residual if draw(st.booleans()) else None,
        "num_threads": draw(st.integers(1, 3)),
    }
    out = draw(st.sampled_from([None, *ORDERS]))
    out = None if out is None else out(np.full(shape, np.nan, dtype))
    return x, dy, given, settings, out, draw(st.booleans())


@given(drawn=calls())
def test_any_good_call(kernels, drawn):
    """y, the running statistics and all gradients; or what a batch of nothing, or of one value a channel, gives."""
    x, dy, (weight, bias, mean, var), settings, out, training = drawn
    axis, residual, slope = settings["axis"], settings["residual"], SLOPES[settings["activation"]]
    values, before = x.size // max(x.shape[axis], 1), (mean.copy(), var.copy())

    def call(**more):
        return fastbn.batch_norm(x, mean, var, weight, bias, training=training, **settings, **more)

    if training and values == 1:
        with pytest.raises(ValueError, match="one value a channel, and training must have at least 2"):
            call()
        assert (mean == before[0]).all() and (var == before[1]).all()
        return
    y = call(out=out)
    assert y.shape == x.shape and y.dtype == x.dtype and (out is None or y is out)
    if training:
        _, saved = fastbn.batch_norm_forward(x, weight, bias, **settings)
        factor = values / (values - 1) if values > 1 else 1
        keep = 0.9 if x.size else 1
        for name, new, old, batch in zip(("mean", "var"), (mean, var), before, (saved.mean, saved.var), strict=True):
            want = keep * old + (1 - keep) * batch * (factor if name == "var" else 1)
            np.testing.assert_allclose(new, want, rtol=1e-6, atol=1e-6)
        used = saved.mean, saved.var
    else:
        _, saved = fastbn.batch_norm_eval_forward(x, mean, var, weight, bias, **settings)
        assert (mean == before[0]).all() and (var == before[1]).all()
        used = mean, var
    gradients = fastbn.batch_norm_backward(dy, saved)
    if not x.size:
        assert all(not g.any() for g in gradients if g is not None)
        return
    plain = oracle_normalize(x, *used, weight, bias, axis, 0.1)
    want = oracle_normalize(x, *used, weight, bias, axis, 0.1, residual=residual, slope=slope)
    w, b = (column(d if p is None else p, x.ndim, axis) for p, d in ((weight, 1), (bias, 0)))
    beside = 0 if residual is None else np.abs(residual.astype(np.float64))
    close("y", y, want, np.abs(plain - b) + np.abs(w) + np.abs(b) + beside, x.dtype)
    z, scale = plain + (0 if residual is None else residual.astype(np.float64)), np.abs(plain - b) + np.abs(w) + beside
    assume(slope == 1 or (np.abs(z) > 64 * unit(x.dtype) * scale).all())  # elsewhere either side of the kink is right
    want = oracle_backward(dy, x, *used, weight, axis, training, 0.1, y=z, slope=slope)
    passed = np.where(z <= 0, slope, 1) * dy.astype(np.float64)
    assert len(gradients) == (3 if residual is None else 4)
    close_gradients(gradients, want, passed, x, *used, weight, axis, training, 0.1, cut=slope != 1)
    if residual is not None:
        close("dx", gradients[3], want[3], np.abs(passed) + float(np.finfo(np.float32).tiny), x.dtype)
