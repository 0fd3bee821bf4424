"""Moments: the one way in which fastbn holds and combines statistics, and the function that takes them of an array."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from . import backends, checks
from .layout import canonical

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(slots=True, eq=False)
class Moments:
    """Count, mean and sum of squared deviations of a set of values, for each channel.

    Two sets' moments merge with ``+`` into the moments of their union: over blocks, threads, processes or batches. A
    data set that does not fit into memory is gone through in chunks::

        total = Moments.none(channels)
        for chunk in chunks:
            total.update(chunk)

    Parameters
    ----------
    count : int
        Values a channel.
    mean : ndarray of float64, shape (channels,)
    m2 : ndarray of float64, shape (channels,)
        Sum of (x - mean)².

    References
    ----------
    Chan, Golub and LeVeque (1983), "Algorithms for computing the sample variance: analysis and recommendations", The
    American Statistician 37(3).
    """

    count: int
    mean: Array
    m2: Array

    def __post_init__(self) -> None:
        self.count = checks.integer("count", self.count)
        self.mean, self.m2 = checks.moments_vector("mean", self.mean), checks.moments_vector("m2", self.m2)
        checks.moments(self.count, self.mean, self.m2)

    def var(self, unbiased: bool = False) -> Array:
        """The variance, shape (channels,), float64.

        Parameters
        ----------
        unbiased : bool
            Divide by count - 1 instead of count.

        Raises
        ------
        ValueError
            Where there are too few values.
        """
        checks.enough_for_variance(self.count, 2 if unbiased else 1)
        return self.m2 / (self.count - 1 if unbiased else self.count)

    @classmethod
    def none(cls, channels: int) -> Moments:
        """The moments of no values: count 0, to begin with.

        Parameters
        ----------
        channels : int
        """
        channels = checks.positive("channels", channels)
        return cls(0, np.zeros(channels), np.zeros(channels))

    def update(self, x: Any, *, axis: int = 1, num_threads: int | None = None) -> Moments:
        """Take in one more chunk of the data: what ``self + moments(x)`` gives, in place.

        Parameters
        ----------
        x, axis, num_threads
            As for `moments`; x has as many channels as there are.

        Returns
        -------
        Moments
            Itself.

        Raises
        ------
        TypeError, ValueError
            Naming the argument, what it was and what it must be. The moments are then as they were.
        """
        total = self + moments(x, axis=axis, num_threads=num_threads)
        self.count, self.mean, self.m2 = total.count, total.mean, total.m2
        return self

    def __radd__(self, other: Any) -> Moments:
        """0 + moments, so that ``sum`` works."""
        return self._copy() if type(other) is int and other == 0 else NotImplemented

    def __add__(self, other: Moments) -> Moments:
        if not isinstance(other, Moments):
            return NotImplemented
        checks.same_channels(self.mean.size, other.mean.size)
        if self.count == 0 or other.count == 0:
            return (other if self.count == 0 else self)._copy()
        count = self.count + other.count
        share = other.count / count
        with np.errstate(all="ignore"):  # what overflows is infinite, whatever NumPy's settings are
            delta = other.mean - self.mean
            m2 = self.m2 + other.m2 + delta * delta * (self.count * share)
            return Moments(count, self.mean + delta * share, m2)

    def _copy(self) -> Moments:
        """Of its own, as `update` works in place."""
        return Moments(self.count, self.mean.copy(), self.m2.copy())


def moments(x: Any, *, axis: int = 1, num_threads: int | None = None) -> Moments:
    """Count, mean and sum of squared deviations of each channel.

    An array on a GPU is taken too, of float16, float32 or float64; the result is on the host.

    Parameters
    ----------
    x : ndarray of float16, bfloat16, float32 or float64, 2 to 5 axes
    axis : int
        The channel axis.
    num_threads : int, optional

    Returns
    -------
    Moments
        Merge with ``+``; ``.var()`` gives the variance. Welford's update, in the pairwise form of Chan, Golub and
        LeVeque (1983).

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what it was and what it must be.
    """
    if type(x) is not np.ndarray and checks.on_gpu(x):
        return backends.gpu(num_threads).moments(x, axis=axis)  # type: ignore[no-any-return]
    source, layout = canonical("x", x, axis)
    outer, channels, inner = layout[:3]
    mean, m2 = np.zeros(channels), np.zeros(channels)
    kernels, threads = backends.serving(num_threads)
    if source.size:
        kernels.moments(source, outer, channels, inner, mean, m2, threads)
    return Moments(layout.values, mean, m2)
