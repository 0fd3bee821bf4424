"""The specification: batch normalization in plain NumPy, float64 inside, no tricks.

Every other backend computes these functions, with these arguments. The shapes, for an array of
(outer, channels, inner) elements in C order:

    x, y, dy, dx, residual, dresidual    outer·channels·inner elements, all of float16, bfloat16, float32 or float64
    mean, var, m2, sum_dy, sum_dy_xmu    (channels,) float64
    weight, bias, their gradients, running statistics   (channels,) float32 or float64; weight and bias may be None
    var                                  the population variance, m2 / (outer·inner)
    slope                                of the activation under 0: 0 for relu, 1 for none, others for leaky_relu

An activation is act(z) = slope·z where z ≤ 0, and z elsewhere (for slope 0 exactly 0, also where z = -∞).
A backward pass knows z's sign from x, by the forward pass's own formula, or from y where a residual was added.

`threads` is ignored here.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

# NaN, infinities and overflow come out as they do from the compiled kernels: without a warning.
_quiet = np.errstate(all="ignore")

NAME = "reference"
INSTRUCTION_SET = "NumPy's"


def openmp() -> str:
    """The OpenMP run-time in use."""
    return "none: the reference kernels run on one thread"


def has_threads() -> bool:
    """Whether the kernels can use more than one thread."""
    return False


def usual(x: Array, channels: int, weight: Any, bias: Any, like: Any, out: Any, others: tuple[Any, ...]) -> bool:
    """Whether a call's arguments are as most are, so that they need no further look; False is always right."""
    return False


def normalize_usual(
    x: Any, mean: Any, var: Any, weight: Any, bias: Any, eps: Any, axis: Any, residual: Any, slope: float, out: Any,
    threads: int,
) -> Array | None:  # fmt: skip
    """y where all arguments, unchecked, are as most are; None, always right, where they need a further look."""
    return None


def forward_usual(
    x: Any, weight: Any, bias: Any, eps: Any, axis: Any, residual: Any, slope: float, out: Any, threads: int
) -> tuple[Array, Array, Array, int, int, int] | None:
    """The same of a forward pass on x in C order: (y, mean, var, outer, channels, inner); None is always right."""
    return None


def usual_statistics(mean: Any, var: Any, channels: int) -> bool:
    """The same for running statistics."""
    return False


def _channels(x: Array, outer: int, channels: int, inner: int) -> Array:
    """A float64 copy, (channels, outer·inner): a channel's values side by side, so that NumPy sums them pairwise."""
    return x.reshape(outer, channels, inner).transpose(1, 0, 2).astype(np.float64, order="C").reshape(channels, -1)


def _store(result: Array, values: Array, outer: int, channels: int, inner: int) -> None:
    """The inverse: values of shape (channels, outer·inner) into the array `result`."""
    result.reshape(outer, channels, inner)[...] = values.reshape(channels, outer, inner).transpose(1, 0, 2)


def _column(values: Array) -> Array:
    """(channels,) → (channels, 1), float64."""
    return values.astype(np.float64)[:, np.newaxis]


def _scale(var: Array, weight: Array | None, eps: float) -> Array:
    """weight/σ, (channels, 1)."""
    scale = 1 / np.sqrt(_column(var) + eps)
    return scale if weight is None else scale * _column(weight)


def _normalized(x: Array, mean: Array, var: Array, weight: Array | None, bias: Array | None, eps: float) -> Array:
    """(channels, outer·inner), in place."""
    x -= _column(mean)
    x *= _scale(var, weight, eps)
    if bias is not None:
        x += _column(bias)
    return x


@_quiet
def moments(x: Array, outer: int, channels: int, inner: int, mean: Array, m2: Array, threads: int) -> None:
    """mean = Σx / n,  m2 = Σ(x - mean)², in two passes. Writes mean and m2."""
    deviation = _channels(x, outer, channels, inner)
    mean_ = deviation.mean(axis=1, keepdims=True)
    deviation -= mean_
    rest = deviation.mean(axis=1, keepdims=True)  # what rounding left over; for a constant channel, all of it
    deviation -= rest
    mean[...] = (mean_ + rest)[:, 0]
    m2[...] = np.square(deviation, out=deviation).sum(axis=1)


@_quiet
def normalize(
    x: Array, y: Array, outer: int, channels: int, inner: int,
    mean: Array, var: Array, weight: Array | None, bias: Array | None, eps: float,
    residual: Array | None, slope: float, threads: int,
) -> None:  # fmt: skip
    """y = act((x - mean) · weight/σ + bias + residual), σ = sqrt(var + eps). Writes y, which may be x or residual."""
    wide = _normalized(_channels(x, outer, channels, inner), mean, var, weight, bias, eps)
    if residual is not None:
        wide += _channels(residual, outer, channels, inner)
    _store(y, np.where(wide <= 0, wide * slope if slope else 0.0, wide), outer, channels, inner)


