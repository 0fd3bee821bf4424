"""Pooling: MaxPool2d, AvgPool2d and GlobalAvgPool2d."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import checks
from .buffers import Buffer
from .layer import Layer
from .windows import Windows

Array = np.ndarray[Any, np.dtype[Any]]


class Pool2d(Layer):
    """One number of each window of an image, channel by channel. A new one is a subclass with `pool` and `spread`.

    Windows that do not fit into the image any more are left out.

    Parameters
    ----------
    kernel_size : int or (int, int)
        A window's height and width.
    stride : int or (int, int), optional
        From one window to the next; kernel_size if not given.
    axis : 1 or -1
        The channel axis of the images: NCHW or NHWC.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what it was and what it must be.
    """

    def __init__(
        self, kernel_size: int | tuple[int, int], stride: int | tuple[int, int] | None = None, *, axis: int = 1
    ) -> None:
        self.kernel_size = checks.pair("kernel_size", kernel_size, 1)
        self.stride = self.kernel_size if stride is None else checks.pair("stride", stride, 1)
        self.axis = checks.image_axis(axis)
        self._windows = Windows(self.kernel_size, self.stride, (0, 0), self.axis)
        self._last: tuple[tuple[int, ...], Array] | None = None  # x's shape, and y
        self._y, self._dx, self._part = Buffer(), Buffer(), Buffer()

    def pool(self, places: list[Array], y: Array) -> None:
        """Write to y the pooled numbers; places: the first elements of all windows, their second elements, ..."""
        raise NotImplementedError

    def spread(self, dy: Array, place: int, part: Array) -> None:
        """Write to part what of dy belongs to this element of each window."""
        raise NotImplementedError

    def __call__(self, x: Array) -> Array:
        """y, of x's dtype, with a row and a column for each window.

        Parameters
        ----------
        x : ndarray, shape (batch, channels, height, width), or channels last
        """
        x = checks.data("x", x)
        checks.images("x", x, None, self.axis)
        size = self._windows.size(x)
        y = self._y.lend(self._windows.shape(len(x), x.shape[self.axis], size), x.dtype)
        self.pool([self._windows.at(x, i, j, size) for i, j in np.ndindex(self.kernel_size)], y)
        self._last = x.shape, y
        return y

    def backward(self, dy: Array) -> Array:
        """dx of the last call.

        Parameters
        ----------
        dy : ndarray of y's shape and dtype
        """
        shape, y = checks.called(self._last)
        dy = checks.data("dy", dy)
        checks.shape_of("dy", dy, y.shape)
        size = y.shape[2:] if self.axis == 1 else y.shape[1:3]
        dx, part = self._dx.lend(shape, dy.dtype), self._part.lend(dy.shape, dy.dtype)
        dx.fill(0)  # where there are no windows, and to begin the sums where they overlap
        for place, (i, j) in enumerate(np.ndindex(self.kernel_size)):
            self.spread(dy, place, part)
            here = self._windows.at(dx, i, j, size)
            np.add(here, part, out=here)
        return dx

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.kernel_size}, stride={self.stride}, axis={self.axis})"


class MaxPool2d(Pool2d):
    """The largest number of each window. The gradient goes to where it stood, or stood first."""

    def __init__(
        self, kernel_size: int | tuple[int, int], stride: int | tuple[int, int] | None = None, *, axis: int = 1
    ) -> None:
        super().__init__(kernel_size, stride, axis=axis)
        elements = self.kernel_size[0] * self.kernel_size[1]
        self._place_dtype = np.dtype(np.uint8 if elements <= 256 else np.uint32)
        self._argmax, self._candidate, self._flag = Buffer(), Buffer(), Buffer()

    def pool(self, places: list[Array], y: Array) -> None:
        """The running maximum, and the place where it last grew."""
        argmax = self._argmax.lend(y.shape, self._place_dtype)
        candidate = self._candidate.lend(y.shape, self._place_dtype)
        grows = self._flag.lend(y.shape, np.dtype(bool))
        argmax.fill(0)
        np.copyto(y, places[0])
        for place, values in enumerate(places[1:], 1):
            np.greater(values, y, out=grows)
            np.maximum(values, y, out=y)  # keeps a NaN
            np.multiply(grows, self._place_dtype.type(place), out=candidate)
            np.maximum(argmax, candidate, out=argmax)

    def spread(self, dy: Array, place: int, part: Array) -> None:
        """dy where this is the maximum's place, else 0."""
        argmax = self._argmax.lend(dy.shape, self._place_dtype)
        here = self._flag.lend(dy.shape, np.dtype(bool))
        np.equal(argmax, self._place_dtype.type(place), out=here)
        np.multiply(dy, here, out=part)


class AvgPool2d(Pool2d):
    """The mean of each window."""

    def pool(self, places: list[Array], y: Array) -> None:
        """The sum by the number of elements."""
        np.copyto(y, places[0])
        for values in places[1:]:
            np.add(y, values, out=y)
        np.multiply(y, 1 / len(places), out=y)

    def spread(self, dy: Array, place: int, part: Array) -> None:
        """The same for each element."""
        if place == 0:
            np.multiply(dy, 1 / (self.kernel_size[0] * self.kernel_size[1]), out=part)


class GlobalAvgPool2d(Layer):
    """The mean of each channel over the image: (batch, channels) for a `Linear`, from NCHW and NHWC alike.

    Parameters
    ----------
    axis : 1 or -1
        The channel axis of the images: NCHW or NHWC.

    References
    ----------
    Lin, Chen and Yan (2014), "Network In Network", section 3.2.
    """

    def __init__(self, *, axis: int = 1) -> None:
        self.axis = checks.image_axis(axis)
        self._image = (2, 3) if axis == 1 else (1, 2)
        self._last: tuple[tuple[int, ...], Array] | None = None  # x's shape, and y
        self._y, self._dx, self._ones = Buffer(), Buffer(), Buffer()

    def __call__(self, x: Array) -> Array:
        """y, of x's dtype, shape (batch, channels).

        Parameters
        ----------
        x : ndarray, shape (batch, channels, height, width), or channels last
        """
        x = checks.data("x", x)
        checks.images("x", x, None, self.axis)
        checks.window_fits(x, (1, 1), (x.shape[self._image[0]], x.shape[self._image[1]]))
        y = self._y.lend((len(x), x.shape[self.axis]), x.dtype)
        if self.axis == 1 or not x.flags.c_contiguous:
            np.add.reduce(x, axis=self._image, out=y)
        else:  # a sum over rows of few numbers is slow but as a product
            rows, height, width, channels = x.shape
            ones = self._ones.lend((1, height * width), x.dtype)
            ones.fill(1)
            np.matmul(ones, x.reshape(rows, height * width, channels), out=y.reshape(rows, 1, channels))
        np.multiply(y, 1 / self._pixels(x.shape), out=y)
        self._last = x.shape, y
        return y

    def backward(self, dy: Array) -> Array:
        """dx of the last call.

        Parameters
        ----------
        dy : ndarray of y's shape and dtype
        """
        shape, y = checks.called(self._last)
        dy = checks.data("dy", dy)
        checks.shape_of("dy", dy, y.shape)
        dx = self._dx.lend(shape, dy.dtype)
        np.multiply(np.expand_dims(dy, self._image), 1 / self._pixels(shape), out=dx)
        return dx

    def _pixels(self, shape: tuple[int, ...]) -> int:
        return shape[self._image[0]] * shape[self._image[1]]

    def __repr__(self) -> str:
        return f"GlobalAvgPool2d(axis={self.axis})"
