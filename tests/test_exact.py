"""Data on which mean and variance are exact in any order of summation: both must be exact, with no tolerance.

As oneDNN's benchdnn fills its tensors: pairs of m + d and m - d, whose mean m is a power of two, with few low bits. All
sums are then sums of small multiples of a power of two, and nothing is rounded until the last division.
"""

import numpy as np
import pytest
from conftest import BACKENDS, DTYPES, F32, generator

import fastbn

SHAPES = {
    "rows": ((1000, 17), 1),
    "rows in chunks": ((20001, 3), 1),
    "rows, more channels than a tile": ((70, 1031), 1),
    "few rows": ((3, 5), 1),
    "one channel": ((30011, 1), 1),
    "NHWC": ((5, 7, 7, 13), -1),
    "7x7": ((33, 5, 7, 7), 1),
    "7x7 in blocks": ((301, 2, 7, 7), 1),
    "7x7, few images": ((3, 4, 7, 7), 1),
    "3x3": ((40, 6, 3, 3), 1),
    "planes of 5, few images": ((3, 60, 5), 1),
    "planes of 11, few images": ((5, 60, 11), 1),
    "14x14": ((11, 7, 14, 14), 1),
    "planes of 511": ((17, 2, 7, 73), 1),
    "planes as runs": ((9, 3, 31, 35), 1),
    "planes of several blocks": ((2, 3, 181, 181), 1),
}
THREADS = (1, 2, 3)
# Numba compiles for each dtype, and is run on one.
RUN_ON = [(backend, dtype) for backend in BACKENDS for dtype in DTYPES if backend != "numba" or dtype == F32]
everywhere = pytest.mark.parametrize(("kernels", "dtype"), RUN_ON, indirect=True, ids=str)
STEP = 8  # x is a multiple of 1/STEP


def fill(shape, axis, *, shuffled):
    """x·STEP as integers, and mean·STEP: each channel of pairs, the last of an odd number its mean itself.

    A pair lies in one plane, or in two rows that follow each other, so that a block of whole pairs has the same mean.
    shuffled: over all of the channel, so that no block has the channel's mean. Then no mean is 0, which is no number to
    round to: what is left of 1e-17 is right, and is not 0.
    """
    rng = generator(8, *shape)
    rest = np.delete(shape, axis)
    channels, rows = shape[axis], axis % len(shape) == len(shape) - 1
    lines, length = (1, rest.prod()) if rows else (rest[0], rest[1:].prod())
    mean = rng.choice([-32, -16, -8, -4, 4, 8, 16, 32] + [0] * (not shuffled), channels)
    half = rng.integers(0, STEP + 1, (channels, lines, length // 2)) * rng.choice([-1, 1], (channels, 1, 1))
    x = np.zeros((channels, lines, length), int)
    x[:, :, 0 : length // 2 * 2 : 2], x[:, :, 1 : length // 2 * 2 : 2] = half, -half
    if shuffled:
        x = rng.permuted(x.reshape(channels, -1), axis=1)
    x = x.reshape(channels, *rest) + mean.reshape(-1, *[1] * len(rest))
    return np.ascontiguousarray(np.moveaxis(x, 0, axis)), mean


def statistics(x, axis):
    """(mean, var), float64, as every way to them gives them."""
    for threads in THREADS:
        m = fastbn.moments(x, axis=axis, num_threads=threads)
        yield m.mean, m.var()
        _, saved = fastbn.batch_norm_forward(x, axis=axis, num_threads=threads)
        yield saved.mean, saved.var


@everywhere
@pytest.mark.parametrize(("shape", "axis"), SHAPES.values(), ids=SHAPES)
def test_pairs(kernels, dtype, shape, axis):
    """No rounding anywhere: the float64 statistics are exact."""
    whole, mean = fill(shape, axis, shuffled=False)
    rest = tuple(i for i in range(len(shape)) if i != axis % len(shape))
    squares = ((whole - np.expand_dims(mean, rest)) ** 2).sum(rest)
    x = (whole / STEP).astype(dtype)
    assert (x.astype(float) * STEP == whole).all()
    for got_mean, got_var in statistics(x, axis):
        np.testing.assert_array_equal(got_mean, mean / STEP)
        np.testing.assert_array_equal(got_var, squares / STEP**2 / (x.size // mean.size))


@everywhere
@pytest.mark.parametrize(("shape", "axis"), SHAPES.values(), ids=SHAPES)
def test_shuffled_pairs(kernels, dtype, shape, axis):
    """Blocks' means are then fractions of any kind, rounded to float64: exact as float32."""
    whole, mean = fill(shape, axis, shuffled=True)
    rest = tuple(i for i in range(len(shape)) if i != axis % len(shape))
    squares = ((whole - np.expand_dims(mean, rest)) ** 2).sum(rest)
    x = (whole / STEP).astype(dtype)
    for got_mean, got_var in statistics(x, axis):
        np.testing.assert_array_equal(got_mean.astype(F32), (mean / STEP).astype(F32))
        np.testing.assert_array_equal(got_var.astype(F32), (squares / STEP**2 / (x.size // mean.size)).astype(F32))