def forward(
    x: Array, y: Array, outer: int, channels: int, inner: int,
    weight: Array | None, bias: Array | None, eps: float, mean: Array, var: Array,
    residual: Array | None, slope: float, threads: int,
) -> None:  # fmt: skip
    """moments, then normalize with them. Writes y, mean and var."""
    moments(x, outer, channels, inner, mean, var, threads)
    var /= outer * inner
    normalize(x, y, outer, channels, inner, mean, var, weight, bias, eps, residual, slope, threads)


@_quiet
def gradient_moments(
    dy: Array, x: Array, outer: int, channels: int, inner: int,
    mean: Array, sum_dy: Array, sum_dy_xmu: Array, threads: int,
) -> None:  # fmt: skip
    """sum_dy = Σdy,  sum_dy_xmu = Σ dy·(x - mean). Writes both."""
    gradient = _channels(dy, outer, channels, inner)
    sum_dy[...] = gradient.sum(axis=1)
    gradient *= _channels(x, outer, channels, inner) - _column(mean)
    sum_dy_xmu[...] = gradient.sum(axis=1)


@_quiet
def input_gradient(
    dy: Array, x: Array, dx: Array, outer: int, channels: int, inner: int,
    mean: Array, var: Array, weight: Array | None, eps: float, sum_dy: Array, sum_dy_xmu: Array, threads: int,
) -> None:  # fmt: skip
    """dx = weight/σ · (dy - Σdy/n - (x - mean)/σ² · Σ(dy·(x - mean))/n). Writes dx."""
    count = outer * inner
    wide = _channels(dy, outer, channels, inner)
    wide -= _column(sum_dy) / count
    wide -= (_channels(x, outer, channels, inner) - _column(mean)) * (
        _column(sum_dy_xmu) / count / (_column(var) + eps)
    )
    wide *= _scale(var, weight, eps)
    _store(dx, wide, outer, channels, inner)


@_quiet
def backward(
    dy: Array, x: Array, dx: Array, outer: int, channels: int, inner: int,
    mean: Array, var: Array, weight: Array | None, bias: Array | None, eps: float,
    grad_weight: Array, grad_bias: Array, batch: bool,
    y: Array | None, dresidual: Array | None, slope: float, threads: int,
) -> None:  # fmt: skip
    """dz = dy · act'(z), then gradient_moments and input_gradient of dz. Writes dx, Σ dz·x̂ and Σ dz (the gradients).

    `batch`: the statistics were the batch's own, and the gradient flows through them. Otherwise they are constants, and
    dx = dz · weight/σ. `dresidual`: where a residual was added, where dz goes, which may be dy; `y`: if an activation
    followed, the forward pass's result. dx may be dy, too.
    """
    if slope != 1:
        if y is None:
            z = _normalized(_channels(x, outer, channels, inner), mean, var, weight, bias, eps)
        else:
            z = _channels(y, outer, channels, inner)
        dz = _channels(dy, outer, channels, inner)
        dz = np.where(z <= 0, dz * slope if slope else 0.0, dz)
        dy = np.empty(outer * channels * inner)
        _store(dy, dz, outer, channels, inner)
    passed = None if dresidual is None else _channels(dy, outer, channels, inner)  # before dx is written over dy
    sum_dy, sum_dy_xmu = np.empty(channels), np.empty(channels)
    gradient_moments(dy, x, outer, channels, inner, mean, sum_dy, sum_dy_xmu, threads)
    if batch:
        input_gradient(dy, x, dx, outer, channels, inner, mean, var, weight, eps, sum_dy, sum_dy_xmu, threads)
    else:
        _store(dx, _channels(dy, outer, channels, inner) * _scale(var, weight, eps), outer, channels, inner)
    if dresidual is not None and passed is not None:
        _store(dresidual, passed, outer, channels, inner)
    grad_weight[...] = sum_dy_xmu * _scale(var, None, eps)[:, 0]
    grad_bias[...] = sum_dy


@_quiet
def update_running_stats(
    running_mean: Array, running_var: Array, mean: Array, var: Array, momentum: float, correction: float
) -> None:
    """running += momentum · (batch - running). Writes both running statistics.

    `correction`: n/(n - 1) for the unbiased variance, 1 for the population's.
    """
    new_mean = (1 - momentum) * running_mean.astype(np.float64) + momentum * mean
    new_var = (1 - momentum) * running_var.astype(np.float64) + momentum * (var * correction)
    running_mean[...], running_var[...] = new_mean, new_var  # both or neither, should Ctrl-C come
