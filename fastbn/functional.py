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
from .layout import Layout, canonical, finish, in_order, like, output, usual_output
from .statistics import moments

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(slots=True, eq=False)
class Saved:
    """What a backward pass needs of its forward pass.

    It refers to x, weight, bias and, after a residual, y without copying them (unless they had gaps): do not overwrite
    them before the backward pass.

    Attributes
    ----------
    mean, var : ndarray, shape (channels,)
        The statistics that normalized x: the batch's own (float64, var the population variance), or those given.
    batch : bool
        Whether they were the batch's own, so that the gradient flows through them.
    weight, bias : ndarray or None
    eps : float
    slope : float
        The activation's under 0: 0 for relu, 1 where there is no activation.
    residual : bool
        Whether one was added.
    y : ndarray or None
        The result, where a residual and an activation made it: the backward pass sees from it which elements the
        activation cut. Without a residual it sees that from x, and y is not kept.
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
    slope: float = 1.0
    residual: bool = False
    y: Array | None = None


def batch_norm(
    x: Any,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    *,
    training: bool = False,
    momentum: float = 0.1,
    unbiased: bool = True,
    nan_policy: str = "propagate",
    eps: float = 1e-5,
    axis: int = 1,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: Any = None,
    out: Array | None = None,
    num_threads: int | None = None,
) -> Array:
    """Normalize each channel: with the batch's statistics in training, with the running ones otherwise.

    Arrays on a GPU (with a ``__cuda_array_interface__``) are taken too, of float16, float32 or float64: all of them
    there, results of torch's or CuPy's kind as x is, and Numba's otherwise.

    Parameters
    ----------
    x : ndarray of float16, bfloat16 (of ml_dtypes), float32 or float64, 2 to 5 axes
        Half types are converted as they are read and written; what is computed from them is computed in float32.
    running_mean, running_var : ndarray of float32 or float64, shape (channels,), optional
        In training they are updated in place: ``running += momentum * (batch - running)``. Otherwise they are what
        normalizes x, and must be given.
    weight, bias : ndarray of float32 or float64, shape (channels,), optional
        Scale and shift (γ and β); 1 and 0 where absent.
    training : bool
    momentum : float from 0 to 1
        The weight of the new batch.
    unbiased : bool
        Whether the running variance takes the batch's unbiased variance (divided by n - 1, as in torch) or the
        population's (by n, as in ONNX and Keras). x is normalized by the population's either way.
    nan_policy : {"propagate", "skip_update", "raise"}
        What a training batch does that has a NaN, an infinity or statistics that overflow: go into the running
        statistics; leave them as they were (y shows the NaN); or raise before anything is written, for which x is read
        once more.
    eps : float
        Added to the variance.
    axis : int
        The channel axis: 1 for NC, NCL, NCHW, NCDHW, -1 for channels-last.
    activation : {None, "relu", "leaky_relu"}
        Applied to the result, in the same pass over memory.
    negative_slope : float of at least 0
        leaky_relu's slope under 0.
    residual : ndarray of x's shape and dtype, optional
        Added before the activation, in the same pass over memory.
    out : ndarray, optional
        Where to write, of x's shape and dtype; may be x or residual itself.
    num_threads : int, optional

    Returns
    -------
    y : ndarray
        ``activation((x - mean) / sqrt(var + eps) * weight + bias + residual)``, of x's shape, dtype and memory order;
        `out` if given.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what it was and what it must be. Running statistics are then as they were.

    Notes
    -----
    An empty batch gives an empty result and leaves the running statistics alone.
    """
    if type(x) is not np.ndarray and checks.on_gpu(x):
        return backends.gpu(num_threads).batch_norm(  # type: ignore[no-any-return]
            x, running_mean, running_var, weight, bias, training=training, momentum=momentum, unbiased=unbiased,
            nan_policy=nan_policy, eps=eps, axis=axis, activation=activation, negative_slope=negative_slope,
            residual=residual, out=out,
        )  # fmt: skip
    if checks.flag("training", training):
        return train_forward(
            x, running_mean, running_var, weight, bias,
            momentum=momentum, unbiased=unbiased, nan_policy=nan_policy, eps=eps, axis=axis, activation=activation,
            negative_slope=negative_slope, residual=residual, out=out, num_threads=num_threads, keep=False,
        )[0]  # fmt: skip
    checks.momentum(momentum)
    checks.flag("unbiased", unbiased)
    checks.nan_policy(nan_policy)
    slope = checks.activation(activation, negative_slope)
    kernels, threads = backends.serving(num_threads)
    y = kernels.normalize_usual(x, running_mean, running_var, weight, bias, eps, axis, residual, slope, out, threads)
    if y is not None:
        return y  # type: ignore[no-any-return]
    source, layout = canonical("x", x, axis)
    mean, var = _running(x, running_mean, running_var, layout.channels, update=False)
    return _normalize(
        x, source, layout, mean, var, weight, bias, eps, slope, residual, out, num_threads, keep=False
    )[0]  # fmt: skip


def train_forward(
    x: Any, running_mean: Any, running_var: Any, weight: Any, bias: Any, *,
    momentum: float, unbiased: bool, nan_policy: str, eps: float, axis: int, activation: str | None,
    negative_slope: float, residual: Any, out: Array | None, num_threads: int | None = None, keep: bool = True,
) -> tuple[Array, Saved, bool]:  # fmt: skip
    """`batch_norm_forward` that also updates the running statistics, where there are any: a training step's forward.

    Without `keep` out may be x, and `saved` is then of no use. The third result: whether the batch counted, which an
    empty one does not, nor one that the `nan_policy` skips.
    """
    if type(x) is not np.ndarray and checks.on_gpu(x):
        return backends.gpu(num_threads).train_forward(  # type: ignore[no-any-return]
            x, running_mean, running_var, weight, bias, momentum=momentum, unbiased=unbiased, nan_policy=nan_policy,
            eps=eps, axis=axis, activation=activation, negative_slope=negative_slope, residual=residual, out=out,
            keep=keep,
        )  # fmt: skip
    source, layout = canonical("x", x, axis)
    rate = checks.momentum(momentum)
    checks.flag("unbiased", unbiased)
    mean, var = _running(x, running_mean, running_var, layout.channels, update=True)
    checks.not_a_parameter(mean, var, weight, bias)
    slope = checks.activation(activation, negative_slope)
    if checks.nan_policy(nan_policy) == "raise" and source.size:
        batch = moments(x, axis=axis, num_threads=num_threads)
        checks.finite_statistics(batch.mean, batch.var(), batch.mean.dtype if var is None else var.dtype)
    y, saved = _forward(
        x, source, layout, weight, bias, eps, slope, residual, out, num_threads, keep=keep, apart=(mean, var)
    )  # fmt: skip
    count = layout.values if source.size else 0
    return y, saved, track(mean, var, saved.mean, saved.var, count, rate, unbiased, nan_policy)


def track(
    running_mean: Any, running_var: Any, mean: Array, var: Array, count: float, rate: float, unbiased: bool,
    nan_policy: str,
) -> bool:  # fmt: skip
    """The running statistics, where there are any, take in those of a batch of `count` values; whether it counted."""
    counts = count > 0
    if nan_policy == "skip_update" and counts and running_var is not None:
        counts = checks.representable(mean, var, running_var.dtype)
    if running_mean is not None and counts:
        correction = count / (count - 1) if unbiased else 1.0
        backends.kernels().update_running_stats(running_mean, running_var, mean, var, rate, correction)
    return counts


def batch_norm_forward(
    x: Any,
    weight: Any = None,
    bias: Any = None,
    *,
    eps: float = 1e-5,
    axis: int = 1,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: Any = None,
    out: Array | None = None,
    num_threads: int | None = None,
) -> tuple[Array, Saved]:
    """Normalize each channel with the batch's statistics, and keep what `batch_norm_backward` needs.

    Arrays on a GPU are taken too, of float16, float32 or float64: see `batch_norm`.

    Parameters
    ----------
    x, weight, bias, eps, axis, activation, negative_slope, residual, num_threads
        As for `batch_norm`.
    out : ndarray, optional
        Where to write, of x's shape and dtype; may be residual itself. It must not share memory with x, which the
        backward pass reads.

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
    if type(x) is not np.ndarray and checks.on_gpu(x):
        return backends.gpu(num_threads).batch_norm_forward(  # type: ignore[no-any-return]
            x, weight, bias, eps=eps, axis=axis, activation=activation, negative_slope=negative_slope,
            residual=residual, out=out,
        )  # fmt: skip
    slope = checks.activation(activation, negative_slope)
    kernels, threads = backends.serving(num_threads)
    found = kernels.forward_usual(x, weight, bias, eps, axis, residual, slope, out, threads)
    if found is not None:
        y, mean, var, outer, channels, inner = found
        return _done(x, in_order(outer, channels, inner), mean, var, weight, bias, eps, True, slope, residual, y, y)
    source, layout = canonical("x", x, axis)
    return _forward(x, source, layout, weight, bias, eps, slope, residual, out, num_threads)


