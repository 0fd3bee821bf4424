"""Moments: what the kernels gather, and how they merge."""

import pickle
import re

import numpy as np
import pytest
from conftest import F64, close_statistics, oracle_forward, sample
from hypothesis import given
from hypothesis import strategies as st

import fastbn
from fastbn import Moments


def assert_same(a, b):
    assert a.count == b.count
    close_statistics(a.mean, a.m2 / a.count, b.mean, b.m2 / b.count, F64)


def test_shapes(kernels, dtype, case):
    x = sample(case.shape, dtype, case.axis)
    m = fastbn.moments(x, axis=case.axis)
    _, mean, var = oracle_forward(x, None, None, case.axis)
    assert m.count == x.size // x.shape[case.axis] and m.mean.dtype == m.m2.dtype == np.float64
    close_statistics(m.mean, m.var(), mean, var, dtype)


@given(cuts=st.lists(st.integers(0, 40), max_size=5))
def test_merge(kernels, cuts):
    """However the batch is cut (empty pieces too), and from either side, the pieces' moments merge into the whole's."""
    x = sample((40, 3, 2), np.float64) + np.arange(40).reshape(40, 1, 1)  # no two pieces have one mean
    whole = fastbn.moments(x)
    pieces = [fastbn.moments(piece) for piece in np.split(x, sorted(cuts))]
    left, right = pieces[0], pieces[-1]
    for piece in pieces[1:]:
        left = left + piece
    for piece in pieces[-2::-1]:
        right = piece + right
    assert_same(left, whole)
    assert_same(right, whole)


@given(cuts=st.lists(st.integers(0, 40), max_size=5))
def test_update(kernels, cuts):
    """Chunk by chunk, of a data set that need not fit into memory: the whole's moments."""
    x = sample((40, 2, 3), np.float64, axis=-1) + np.arange(40).reshape(40, 1, 1)
    total = Moments.none(3)
    for piece in np.split(x, sorted(cuts)):
        before = total
        assert total.update(piece, axis=-1) is before
    assert total.count == 80
    np.testing.assert_allclose(total.mean, x.mean((0, 1)), rtol=1e-13)
    np.testing.assert_allclose(total.var(), x.var((0, 1)), rtol=1e-13)


def test_update_over_a_memory_map(kernels, tmp_path):
    """Rows of 12 bytes at a mean of 1e4: float32's own sum would lose all digits."""
    x = (sample((100_003, 3), np.float64) + 1e4).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    total, mapped = Moments.none(3), np.load(tmp_path / "x.npy", mmap_mode="r")
    for start in range(0, len(mapped), 7001):
        total.update(mapped[start : start + 7001])
    exact = x.astype(np.float64)
    np.testing.assert_allclose(total.mean, exact.mean(0), rtol=1e-12)
    np.testing.assert_allclose(total.var(), exact.var(0), rtol=1e-6)


def test_update_that_raises_leaves_the_moments():
    total = fastbn.moments(sample((5, 3), np.float64))
    count, mean, m2 = total.count, total.mean.copy(), total.m2.copy()
    for bad in (np.ones((4, 2)), np.ones(3), np.ones((4, 3), int), None):
        with pytest.raises((TypeError, ValueError)):
            total.update(bad)
    with pytest.raises(ValueError, match="channels is 0, and must be at least 1"):
        Moments.none(0)
    assert total.count == count and (total.mean == mean).all() and (total.m2 == m2).all()


def test_update_changes_nothing_else():
    """What + and sum give is their own, also where one side is empty."""
    m = fastbn.moments(sample((5, 3), np.float64))
    for total in (sum([m]), Moments.none(3) + m, m + Moments.none(3)):
        total.update(sample((7, 3), np.float64))
        assert total.count == 12 and m.count == 5


def test_overflow_is_infinite_whatever_numpys_settings_are():
    with np.errstate(all="raise"):
        both = fastbn.moments(np.array([[1e200], [2e200]])) + fastbn.moments(np.array([[-1e200], [-2e200]]))
    assert both.m2 == np.inf and both.mean == 0


