"""Activations: arrays of any shape in, arrays of the same shape and dtype out."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import checks
from .buffers import Buffer
from .layer import Layer

Array = np.ndarray[Any, np.dtype[Any]]


class Activation(Layer):
    """y = f(x), element by element, with f' written in terms of y. A new one is a subclass with these two functions."""

    def __init__(self) -> None:
        self._last: Array | None = None
        self._done_before = False
        self._y, self._dx = Buffer(), Buffer()

    def function(self, x: Array, y: Array) -> None:
        """Write f(x) to y, which does not overlap x."""
        raise NotImplementedError

    def gradient(self, dy: Array, y: Array, dx: Array) -> None:
        """Write dy · f' to dx, which overlaps neither dy nor y."""
        raise NotImplementedError

    def __call__(self, x: Array) -> Array:
        """y, of x's shape and dtype."""
        x = checks.data("x", x)
        self._last = y = self._y.lend(x.shape, x.dtype)
        self._done_before = False
        self.function(x, y)
        return y

    def done_before(self, y: Array) -> None:
        """The layer before computes this one in its own pass, there and back: `backward` hands dy on to it."""
        self._last, self._done_before = y, True

    def backward(self, dy: Array) -> Array:
        """dx = dy · f', of the same shape and dtype."""
        y: Array = checks.called(self._last)
        dy = checks.data("dy", dy)
        checks.same("dy", dy, y)
        if self._done_before:
            return dy
        dx = self._dx.lend(dy.shape, dy.dtype)
        self.gradient(dy, y, dx)
        return dx

    def __getstate__(self) -> dict[str, Any]:
        """Without the last batch: a copy or a pickle does not carry it."""
        return self.__dict__ | {"_last": None}

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class ReLU(Activation):
    """y = max(x, 0)."""

    def function(self, x: Array, y: Array) -> None:
        """max(x, 0)."""
        np.maximum(x, 0, out=y)

    def gradient(self, dy: Array, y: Array, dx: Array) -> None:
        """dy where y > 0, else 0."""
        np.sign(y, out=dx)
        np.multiply(dx, dy, out=dx)


class LeakyReLU(Activation):
    """y = x where x > 0, else negative_slope · x.

    Parameters
    ----------
    negative_slope : float from 0 to 1
    """

    def __init__(self, negative_slope: float = 0.01) -> None:
        super().__init__()
        self.negative_slope = checks.number_in("negative_slope", negative_slope, 0, 1)

    def function(self, x: Array, y: Array) -> None:
        """max(x, negative_slope · x)."""
        if self.negative_slope:
            np.multiply(x, self.negative_slope, out=y)
            np.maximum(x, y, out=y)
        else:  # 0 · -∞ would be NaN
            np.maximum(x, 0, out=y)

    def gradient(self, dy: Array, y: Array, dx: Array) -> None:
        """dy where y > 0, else negative_slope · dy."""
        np.sign(y, out=dx)
        np.maximum(dx, self.negative_slope, out=dx)
        np.multiply(dx, dy, out=dx)

    def __repr__(self) -> str:
        return f"LeakyReLU({self.negative_slope})"


class Sigmoid(Activation):
    """y = 1 / (1 + exp(-x))."""

    # The largest number whose exponential, and its reciprocal, are still normal numbers.
    LARGEST = {checks.F32: 87.0, checks.F64: 708.0}  # noqa: RUF012  (never changed)

    def function(self, x: Array, y: Array) -> None:
        """1 / (1 + exp(-x))."""
        np.negative(x, out=y)
        np.minimum(y, self.LARGEST[y.dtype], out=y)
        np.exp(y, out=y)
        np.add(y, 1, out=y)
        np.reciprocal(y, out=y)

    def gradient(self, dy: Array, y: Array, dx: Array) -> None:
        """dy · y · (1 - y)."""
        np.subtract(1, y, out=dx)
        np.multiply(dx, y, out=dx)
        np.multiply(dx, dy, out=dx)


class Tanh(Activation):
    """y = tanh(x)."""

    def function(self, x: Array, y: Array) -> None:
        """tanh(x)."""
        np.tanh(x, out=y)

    def gradient(self, dy: Array, y: Array, dx: Array) -> None:
        """dy · (1 - y²)."""
        np.multiply(y, y, out=dx)
        np.subtract(1, dx, out=dx)
        np.multiply(dx, dy, out=dx)
