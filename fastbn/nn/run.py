"""A training at one moment: what a step does to it, what its checkpoints hold, and what Ctrl-C leaves of it."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable
from dataclasses import asdict
from time import perf_counter
from typing import Any

import numpy as np

from .. import checks, files
from .batches import Batches, paired
from .buffers import Buffer
from .checkpoints import Checkpoint, Generators, need_safetensors, real_path
from .history import History
from .layer import Layer
from .optimizers import Optimizer

Array = np.ndarray[Any, np.dtype[Any]]

INDEX, BOOL = np.dtype(np.intp), np.dtype(bool)
ROWS = 1000  # that are validated on together


def gradients(model: Layer, loss: Any, x: Array, targets: Array, weights: Array | None = None) -> tuple[float, Array]:
    """One batch forward and back, leaving the gradient of each parameter.

    Parameters
    ----------
    model, loss, x, targets
        As for `fastbn.nn.fit`, of one batch.
    weights : ndarray, shape (batch,), optional
        Of the rows, of mean 1 over the data set (not over the batch, whose loss counts as its share of them).

    Returns
    -------
    loss : float
        Times the batch's mean weight.
    outputs : ndarray
        Of the model, in its memory.
    """
    outputs = model(x)
    if weights is None:
        value = loss(outputs, targets)
        model.parameter_gradients(loss.backward())
        return value, outputs
    share = float(weights.mean())  # the loss divides by the batch's weights; a row is to count by its share of all
    value = share * loss(outputs, targets, weights)
    dy = loss.backward()
    np.multiply(dy, share, out=dy)
    model.parameter_gradients(dy)
    return value, outputs


class Run:
    """A training at one moment: what a checkpoint holds, and what it has to be given again."""

    def __init__(
        self,
        model: Layer,
        optimizer: Optimizer,
        loss: Any,
        batches: Batches,
        schedule: Callable[[int], float] | None,
        validation: tuple[Array, Any] | None,
    ) -> None:
        self.model, self.optimizer, self.loss, self.batches, self.schedule = model, optimizer, loss, batches, schedule
        self.validation = None
        if validation is not None:
            there = checks.pair_of_data("validation", validation)
            self.validation = paired("validation[0]", there[0], "validation[1]", there[1])
        self.history = History()
        self.position = 0  # batches of this epoch that are done
        self.total = self.seen = self.right = 0.0  # sums over the rows of the epoch
        self.lr = optimizer.lr
        self.first = model.state_dict()
        self.best: dict[str, Array] | None = None
        self.best_score: list[float] = []
        self.whole = True  # not in the middle of a step
        self._labels = batches.targets.ndim == 1 and batches.targets.dtype.kind in "iu"
        self._found, self._hit = Buffer(), Buffer()
        self._about = self._describe()
        self._began = perf_counter()

    def try_validation(self) -> None:
        """Some rows in eval mode, so that what is wrong is known before an epoch has passed; nothing changes by it."""
        if self.validation is None:
            return
        x, targets = self.validation
        rows = [0, len(x) - 1]  # two: some layers take their statistics of the batch in eval mode, too
        if targets.size and targets.dtype.kind in "fiub":  # the least and the greatest are the ones that may not do
            rows += [int(place) * len(x) // targets.size for place in (targets.argmin(), targets.argmax())]
        rows = sorted({*rows})
        model, generators = self.model, self.generators()
        training, states = model.training, generators.get()
        model.eval()
        try:
            self.loss(model(x[rows]), targets[rows])
        except (TypeError, ValueError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"validation does not suit model and loss: {error}") from error
        finally:
            model.train(training)
            generators.set(states)

    def step(self, x: Array, targets: Array, weights: Array | None = None) -> None:
        """One batch."""
        if self.position == 0:
            self.total = self.seen = self.right = 0.0
        self.whole = False
        optimizer = self.optimizer
        if self.schedule is not None:
            optimizer.lr = self.lr * self.schedule(optimizer.steps)
        loss, outputs = gradients(self.model, self.loss, x, targets, weights)
        optimizer.step()
        self.whole = True
        self.total += float(loss) * len(x)
        self.seen += len(x) if weights is None else float(weights.sum())
        self.right += self._count(outputs, targets, weights)
        self.position += 1
        self.history.steps += 1

    def end_epoch(self) -> None:
        """Note how it went, and keep the model if it is the best."""
        history = self.history
        loss = self.total / self.seen
        score = [-loss]
        if self._labels:
            history.accuracies.append(self.right / self.seen)
        if self.validation is not None:
            loss_there, accuracy_there = self._validate(*self.validation)
            history.validation_losses.append(loss_there)
            score = [-loss_there]
            if self._labels:
                history.validation_accuracies.append(accuracy_there)
                score = [accuracy_there, -loss_there]
        better = score > self.best_score and np.isfinite(score).all()
        state = self.model.state_dict() if better else None
        history.losses.append(loss)
        self.position = 0
        if state is not None:
            self.best, self.best_score, history.best_epoch = state, score, len(history.losses) - 1

    def back_to_best(self) -> None:
        """What Ctrl-C leaves."""
        self.history.interrupted = True
        self.history.cut()
        if self.best is not None:
            self.model.load_state_dict(self.best)
        elif not self.whole or not np.isfinite(self.total):
            self.model.load_state_dict(self.first)

    def end(self) -> None:
        """What is the caller's is as it was."""
        self.history.seconds = perf_counter() - self._began
        if self.schedule is not None:
            self.optimizer.lr = self.lr

    def text(self) -> str:
        """Of the epoch so far, and of the last look at the validation data."""
        history = self.history
        parts = [f"loss {self.total / self.seen:.4f}"] if self.seen else []
        if self.seen and self._labels:
            parts.append(f"accuracy {self.right / self.seen:.3f}")
        if history.validation_accuracies:
            parts.append(f"validation accuracy {history.validation_accuracies[-1]:.3f}")
        elif history.validation_losses:
            parts.append(f"validation loss {history.validation_losses[-1]:.4f}")
        return ", ".join(parts)

    def _count(self, outputs: Array, targets: Array, weights: Array | None = None) -> float:
        """Rows whose largest output is the label's, by their weights."""
        if not self._labels:
            return 0
        if outputs.ndim != 2 or outputs.shape[1] < 2:
            self._labels = False
            return 0
        found = outputs.argmax(axis=1, out=self._found.lend(targets.shape, INDEX))
        hit = np.equal(found, targets, out=self._hit.lend(targets.shape, BOOL))
        return int(np.count_nonzero(hit)) if weights is None else float(weights @ hit)

    def _validate(self, x: Array, targets: Array) -> tuple[float, float]:
        """Loss and accuracy in eval mode."""
        self.model.eval()
        total = right = 0.0
        for start in range(0, len(x), ROWS):
            part = targets[start : start + ROWS]
            outputs = self.model(x[start : start + ROWS])
            total += len(part) * self.loss(outputs, part)
            right += self._count(outputs, part)
        self.model.train()
        return total / len(x), right / len(x)

    # ---- to a checkpoint and back ----

    def generators(self) -> Generators:
        """Every generator in it."""
        return Generators(self.batches.rng, self.model, self.loss, self.optimizer)

    def _describe(self) -> dict[str, Any]:
        """What the training is of, at its start: the same for one that is to go on from a checkpoint of this."""
        optimizer, batches, validation = self.optimizer, self.batches, self.validation
        options = {
            name: value
            for name, value in vars(optimizer).items()
            if isinstance(value, (int, float, tuple)) and name[0] != "_" and name not in ("lr", "steps")
        } | {"decay_vectors": optimizer.decay_vectors}
        return {
            "model": _text(self.model),
            "model's state": {name: _shape(array) for name, array in self.first.items()},
            "optimizer": f"{type(optimizer).__name__} {options}",
            "loss": type(self.loss).__name__,
            "batch_size": batches.batch_size,
            "x": _shape(batches.x),
            "targets": _shape(batches.targets),
            "sample_weight": None if batches.sample_weight is None else _shape(batches.sample_weight),
            "validation": None if validation is None else [_shape(array) for array in validation],
            "random generators": self.generators().places,
        }

    def checkpoint(self) -> Checkpoint:
        """This moment, which must not be in the middle of a step."""
        self.history.seconds = perf_counter() - self._began
        notes = {
            "run": self._about,
            "history": asdict(self.history),
            "position": self.position,
            "sums": [self.total, self.seen, self.right],
            "lr": self.lr,
            "best_score": self.best_score,
            "random": self.generators().get(),
        }
        model, optimizer = self.model.state_dict(), self.optimizer.state_dict()
        return Checkpoint(model, self.best, optimizer, self.batches.order.astype(np.uint32), notes)

    def resume(self, path: str) -> None:
        """Go on from the file."""
        found = Checkpoint.load(path)
        notes, theirs, mine = found.notes, found.notes["run"], self._about
        for name in mine:
            if theirs.get(name) != mine[name]:
                raise ValueError(
                    f"checkpoint {path!r} is of another training: its {name} is {theirs.get(name)}, "
                    f"and here it is {mine[name]}"
                )
        at_start, now = float(notes["lr"]), float(found.optimizer["lr"])
        if self.lr != at_start and (self.lr != now or self.schedule is not None):
            raise ValueError(
                f"checkpoint {path!r} is of another training: its learning rate is {at_start:g}, and here it is "
                f"{self.lr:g}; resume with the same, and change it by schedule or in after_step"
            )
        self.optimizer.load_state_dict(found.optimizer)
        self.model.load_state_dict(found.model)
        self.generators().set(notes["random"])
        self.batches.order[...] = found.order
        self.history = History(**notes["history"] | {"interrupted": False})
        self.position = notes["position"]
        self.total, self.seen, self.right = notes["sums"]
        self.lr = notes["lr"]
        self.first, self.best, self.best_score = found.model, found.best, notes["best_score"]
        self._began -= self.history.seconds


