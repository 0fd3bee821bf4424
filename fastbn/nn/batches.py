"""Batches: a data set in shuffled mini-batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from .. import checks

Array = np.ndarray[Any, np.dtype[Any]]


class Batches:
    """A data set in mini-batches; each walk over it is one epoch, in an order of its own.

    A last batch of one row is left out, since no BatchNorm can train on it; the next epoch has another row there.

    Parameters
    ----------
    x : ndarray, shape (rows, ...)
    labels : ndarray, shape (rows,)
    batch_size : int
    rng : numpy.random.Generator or int, optional
        Of the orders.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what it was and what it must be.
    """

    def __init__(
        self, x: Array, labels: Array, batch_size: int, *, rng: np.random.Generator | int | None = None
    ) -> None:
        self.x, self.labels = checks.data("x", x), np.asarray(labels)
        if not self.x.ndim or not len(self.x):
            raise ValueError(f"x has shape {self.x.shape}, and must have at least one row")
        rows = len(self.x)
        if self.labels.shape != (rows,):
            raise ValueError(f"labels has shape {self.labels.shape}, and must have shape ({rows},): one a row of x")
        self.batch_size = min(checks.positive("batch_size", batch_size), rows)
        self._rng = np.random.default_rng(rng)
        self._order = np.arange(rows)
        self._batch = np.empty((self.batch_size, *self.x.shape[1:]), self.x.dtype)
        self._batch_labels = np.empty(self.batch_size, self.labels.dtype)
        left = rows % self.batch_size
        self._end = rows - 1 if left == 1 and self.batch_size > 1 else rows

    def __len__(self) -> int:
        return -(-self._end // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Array, Array]]:
        """Pairs of x and labels, in memory that the next pair overwrites."""
        self._rng.shuffle(self._order)
        for start in range(0, self._end, self.batch_size):
            rows = self._order[start : min(start + self.batch_size, self._end)]
            x, labels = self._batch[: len(rows)], self._batch_labels[: len(rows)]
            # mode: "raise", the default, would write to a new array first.
            np.take(self.x, rows, axis=0, out=x, mode="clip")
            np.take(self.labels, rows, out=labels, mode="clip")
            yield x, labels
