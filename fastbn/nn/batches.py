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
    targets : ndarray, shape (rows, ...)
        Labels, or what else the loss takes.
    batch_size : int
    sample_weight : ndarray, shape (rows,), optional
        How much each row counts.
    rng : numpy.random.Generator or int, optional
        Of the orders.

    Attributes
    ----------
    rng : numpy.random.Generator
    order : ndarray of int, shape (rows,)
        Of the rows in the epoch at hand; the next one's is made from it. With ``rng``'s state it is all there is to
        save, and to set, for the batches to go on as they would have.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what it was and what it must be.
    """

    def __init__(
        self,
        x: Array,
        targets: Any,
        batch_size: int,
        *,
        sample_weight: Any = None,
        rng: np.random.Generator | int | None = None,
    ) -> None:
        self.x, self.targets = paired("x", x, "targets", targets)
        rows = len(self.x)
        self.sample_weight = None if sample_weight is None else checks.sample_weight(sample_weight, rows)[0]
        self.batch_size = min(checks.positive("batch_size", batch_size), rows)
        self.rng = np.random.default_rng(rng)
        self.order = np.arange(rows)
        data = [self.x, self.targets] if self.sample_weight is None else [self.x, self.targets, self.sample_weight]
        self._data = [(array, np.empty((self.batch_size, *array.shape[1:]), array.dtype)) for array in data]
        left = rows % self.batch_size
        self._end = rows - 1 if left == 1 and self.batch_size > 1 else rows

    def __len__(self) -> int:
        """Batches an epoch."""
        return -(-self._end // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Array, ...]]:
        """Pairs of x and targets (with `sample_weight`, triples), in memory that the next ones overwrite."""
        self.rng.shuffle(self.order)
        return self.rest(0)

    def rest(self, first: int) -> Iterator[tuple[Array, ...]]:
        """The epoch's batches from the one of this number on, in the order that it has."""
        for start in range(first * self.batch_size, self._end, self.batch_size):
            rows = self.order[start : min(start + self.batch_size, self._end)]
            # mode: "raise", the default, would write to a new array first.
            yield tuple([array.take(rows, 0, batch[: len(rows)], "clip") for array, batch in self._data])


def paired(x_name: str, x: Any, name: str, targets: Any) -> tuple[Array, Array]:
    """At least one row of data, and a target for each."""
    x, targets = checks.rows(x_name, x), np.asarray(targets)
    if targets.shape[:1] != (len(x),):
        raise ValueError(
            f"{name} has shape {targets.shape}, and must have shape ({len(x)}, ...): one a row of {x_name}"
        )
    return x, targets
