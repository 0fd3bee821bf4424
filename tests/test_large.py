"""Tensors of more elements than 32 bits count."""

import os

import numpy as np
import pytest

import fastbn

pytestmark = [
    pytest.mark.large,
    pytest.mark.skipif(
        os.environ.get("FASTBN_TEST_LARGE") != "1",
        reason="needs 6 GB of memory and half a minute: set FASTBN_TEST_LARGE=1",
    ),
]

SHAPES = {  # a little over 2³¹ elements of float16: 4.3 GB
    "rows": (524_289, 4096),
    "few channels": (67_108_865, 32),
    "small planes": (6_731_925, 11, 29),
    "planes": (2, 3, 357_913_943),
    "one channel": (1, 1, 2**31 + 7),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_first_and_last(shape):
    """Zeros, but for a few numbers at both ends of memory, in the first channel and the last."""
    images, channels = shape[:2]
    count = int(np.prod(shape)) // channels
    assert 2**31 < count * channels < 2**31 + 2**25
    x = np.zeros(shape, np.float16)
    flat = x.reshape(images, channels, -1)
    ends = sorted({(n, c, i) for n in (0, images - 1) for c in (0, channels - 1) for i in (0, flat.shape[2] - 1)})
    for value, end in enumerate(ends, 1):
        flat[end] = value
    sums = np.zeros((2, channels))
    for value, (_, channel, _) in enumerate(ends, 1):
        sums[:, channel] += value, value * value

    m = fastbn.moments(x)
    assert m.count == count
    np.testing.assert_allclose(m.mean, sums[0] / count, rtol=1e-6)
    np.testing.assert_allclose(m.m2, sums[1] - sums[0] ** 2 / count, rtol=1e-6)

    # y = 2·x + the channel's bias, in place; see test_half for why exactly.
    bias = np.arange(channels) % 7 + 1.0
    eps, twos = 2.0**-10, np.full(channels, 2.0)
    y = fastbn.batch_norm(
        x, np.zeros(channels), np.full(channels, 1 - eps), twos, bias, eps=eps, activation="relu", out=x
    )  # fmt: skip
    assert y is x
    for value, end in enumerate(ends, 1):
        assert flat[end] == 2 * value + bias[end[1]]
    for n, i in ((images // 2, flat.shape[2] // 2), (0, min(1, flat.shape[2] - 1)), (images - 1, -2 % flat.shape[2])):
        if (n, 0, i) not in ends:
            np.testing.assert_array_equal(flat[n, :, i], bias)
    # Nothing between was left out or written twice, or the sums would not be these.
    total = fastbn.moments(y)
    np.testing.assert_allclose(total.mean, bias + 2 * m.mean, rtol=1e-6)
    np.testing.assert_allclose(total.m2, 4 * m.m2, rtol=1e-6)
