"""Folding: a BatchNorm in eval mode as part of the layer before it, or as a scale and a shift."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import checks
from .layers import BatchNorm

Array = np.ndarray[Any, np.dtype[Any]]


def fold(weight: Any, bias: Any, bn: BatchNorm, axis: int = 0) -> tuple[Array, Array]:
    """The weight and bias of a linear or convolution layer that does the work of the BatchNorm after it, too.

    With running mean μ, variance v and s = bn.weight / sqrt(v + eps): ``weight · s`` along `axis`, and
    ``(bias - μ) · s + bn.bias``. They replace layer and BatchNorm in eval mode (whichever mode `bn` is in), not in
    training. If `bn` has an activation, it is *not* folded: it remains, to be applied to what the new layer gives.

    Parameters
    ----------
    weight : ndarray of float16, bfloat16, float32 or float64, at least 1 axis
    bias : ndarray of these, shape (channels,), or None
    bn : BatchNorm
        With running statistics.
    axis : int
        weight's axis of output channels: 0 for torch's Linear and Conv (with groups, too) and for
        `fastbn.nn.Linear`, 1 for torch's ConvTranspose, -1 for Keras's Dense and Conv and for Flax's. A transposed
        convolution with groups has its output channels on two axes, and must be folded group by group.

    Returns
    -------
    weight : ndarray
        New, of weight's shape and dtype. Computed in float64.
    bias : ndarray, shape (channels,)
        New, of weight's dtype; there is one even where `bias` is None.

    Raises
    ------
    TypeError, ValueError
        Naming the argument; ValueError, too, where a result is beyond weight's dtype.

    References
    ----------
    Jacob et al. (2018), "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference", section 3.2, equation 14.
    """
    scale, shift = scale_shift(bn)
    weight = checks.data("weight", weight)
    axis = checks.output_axis(axis, weight, bn.num_features)
    bias = None if bias is None else checks.output_bias(bias, bn.num_features)
    column = [1] * weight.ndim
    column[axis] = -1
    with np.errstate(all="ignore"):  # as eval mode does; `fits` tells
        wide = weight.astype(np.float64) * scale.reshape(column)
        # Not bias·s + shift: where bias and mean are large and near each other, their difference is exact.
        moved = shift if bias is None else _affine(bn, bias.astype(np.float64))
        return checks.fits("weight", wide, weight.dtype), checks.fits("bias", moved, weight.dtype)


def scale_shift(bn: BatchNorm) -> tuple[Array, Array]:
    """The scale and shift of each channel for which ``x * scale + shift`` is what eval mode gives, rounding aside.

    With an activation, eval mode gives ``activation(x * scale + shift)``.

    In floating point this form loses what `bn` itself does not: where a channel's mean is large against its deviation,
    ``x * scale`` and ``shift`` are both large and nearly cancel. The error of y is then about |mean| / deviation
    roundings of the type that it is computed in: in float32 and at a ratio of 10⁴, about 10⁻³. `bn` subtracts the mean
    first.

    Parameters
    ----------
    bn : BatchNorm
        With running statistics.

    Returns
    -------
    scale, shift : ndarray of float64, shape (channels,)
        ``weight / sqrt(running_var + eps)`` and ``bias - running_mean * scale``.

    Raises
    ------
    TypeError, ValueError
        Where `bn` is no BatchNorm, or has no running statistics.
    """
    checks.instance("bn", bn, BatchNorm)
    checks.statistics(bn)
    with np.errstate(all="ignore"):  # statistics that are no numbers give what they give in eval mode
        return _scale(bn), _affine(bn, np.zeros(bn.num_features))


def _scale(bn: BatchNorm) -> Array:
    assert bn.running_var is not None
    scale: Array = 1 / np.sqrt(bn.running_var.astype(np.float64) + bn.eps)
    return scale if bn.weight is None else scale * bn.weight


def _affine(bn: BatchNorm, x: Array) -> Array:
    """What eval mode without the activation makes of one float64 value a channel."""
    assert bn.running_mean is not None
    y: Array = (x - bn.running_mean) * _scale(bn)
    return y if bn.bias is None else y + bn.bias