def batch_norm_eval_forward(
    x: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    *,
    eps: float = 1e-5,
    axis: int = 1,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: Any = None,
    out: Array | None = None,
    num_threads: int | None = None,
) -> tuple[Array, Saved]:
    """Normalize each channel with given statistics, and keep what `batch_norm_backward` needs.

    For fine-tuning with fixed statistics: the backward pass treats them as constants.
    Arrays on a GPU are taken too, of float16, float32 or float64: see `batch_norm`.

    Parameters
    ----------
    x, running_mean, running_var, weight, bias, eps, axis, activation, negative_slope, residual, num_threads
        As for `batch_norm`; the running statistics are required and are not updated.
    out : ndarray, optional
        Where to write, of x's shape and dtype; may be residual itself. It must not share memory with x, which the
        backward pass reads.

    Returns
    -------
    y : ndarray
    saved : Saved

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what it was and what it must be.
    """
    if type(x) is not np.ndarray and checks.on_gpu(x):
        return backends.gpu(num_threads).batch_norm_eval_forward(  # type: ignore[no-any-return]
            x, running_mean, running_var, weight, bias, eps=eps, axis=axis, activation=activation,
            negative_slope=negative_slope, residual=residual, out=out,
        )  # fmt: skip
    source, layout = canonical("x", x, axis)
    mean, var = _running(x, running_mean, running_var, layout.channels, update=False)
    slope = checks.activation(activation, negative_slope)
    return _normalize(
        x, source, layout, mean, var, weight, bias, eps, slope, residual, out, num_threads
    )  # fmt: skip


