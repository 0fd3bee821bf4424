"""Shapes, axes, memory and parameters drawn by Hypothesis; properties that hold for all of them."""

import numpy as np
from conftest import (
    COPIES,
    DTYPES,
    ORDERS,
    WIDE,
    close_gradients,
    close_y,
    computed,
    generator,
    oracle_backward,
    oracle_forward,
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
