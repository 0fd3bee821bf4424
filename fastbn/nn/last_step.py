"""LastStep: the last of a sequence's states, for a classifier."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import checks
from .buffers import Buffer
from .layer import Layer

Array = np.ndarray[Any, np.dtype[Any]]


class LastStep(Layer):
    """A sequence's last step: (steps, batch, features) to (batch, features), between a recurrent layer and a `Linear`.

    Parameters
    ----------
    batch_first : bool
        Whether sequences are (batch, steps, features).
    """

    def __init__(self, *, batch_first: bool = False) -> None:
        self.batch_first = checks.flag("batch_first", batch_first)
        self._shape: tuple[int, ...] | None = None
        self._y, self._dx = Buffer(), Buffer()

    def __call__(self, x: Array) -> Array:
        """y, of x's dtype, shape (batch, features).

        Parameters
        ----------
        x : ndarray, shape (steps, batch, features), or (batch, steps, features) if `batch_first`
        """
        x = checks.data("x", x)
        checks.sequence("x", x, None, self.batch_first)
        self._shape = x.shape
        last = x[:, -1] if self.batch_first else x[-1]
        y = self._y.lend(last.shape, x.dtype)
        np.copyto(y, last)
        return y

    def backward(self, dy: Array) -> Array:
        """dx: dy at the last step, 0 before it.

        Parameters
        ----------
        dy : ndarray, shape (batch, features)
        """
        shape = checks.called(self._shape)
        dy = checks.data("dy", dy)
        batch, steps = (0, 1) if self.batch_first else (1, 0)
        checks.shape_of("dy", dy, (shape[batch], shape[2]))
        # Time first in memory, as the recurrent layers have it; rows in one axis, so that a smaller batch fits.
        dx = self._dx.lend((shape[0] * shape[1], shape[2]), dy.dtype).reshape(shape[steps], shape[batch], shape[2])
        dx[:-1] = 0
        dx[-1] = dy
        return dx.swapaxes(0, 1) if self.batch_first else dx

    def __repr__(self) -> str:
        return f"LastStep(batch_first={self.batch_first})"