def batch_norm_backward(
    dy: Any,
    saved: Saved,
    *,
    out: Array | None = None,
    out_residual: Array | None = None,
    num_threads: int | None = None,
) -> tuple[Array | None, ...]:
    """The gradients of a loss with respect to x, weight, bias and, where there was one, residual.

    After a forward pass on a GPU, dy must be there too, and so are the gradients: float16, float32 or float64.

    Parameters
    ----------
    dy : ndarray
        The loss's gradient with respect to y, of y's shape and dtype.
    saved : Saved
        What `batch_norm_forward` or `batch_norm_eval_forward` returned beside y.
    out : ndarray, optional
        Where to write dx, of dy's shape and dtype; may be dy itself, but must not share memory with x.
    out_residual : ndarray, optional
        Where to write dresidual, likewise; allowed only if the forward pass had a residual. Not out's memory.
    num_threads : int, optional

    Returns
    -------
    dx : ndarray
        Of x's shape, dtype and memory order; `out` if given.
    dweight, dbias : ndarray of shape (channels,) and of weight's and bias's dtype, or None
        None where the forward pass had no weight or no bias.
    dresidual : ndarray
        Only where the forward pass had a residual, as a fourth result: dy where the activation passed it on.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what it was and what it must be.
    """
    checks.saved(saved, Saved, gpu=True)
    if type(saved) is not Saved or (type(dy) is not np.ndarray and checks.on_gpu(dy)):
        gpu = backends.gpu(num_threads)
        return gpu.batch_norm_backward(dy, saved, out=out, out_residual=out_residual)  # type: ignore[no-any-return]
    x, layout, weight, bias = saved.x, saved.layout, saved.weight, saved.bias
    channels = layout.channels
    kernels, threads = backends.serving(num_threads)
    residual_memory = dresidual = None
    if (
        not saved.residual
        and out_residual is None
        and dy is not None
        and kernels.usual(given := layout.from_memory(x), channels, weight, bias, dy, out, ())
    ):
        gradient = layout.to_memory(dy)
        memory, dx = usual_output(given, out, layout)
    else:
        checks.one_side("x", x, {"out": out, "out_residual": out_residual})
        gradient = like("dy", dy, x, layout)
        memory, dx = output("out", out, x, layout)
        reads = {"dy": dy, "x": x, "weight": weight, "bias": bias, "y": saved.y}
        checks.overlap("out", out, reads, same_as=("dy",))
        if saved.residual:
            residual_memory, dresidual = output("out_residual", out_residual, x, layout)
            checks.overlap("out_residual", out_residual, {**reads, "out": dx}, same_as=("dy",))
        else:
            checks.no_residual(out_residual)
    dweight = np.empty(channels, checks.parameters_like(x) if weight is None else weight.dtype)
    dbias = np.empty(channels, checks.parameters_like(x) if bias is None else bias.dtype)
    if x.size:
        kernels.backward(
            gradient, x, memory, layout.outer, channels, layout.inner,
            saved.mean, saved.var, weight, bias, saved.eps, dweight, dbias, saved.batch,
            saved.y, residual_memory, saved.slope, threads,
        )  # fmt: skip
    else:
        dweight[...] = dbias[...] = 0
    dx = dx if memory is dx else finish(memory, dx, layout)
    gradients = dx, None if weight is None else dweight, None if bias is None else dbias
    if residual_memory is None or dresidual is None:
        return gradients
    return *gradients, finish(residual_memory, dresidual, layout)


