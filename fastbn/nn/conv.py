"""Conv2d: a convolution over images, as a matrix product."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from .. import checks
from ..statistics import moments
from .batch_norm import BatchNorm
from .buffers import Buffer
from .initial import weights
from .weighted import Weighted
from .windows import Windows

Array = np.ndarray[Any, np.dtype[Any]]

# The windows of so many images are laid out at once as fit into this many bytes: what a core's cache holds beside the
# weights. It also bounds the memory, which the windows of a whole batch would multiply by the kernel's size.
BLOCK = 1 << 21


class Conv2d(Weighted):
    """y[n, o, h, w] = bias[o] + Σ weight[o, c, i, j] · x[n, c, h·stride + i - padding, w·stride + j - padding].

    Each window of x becomes a row of a matrix ("im2col"; Chellapilla, Puri and Simard 2006, section 2.1), a few images
    at a time, and the rows are multiplied by the weights. Channels-last images are the faster, as a window's rows are
    then runs in memory, and one product serves several images.

    In a `Sequential`, a Conv2d directly before a `BatchNorm` loses its bias, as a `Linear` does.

    Parameters
    ----------
    in_channels, out_channels : int
    kernel_size, stride : int or (int, int)
        The pairs are height and width.
    padding : int or (int, int)
        Zeros on each side of the image.
    bias : bool
        Whether there is one. It starts at 0.
    init : {"he", "glorot"} or float
        How the weights start, as in `Linear`; a window's size counts as in_features, and out_channels times the
        kernel's as out_features.
    rng : numpy.random.Generator or int, optional
        Where the weights are drawn from.
    dtype : {float32, float64}
        Of the parameters, and of the data that the layer takes.
    axis : 1 or -1
        The channel axis of the images: NCHW or NHWC. The weights are the same for both.

    Attributes
    ----------
    weight : ndarray, shape (out_channels, in_channels, kernel height, kernel width)
    bias : ndarray, shape (out_channels,), or None
    grad_weight, grad_bias : ndarray or None
        Of the last `backward`, of the same shapes.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what it was and what it must be.
    """

    weight: Array

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        *,
        bias: bool = True,
        init: str | float = "he",
        rng: np.random.Generator | int | None = None,
        dtype: Any = np.float32,
        axis: int = 1,
    ) -> None:
        self.in_channels = checks.positive("in_channels", in_channels)
        self.out_channels = checks.positive("out_channels", out_channels)
        self.kernel_size = height, width = checks.pair("kernel_size", kernel_size, 1)
        self.stride = checks.pair("stride", stride, 1)
        self.padding = checks.pair("padding", padding, 0)
        self.axis = checks.image_axis(axis)
        self.dtype = checks.parameter_dtype(dtype)
        shape = (out_channels, in_channels, height, width)
        fans = in_channels * height * width, out_channels * height * width
        self.weight = weights(init, shape, *fans, np.random.default_rng(rng), self.dtype)
        self.bias = np.zeros(out_channels, self.dtype) if checks.flag("bias", bias) else None
        self.grad_weight = self.grad_bias = None
        self._windows = Windows(self.kernel_size, self.stride, self.padding, self.axis)
        # A window of one element, and every element its window: x already is the matrix.
        self._pointwise = self.kernel_size == self.stride == (1, 1) and self.padding == (0, 0)
        self._x: Array | None = None
        self._y, self._dx, self._matrix, self._padded = Buffer(), Buffer(), Buffer(), Buffer()
        self._weight, self._places, self._part, self._gradient = Buffer(), Buffer(), Buffer(), Buffer()

    def __call__(self, x: Array) -> Array:
        """y: the channels are out_channels. `backward` reads x again: leave it as it is until then.

        Parameters
        ----------
        x : ndarray of the layer's dtype, shape (batch, in_channels, height, width), or channels last
        """
        checks.of_layer("x", x, self.dtype)
        checks.images("x", x, self.in_channels, self.axis)
        size = self._windows.size(x)
        self._x = x
        y = self._y.lend(self._windows.shape(len(x), self.out_channels, size), self.dtype)
        weight = self._flat_weight()
        bias = self.bias
        if bias is not None:  # channels last, for a whole row of the image: NumPy is slow in short runs
            bias = bias[:, np.newaxis, np.newaxis] if self.axis == 1 else np.tile(bias, y.shape[2])
        for block, matrix in self._matrices(x, size):
            part = y[block]
            if self.axis == 1:
                np.matmul(weight, matrix, out=part.reshape(len(matrix), self.out_channels, -1))
            else:
                np.matmul(matrix, weight.T, out=part.reshape(len(matrix), self.out_channels))
            if bias is not None:  # while the block is in cache
                part = part if self.axis == 1 else part.reshape(-1, len(bias))
                np.add(part, bias, out=part)
        return y

    def backward(self, dy: Array) -> Array:
        """dx, leaving `grad_weight` and `grad_bias`.

        Parameters
        ----------
        dy : ndarray of y's shape and dtype
        """
        self.parameter_gradients(dy)
        x, windows, (height, width) = self._last(), self._windows, self.kernel_size
        size = windows.size(x)
        dx = self._dx.lend(x.shape, self.dtype)
        places = self._places.lend((height, width, self.out_channels, self.in_channels), self.dtype)
        np.copyto(places, self.weight.transpose(2, 3, 0, 1))
        if self._pointwise:
            self._mix(dy, places[0, 0], dx)
            return dx
        parts = self._part.lend(windows.shape(self._images(x, size), self.in_channels, size), self.dtype)
        for block in self._blocks(x, size):
            # dx sums over the places of the kernel what dy gives to the element that stood there in each window.
            part = parts[: len(dy[block])]
            padded = self._room(x, len(part))
            whole = dx[block] if padded is None else padded
            whole.fill(0)
            for i, j in np.ndindex(height, width):
                self._mix(dy[block], places[i, j], part)
                here = windows.at(whole, i, j, size)
                np.add(here, part, out=here)
            if padded is not None:
                np.copyto(dx[block], windows.inside(padded))
        return dx

    def parameter_gradients(self, dy: Array) -> None:
        """`grad_weight` and `grad_bias`."""
        x = self._last()
        size = self._windows.size(x)
        checks.of_layer("dy", dy, self.dtype)
        checks.shape_of("dy", dy, self._windows.shape(len(x), self.out_channels, size))
        part, total = self._gradient.lend((2, self.out_channels, self.weight[0].size), self.dtype)
        total.fill(0)
        for block, matrix in self._matrices(x, size):
            if self.axis == 1:
                for one, rows in zip(dy[block], matrix, strict=True):
                    np.matmul(one.reshape(self.out_channels, -1), rows.T, out=part)
                    np.add(total, part, out=total)
            else:
                np.matmul(dy[block].reshape(-1, self.out_channels).T, matrix, out=part)
                np.add(total, part, out=total)
        if self.grad_weight is None:
            self.grad_weight = np.empty_like(self.weight)
        ordered = self._in_matrix_order(self.grad_weight)
        np.copyto(ordered, total.reshape(ordered.shape))
        if self.bias is not None:
            if self.grad_bias is None:
                self.grad_bias = np.empty_like(self.bias)
            sums = moments(dy, axis=self.axis)
            np.multiply(sums.mean, sums.count, out=self.grad_bias, casting="same_kind")

    def drop_bias(self, following: BatchNorm) -> None:
        """Leave the bias to the BatchNorm that follows; what the two compute together stays the same."""
        checks.followed(self, self.out_channels, self.axis, following)
        super().drop_bias(following)

    def _last(self) -> Array:
        x: Array = checks.called(self._x)
        return x

    # A window as a row of the matrix is (kernel height, kernel width, in_channels) channels last, so that its pieces
    # are runs of memory, and (in_channels, kernel height, kernel width) channels first.

    def _in_matrix_order(self, weight: Array) -> Array:
        return weight if self.axis == 1 else weight.transpose(0, 2, 3, 1)

    def _flat_weight(self) -> Array:
        """The weights, (out_channels, a window's elements)."""
        weight = self._in_matrix_order(self.weight)
        if not weight.flags.c_contiguous:
            memory = self._weight.lend(weight.shape, self.dtype)
            np.copyto(memory, weight)
            weight = memory
        return weight.reshape(self.out_channels, -1)

    def _images(self, x: Array, size: tuple[int, int]) -> int:
        """How many images make a block."""
        window: int = self.weight[0].nbytes
        return min(len(x), max(1, BLOCK // (window * size[0] * size[1])))

    def _blocks(self, x: Array, size: tuple[int, int]) -> Iterator[slice]:
        step = max(1, self._images(x, size))
        for start in range(0, len(x), step):
            yield slice(start, min(start + step, len(x)))

    def _matrices(self, x: Array, size: tuple[int, int]) -> Iterator[tuple[slice, Array]]:
        """Blocks of images, and the windows of each.

        Channels last: (windows of the block, a window's elements); channels first: (images, a window's elements, an
        image's windows).
        """
        if self._pointwise and x.flags.c_contiguous and len(x):
            shape = (len(x), self.in_channels, -1) if self.axis == 1 else (-1, self.in_channels)
            yield slice(None), x.reshape(shape)
            return
        windows, images = self._windows, self._images(x, size)
        padded = self._room(x, images)
        if padded is not None:
            padded.fill(0)
        (height, width), (down, across) = self.kernel_size, self.stride
        if self.axis == 1:
            memory = self._matrix.lend((images, self.in_channels, height, width, *size), self.dtype)
        else:
            memory = self._matrix.lend((images, *size, height, width, self.in_channels), self.dtype)
        for block in self._blocks(x, size):
            source = x[block]
            matrix = memory[: len(source)]
            if padded is not None:
                np.copyto(windows.inside(padded[: len(source)]), source)
                source = padded[: len(source)]
            if self.axis == 1:
                seen = sliding_window_view(source, self.kernel_size, axis=(2, 3))
                np.copyto(matrix, seen[:, :, ::down, ::across].transpose(0, 1, 4, 5, 2, 3))
                yield block, matrix.reshape(len(source), -1, size[0] * size[1])
            else:
                if self.in_channels == 1:  # no runs to copy: the windows' places one by one
                    for i, j in np.ndindex(height, width):
                        np.copyto(matrix[:, :, :, i, j], windows.at(source, i, j, size))
                else:
                    seen = sliding_window_view(source, self.kernel_size, axis=(1, 2))
                    np.copyto(matrix, seen[:, ::down, ::across].transpose(0, 1, 2, 4, 5, 3))
                yield block, matrix.reshape(len(source) * size[0] * size[1], -1)

    def _room(self, x: Array, images: int) -> Array | None:
        """Memory for so many padded images, with whatever numbers are in it; None where there is no padding."""
        if self.padding == (0, 0):
            return None
        shape = self._windows.shape(images, self.in_channels, self._windows.padded(x))
        return self._padded.lend(shape, self.dtype)

    def _mix(self, dy: Array, weight: Array, out: Array) -> None:
        """out = the product of each position's channels of dy and weight, (out_channels, in_channels)."""
        if self.axis == 1:
            rows, channels, height, width = dy.shape
            flat = out.reshape(rows, self.in_channels, height * width)
            np.matmul(weight.T, dy.reshape(rows, channels, height * width), out=flat)
        else:
            np.matmul(dy.reshape(-1, self.out_channels), weight, out=out.reshape(-1, self.in_channels))

    def __repr__(self) -> str:
        return (
            f"Conv2d({self.in_channels}, {self.out_channels}, {self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, bias={self.bias is not None}, dtype={self.dtype}, axis={self.axis})"
        )
