"""Moments: the one way in which fastbn holds and combines statistics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """Count, mean and sum of squared deviations of a set of values, for each channel.

    Two sets' moments merge with ``+`` into the moments of their union: over blocks, threads, processes or batches.

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
        for name in ("mean", "m2"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), np.float64))
        if self.count < 0 or self.mean.ndim != 1 or self.mean.shape != self.m2.shape:
            raise ValueError(
                f"count is {self.count}, mean has shape {self.mean.shape} and m2 {self.m2.shape}; "
                "count must be at least 0, and both shapes (channels,)"
            )

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
        divisor = self.count - 1 if unbiased else self.count
        if divisor < 1:
            needed = 2 if unbiased else 1
            raise ValueError(f"count is {self.count}, and must be at least {needed} for this variance")
        return self.m2 / divisor

    def __radd__(self, other: Any) -> Moments:
        """0 + moments, so that ``sum`` works."""
        return self if type(other) is int and other == 0 else NotImplemented

    def __add__(self, other: Moments) -> Moments:
        if not isinstance(other, Moments):
            return NotImplemented
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"moments of {other.mean.size} channels cannot merge with those of {self.mean.size}")
        if self.count == 0:
            return other
        if other.count == 0:
            return self
        count = self.count + other.count
        share = other.count / count
        delta = other.mean - self.mean
        return Moments(count, self.mean + delta * share, self.m2 + other.m2 + delta * delta * (self.count * share))