def test_merge_of_unlike_pieces():
    """One value and a thousand; means far apart."""
    a, b = np.full((1, 1), 1e6), sample((1000, 1), np.float64)
    assert_same(fastbn.moments(a) + fastbn.moments(b), fastbn.moments(np.concatenate([a, b])))


def test_merge_leaves_its_operands():
    a, b = fastbn.moments(sample((5, 3), np.float64)), fastbn.moments(sample((7, 3), np.float64, seed=1))
    before = [v.copy() for v in (a.mean, a.m2, b.mean, b.m2)]
    a + b
    for value, was in zip((a.mean, a.m2, b.mean, b.m2), before, strict=True):
        np.testing.assert_array_equal(value, was)


def test_variance(kernels):
    x = sample((5, 3, 7), np.float64)
    m = fastbn.moments(x)
    np.testing.assert_allclose(m.var(), x.var((0, 2)), rtol=1e-13)
    np.testing.assert_allclose(m.var(unbiased=True), x.var((0, 2), ddof=1), rtol=1e-13)


@pytest.mark.parametrize("shape", [(0, 3), (4, 3, 0)])
def test_empty(kernels, dtype, shape):
    m = fastbn.moments(np.empty(shape, dtype))
    assert m.count == 0 and (m.mean == 0).all() and (m.m2 == 0).all()
    other = fastbn.moments(sample((4, 3), np.float64))
    for merged in (m + other, other + m):
        assert_same(merged, other)
    with pytest.raises(ValueError, match="count is 0, and must be at least 1"):
        m.var()


def test_too_few_values():
    m = fastbn.moments(np.ones((1, 3)))
    assert (m.var() == 0).all()
    with pytest.raises(ValueError, match="count is 1, and must be at least 2"):
        m.var(unbiased=True)


def test_merge_errors():
    m = fastbn.moments(np.ones((2, 3)))
    with pytest.raises(ValueError, match=r"4 channels cannot merge with those of 3"):
        m + fastbn.moments(np.ones((2, 4)))
    with pytest.raises(TypeError):
        m + 1


def test_pickle():
    m = fastbn.moments(sample((5, 3), np.float64))
    again = pickle.loads(pickle.dumps(m))
    assert isinstance(again, Moments)
    assert_same(again, m)


def test_sum_and_bad_parts():
    x = sample((12, 3), np.float64)
    whole, parts = fastbn.moments(x), [fastbn.moments(x[i : i + 4]) for i in (0, 4, 8)]
    np.testing.assert_allclose(sum(parts).mean, whole.mean, rtol=1e-14)
    with pytest.raises(ValueError, match="m2"):
        fastbn.Moments(3, np.zeros(3), np.zeros(2))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((2, np.ones(3), -np.ones(3)), ValueError, "m2 has -1.0, and must be sums of squares: at least 0"),
        ((2, ["a", "b"], np.ones(2)), TypeError, "mean has dtype <U1, and must be real numbers"),
        ((2.5, np.ones(3), np.ones(3)), TypeError, "count is 2.5, and must be an integer"),
        ((-1, np.ones(3), np.ones(3)), ValueError, "count is -1, and must be from 0 to 2**63 - 1"),
        ((2**63, np.ones(3), np.ones(3)), ValueError, "count is 9223372036854775808, and must be from 0 to 2**63 - 1"),
        ((2**2000, np.ones(3), np.ones(3)), ValueError, "count is a number of more than 99 bits, and must be from 0"),
        (
            (2, np.ones(3), np.ones(2)),
            ValueError,
            "mean has shape (3,) and m2 (2,), and both must have shape (channels,)",
        ),
    ],
)
def test_bad_parts(arguments, error, words):
    with pytest.raises(error, match=re.escape(words)):
        Moments(*arguments)


@pytest.mark.parametrize(("count", "unbiased", "needed"), [(0, False, 1), (1, True, 2)])
def test_words_for_too_few_values(count, unbiased, needed):
    with pytest.raises(ValueError, match=f"count is {count}, and must be at least {needed} for this variance"):
        Moments(count, np.ones(3), np.ones(3)).var(unbiased)
