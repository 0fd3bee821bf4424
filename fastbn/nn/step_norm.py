"""StepNorm: batch normalization inside a recurrent layer, each time step with statistics of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from .. import checks
from ..functional import Saved, batch_norm, batch_norm_backward, batch_norm_forward, track

Array = np.ndarray[Any, np.dtype[Any]]


class StepNorm:
    """BN(x_t; γ, β): mean and variance over the batch at each step t, one γ (and β) for all steps.

    The first steps of a sequence have other statistics than the later ones, which settle; one running mean and variance
    for all would fit none of them.

    Parameters
    ----------
    num_features, steps : int
        `steps`: how many have running statistics, which is the longest sequence that can be trained on. In use, the
        last step that was trained stands for all later ones.
    weight : float
        γ at the start.
    bias : bool
        Whether there is a β.
    eps, momentum
        As for `BatchNorm`.
    dtype : {float32, float64}

    Attributes
    ----------
    weight, bias : ndarray, shape (num_features,); bias may be None
    running_mean, running_var : ndarray, shape (steps, num_features)
    num_batches_tracked : ndarray of int64, shape (steps,)
        How many batches were as long.

    References
    ----------
    Cooijmans et al. (2017), "Recurrent Batch Normalization", section 3.
    """

    def __init__(
        self,
        num_features: int,
        steps: int,
        *,
        weight: float,
        bias: bool,
        eps: float,
        momentum: float | None,
        dtype: np.dtype[Any],
    ) -> None:
        self.eps, self.momentum = eps, momentum
        self.weight = np.full(num_features, weight, dtype)
        self.bias = np.zeros(num_features, dtype) if bias else None
        self.running_mean = np.zeros((steps, num_features), dtype)
        self.running_var = np.ones((steps, num_features), dtype)
        self.num_batches_tracked = np.zeros(steps, np.int64)
        self.grad_weight: Array | None = None
        self.grad_bias: Array | None = None
        self._saved: list[Saved] = []

    def train_step(self, x: Array, out: Array) -> None:
        """Write BN of the next step's x to `out`, by the batch's statistics. x is read again by `backward_step`."""
        _, saved = batch_norm_forward(x, self.weight, self.bias, eps=self.eps, out=out)
        self._saved.append(saved)

    def eval_step(self, t: int, x: Array, out: Array) -> None:
        """Write BN of step t's x to `out`, by the running statistics; x may be `out`."""
        t = min(t, max(int(np.count_nonzero(self.num_batches_tracked)) - 1, 0))
        batch_norm(x, self.running_mean[t], self.running_var[t], self.weight, self.bias, eps=self.eps, out=out)

    def forget(self) -> None:
        """Start a sequence: drop what is left of the last one."""
        self._saved = []

    def track(self) -> None:
        """Take the statistics of the sequence's steps, all done, into the running ones."""
        for t, saved in enumerate(self._saved):
            count = saved.layout.values if saved.x.size else 0
            rate = 1 / (self.num_batches_tracked[t] + 1) if self.momentum is None else self.momentum
            mean, var = self.running_mean[t], self.running_var[t]
            if track(mean, var, saved.mean, saved.var, count, float(rate), True, "propagate"):
                self.num_batches_tracked[t] += 1

    def start_backward(self) -> None:
        """Start to sum the gradients over the steps."""
        if self.grad_weight is None:
            self.grad_weight = np.empty_like(self.weight)
            self.grad_bias = None if self.bias is None else np.empty_like(self.bias)
        self.grad_weight[...] = 0
        if self.grad_bias is not None:
            self.grad_bias[...] = 0

    def backward_step(self, t: int, dy: Array, out: Array) -> None:
        """Write dx of step t to `out`, which may be dy, and add the step's share to `grad_weight` and `grad_bias`."""
        _, dweight, dbias, *_ = batch_norm_backward(dy, self._saved[t], out=out)
        assert self.grad_weight is not None and dweight is not None
        np.add(self.grad_weight, dweight, out=self.grad_weight)
        if self.grad_bias is not None and dbias is not None:
            np.add(self.grad_bias, dbias, out=self.grad_bias)

    def reset_running_stats(self) -> None:
        """Mean 0, variance 1, no batches tracked, as at the start."""
        self.running_mean[...] = 0
        self.running_var[...] = 1
        self.num_batches_tracked[...] = 0

    def parameters(self) -> Iterator[tuple[Array, Array | None]]:
        """Weight, and bias where there is one."""
        yield self.weight, self.grad_weight
        if self.bias is not None:
            yield self.bias, self.grad_bias

    def state_dict(self) -> dict[str, Array]:
        """Copies of parameters and statistics, by name."""
        return {name: array.copy() for name, array in self._named()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        mine = dict(self._named())
        checks.state_keys(state, list(mine))
        counts = mine.pop("num_batches_tracked")
        new_counts = checks.counts("num_batches_tracked", state["num_batches_tracked"], counts)
        new = {name: checks.state(name, state[name], array) for name, array in mine.items()}
        counts[...] = new_counts
        for name, array in mine.items():
            array[...] = new[name]

    def _named(self) -> Iterator[tuple[str, Array]]:
        yield "weight", self.weight
        if self.bias is not None:
            yield "bias", self.bias
        yield "running_mean", self.running_mean
        yield "running_var", self.running_var
        yield "num_batches_tracked", self.num_batches_tracked

    def __getstate__(self) -> dict[str, Any]:
        """Without the last batch: a copy or a pickle does not carry it."""
        return self.__dict__ | {"_saved": []}
