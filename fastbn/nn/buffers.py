"""Memory that is written anew at every step."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


class Buffer:
    """An array that is allocated once and lent out at every step; a smaller batch gets its first rows."""

    __slots__ = ("_lent", "_memory")

    def __init__(self) -> None:
        self._memory = self._lent = np.empty((0, 0), np.float32)

    def __reduce__(self) -> tuple[type[Buffer], tuple[()]]:
        """A copy or a pickle begins without memory."""
        return Buffer, ()

    def lend(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """An array of this shape and dtype, with whatever numbers are left in it. The first axis is the batch's."""
        lent = self._lent
        if lent.shape != shape or lent.dtype != dtype:
            if not shape:
                return np.empty(shape, dtype)
            memory = self._memory
            if memory.shape[1:] != shape[1:] or len(memory) < shape[0] or memory.dtype != dtype:
                memory = self._memory = np.empty(shape, dtype)
            lent = self._lent = memory[: shape[0]]
        return lent
