"""Losses: a number from a network's output and what it should have been, and the gradient to start `backward` with."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import checks
from .buffers import Buffer

Array = np.ndarray[Any, np.dtype[Any]]


class SoftmaxCrossEntropy:
    """The mean over the batch of -log softmax(logits)[label].

    Call it for the loss, then `backward` for its gradient with respect to the logits.
    """

    def __init__(self) -> None:
        self._softmax, self._row, self._picked, self._index = Buffer(), Buffer(), Buffer(), Buffer()
        self._starts = np.empty(0, np.intp)
        self._done: tuple[Array, Array] | None = None

    def __call__(self, logits: Array, labels: Array) -> float:
        """The loss.

        Parameters
        ----------
        logits : ndarray of float32 or float64, shape (batch, classes)
        labels : ndarray of integers from 0 to classes - 1, shape (batch,)

        Raises
        ------
        TypeError, ValueError
            Naming the argument, what it was and what it must be.
        """
        logits = checks.data("logits", logits)
        if logits.ndim != 2 or not logits.size:
            raise ValueError(
                f"logits has shape {logits.shape}, and must have shape (batch, classes), neither of them 0"
            )
        batch, classes = logits.shape
        labels = _labels(labels, batch, classes)
        softmax = self._softmax.lend(logits.shape, logits.dtype)
        row = self._row.lend((batch, 1), logits.dtype)
        picked = self._picked.lend((batch,), logits.dtype)
        index = self._index.lend((batch,), labels.dtype)  # of each row's label, in the flat array

        if len(self._starts) != batch or self._starts[-1] != (batch - 1) * classes:
            self._starts = np.arange(0, batch * classes, classes, dtype=np.intp)
        np.add(self._starts, labels, out=index)

        # With each row's maximum taken away no exponential overflows, and one is 1.
        np.maximum.reduce(logits, axis=1, keepdims=True, out=row)
        np.subtract(logits, row, out=softmax)
        # mode: "raise", the default, would write to a new array first.
        np.take(softmax.ravel(), index, out=picked, mode="clip")
        np.exp(softmax, out=softmax)
        np.add.reduce(softmax, axis=1, keepdims=True, out=row)
        np.divide(softmax, row, out=softmax)
        np.log(row, out=row)
        self._done = softmax, index
        loss: float = (float(np.add.reduce(row, axis=None)) - float(np.add.reduce(picked))) / batch
        return loss

    def backward(self) -> Array:
        """The gradient of the last loss with respect to the logits: (softmax - one_hot(labels)) / batch.

        Returns
        -------
        dlogits : ndarray of the logits' dtype, shape (batch, classes)
        """
        if self._done is None:
            raise ValueError("backward has nothing to go back over: call the loss first, and backward once after it")
        softmax, index = self._done
        self._done = None  # the softmax becomes the gradient in place
        softmax.ravel()[index] -= 1
        np.multiply(softmax, 1 / len(softmax), out=softmax)
        return softmax


def _labels(given: Any, batch: int, classes: int) -> Array:
    labels: Array = np.asarray(given)
    if labels.dtype.kind not in "iu":
        raise TypeError(f"labels has dtype {labels.dtype}, and must be integers")
    if labels.shape != (batch,):
        raise ValueError(f"labels has shape {labels.shape}, and must have shape ({batch},): one a row of logits")
    if labels.dtype != np.intp:
        labels = labels.astype(np.intp)
    # Read as unsigned, a negative label is a huge one.
    if np.maximum.reduce(labels.view(np.uintp)) >= classes:
        raise ValueError(f"labels goes from {labels.min()} to {labels.max()}, and must be from 0 to {classes - 1}")
    return labels
