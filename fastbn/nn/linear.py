"""Linear: y = x·Wᵀ + b."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import checks
from .batch_norm import BatchNorm
from .buffers import Buffer
from .initial import weights
from .weighted import Weighted

Array = np.ndarray[Any, np.dtype[Any]]


class Linear(Weighted):
    """y = x·weightᵀ + bias.

    In a `Sequential`, a Linear directly before a `BatchNorm` loses its bias: the batch's mean takes it away again, and
    the BatchNorm's own bias (β) does its work (Ioffe and Szegedy 2015, section 3.2).

    Parameters
    ----------
    in_features, out_features : int
    bias : bool
        Whether there is one. It starts at 0.
    init : {"he", "glorot"} or float
        How the weights start. "he": normal of variance 2/in_features, for ReLU (He et al. 2015, section 2.2).
        "glorot": uniform of variance 2/(in_features + out_features), for tanh and sigmoid (Glorot and Bengio 2010,
        equation 16). A number: normal of this standard deviation.
    rng : numpy.random.Generator or int, optional
        Where the weights are drawn from. One Generator passed to every layer gives each layer weights of its own.
    dtype : {float32, float64}
        Of the parameters, and of the data that the layer takes.

    Attributes
    ----------
    weight : ndarray, shape (out_features, in_features)
    bias : ndarray, shape (out_features,), or None
    grad_weight, grad_bias : ndarray or None
        Of the last `backward`, of the same shapes.
    """

    weight: Array

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        init: str | float = "he",
        rng: np.random.Generator | int | None = None,
        dtype: Any = np.float32,
    ) -> None:
        self.in_features = checks.positive("in_features", in_features)
        self.out_features = checks.positive("out_features", out_features)
        self.dtype = checks.parameter_dtype(dtype)
        fan_in, fan_out = self.in_features, self.out_features
        self.weight = weights(init, (fan_out, fan_in), fan_in, fan_out, np.random.default_rng(rng), self.dtype)
        self.bias = np.zeros(self.out_features, self.dtype) if bias else None
        self.grad_weight = self.grad_bias = None
        self._x: Array | None = None
        self._y, self._dx = Buffer(), Buffer()

    def __call__(self, x: Array) -> Array:
        """y, of shape (batch, out_features). `backward` reads x again: leave it as it is until then.

        Parameters
        ----------
        x : ndarray of the layer's dtype, shape (batch, in_features)
        """
        checks.rows_of_layer("x", x, self.in_features, self.dtype)
        self._x = x
        y = self._y.lend((len(x), self.out_features), self.dtype)
        np.matmul(x, self.weight.T, out=y)
        if self.bias is not None:
            np.add(y, self.bias, out=y)
        return y

    def backward(self, dy: Array) -> Array:
        """dx = dy·weight, leaving `grad_weight` and `grad_bias`.

        Parameters
        ----------
        dy : ndarray of the layer's dtype, shape (batch, out_features)
        """
        self.parameter_gradients(dy)
        return np.matmul(dy, self.weight, out=self._dx.lend((len(dy), self.in_features), self.dtype))

    def parameter_gradients(self, dy: Array) -> None:
        """grad_weight = dyᵀ·x, grad_bias = Σ dy."""
        x: Array = checks.called(self._x)
        checks.rows_of_layer("dy", dy, self.out_features, self.dtype, len(x))
        if self.grad_weight is None:
            self.grad_weight = np.empty_like(self.weight)
        np.matmul(dy.T, x, out=self.grad_weight)
        if self.bias is not None:
            if self.grad_bias is None:
                self.grad_bias = np.empty_like(self.bias)
            np.add.reduce(dy, axis=0, out=self.grad_bias)

    def drop_bias(self, following: BatchNorm) -> None:
        """Leave the bias to the BatchNorm that follows; what the two compute together stays the same."""
        checks.followed(self, self.out_features, None, following)
        super().drop_bias(following)

    def __getstate__(self) -> dict[str, Any]:
        """Without the last batch: a copy or a pickle does not carry it."""
        return self.__dict__ | {"_x": None}

    def __repr__(self) -> str:
        return f"Linear({self.in_features}, {self.out_features}, bias={self.bias is not None}, dtype={self.dtype})"
