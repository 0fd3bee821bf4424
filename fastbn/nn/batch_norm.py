"""fastbn.BatchNorm as a layer of a network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from .. import backends, checks, ghost, layers
from .activations import ReLU
from .buffers import Buffer

Array = np.ndarray[Any, np.dtype[Any]]

# Arrays of so many elements have a team of threads, where there is one. On smaller ones, which take a few tenths of a
# millisecond at most, the caller's thread works alone: np.matmul, before and after, has threads of its own in the BLAS.
# Both kinds spin for milliseconds after their work, each on the processor that the other wants.
TEAM = 1 << 18
SMALL = 1 << 12  # which no team would do anyway


class BatchNorm(layers.BatchNorm):
    """`fastbn.BatchNorm` that keeps its output and gradient buffers and yields its parameters: a `Layer`.

    Its place in the list decides what is normalized: before the activation (as in the paper, section 3.2) or after it.

    Parameters
    ----------
    num_features : int
    **options
        As for `fastbn.BatchNorm`.
    """

    def __init__(self, num_features: int, **options: Any) -> None:
        super().__init__(num_features, **options)
        self._y, self._dx = Buffer(), Buffer()

    def __call__(self, x: Any, residual: Any = None, *, out: Array | None = None) -> Array:
        """y, in `out` or in the layer's own memory. `backward` reads x again: leave it as it is until then."""
        x = checks.data("x", x)
        with _threads(x):
            return super().__call__(x, residual, out=_own(self._y, x) if out is None else out)

    def joins(self, following: Any) -> bool:
        """Whether what follows is a ReLU that this layer can compute in its own pass over memory."""
        return type(following) is ReLU and type(self) is BatchNorm and self.activation is None

    def with_relu(self, x: Any, relu: Any) -> Array:
        """``relu(self(x))`` in one pass; the `backward` of both may follow. To the same bits, where x has no NaN."""
        try:
            self.activation = "relu"
            y = self(x)
        finally:
            self.activation = None
        relu.done_before(y)
        return y

    def backward(self, dy: Any, *, out: Array | None = None, out_residual: Array | None = None) -> Array:
        """dx, in `out` or in the layer's own memory, leaving `grad_weight`, `grad_bias` (and `grad_residual`)."""
        dy = checks.data("dy", dy)
        with _threads(dy):
            return super().backward(dy, out=_own(self._dx, dy) if out is None else out, out_residual=out_residual)

    def parameter_gradients(self, dy: Any) -> None:
        """`grad_weight` and `grad_bias`."""
        self.backward(dy)

    def parameters(self) -> Iterator[tuple[Array, Array | None]]:
        """Weight and bias, where there are any and the layer is not frozen."""
        if not self.trainable:
            return
        if self.weight is not None:
            yield self.weight, self.grad_weight
        if self.bias is not None:
            yield self.bias, self.grad_bias


class GhostBatchNorm(BatchNorm, ghost.GhostBatchNorm):
    """`fastbn.GhostBatchNorm` as a layer of a network, with buffers and parameters as `BatchNorm` has them.

    The other kin have no such form: a mask is not passed from layer to layer, and in a `Sequential` the layer before an
    `InplaceBatchNorm` may still need what that would write over. They are used by hand.

    Parameters
    ----------
    num_features : int
    **options
        As for `fastbn.GhostBatchNorm`: `virtual_batch_size`, and those of `BatchNorm`.
    """


def _own(buffer: Buffer, like: Array) -> Array | None:
    """The buffer's memory for data in C order; for other orders None, so that the result follows the data's."""
    return buffer.lend(like.shape, like.dtype) if like.flags.c_contiguous else None


def _threads(x: Array) -> AbstractContextManager[None]:
    """The settings for an array of this size."""
    return backends.config_context(num_threads=1) if SMALL < x.size < TEAM else nullcontext()
