"""fit: the loop, and accuracy, which says how well it went."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from .. import checks
from .batches import Batches, paired
from .history import History
from .interrupt import Interrupt
from .layer import Layer
from .losses import SoftmaxCrossEntropy
from .optimizers import Optimizer
from .progress import Bar
from .run import File, Run

Array = np.ndarray[Any, np.dtype[Any]]


def fit(
    model: Layer,
    x: Array,
    targets: Any,
    optimizer: Optimizer,
    *,
    loss: Any = None,
    epochs: int = 1,
    batch_size: int = 64,
    rng: np.random.Generator | int | None = None,
    schedule: Callable[[int], float] | None = None,
    validation: tuple[Array, Any] | None = None,
    sample_weight: Any = None,
    progress: bool | str = False,
    after_step: Callable[[int], None] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    resume: bool = False,
) -> History:
    """Train by mini-batches, and leave the model in eval mode.

    **Ctrl-C** ends training after the step at hand, and a second one at once. The model is then the best so far, with
    parameters and running statistics of one moment: the end of the best epoch (see `History.best_epoch`), or, before
    the end of the first, that of the last step. `fit` returns as usual, with `History.interrupted` set: a program
    that trains several models looks there. Any other KeyboardInterrupt (of `after_step`, or in the middle of a step,
    where the program handles Ctrl-C itself) is treated alike; if it comes in the middle of a step of the first epoch,
    the model is as it was before training.

    **A checkpoint** holds the model, the best so far, the optimizer, the history, the place in the epoch, and the state
    of `rng` and of every numpy Generator in the layers. It is written at the start, at the end of each epoch (or every
    `checkpoint_every` steps), at the end and at Ctrl-C; beside its place, and then moved there, so that a process that
    is killed at any moment leaves the last whole one. A call that fails before its first step is done takes its file
    away again. The same call with ``resume=True`` goes on from it, and ends with the same bits in model, optimizer,
    generators and history (but its seconds), on the same machine and number of BLAS threads; also where `epochs` is
    more than it was. What a file cannot hold must be given again as it was: the values of the data, `schedule`,
    `after_step`. A random state that is kept elsewhere than in a Generator of a layer's attributes does not go on. The
    optimizer must have the learning rate that it had at the start (or has in the checkpoint, where `after_step` changed
    it); training goes on with the checkpoint's.

    Parameters
    ----------
    model : Layer
        From a batch of x to what the loss takes: for the default, logits of shape (batch, classes). For Ctrl-C and
        checkpoints, its `state_dict` must have all of its state.
    x : ndarray of the model's dtype, shape (rows, ...)
    targets : ndarray, shape (rows, ...)
        For the default loss, labels: integers, shape (rows,).
    optimizer : Optimizer
        Of the model, or of a part of it: the rest then stays as it is (but for running statistics).
    loss : object, optional
        Called with outputs and targets (and a batch's weights, if there are any), gives a number, and its `backward`
        the gradient with respect to the outputs; a mean over rows. None: SoftmaxCrossEntropy.
    epochs : int
        In all: those before a checkpoint count.
    batch_size : int
        A last batch of one row is left out of its epoch, with or without a BatchNorm in the model (see `Batches`).
    rng : numpy.random.Generator or int, optional
        Of the order of the rows.
    schedule : callable, optional
        From the optimizer's steps so far to a factor of its learning rate (see `schedules`), which is set before each
        step and is as it was in the end.
    validation : (x, targets), optional
        To look at after each epoch, in eval mode. A few of its rows are tried before the first step: those of the
        least and the greatest target among them.
    sample_weight : ndarray, shape (rows,), optional
        How much each row counts in the loss, relative to their mean; at least 0. In a batch's statistics all rows count
        the same, but rows of weight 0 are as if they were not there.
    progress : bool or str
        Whether to show a bar (with this text), with loss and accuracy of the epoch so far, steps a second and the time
        left: needs tqdm.
    after_step : callable, optional
        Called with the number of steps taken, after each; it may use the model, in eval mode too.
    checkpoint : str or path-like, optional
        The file, of this training alone. One that exists already is refused unless ``resume=True``.
    checkpoint_every : int, optional
        Steps from one to the next.
    resume : bool
        Whether to go on from the checkpoint, if there is one; if not, training starts from its beginning.

    Returns
    -------
    History

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what it was and what it must be; naming the file, where a checkpoint is damaged or of
        another model, optimizer, loss, data set, batch size or learning rate. With ``batch_size=1`` a BatchNorm of x of
        shape (batch, channels) says that "x has shape (1, channels): one value a channel", and cannot train.
    FileExistsError
        Where there is a checkpoint, and ``resume`` is False.
    OSError
        Where the checkpoint is no file or its folder does not exist, or where it cannot be written. One that was there
        before still is.
    ImportError
        If a bar is asked for and tqdm is not installed, or a checkpoint and safetensors is not.

    Warns
    -----
    RuntimeWarning
        At the end of the first epoch whose mean loss is NaN or infinite.
    """
    checks.made("model", model, Layer)
    checks.made("optimizer", optimizer, Optimizer)
    checks.optimizer_within(optimizer, model)
    loss = SoftmaxCrossEntropy() if loss is None else loss
    checks.loss(loss)
    checks.function("schedule", schedule)
    checks.function("after_step", after_step)
    epochs = checks.positive("epochs", epochs)
    x, targets, weights = _rows_that_count(x, targets, sample_weight)
    batches = Batches(x, targets, batch_size, sample_weight=weights, rng=rng)
    run = Run(model, optimizer, loss, batches, schedule, validation)
    run.try_validation()
    file = File(run, checkpoint, checkpoint_every, resume)
    history = run.history
    model.train()
    try:
        with Interrupt() as interrupt, Bar(progress, epochs * len(batches), history.steps) as bar:
            try:
                _train(run, epochs, after_step, file, bar, interrupt)
                if interrupt.asked:
                    raise KeyboardInterrupt
            except KeyboardInterrupt:
                interrupt.closing = True
                run.back_to_best()
            bar.show(history.steps, run.text, now=True)
    except BaseException:
        file.take_back()
        raise
    finally:  # what after_step raises, too, leaves a model that is ready for use
        model.eval()
        run.end()
    return history


def accuracy(model: Layer, x: Array, labels: Array, *, batch_size: int = 1000) -> float:
    """The share of rows whose largest logit is the label's, in eval mode; the model's mode is then as it was.

    Parameters
    ----------
    model : Layer
        From a batch of x to logits of shape (batch, classes).
    x : ndarray of the model's dtype, shape (rows, ...)
    labels : ndarray of integers, shape (rows,)
    batch_size : int
        Rows in memory at once; it changes nothing else.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what it was and what it must be; naming the model, where it does not give at least two
        logits a row.
    """
    checks.made("model", model, Layer)
    batch_size = checks.positive("batch_size", batch_size)
    x = checks.rows("x", x)
    labels = checks.labels("labels", labels, len(x))
    training = model.training
    model.eval()
    right = 0
    try:
        for start in range(0, len(x), batch_size):
            logits = model(x[start : start + batch_size])
            checks.logits("model", logits.shape)
            right += int(np.count_nonzero(logits.argmax(axis=1) == labels[start : start + batch_size]))
    finally:
        model.train(training)
    return right / len(x)


def _train(
    run: Run, epochs: int, after_step: Callable[[int], None] | None, file: File, bar: Bar, interrupt: Interrupt
) -> None:
    """To the last epoch's end, or to a Ctrl-C."""
    model, batches, history = run.model, run.batches, run.history
    while len(history.losses) < epochs:
        for batch in batches.rest(run.position) if run.position else batches:
            run.step(*batch)
            bar.show(history.steps, run.text)
            if after_step is not None:
                after_step(history.steps)
                model.train()
            if run.position == len(batches):
                run.end_epoch()
                _warn_of_divergence(history, run.optimizer.lr)
            file.save_if_due()
            if interrupt.asked:
                file.save()
                return
    file.save()


def _warn_of_divergence(history: History, lr: float) -> None:
    """Once: at the first epoch that shows it."""
    *before, loss = history.losses
    if not np.isfinite(loss) and np.isfinite(before).all():
        message = (
            f"the mean loss of epoch {len(before) + 1} is {loss}: look for NaN and infinite numbers in x and targets; "
            f"if there are none, lower the learning rate, which is {lr:g}"
        )
        warnings.warn(message, RuntimeWarning, stacklevel=4)  # at the call of fit


def _rows_that_count(x: Any, targets: Any, sample_weight: Any) -> tuple[Array, Array, Array | None]:
    """Without those of weight 0; the weights have a mean of 1."""
    x, targets = paired("x", x, "targets", targets)
    if sample_weight is None:
        return x, targets, None
    weights, _ = checks.sample_weight(sample_weight, len(x))
    there = weights > 0
    if not there.all():
        x, targets, weights = x[there], targets[there], weights[there]
    return x, targets, weights / weights.mean(dtype=np.float64)
