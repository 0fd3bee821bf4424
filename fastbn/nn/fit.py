"""fit: the loop, and accuracy, which says how well it went."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .. import checks
from .batches import Batches
from .layer import Layer
from .losses import SoftmaxCrossEntropy
from .optimizers import Optimizer

Array = np.ndarray[Any, np.dtype[Any]]


def fit(
    model: Layer,
    x: Array,
    labels: Array,
    optimizer: Optimizer,
    *,
    epochs: int = 1,
    batch_size: int = 64,
    rng: np.random.Generator | int | None = None,
    progress: bool | str = False,
    after_step: Callable[[int], None] | None = None,
) -> list[float]:
    """Train a classifier by mini-batches, and leave it in eval mode.

    Parameters
    ----------
    model : Layer
        From a batch of x to logits of shape (batch, classes).
    x : ndarray of the model's dtype, shape (rows, ...)
    labels : ndarray of integers, shape (rows,)
    optimizer : Optimizer
        Of the model's parameters.
    epochs, batch_size : int
    rng : numpy.random.Generator or int, optional
        Of the order of the rows.
    progress : bool or str
        Whether to show a bar (with this text): needs tqdm.
    after_step : callable, optional
        Called with the number of steps taken, after each; it may use the model, in eval mode too.

    Returns
    -------
    losses : list of float
        The mean loss of each epoch's steps.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what it was and what it must be.
    ImportError
        If a bar is asked for and tqdm is not installed.
    """
    batches = Batches(x, labels, batch_size, rng=rng)
    epochs = checks.positive("epochs", epochs)
    loss = SoftmaxCrossEntropy()
    losses = []
    steps = 0
    model.train()
    try:
        with _bar(progress, epochs * len(batches)) as bar:
            for _ in range(epochs):
                total = 0.0
                for batch, batch_labels in batches:
                    total += loss(model(batch), batch_labels)
                    model.parameter_gradients(loss.backward())
                    optimizer.step()
                    steps += 1
                    bar.update()
                    if after_step is not None:
                        after_step(steps)
                        model.train()
                losses.append(total / len(batches))
    finally:  # Ctrl-C too leaves a model that is ready for use
        model.eval()
    return losses


def accuracy(model: Layer, x: Array, labels: Array, *, batch_size: int = 1000) -> float:
    """The share of rows whose largest logit is the label's, in eval mode; the model's mode is then as it was.

    Parameters
    ----------
    model, x, labels
        As for `fit`.
    batch_size : int
        Rows in memory at once; it changes nothing else.
    """
    batch_size = checks.positive("batch_size", batch_size)
    if not len(x) or len(labels) != len(x):
        raise ValueError(f"x has {len(x)} rows and labels {len(labels)}, and must have as many, and at least one")
    training = model.training
    model.eval()
    right = 0
    try:
        for start in range(0, len(x), batch_size):
            logits = model(x[start : start + batch_size])
            right += int(np.count_nonzero(logits.argmax(axis=1) == labels[start : start + batch_size]))
    finally:
        model.train(training)
    return right / len(x)


class _NoBar:
    def __enter__(self) -> _NoBar:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self) -> None:
        pass


def _bar(progress: bool | str, total: int) -> Any:
    if not progress:
        return _NoBar()
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("progress needs tqdm: pip install 'fastbn[demo]'", name="tqdm") from error
    return tqdm(total=total, desc=progress if isinstance(progress, str) else None, unit="step")
