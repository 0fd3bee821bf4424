"""LayerNorm: each row normalized by its own mean and variance."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import checks
from ..functional import Saved, batch_norm_backward, batch_norm_forward
from ..statistics import moments
from .buffers import Buffer
from .weighted import Weighted

Array = np.ndarray[Any, np.dtype[Any]]


class LayerNorm(Weighted):
    """y = (x - mean) / sqrt(var + eps) · weight + bias, mean and variance taken over the last axis.

    To batch normalization's kernels a row is a channel, and its features are that channel's values. Training and use
    are the same, and no row depends on another.

    Parameters
    ----------
    num_features : int
        At least 2: one value has no variance.
    eps : float
        Added to the variance.
    affine : bool, "weight" or "bias"
        Whether there are a weight and a bias (a feature's gain and bias), or which one.
    dtype : {float32, float64}
        Of the parameters, and of the data that the layer takes.

    Attributes
    ----------
    weight, bias : ndarray, shape (num_features,), or None
    grad_weight, grad_bias : ndarray or None
        Of the last `backward`, of the same shapes.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what it was and what it must be.

    References
    ----------
    Ba, Kiros and Hinton (2016), "Layer Normalization", section 3, equation 3.
    """

    def __init__(
        self, num_features: int, *, eps: float = 1e-5, affine: bool | str = True, dtype: Any = np.float32
    ) -> None:
        self.num_features = checks.features_to_normalize(num_features)
        self.eps = checks.eps(eps)
        self.dtype = checks.parameter_dtype(dtype)
        has_weight, has_bias = checks.affine(affine)
        self.weight = np.ones(num_features, self.dtype) if has_weight else None
        self.bias = np.zeros(num_features, self.dtype) if has_bias else None
        self.grad_weight = self.grad_bias = None
        self._last: tuple[Array, Saved] | None = None  # x normalized, and what the kernels keep
        self._y, self._normal, self._dx = Buffer(), Buffer(), Buffer()

    @property
    def affine(self) -> bool | str:
        """Whether there are a weight and a bias: True, False, or the name of the only one."""
        if (self.weight is None) == (self.bias is None):
            return self.weight is not None
        return "bias" if self.weight is None else "weight"

    def __call__(self, x: Array) -> Array:
        """y, of x's shape. `backward` reads x again: leave it as it is until then.

        Parameters
        ----------
        x : ndarray of the layer's dtype, shape (..., num_features): (batch, features), (batch, time, features)
        """
        checks.of_layer("x", x, self.dtype)
        checks.last_axis("x", x, self.num_features)
        normal = self._normal.lend(x.shape, self.dtype)
        _, saved = batch_norm_forward(_rows_as_channels(x), eps=self.eps, out=_rows_as_channels(normal))
        self._last = normal, saved
        y = self._y.lend(x.shape, self.dtype)
        if self.weight is None:
            np.copyto(y, normal)
        else:
            np.multiply(normal, self.weight, out=y)
        if self.bias is not None:
            np.add(y, self.bias, out=y)
        return y

    def backward(self, dy: Array) -> Array:
        """dx, leaving `grad_weight` and `grad_bias`.

        Parameters
        ----------
        dy : ndarray of y's shape and dtype
        """
        normal, saved = checks.called(self._last)
        checks.of_layer("dy", dy, self.dtype)
        checks.shape_of("dy", dy, normal.shape)
        dx = self._dx.lend(dy.shape, self.dtype)
        if self.weight is None:
            np.copyto(dx, dy)
        else:
            self.grad_weight = _sum_over_rows(np.multiply(dy, normal, out=dx), self.grad_weight)
            np.multiply(dy, self.weight, out=dx)
        if self.bias is not None:
            self.grad_bias = _sum_over_rows(dy, self.grad_bias)
        batch_norm_backward(_rows_as_channels(dx), saved, out=_rows_as_channels(dx))
        return dx

    def __repr__(self) -> str:
        return f"LayerNorm({self.num_features}, eps={self.eps}, affine={self.affine!r}, dtype={self.dtype})"


def _rows_as_channels(x: Array) -> Array:
    return x.reshape(1, -1, x.shape[-1])


def _sum_over_rows(x: Array, total: Array | None) -> Array:
    """Σ x over all axes but the last, in `total` if there is one already."""
    sums = moments(x.reshape(-1, x.shape[-1]))
    if total is None:
        total = np.empty(x.shape[-1], x.dtype)
    return np.multiply(sums.mean, sums.count, out=total, casting="same_kind")
