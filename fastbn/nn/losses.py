"""Losses: a number from a network's output and what it should have been, and the gradient to start `backward` with.

Each is a mean over the batch's rows. With sample weights w it is Σ w·l / Σ w, as in scikit-learn: a weight of 2 counts
for two such rows, and multiplying all weights by a number changes nothing.
"""

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
        self._share = Buffer()
        self._starts = np.empty(0, np.intp)
        self._done: tuple[Array, Array, Array | None] | None = None

    def __call__(self, logits: Array, labels: Array, sample_weight: Any = None) -> float:
        """The loss.

        Parameters
        ----------
        logits : ndarray of float32 or float64, shape (batch, classes)
        labels : ndarray of integers from 0 to classes - 1, shape (batch,)
        sample_weight : array of numbers of at least 0, shape (batch,), optional
            How much each row counts.

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
        share = _shares(sample_weight, batch, logits.dtype, self._share)
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
        self._done = softmax, index, share
        if share is not None:
            return _mean(np.subtract(row[:, 0], picked, out=picked), share)
        loss: float = (float(np.add.reduce(row, axis=None)) - float(np.add.reduce(picked))) / batch
        return loss

    def backward(self) -> Array:
        """The gradient of the last loss with respect to the logits: (softmax - one_hot(labels)) / batch.

        With sample weights each row is multiplied by w / Σ w in place of 1 / batch.

        Returns
        -------
        dlogits : ndarray of the logits' dtype, shape (batch, classes)
        """
        softmax, index, share = checks.loss_called(self._done)
        self._done = None  # the softmax becomes the gradient in place
        softmax.ravel()[index] -= 1
        return _share_out(softmax, share, 1)


class MSELoss:
    """The mean of (predictions - targets)², over the batch and all outputs.

    Call it for the loss, then `backward` for its gradient with respect to the predictions.
    """

    def __init__(self) -> None:
        self._difference, self._square, self._share = Buffer(), Buffer(), Buffer()
        self._done: tuple[Array, Array | None] | None = None

    def __call__(self, predictions: Array, targets: Array, sample_weight: Any = None) -> float:
        """The loss.

        Parameters
        ----------
        predictions : ndarray of float32 or float64, shape (batch, ...)
        targets : ndarray of real numbers
            Of the predictions' shape; shape (batch,) will do for predictions of shape (batch, 1).
        sample_weight : array of numbers of at least 0, shape (batch,), optional
            How much each row counts.

        Raises
        ------
        TypeError, ValueError
            Naming the argument, what it was and what it must be.
        """
        predictions = checks.predictions("predictions", predictions)
        targets = checks.targets("targets", targets, "predictions", predictions)
        share = _shares(sample_weight, len(predictions), predictions.dtype, self._share)
        difference = self._difference.lend(predictions.shape, predictions.dtype)
        square = self._square.lend(predictions.shape, predictions.dtype)
        np.subtract(predictions, targets, out=difference, dtype=predictions.dtype, casting="same_kind")
        np.multiply(difference, difference, out=square)
        self._done = difference, share
        return _mean(square, share)

    def backward(self) -> Array:
        """The gradient of the last loss with respect to the predictions: 2·(predictions - targets) / size.

        With sample weights each row is multiplied by w / Σ w in place of 1 / batch.

        Returns
        -------
        dpredictions : ndarray of the predictions' shape and dtype
        """
        difference, share = checks.loss_called(self._done)
        self._done = None  # the difference becomes the gradient in place
        return _share_out(difference, share, 2 / difference[0].size)


class BCEWithLogitsLoss:
    """The mean of -t·log σ(x) - (1 - t)·log(1 - σ(x)), over the batch and all outputs: logistic regression's loss.

    σ is the sigmoid, x the logits, t the targets. Computed as max(x, 0) - x·t + log(1 + exp(-abs(x))), which neither
    overflows nor cancels. Call it for the loss, then `backward` for its gradient with respect to the logits.
    """

    def __init__(self) -> None:
        self._loss, self._term, self._gradient, self._share = Buffer(), Buffer(), Buffer(), Buffer()
        self._done: tuple[Array, Array | None] | None = None

    def __call__(self, logits: Array, targets: Array, sample_weight: Any = None) -> float:
        """The loss.

        Parameters
        ----------
        logits : ndarray of float32 or float64, shape (batch, ...)
        targets : ndarray of numbers from 0 to 1
            Of the logits' shape; shape (batch,) will do for logits of shape (batch, 1).
        sample_weight : array of numbers of at least 0, shape (batch,), optional
            How much each row counts.

        Raises
        ------
        TypeError, ValueError
            Naming the argument, what it was and what it must be.
        """
        logits = checks.predictions("logits", logits)
        targets = checks.targets("targets", targets, "logits", logits, most=1)
        share = _shares(sample_weight, len(logits), logits.dtype, self._share)
        loss = self._loss.lend(logits.shape, logits.dtype)
        term = self._term.lend(logits.shape, logits.dtype)
        gradient = self._gradient.lend(logits.shape, logits.dtype)

        np.maximum(logits, 0, out=loss)
        np.multiply(logits, targets, out=term, dtype=logits.dtype, casting="same_kind")
        np.subtract(loss, term, out=loss)  # exactly 0 where x and t are on the same side; what is small comes after
        np.abs(logits, out=term)
        np.negative(term, out=term)
        np.exp(term, out=term)
        np.log1p(term, out=gradient)
        np.add(loss, gradient, out=loss)
        # σ(x) = exp(min(x, 0)) / (1 + exp(-|x|)): both exponentials are at most 1.
        np.add(term, 1, out=term)
        np.minimum(logits, 0, out=gradient)
        np.exp(gradient, out=gradient)
        np.divide(gradient, term, out=gradient)
        np.subtract(gradient, targets, out=gradient, dtype=logits.dtype, casting="same_kind")
        self._done = gradient, share
        return _mean(loss, share)

    def backward(self) -> Array:
        """The gradient of the last loss with respect to the logits: (σ(logits) - targets) / size.

        With sample weights each row is multiplied by w / Σ w in place of 1 / batch.

        Returns
        -------
        dlogits : ndarray of the logits' shape and dtype
        """
        gradient, share = checks.loss_called(self._done)
        self._done = None
        return _share_out(gradient, share, 1 / gradient[0].size)


def _shares(sample_weight: Any, batch: int, dtype: np.dtype[Any], buffer: Buffer) -> Array | None:
    """Each row's share of the weights, w / Σ w; None where all rows count the same."""
    if sample_weight is None:
        return None
    weights, total = checks.sample_weight(sample_weight, batch)
    share = buffer.lend((batch,), dtype)
    return np.divide(weights, total, out=share, dtype=np.float64, casting="same_kind")


def _mean(values: Array, share: Array | None) -> float:
    """The mean over rows, by their shares, and outputs; with shares, values are overwritten."""
    if share is None:
        return float(np.add.reduce(values, axis=None)) / values.size
    np.multiply(values, _column(share, values), out=values)
    return float(np.add.reduce(values, axis=None)) * len(values) / values.size


def _share_out(gradient: Array, share: Array | None, factor: float) -> Array:
    """Each row by its share, and all by `factor`, in place; the shares are used up."""
    if share is None:
        return np.multiply(gradient, factor / len(gradient), out=gradient)
    np.multiply(share, factor, out=share)
    return np.multiply(gradient, _column(share, gradient), out=gradient)


def _column(share: Array, beside: Array) -> Array:
    """(batch,) → (batch, 1, ...)."""
    return share.reshape(-1, *[1] * (beside.ndim - 1))


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
