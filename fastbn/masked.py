"""Batch normalization over the elements that a mask leaves: padded sequences, ragged batches, weighted samples.

A mask says for each position (each element of the batch and of the spatial axes, all channels alike) whether it
counts, or how often. The elements that count are gathered into rows, (count, channels), which the ordinary functions
normalize; what they give is scattered back. With a boolean mask the numbers are therefore those of `batch_norm` of the
rows, bit for bit.

Where the mask is off, y = 0 and dx = 0, and x and dy are not read: nothing of a padded element leaks into what comes
after (a convolution over the padded axis sees zeros, a sum over it sums what is valid), and NaN in the padding harms
nothing.

Weights. A weight w_i is a frequency: an element of weight 3 counts as three elements of the same value. With W = Σ w_i,

    mean = Σ w_i·x_i / W        var = Σ w_i·(x_i - mean)² / W        (running: · W/(W - 1))
    y_i = act(weight·x̂_i + bias),   x̂_i = (x_i - mean)/σ,   σ = sqrt(var + eps)       where w_i > 0

and, as ∂mean/∂x_i = w_i/W and ∂var/∂x_i = 2·w_i·(x_i - mean)/W, with dz_i = dy_i·act'(z_i)

    dx_i = weight/σ · (dz_i - w_i/W · (Σ_j dz_j + x̂_i · Σ_j dz_j·x̂_j))
    dweight = Σ_j dz_j·x̂_j        dbias = Σ_j dz_j

dz is the caller's, and is not weighted: a loss that counts y_i three times has that in its dy_i. With w_i = 1 these are
the formulas of Ioffe and Szegedy (2015), Algorithm 1 and section 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import checks
from .functional import (
    Saved,
    batch_norm,
    batch_norm_backward,
    batch_norm_eval_forward,
    batch_norm_forward,
    track,
)
from .layers import BatchNorm
from .layout import Layout, canonical, finish, like, output
from .pieces import PIECE

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(slots=True, eq=False)
class Masked:
    """An array's positions that count.

    Attributes
    ----------
    where : ndarray of bool
        Which ones, of the array's shape without the channel axis.
    axis : int
        The channel axis.
    like : ndarray
        Of the array's shape (axes in memory order) and dtype; without memory of its own.
    layout : Layout
    """

    where: Array
    axis: int
    like: Array
    layout: Layout

    def gather(self, array: Array) -> Array:
        """Rows (count, channels) in C order, new, of an array in memory order."""
        view = np.moveaxis(self.layout.from_memory(array), self.axis, -1)
        return np.ascontiguousarray(view[self.where])  # in which order an index gives its result is NumPy's affair

    def scatter(self, rows: Array, out: Array | None) -> Array:
        """The inverse: an array of the shape, dtype and memory order, or `out`; 0 where the mask is off."""
        memory, result = output("out", out, self.like, self.layout)
        memory[...] = 0
        with np.errstate(all="ignore"):  # float32 rows may overflow a half type
            np.moveaxis(self.layout.from_memory(memory), self.axis, -1)[self.where] = rows
        return finish(memory, result, self.layout)


@dataclass(slots=True, eq=False)
class MaskedSaved:
    """What `masked_batch_norm_backward` needs of its forward pass.

    It holds a copy of the elements that count, and refers to weight and bias.

    Attributes
    ----------
    rows : Saved
        Of the rows: ``rows.mean`` and ``rows.var`` are the statistics that normalized x, float64.
    masked : Masked
    count : float
        The elements that count, or the sum of their weights.
    weights : ndarray of float64, shape (rows,), or None
        Where they made the statistics.
    dtypes : tuple
        Of weight and bias; None where there was none.
    """

    rows: Saved
    masked: Masked
    count: float
    weights: Array | None
    dtypes: tuple[np.dtype[Any] | None, ...]

    @property
    def mean(self) -> Array:
        """The mean that normalized x."""
        return self.rows.mean

    @property
    def var(self) -> Array:
        """The population variance that normalized x."""
        return self.rows.var


def masked_batch_norm_forward(
    x: Any,
    mask: Any,
    weight: Any = None,
    bias: Any = None,
    *,
    eps: float = 1e-5,
    axis: int = 1,
    activation: str | None = None,
    negative_slope: float = 0.01,
    out: Array | None = None,
    num_threads: int | None = None,
) -> tuple[Array, MaskedSaved]:
    """Normalize each channel with the statistics of the elements that count, and keep what the backward pass needs.

    Parameters
    ----------
    x, weight, bias, eps, axis, activation, negative_slope, num_threads
        As for `batch_norm_forward`.
    mask : ndarray of bool, or of real numbers of at least 0
        Which positions count; or their weights, each of which is how often its value counts (0 and 1 are False and
        True). Of x's shape without the channel axis, (N, L) for x of shape (N, C, L), or with 1 for any of its lengths:
        (N, 1), (1, L); or with a 1 in the channel axis, too: (N, 1, L). It is copied.
    out : ndarray, optional
        Where to write, of x's shape and dtype; may be x itself, of which what counts is copied.

    Returns
    -------
    y : ndarray
        0 where the mask is off.
    saved : MaskedSaved
        ``saved.mean`` and ``saved.var`` are the statistics, float64, and ``saved.count`` is the number of elements that
        they are of (or the sum of the weights).

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what it was and what it must be; also where one element a channel counts, or weights sum
        to 1 or less.

    Notes
    -----
    All masked is an empty batch: y is 0, and so are the gradients. Weighted statistics are taken in float64; half types
    are computed in float32.
    """
    return _train(
        x, mask, None, None, weight, bias, momentum=0.0, unbiased=True, nan_policy="propagate", eps=eps, axis=axis,
        activation=activation, negative_slope=negative_slope, out=out, num_threads=num_threads,
    )[:2]  # fmt: skip


def masked_batch_norm_backward(
    dy: Any, saved: MaskedSaved, *, out: Array | None = None, num_threads: int | None = None
) -> tuple[Array, Array | None, Array | None]:
    """The gradients of a loss with respect to x, weight and bias.

    Parameters
    ----------
    dy : ndarray
        The loss's gradient with respect to y, of y's shape and dtype. Where the mask is off it is not read.
    saved : MaskedSaved
        What `masked_batch_norm_forward` returned beside y.
    out : ndarray, optional
        Where to write dx, of dy's shape and dtype; may be dy or x itself.
    num_threads : int, optional

    Returns
    -------
    dx : ndarray
        Of x's shape, dtype and memory order; `out` if given. 0 where the mask is off.
    dweight, dbias : ndarray of shape (channels,) and of weight's and bias's dtype, or None

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what it was and what it must be.
    """
    checks.masked_saved(saved, MaskedSaved)
    masked, rows = saved.masked, saved.rows
    gradient = masked.gather(like("dy", dy, masked.like, masked.layout))
    _check_output(out, masked, {"weight": rows.weight, "bias": rows.bias})
    if saved.weights is not None:
        gradient = gradient.astype(rows.x.dtype, copy=False)
    dx, dweight, dbias = batch_norm_backward(gradient, rows, num_threads=num_threads)
    assert dx is not None
    if saved.weights is not None:
        assert dweight is not None and dbias is not None
        _through_statistics(dx, saved, dweight, dbias)
        dweight, dbias = (
            None if dtype is None else gradient.astype(dtype)
            for gradient, dtype in zip((dweight, dbias), saved.dtypes, strict=True)
        )
    return masked.scatter(dx, out), dweight, dbias


class MaskedBatchNorm(BatchNorm):
    """`BatchNorm` of the elements that a mask leaves: ``y = bn(x, mask)``.

    In training the statistics are those of the elements that count, and so are the running ones. In eval mode (and
    frozen) the running statistics normalize them. Where the mask is off, y and dx are 0, in every mode.

    Parameters
    ----------
    num_features : int
    **options
        As for `BatchNorm`.

    See Also
    --------
    masked_batch_norm_forward : masks, weights, and what they mean.
    """

    def __call__(self, x: Any, mask: Any, *, out: Array | None = None) -> Array:  # type: ignore[override]
        """y, of x's shape, dtype and memory order.

        Parameters
        ----------
        x : ndarray of float16, bfloat16, float32 or float64, 2 to 5 axes, num_features long along `axis`
        mask : ndarray of bool, or of weights
            As for `masked_batch_norm_forward`. In eval mode a weight above 0 is True.
        out : ndarray, optional
            Where to write; may be x itself.

        Raises
        ------
        TypeError, ValueError
            Naming the argument; the layer is then as it was.

        Notes
        -----
        All masked: y is 0, and the running statistics stay as they are.
        """
        x = checks.features(x, self.axis, self.num_features)
        settings: dict[str, Any] = {
            "eps": self.eps, "activation": self.activation, "negative_slope": self.negative_slope,
        }  # fmt: skip
        if self.running_mean is None or (self.training and self.trainable):
            batches = self.num_batches_tracked
            y, saved, counts = _train(
                x, mask, self.running_mean if self.training else None, self.running_var if self.training else None,
                self.weight, self.bias, momentum=self._rate(batches), unbiased=self.unbiased,
                nan_policy=self.nan_policy if self.training else "propagate", axis=self.axis, out=out, num_threads=None,
                **settings,
            )  # fmt: skip
            self._saved = saved if self.training else None
            if batches is not None and counts:
                self.num_batches_tracked = batches + 1
            return y
        masked, rows, _ = _valid(x, mask, self.axis)
        given = (self.running_mean, self.running_var, self.weight, self.bias)
        _check_output(out, masked, dict(zip(("running_mean", "running_var", "weight", "bias"), given, strict=True)))
        if self.training:
            flat, kept = batch_norm_eval_forward(rows, *given, **settings)
            y = masked.scatter(flat, out)
            self._saved = MaskedSaved(kept, masked, len(rows), None, (None, None))
        else:
            y = masked.scatter(batch_norm(rows, *given, **settings), out)
            self._saved = None
        return y

    def backward(self, dy: Any, *, out: Array | None = None, out_residual: Array | None = None) -> Array:
        """dx, leaving `grad_weight` and `grad_bias`.

        Parameters
        ----------
        dy : ndarray of y's shape and dtype
        out : ndarray, optional
            Where to write dx; may be dy itself.
        out_residual : None

        Raises
        ------
        ValueError
            Before any forward pass in training mode, or after one in eval mode, which keeps nothing.
        """
        saved = self._kept()
        checks.absent("out_residual", out_residual, "there is no residual")
        dx, self.grad_weight, self.grad_bias = masked_batch_norm_backward(dy, saved, out=out)
        return dx


def _valid(x: Any, mask: Any, axis: int) -> tuple[Masked, Array, Array | None]:
    """Where the mask is on, the rows that are there, and their weights, if they are not all 1."""
    source, layout = canonical("x", x, axis)
    view = layout.from_memory(source)
    axis = checks.channel_axis(axis, view.shape)
    where, weights = checks.mask(mask, view, axis)
    masked = Masked(where, axis, np.broadcast_to(np.zeros((), source.dtype), source.shape), layout)
    return masked, masked.gather(source), None if weights is None else weights[where]


def _check_output(out: Array | None, masked: Masked, others: dict[str, Any]) -> None:
    """Before anything is computed. It may overlap data, of which rows were copied."""
    if out is not None:
        checks.output("out", out, masked.layout.from_memory(masked.like))
        checks.overlap("out", out, others)


def _train(
    x: Any, mask: Any, running_mean: Any, running_var: Any, weight: Any, bias: Any, *,
    momentum: float, unbiased: bool, nan_policy: str, eps: float, axis: int, activation: str | None,
    negative_slope: float, out: Array | None, num_threads: int | None,
) -> tuple[Array, MaskedSaved, bool]:  # fmt: skip
    """`functional.train_forward` of the elements that count. `out` and the statistics are written last."""
    masked, rows, weights = _valid(x, mask, axis)
    channels = rows.shape[1]
    rate = checks.momentum(momentum)
    checks.flag("unbiased", unbiased)
    checks.nan_policy(nan_policy)
    statistics = checks.running(running_mean, running_var, channels, update=True)
    others = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    _check_output(out, masked, others)
    settings: dict[str, Any] = {
        "eps": eps, "activation": activation, "negative_slope": negative_slope, "num_threads": num_threads,
    }  # fmt: skip
    given = [checks.parameter(name, others[name], channels) for name in ("weight", "bias")]
    if weights is None or not len(rows):
        weights, total = None, float(len(rows))
        if channels:
            checks.enough_valid(len(rows), masked.layout.from_memory(masked.like).shape)
        flat, kept = batch_norm_forward(rows, *given, **settings)
    else:
        total = float(weights.sum())
        checks.enough_weight(total)
        # float64 parameters give the sums of the backward pass in float64, which dx is made of.
        wide = [
            np.full(channels, otherwise) if p is None else p.astype(np.float64)
            for p, otherwise in zip(given, (1.0, 0.0), strict=True)
        ]
        data = rows.astype(np.float32) if rows.itemsize == 2 else rows
        flat, kept = batch_norm_eval_forward(data, *_moments(rows, weights, total), *wide, **settings)
    if nan_policy == "raise" and total:
        held = kept.mean.dtype if statistics[1] is None else statistics[1].dtype
        checks.finite_statistics(kept.mean, kept.var, held)
    y = masked.scatter(flat, out)
    count = total if channels else 0
    counts = track(*statistics, kept.mean, kept.var, count, rate, unbiased, nan_policy)
    return y, MaskedSaved(kept, masked, total, weights, tuple(None if p is None else p.dtype for p in given)), counts


def _blocks(rows: Array) -> Iterator[slice]:
    """Rows that are worked on at once."""
    step = max(1, PIECE // max(1, rows.shape[1]))
    return (slice(start, start + step) for start in range(0, len(rows), step))


def _columns(rows: Array) -> Array:
    """(channels, rows) in float64: a channel's values side by side, so that NumPy sums them pairwise."""
    return rows.T.astype(np.float64, order="C")


