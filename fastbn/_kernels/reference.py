"""The specification: batch normalization in plain NumPy, float64 inside, no tricks.

Every other backend computes these functions, with these arguments. The shapes, for an array of
(outer, channels, inner) elements in C order:

    x, y, dy, dx                         outer·channels·inner elements of float32 or float64
    mean, var, m2, sum_dy, sum_dy_xmu    (channels,) float64
    weight, bias, their gradients, running statistics   (channels,) float32 or float64; weight and bias may be None
    var                                  the population variance, m2 / (outer·inner)

`threads` is ignored here.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

NAME = "reference"
INSTRUCTION_SET = "NumPy's"


def openmp() -> str:
    """The OpenMP run-time in use."""
    return "none: the reference kernels run on one thread"


def _view(x: Array, outer: int, channels: int, inner: int) -> Array:
    return x.reshape(outer, channels, inner)


def _column(values: Array) -> Array:
    """(channels,) → (channels, 1), float64, to stand beside (outer, channels, inner)."""
    return values.astype(np.float64)[:, np.newaxis]


def moments(x: Array, outer: int, channels: int, inner: int, mean: Array, m2: Array, threads: int) -> None:
    """mean = Σx / n,  m2 = Σ(x - mean)², in two passes. Writes mean and m2."""
    wide = _view(x, outer, channels, inner).astype(np.float64)
    if wide.size == 0:
        mean[...] = m2[...] = 0
        return
    pivot = wide[0, :, 0].copy()  # a constant channel's mean is then exactly its value
    deviation = wide - pivot[:, np.newaxis]
    shift = deviation.mean(axis=(0, 2))
    mean[...] = pivot + shift
    deviation -= shift[:, np.newaxis]
    m2[...] = np.square(deviation).sum(axis=(0, 2))


def normalize(
    x: Array, y: Array, outer: int, channels: int, inner: int,
    mean: Array, var: Array, weight: Array | None, bias: Array | None, eps: float, threads: int,
) -> None:  # fmt: skip
    """y = (x - mean) / sqrt(var + eps) · weight + bias. Writes y."""
    wide = _view(x, outer, channels, inner).astype(np.float64)
    wide -= _column(mean)
    wide *= 1 / np.sqrt(_column(var) + eps)
    if weight is not None:
        wide *= _column(weight)
    if bias is not None:
        wide += _column(bias)
    _view(y, outer, channels, inner)[...] = wide


def forward(
    x: Array, y: Array, outer: int, channels: int, inner: int,
    weight: Array | None, bias: Array | None, eps: float, mean: Array, var: Array, threads: int,
) -> None:  # fmt: skip
    """moments, then normalize with them. Writes y, mean and var."""
    moments(x, outer, channels, inner, mean, var, threads)
    var /= outer * inner
    normalize(x, y, outer, channels, inner, mean, var, weight, bias, eps, threads)


def gradient_moments(
    dy: Array, x: Array, outer: int, channels: int, inner: int,
    mean: Array, sum_dy: Array, sum_dy_xmu: Array, threads: int,
) -> None:  # fmt: skip
    """sum_dy = Σdy,  sum_dy_xmu = Σ dy·(x - mean). Writes both."""
    gradient = _view(dy, outer, channels, inner).astype(np.float64)
    sum_dy[...] = gradient.sum(axis=(0, 2))
    gradient *= _view(x, outer, channels, inner).astype(np.float64) - _column(mean)
    sum_dy_xmu[...] = gradient.sum(axis=(0, 2))


def input_gradient(
    dy: Array, x: Array, dx: Array, outer: int, channels: int, inner: int,
    mean: Array, var: Array, weight: Array | None, eps: float, sum_dy: Array, sum_dy_xmu: Array, threads: int,
) -> None:  # fmt: skip
    """dx = weight/σ · (dy - Σdy/n - x̂ · Σ(dy·x̂)/n),  x̂ = (x - mean)/σ. Writes dx."""
    count = outer * inner
    inverse = 1 / np.sqrt(_column(var) + eps)
    xhat = (_view(x, outer, channels, inner).astype(np.float64) - _column(mean)) * inverse
    wide = _view(dy, outer, channels, inner).astype(np.float64)
    wide = wide - _column(sum_dy) / count - xhat * (_column(sum_dy_xmu) * inverse / count)
    wide *= inverse if weight is None else inverse * _column(weight)
    _view(dx, outer, channels, inner)[...] = wide


def backward(
    dy: Array, x: Array, dx: Array, outer: int, channels: int, inner: int,
    mean: Array, var: Array, weight: Array | None, eps: float,
    grad_weight: Array, grad_bias: Array, batch: bool, threads: int,
) -> None:  # fmt: skip
    """gradient_moments, then input_gradient with them. Writes dx, grad_weight = Σ dy·x̂ and grad_bias = Σ dy.

    `batch`: the statistics were the batch's own, and the gradient flows through them. Otherwise they are constants, and
    dx = dy · weight/σ.
    """
    sum_dy, sum_dy_xmu = np.empty(channels), np.empty(channels)
    gradient_moments(dy, x, outer, channels, inner, mean, sum_dy, sum_dy_xmu, threads)
    inverse = 1 / np.sqrt(var.astype(np.float64) + eps)
    if batch:
        input_gradient(dy, x, dx, outer, channels, inner, mean, var, weight, eps, sum_dy, sum_dy_xmu, threads)
    else:
        scale = inverse if weight is None else inverse * weight
        _view(dx, outer, channels, inner)[...] = _view(dy, outer, channels, inner) * scale[:, np.newaxis]
    grad_weight[...] = sum_dy_xmu * inverse
    grad_bias[...] = sum_dy


def update_running_stats(
    running_mean: Array, running_var: Array, mean: Array, var: Array, momentum: float, count: int
) -> None:
    """running += momentum · (batch - running), with the unbiased variance. Writes both running statistics."""
    unbiased = count / (count - 1)
    running_mean[...] = (1 - momentum) * running_mean.astype(np.float64) + momentum * mean
    running_var[...] = (1 - momentum) * running_var.astype(np.float64) + momentum * (var * unbiased)
