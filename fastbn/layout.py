"""Any array and channel axis → one (outer, channels, inner) view of its memory.

The kernels know two shapes: planes (inner > 1) and rows (inner == 1). Which one an array is follows its *memory*, not
its labels: an NCHW-shaped view of channels-last memory is served as rows, and the output gets the input's memory
order. Of inputs x, only one with gaps, negative or zero strides is copied.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import numpy as np

from . import checks
from .memory import output_like

Array = np.ndarray[Any, np.dtype[Any]]


class Layout(NamedTuple):
    """How an array of a given shape lies in memory.

    Attributes
    ----------
    outer, channels, inner : int
        The array's memory, read in order, is (outer, channels, inner).
    order : tuple of int or None
        The axes from the slowest to the fastest in memory; None where that is C order.
    inverse : tuple of int or None
        The permutation that undoes `order`.
    """

    outer: int
    channels: int
    inner: int
    order: tuple[int, ...] | None
    inverse: tuple[int, ...] | None

    @property
    def values(self) -> int:
        """Values a channel."""
        return self.outer * self.inner

    def to_memory(self, array: Array) -> Array:
        """The array with its axes in memory order: C-contiguous if its layout is this one."""
        return array if self.order is None else array.transpose(self.order)

    def from_memory(self, array: Array) -> Array:
        """The inverse of `to_memory`."""
        return array if self.inverse is None else array.transpose(self.inverse)


@lru_cache(maxsize=1024)
def _layout(shape: tuple[int, ...], strides: tuple[int, ...] | None, itemsize: int, axis: int) -> Layout | None:
    """The layout of an array with these strides (None: C order), or None where its memory has gaps."""
    axis = checks.channel_axis(axis, shape)
    ndim = len(shape)
    order = tuple(range(ndim))
    if strides is not None:
        # Axes of length 1 have meaningless strides, and may stand anywhere: last.
        order = tuple(sorted(order, key=lambda d: (shape[d] == 1, -strides[d])))
        expected = itemsize
        for d in reversed(order):
            if shape[d] == 1:
                continue
            if strides[d] != expected:
                return None
            expected *= shape[d]
    channels = shape[axis]
    place = order.index(axis)
    outer = prod(shape[d] for d in order[:place])
    inner = prod(shape[d] for d in order[place + 1 :])
    if channels == 1:  # one channel is one run, wherever its axis stands
        outer, inner = 1, outer * inner
    if order == tuple(range(ndim)):
        return Layout(outer, channels, inner, None, None)
    return Layout(outer, channels, inner, order, tuple(order.index(d) for d in range(ndim)))


@lru_cache(maxsize=1024)
def in_order(outer: int, channels: int, inner: int) -> Layout:
    """The layout of an array in C order."""
    return Layout(outer, channels, inner, None, None)


def canonical(name: str, x: Any, axis: int) -> tuple[Array, Layout]:
    """Checks an input array and finds its layout.

    Parameters
    ----------
    name : str
        The argument's name, for the error.
    x : array of float16, bfloat16, float32 or float64, 2 to 5 axes
    axis : int
        The channel axis.

    Returns
    -------
    memory : ndarray
        The array with its axes in memory order, C-contiguous: the array's own memory wherever it has no gaps.
    layout : Layout

    Raises
    ------
    TypeError, ValueError
        Where the array's kind, dtype, rank or `axis` is not served.
    """
    x = checks.data(name, x)
    if type(axis) is not int:  # before it is looked up in the cache
        axis = checks.integer("axis", axis)
    layout = _layout(x.shape, None if x.flags.c_contiguous else x.strides, x.itemsize, axis)
    if layout is None:
        x = x.copy(order="K")
        layout = _layout(x.shape, x.strides, x.itemsize, axis)
        if layout is None:  # "K" could not undo the strides (overlapping windows): plain C order can
            x = np.ascontiguousarray(x)
            layout = _layout(x.shape, None, x.itemsize, axis)
            assert layout is not None
    return layout.to_memory(x), layout


def like(name: str, array: Any, x: Array, layout: Layout) -> Array:
    """`array`, which must have x's shape and dtype, in memory order; copied if its own layout is another one.

    `x` is in memory order, as `canonical` returned it.
    """
    array = checks.data(name, array)
    checks.same(name, array, layout.from_memory(x))
    memory = layout.to_memory(array)
    return memory if memory.flags.c_contiguous else np.ascontiguousarray(memory)


def output(name: str, out: Any, x: Array, layout: Layout) -> tuple[Array, Array]:
    """Where a kernel writes: `(memory, result)`, x in memory order.

    `result` is what the caller gets: a new array in x's memory order, or `out`. `memory` is the C-contiguous array that
    the kernel fills; it shares memory with `result` unless `out` lies in memory in another way than x, and then
    `finish` copies.
    """
    if out is None:
        memory = output_like(x)
        return memory, layout.from_memory(memory)
    checks.output(name, out, layout.from_memory(x))
    memory = layout.to_memory(out)
    return (memory if memory.flags.c_contiguous else output_like(x)), out


def usual_output(given: Array, out: Array | None, layout: Layout) -> tuple[Array, Array]:
    """The same where `given`, x as the caller has it, has no gaps, and `out` is known to lie in memory as it does."""
    result = output_like(given) if out is None else out
    return layout.to_memory(result), result


def finish(memory: Array, result: Array, layout: Layout) -> Array:
    """Brings what a kernel wrote into `result`, where that has a memory order of its own."""
    if not layout.to_memory(result).flags.c_contiguous:
        np.copyto(result, layout.from_memory(memory))
    return result


class _At:
    """What NumPy makes an array of."""

    def __init__(self, interface: dict[str, Any]) -> None:
        self.__array_interface__ = interface


def at_address(
    address: int, shape: tuple[int, ...], dtype: Any, strides: tuple[int, ...] | None = None, read_only: bool = False
) -> Array:
    """An array over memory that NumPy does not own, and that may be a GPU's."""
    about = {"data": (address, read_only), "shape": shape, "strides": strides, "typestr": dtype.str, "version": 3}
    return np.asarray(_At(about))
