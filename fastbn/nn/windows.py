"""Windows: the rectangles of an image that a convolution or a pooling looks at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import checks

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class Windows:
    """Rectangles of one size at regular distances, each pair in the order height, width.

    Attributes
    ----------
    kernel, stride, padding : (int, int)
        A window's size, from one to the next, and the zeros on each side of the image.
    axis : 1 or -1
        The channel axis of the images: NCHW or NHWC.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    axis: int

    def size(self, x: Array) -> tuple[int, int]:
        """How many windows x's images have, down and across; an error if there is none."""
        height, width = self.padded(x)
        checks.window_fits(x, self.kernel, (height, width))
        return (height - self.kernel[0]) // self.stride[0] + 1, (width - self.kernel[1]) // self.stride[1] + 1

    def padded(self, x: Array) -> tuple[int, int]:
        """The height and width of x's images with their padding."""
        height, width = x.shape[2:] if self.axis == 1 else x.shape[1:3]
        return height + 2 * self.padding[0], width + 2 * self.padding[1]

    def shape(self, rows: int, channels: int, size: tuple[int, int]) -> tuple[int, ...]:
        """The shape of `rows` images with these channels."""
        return (rows, channels, *size) if self.axis == 1 else (rows, *size, channels)

    def at(self, x: Array, i: int, j: int, size: tuple[int, int]) -> Array:
        """The elements at place (i, j) of every window, of shape `shape(rows, channels, size)`: a view of padded x."""
        down = slice(i, i + self.stride[0] * (size[0] - 1) + 1, self.stride[0])
        across = slice(j, j + self.stride[1] * (size[1] - 1) + 1, self.stride[1])
        return x[:, :, down, across] if self.axis == 1 else x[:, down, across]

    def inside(self, padded: Array) -> Array:
        """Padded images without their padding: a view."""
        top, left = self.padding
        height, width = padded.shape[2:] if self.axis == 1 else padded.shape[1:3]
        down, across = slice(top, height - top), slice(left, width - left)
        return padded[:, :, down, across] if self.axis == 1 else padded[:, down, across]