def _running(x: Any, mean: Any, var: Any, channels: int, *, update: bool) -> tuple[Any, Any]:
    """The running statistics, checked."""
    if backends.kernels().usual_statistics(mean, var, channels):
        return mean, var
    checks.one_side("x", x, {"running_mean": mean, "running_var": var})
    return checks.running(mean, var, channels, update=update)


def _forward(
    given: Any, x: Array, layout: Layout, weight: Any, bias: Any, eps: float, slope: float, residual: Any,
    out: Array | None, num_threads: int | None, *, keep: bool = True, apart: tuple[Any, ...] = (),
) -> tuple[Array, Saved]:  # fmt: skip
    """y by the batch's statistics. `given`: x as the caller gave it; `apart`: more that `out` must not overlap."""
    outer, channels, inner, _, _ = layout
    if outer * inner == 1 and channels:
        checks.enough_values(1, layout.from_memory(x).shape)
    eps = checks.eps(eps)
    kernels, threads = backends.serving(num_threads)
    if kernels.usual(given, channels, weight, bias, residual, out, apart):
        residual = None if residual is None else layout.to_memory(residual)
        memory, y = usual_output(given, out, layout)
    else:
        others = {"x": given, "residual": residual, "weight": weight, "bias": bias}
        others |= dict(zip(("running_mean", "running_var"), apart, strict=False))
        checks.one_side("x", x, {**others, "out": out})
        weight, bias = checks.parameter("weight", weight, channels), checks.parameter("bias", bias, channels)
        residual = None if residual is None else like("residual", residual, x, layout)
        memory, y = output("out", out, x, layout)
        checks.overlap("out", out, others, same_as=("residual",) if keep else ("x", "residual"))
    mean, var = np.empty(channels), np.empty(channels)
    if x.size:
        kernels.forward(x, memory, outer, channels, inner, weight, bias, eps, mean, var, residual, slope, threads)
    else:
        mean[...] = var[...] = 0
    return _done(x, layout, mean, var, weight, bias, eps, True, slope, residual, memory, y)


def _normalize(
    given: Any, x: Array, layout: Layout, mean: Array, var: Array, weight: Any, bias: Any, eps: float, slope: float,
    residual: Any, out: Array | None, num_threads: int | None, *, keep: bool = True,
) -> tuple[Array, Any]:  # fmt: skip
    """y by given statistics. Without `keep` out may be x, and nothing is saved: None."""
    outer, channels, inner, _, _ = layout
    eps = checks.eps(eps)
    kernels, threads = backends.serving(num_threads)
    if kernels.usual(given, channels, weight, bias, residual, out, (mean, var)):
        residual = None if residual is None else layout.to_memory(residual)
        memory, y = usual_output(given, out, layout)
    else:
        others = {
            "x": given, "residual": residual, "weight": weight, "bias": bias, "running_mean": mean, "running_var": var,
        }  # fmt: skip
        checks.one_side("x", x, {**others, "out": out})
        weight, bias = checks.parameter("weight", weight, channels), checks.parameter("bias", bias, channels)
        residual = None if residual is None else like("residual", residual, x, layout)
        memory, y = output("out", out, x, layout)
        checks.overlap("out", out, others, same_as=("residual",) if keep else ("x", "residual"))
        mean, var = np.ascontiguousarray(mean), np.ascontiguousarray(var)
    if keep:  # a training step may update the running statistics before the backward pass
        mean, var = mean.copy(), var.copy()
    if x.size:
        kernels.normalize(x, memory, outer, channels, inner, mean, var, weight, bias, eps, residual, slope, threads)
    if not keep:
        return y if memory is y else finish(memory, y, layout), None
    return _done(x, layout, mean, var, weight, bias, eps, False, slope, residual, memory, y)


def _done(
    x: Array, layout: Layout, mean: Array, var: Array, weight: Array | None, bias: Array | None, eps: float,
    batch: bool, slope: float, residual: Array | None, memory: Array, y: Array,
) -> tuple[Array, Saved]:  # fmt: skip
    """The result, and what a backward pass needs: y among it only where it alone knows what the activation cut."""
    kept = memory if residual is not None and slope != 1 else None
    saved = Saved(x, layout, mean, var, weight, bias, eps, batch, slope, residual is not None, kept)
    return y if memory is y else finish(memory, y, layout), saved
