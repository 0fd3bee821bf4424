"""Dropout: a random part of the numbers set to 0 in training."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import checks
from .buffers import Buffer
from .layer import Layer

Array = np.ndarray[Any, np.dtype[Any]]


class Dropout(Layer):
    """In training each number is 0 with probability p, and 1/(1 - p) times itself otherwise; in eval mode y is x.

    The factor keeps the expectation ("inverted" dropout), so that nothing need be scaled in use.

    Parameters
    ----------
    p : float from 0 to 1
        The probability of 0.
    rng : numpy.random.Generator or int, optional
        Where the choices are drawn from.

    Attributes
    ----------
    p : float
    rng : numpy.random.Generator
        ``rng.bit_generator.state`` is all there is to save, and to set, for training to go on exactly as it would have.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what it was and what it must be.

    Notes
    -----
    In eval mode, and where p is 0, y is x itself, dx is dy itself, and nothing is drawn.

    References
    ----------
    Srivastava et al. (2014), "Dropout: A Simple Way to Prevent Neural Networks from Overfitting", sections 4 and 10.
    """

    def __init__(self, p: float = 0.5, *, rng: np.random.Generator | int | None = None) -> None:
        self.p = checks.number_in("p", p, 0, 1)
        self.rng = np.random.default_rng(rng)
        self._shape: tuple[int, ...] | None = None
        self._kept: Array | None = None  # None: all
        self._y, self._dx, self._mask, self._random = Buffer(), Buffer(), Buffer(), Buffer()

    def __call__(self, x: Array) -> Array:
        """y, of x's shape and dtype."""
        x = checks.data("x", x)
        self._shape, self._kept = x.shape, None
        if not self.training or self.p == 0:
            return x
        random = self._random.lend(x.shape, checks.F32)
        self.rng.random(dtype=np.float32, out=random)
        self._kept = kept = self._mask.lend(x.shape, np.dtype(bool))
        np.greater_equal(random, self.p, out=kept)
        return self._drop(x, kept, self._y)

    def backward(self, dy: Array) -> Array:
        """dx, by the choices of the last call."""
        shape = checks.called(self._shape)
        dy = checks.data("dy", dy)
        checks.shape_of("dy", dy, shape)
        return dy if self._kept is None else self._drop(dy, self._kept, self._dx)

    def _drop(self, array: Array, kept: Array, buffer: Buffer) -> Array:
        result = buffer.lend(array.shape, array.dtype)
        np.multiply(array, kept, out=result)
        return np.multiply(result, 1 / (1 - self.p) if self.p < 1 else 0, out=result)

    def __repr__(self) -> str:
        return f"Dropout({self.p})"