def _moments(rows: Array, weights: Array, total: float) -> tuple[Array, Array]:
    """The weighted mean and population variance of each column, in two passes of float64, the second about the mean."""
    with np.errstate(all="ignore"):
        mean = np.sum([(_columns(rows[b]) * weights[b]).sum(axis=1) for b in _blocks(rows)], axis=0) / total
        sums, squares = [], []
        for b in _blocks(rows):
            deviation = _columns(rows[b]) - mean[:, None]
            weighted = deviation * weights[b]
            sums.append(weighted.sum(axis=1))
            squares.append((weighted * deviation).sum(axis=1))
        rest = np.sum(sums, axis=0) / total  # what rounding left over; for a constant channel, all of it
        var = np.sum(squares, axis=0) / total
        return mean + rest, np.where(np.isfinite(var), np.maximum(var - rest * rest, 0), var)  # of ∞ nothing is taken


def _through_statistics(dx: Array, saved: MaskedSaved, dweight: Array, dbias: Array) -> None:
    """Take from dx, which is dz·weight/σ, what flows through the weighted statistics: see the head of this file."""
    rows, weights, total = saved.rows, saved.weights, saved.count
    assert weights is not None and rows.weight is not None
    with np.errstate(all="ignore"):
        inverse = 1 / np.sqrt(rows.var + rows.eps)
        scale = rows.weight * inverse / total
        for b in _blocks(dx):
            xhat = (rows.x[b] - rows.mean) * inverse
            dx[b] -= (dbias + xhat * dweight) * scale * weights[b, None]