class File:
    """Where the checkpoints go, if anywhere, and when."""

    def __init__(self, run: Run, path: Any, every: int | None, resume: bool) -> None:
        self._run, self._path = run, path
        self._every = None if every is None else checks.positive("checkpoint_every", every)
        self._saved = -1  # the step
        self._made = False  # by this call
        if path is None:
            if every is not None or checks.flag("resume", resume):
                name = "resume" if resume else "checkpoint_every"
                raise ValueError(f"checkpoint is None, and must be a path where {name} is given")
            return
        need_safetensors()
        self._path = place = real_path(path)
        there = sum(array.size for array in run.first.values())
        least = sum(parameter.size for parameter, _ in run.model.parameters())
        if there < least:
            raise ValueError(
                f"model has {least} numbers to train and only {there} in its state_dict, and must have them all there "
                "for a checkpoint"
            )
        checks.checkpoint_place(place)
        exists = os.path.exists(place)
        if exists and not checks.flag("resume", resume):
            raise FileExistsError(
                f"checkpoint {place!r} exists, and must not, unless resume=True: to start anew, remove it"
            )
        files.remove_leftovers(place)
        if exists:
            run.resume(place)
            self._saved = run.history.steps
        else:
            self.save()
            self._made = True

    def take_back(self) -> None:
        """Where this call fails before a step is done, its file would only stand in the corrected call's way."""
        if self._made and self._run.history.steps == 0:
            with contextlib.suppress(OSError):
                os.unlink(self._path)

    def save_if_due(self) -> None:
        """After a step."""
        run = self._run
        if self._path is not None and (run.history.steps % self._every if self._every else run.position) == 0:
            self.save()

    def save(self) -> None:
        """Unless it is done."""
        if self._path is not None and self._saved != self._run.history.steps:
            self._run.checkpoint().save(self._path)
            self._saved = self._run.history.steps


def _shape(array: Array) -> str:
    """Its dtype, too."""
    return f"{array.dtype} {array.shape}"


def _text(model: Any) -> str:
    """Its repr; what does not have one of its own has its place in memory there."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(model))
