"""Flatten: images to rows, for a Linear."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from .. import checks
from .buffers import Buffer
from .layer import Layer

Array = np.ndarray[Any, np.dtype[Any]]


class Flatten(Layer):
    """(batch, channels, ...) to (batch, features), the features always in the order of channels first.

    A `Linear` after it therefore has the same weights, torch's, whether the images are NCHW or NHWC. Channels last
    that costs a copy; channels first, y is a view of x, and dx one of dy, where they are contiguous.

    Parameters
    ----------
    axis : 1 or -1
        The channel axis of the images.
    """

    def __init__(self, *, axis: int = 1) -> None:
        self.axis = checks.image_axis(axis)
        self._shape: tuple[int, ...] | None = None
        self._y, self._dx = Buffer(), Buffer()

    def __call__(self, x: Array) -> Array:
        """y, of x's dtype, shape (batch, features).

        Parameters
        ----------
        x : ndarray of at least 2 axes
        """
        x = checks.data("x", x)
        checks.least_axes("x", x, 2)
        self._shape = x.shape
        flat = len(x), prod(x.shape[1:])
        first = np.moveaxis(x, self.axis, 1)
        if first.flags.c_contiguous:
            return first.reshape(flat)
        y = self._y.lend(flat, x.dtype)
        np.copyto(y.reshape(first.shape), first)
        return y

    def backward(self, dy: Array) -> Array:
        """dx, of the shape that x had.

        Parameters
        ----------
        dy : ndarray, shape (batch, features)
        """
        shape = checks.called(self._shape)
        dy = checks.data("dy", dy)
        checks.shape_of("dy", dy, (shape[0], prod(shape[1:])))
        if self.axis == 1 and dy.flags.c_contiguous:
            return dy.reshape(shape)
        dx = self._dx.lend(shape, dy.dtype)
        first = np.moveaxis(dx, self.axis, 1)
        np.copyto(first, dy.reshape(first.shape))
        return dx

    def __repr__(self) -> str:
        return f"Flatten(axis={self.axis})"
