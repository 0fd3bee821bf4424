"""Ghost batch normalization: large batches with the statistics of small ones.

Hoffer, Hubara and Soudry (2017), "Train longer, generalize better: closing the generalization gap in large batch
training of neural networks", Algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from . import checks
from .functional import Saved, batch_norm_backward, train_forward
from .layers import BatchNorm
from .memory import output_like
from .pieces import parts
from .statistics import moments

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(slots=True, eq=False)
class GhostSaved:
    """What `GhostBatchNorm.backward` needs: the whole batch, and what each part left."""

    x: Array
    y: Array | None
    parts: list[tuple[slice, Saved]]


class GhostBatchNorm(BatchNorm):
    """`BatchNorm` that normalizes each part of a training batch by its own statistics.

    A batch of more than `virtual_batch_size` rows (elements along axis 0) is cut into as few parts as hold no more
    than that; their sizes differ by one row at most: 130 rows by 64 are parts of 43, 43 and 44. (64, 64 and 2 would
    leave two rows to statistics of their own.) No part has a single value a channel, which has no variance: with
    ``virtual_batch_size=2`` and an odd number of rows of one value a channel, one part has three rows.

    The parts enter the running statistics one after the other, each with `momentum`, and each is a batch to
    `num_batches_tracked`, as if the layer had been called on each. In eval mode, frozen, and for batches of no more
    than `virtual_batch_size` rows it is a `BatchNorm`, bit for bit.

    Parameters
    ----------
    num_features : int
    virtual_batch_size : int
        Most rows of a part. At least 2, if x has no spatial axes.
    **options
        As for `BatchNorm`; `axis` must not be 0, the batch's.

    References
    ----------
    Hoffer, Hubara and Soudry (2017), Algorithm 1.
    """

    OWN_OPTIONS = ("virtual_batch_size",)

    def __init__(self, num_features: int, *, virtual_batch_size: int, **options: Any) -> None:
        super().__init__(num_features, **options)
        self.virtual_batch_size = checks.positive("virtual_batch_size", virtual_batch_size)
        checks.not_batch_axis(self.axis)

    def __call__(self, x: Any, residual: Any = None, *, out: Array | None = None) -> Array:
        """y, of x's shape, dtype and memory order.

        Parameters
        ----------
        x, residual, out
            As for `BatchNorm`.

        Raises
        ------
        TypeError, ValueError
            Naming the argument; the layer is then as it was, whichever part it was that failed.
        """
        x = checks.features(x, self.axis, self.num_features)
        checks.positive("virtual_batch_size", self.virtual_batch_size)
        checks.channel_axis(self.axis, x.shape)
        checks.not_batch_axis(self.axis, x.shape)
        if not (self.training and self.trainable and x.size):
            return super().__call__(x, residual, out=out)
        one = x.size == len(x) * self.num_features  # one value a channel and row
        if one:
            checks.virtual_batch(self.virtual_batch_size, x.shape)
        cut = parts(len(x), self.virtual_batch_size, 2 if one else 1)
        if len(cut) == 1:
            return super().__call__(x, residual, out=out)
        return self._train(x, residual, out, cut)

    def _train(self, x: Array, residual: Any, out: Array | None, cut: list[slice]) -> Array:
        running = checks.running(self.running_mean, self.running_var, self.num_features, update=True)
        if residual is not None:
            residual = checks.data("residual", residual)
            checks.same("residual", residual, x)
        others = {"x": x, "weight": self.weight, "bias": self.bias, "residual": residual}
        others |= {"running_mean": self.running_mean, "running_var": self.running_var}
        y = _output("out", out, x, others, "residual")
        if self.nan_policy == "raise":  # before any part is written
            for part in cut:
                batch = moments(x[part], axis=self.axis)
                wide = batch.mean.dtype if running[1] is None else running[1].dtype
                checks.finite_statistics(batch.mean, batch.var(), wide)
        # The parts update copies, so that what a later one raises leaves the layer's own as they were.
        mean, var = (None if statistic is None else statistic.copy() for statistic in running)
        batches = self.num_batches_tracked
        saved: list[tuple[slice, Saved]] = []
        for part in cut:
            _, kept, counts = train_forward(
                x[part], mean, var, self.weight, self.bias, momentum=self._rate(batches), unbiased=self.unbiased,
                nan_policy="propagate" if self.nan_policy == "raise" else self.nan_policy, eps=self.eps, axis=self.axis,
                activation=self.activation, negative_slope=self.negative_slope,
                residual=None if residual is None else residual[part], out=y[part],
            )  # fmt: skip
            saved.append((part, kept))
            if batches is not None and counts:
                batches += 1
        self._saved = GhostSaved(x, None if saved[0][1].y is None else y, saved)
        if self.running_mean is not None and self.running_var is not None:
            self.running_mean[...], self.running_var[...] = mean, var
            self.num_batches_tracked = batches
        return y

    def backward(self, dy: Any, *, out: Array | None = None, out_residual: Array | None = None) -> Array:
        """dx, leaving `grad_weight`, `grad_bias` and, if there was a residual, `grad_residual`.

        The parameters' gradients are summed over the parts in float64, in order.

        Parameters
        ----------
        dy, out, out_residual
            As for `BatchNorm`.
        """
        saved = self._kept()
        if isinstance(saved, Saved):
            return super().backward(dy, out=out, out_residual=out_residual)
        x = saved.x
        dy = checks.data("dy", dy)
        checks.same("dy", dy, x)
        first: Saved = saved.parts[0][1]
        reads = {"dy": dy, "x": x, "y": saved.y, "weight": first.weight, "bias": first.bias}
        dx = _output("out", out, x, reads, "dy")
        dresidual = None
        if first.residual:
            dresidual = _output("out_residual", out_residual, x, {**reads, "out": dx}, "dy")
        else:
            checks.no_residual(out_residual)
        sums: list[Array | None] = [
            None if p is None else np.zeros(self.num_features) for p in (first.weight, first.bias)
        ]
        for part, kept in saved.parts:
            wide = replace(kept, weight=_wide(kept.weight), bias=_wide(kept.bias))  # gradients have their dtypes
            _, *gradients = batch_norm_backward(
                dy[part], wide, out=dx[part], out_residual=None if dresidual is None else dresidual[part]
            )
            for total, gradient in zip(sums, gradients, strict=False):
                if total is not None:
                    total += gradient
        self.grad_weight, self.grad_bias = (
            None if total is None or p is None else total.astype(p.dtype)
            for total, p in zip(sums, (first.weight, first.bias), strict=True)
        )
        self.grad_residual = dresidual
        return dx

    def __repr__(self) -> str:
        first, rest = super().__repr__().split(", ", 1)
        return f"{first}, virtual_batch_size={self.virtual_batch_size}, {rest}"


def _output(name: str, out: Array | None, x: Array, others: dict[str, Any], same: str) -> Array:
    """Where all parts are written, checked as a whole: a part may not overlap another's input, either."""
    if out is None:
        return output_like(x)
    checks.output(name, out, x)
    checks.overlap(name, out, others, same_as=(same,))
    return out


def _wide(parameter: Array | None) -> Array | None:
    return None if parameter is None else parameter.astype(np.float64)
