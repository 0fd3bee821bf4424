"""The operations: arrays in, arrays out, nothing kept.

Every function checks its arguments, finds the array's layout and hands its memory to the kernels of the chosen
backend. Formulas: Ioffe and Szegedy (2015), "Batch Normalization: Accelerating Deep Network Training by Reducing
Internal Covariate Shift", Algorithm 1 (forward), section 3 (backward).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from . import backends, checks
from .layout import Layout, canonical, finish, like, output
from .statistics import Moments

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(slots=True, eq=False)
class Saved:
    """What a backward pass needs of its forward pass.

    It refers to x and weight without copying them (unless they had gaps): do not overwrite them before the backward
    pass.

    Attributes
    ----------
    mean, var : ndarray, shape (channels,)
        The statistics that normalized x: the batch's own (float64, var the population variance), or those given.
    batch : bool
        Whether they were the batch's own, so that the gradient flows through them.
    weight, bias : ndarray or None
    eps : float
    x : ndarray
        The input, its axes in memory order.
    layout : Layout
    """

    x: Array
    layout: Layout
    mean: Array
    var: Array
    weight: Array | None
    bias: Array | None
    eps: float
    batch: bool


def batch_norm(
    x: Any,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    axis: int = 1,
    out: Array | None = None,
    num_threads: int | None = None,
) -> Array:
    """Normalize each channel: with the batch's statistics in training, with the running ones otherwise.

    Parameters
    ----------
    x : ndarray of float32 or float64, 2 to 5 axes
    running_mean, running_var : ndarray of float32 or float64, shape (channels,), optional
        In training they are updated in place: ``running += momentum * (batch - running)``, with the unbiased variance.
        Otherwise they are what normalizes x, and must be given.
    weight, bias : ndarray of float32 or float64, shape (channels,), optional
        Scale and shift (γ and β); 1 and 0 where absent.
    training : bool
    momentum : float from 0 to 1
        The weight of the new batch.
    eps : float
        Added to the variance.
    axis : int
        The channel axis: 1 for NC, NCL, NCHW, NCDHW, -1 for channels-last.
    out : ndarray, optional
        Where to write, of x's shape and dtype; may be x itself.
    num_threads : int, optional

    Returns
    -------
    y : ndarray
        ``(x - mean) / sqrt(var + eps) * weight + bias``, of x's shape, dtype and memory order; `out` if given.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what it was and what it must be. Running statistics are then as they were.

    Notes
    -----
    An empty batch gives an empty result and leaves the running statistics alone.
    """
    if checks.flag("training", training):
        return train_forward(
            x, running_mean, running_var, weight, bias,
            momentum=momentum, eps=eps, axis=axis, out=out, num_threads=num_threads, same_as="x",
        )[0]  # fmt: skip
    source, layout = canonical("x", x, axis)
    checks.momentum(momentum)
    mean, var = checks.running(running_mean, running_var, layout.channels, update=False)
    return _normalize(x, source, layout, mean, var, weight, bias, eps, out, num_threads, same_as="x")[0]


def train_forward(
    x: Any, running_mean: Any, running_var: Any, weight: Any, bias: Any, *,
    momentum: float, eps: float, axis: int, out: Array | None, num_threads: int | None = None,
    same_as: str | None = None,
) -> tuple[Array, Saved]:  # fmt: skip
    """`batch_norm_forward` that also updates the running statistics, where there are any: a training step's forward.

    With ``same_as="x"`` out may be x, and `saved` is then of no use.
    """
    source, layout = canonical("x", x, axis)
    rate = checks.momentum(momentum)
    mean, var = checks.running(running_mean, running_var, layout.channels, update=True)
    y, saved = _forward(x, source, layout, weight, bias, eps, out, num_threads, same_as=same_as, apart=(mean, var))
    if mean is not None and source.size:
        backends.kernels().update_running_stats(mean, var, saved.mean, saved.var, rate, layout.values)
    return y, saved


def batch_norm_forward(
    x: Any,
    weight: Any = None,
    bias: Any = None,
    *,
    eps: float = 1e-5,
    axis: int = 1,
    out: Array | None = None,
    num_threads: int | None = None,
) -> tuple[Array, Saved]:
    """Normalize each channel with the batch's statistics, and keep what `batch_norm_backward` needs.

    Parameters
    ----------
    x, weight, bias, eps, axis, num_threads
        As for `batch_norm`.
    out : ndarray, optional
        Where to write, of x's shape and dtype. It must not share memory with x, which the backward pass reads.

    Returns
    -------
    y : ndarray
    saved : Saved
        ``saved.mean`` and ``saved.var`` are the batch's statistics, float64.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what it was and what it must be.
    """
    source, layout = canonical("x", x, axis)
    return _forward(x, source, layout, weight, bias, eps, out, num_threads)


def batch_norm_eval_forward(
    x: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    *,
    eps: float = 1e-5,
    axis: int = 1,
    out: Array | None = None,
    num_threads: int | None = None,
) -> tuple[Array, Saved]:
    """Normalize each channel with given statistics, and keep what `batch_norm_backward` needs.

    For fine-tuning with fixed statistics: the backward pass treats them as constants.

    Parameters
    ----------
    x, running_mean, running_var, weight, bias, eps, axis, num_threads
        As for `batch_norm`; the running statistics are required and are not updated.
    out : ndarray, optional
        Where to write, of x's shape and dtype. It must not share memory with x, which the backward pass reads.

    Returns
    -------
    y : ndarray
    saved : Saved

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what it was and what it must be.
    """
    source, layout = canonical("x", x, axis)
    mean, var = checks.running(running_mean, running_var, layout.channels, update=False)
    # Copies: a training step may update the running statistics before the backward pass.
    return _normalize(x, source, layout, mean.copy(), var.copy(), weight, bias, eps, out, num_threads)


def batch_norm_backward(
    dy: Any, saved: Saved, *, out: Array | None = None, num_threads: int | None = None
) -> tuple[Array, Array | None, Array | None]:
    """The gradients of a loss with respect to x, weight and bias.

    Parameters
    ----------
    dy : ndarray
        The loss's gradient with respect to y, of y's shape and dtype.
    saved : Saved
        What `batch_norm_forward` or `batch_norm_eval_forward` returned beside y.
    out : ndarray, optional
        Where to write dx, of dy's shape and dtype; may be dy itself, but must not share memory with x.
    num_threads : int, optional

    Returns
    -------
    dx : ndarray
        Of x's shape, dtype and memory order; `out` if given.
    dweight, dbias : ndarray of shape (channels,) and of weight's and bias's dtype, or None
        None where the forward pass had no weight or no bias.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what it was and what it must be.
    """
    if not isinstance(saved, Saved):
        raise TypeError(
            f"saved is a {type(saved).__name__}, and must be what batch_norm_forward or batch_norm_eval_forward "
            "returned beside y; batch_norm keeps nothing for a backward pass"
        )
    x, layout, weight, bias = saved.x, saved.layout, saved.weight, saved.bias
    gradient = like("dy", dy, x, layout)
    memory, dx = output("out", out, x, layout)
    checks.overlap("out", out, {"dy": dy, "x": x, "weight": weight}, same_as="dy")
    channels = layout.channels
    dweight = np.empty(channels, x.dtype if weight is None else weight.dtype)
    dbias = np.empty(channels, x.dtype if bias is None else bias.dtype)
    kernels, threads = backends.serving(num_threads)
    if x.size:
        kernels.backward(
            gradient, x, memory, layout.outer, channels, layout.inner,
            saved.mean, saved.var, weight, saved.eps, dweight, dbias, saved.batch, threads,
        )  # fmt: skip
    else:
        dweight[...] = dbias[...] = 0
    return finish(memory, dx, layout), None if weight is None else dweight, None if bias is None else dbias


def moments(x: Any, *, axis: int = 1, num_threads: int | None = None) -> Moments:
    """Count, mean and sum of squared deviations of each channel.

    Parameters
    ----------
    x : ndarray of float32 or float64, 2 to 5 axes
    axis : int
        The channel axis.
    num_threads : int, optional

    Returns
    -------
    Moments
        Merge with ``+``; ``.var()`` gives the variance. Welford's update, in the pairwise form of Chan, Golub and
        LeVeque (1983).

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what it was and what it must be.
    """
    source, layout = canonical("x", x, axis)
    outer, channels, inner = layout[:3]
    mean, m2 = np.zeros(channels), np.zeros(channels)
    kernels, threads = backends.serving(num_threads)
    if source.size:
        kernels.moments(source, outer, channels, inner, mean, m2, threads)
    return Moments(layout.values, mean, m2)


def _forward(
    given: Any, x: Array, layout: Layout, weight: Any, bias: Any, eps: float, out: Array | None,
    num_threads: int | None, *, same_as: str | None = None, apart: tuple[Any, ...] = (),
) -> tuple[Array, Saved]:  # fmt: skip
    """y by the batch's statistics. `given`: x as the caller gave it; `apart`: more that `out` must not overlap."""
    outer, channels, inner = layout[:3]
    if outer * inner == 1 and channels:
        checks.enough_values(1, layout.from_memory(x).shape)
    w, b = checks.parameter("weight", weight, channels), checks.parameter("bias", bias, channels)
    eps = checks.eps(eps)
    memory, y = output("out", out, x, layout)
    if out is not None:
        others = {"x": given, "weight": weight, "bias": bias}
        others |= dict(zip(("running_mean", "running_var"), apart, strict=False))
        checks.overlap("out", out, others, same_as=same_as)
    kernels, threads = backends.serving(num_threads)
    mean, var = np.empty(channels), np.empty(channels)
    if x.size:
        kernels.forward(x, memory, outer, channels, inner, w, b, eps, mean, var, threads)
    else:
        mean[...] = var[...] = 0
    return finish(memory, y, layout), Saved(x, layout, mean, var, w, b, eps, True)


def _normalize(
    given: Any, x: Array, layout: Layout, mean: Array, var: Array, weight: Any, bias: Any, eps: float,
    out: Array | None, num_threads: int | None, *, same_as: str | None = None,
) -> tuple[Array, Saved]:  # fmt: skip
    """y by given statistics."""
    outer, channels, inner = layout[:3]
    others = {"x": given, "weight": weight, "bias": bias, "running_mean": mean, "running_var": var}
    weight = checks.parameter("weight", weight, channels)
    bias = checks.parameter("bias", bias, channels)
    eps = checks.eps(eps)
    memory, y = output("out", out, x, layout)
    if out is not None:
        checks.overlap("out", out, others, same_as=same_as)
    kernels, threads = backends.serving(num_threads)
    mean, var = np.ascontiguousarray(mean), np.ascontiguousarray(var)
    if x.size:
        kernels.normalize(x, memory, outer, channels, inner, mean, var, weight, bias, eps, threads)
    return finish(memory, y, layout), Saved(x, layout, mean, var, weight, bias, eps, False)
