"""History: what was seen along a training."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class History:
    """What `fit` returns: one number an epoch in each list, and how it ended.

    Attributes
    ----------
    losses : list of float
        The mean training loss over each epoch's rows, as they passed: the first of an epoch met earlier weights than
        the last. With sample weights, the weighted mean.
    accuracies : list of float
        The share of the same rows that were classified rightly; empty where the targets are not labels.
    validation_losses, validation_accuracies : list of float
        After each epoch, in eval mode; empty without validation (and accuracies, without labels).
    best_epoch : int or None
        The place in these lists of the epoch that ended with the best model: by validation accuracy (of equal ones by
        validation loss), without labels by validation loss, without validation by training loss. None before the end
        of the first epoch, and where every loss was NaN.
    steps : int
        Taken in all.
    seconds : float
        From beginning to end; of a resumed training, the time before counts up to the checkpoint.
    interrupted : bool
        Whether Ctrl-C ended it.
    """

    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    validation_losses: list[float] = field(default_factory=list)
    validation_accuracies: list[float] = field(default_factory=list)
    best_epoch: int | None = None
    steps: int = 0
    seconds: float = 0.0
    interrupted: bool = False

    def cut(self) -> None:
        """Leave out what is there of an epoch whose end was interrupted: its loss comes last."""
        for values in (self.accuracies, self.validation_losses, self.validation_accuracies):
            del values[len(self.losses) :]
