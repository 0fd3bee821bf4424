"""Linear: y = x·Wᵀ + b."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from .. import checks
from .batch_norm import BatchNorm
from .buffers import Buffer
from .layer import Layer

Array = np.ndarray[Any, np.dtype[Any]]


class Linear(Layer):
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
        self.weight = _initial(init, self.out_features, self.in_features, np.random.default_rng(rng), self.dtype)
        self.bias: Array | None = np.zeros(self.out_features, self.dtype) if bias else None
        self.grad_weight: Array | None = None
        self.grad_bias: Array | None = None
        self._x: Array | None = None
        self._y, self._dx = Buffer(), Buffer()

    def __call__(self, x: Array) -> Array:
        """y, of shape (batch, out_features). `backward` reads x again: leave it as it is until then.

        Parameters
        ----------
        x : ndarray of the layer's dtype, shape (batch, in_features)
        """
        self._check("x", x, self.in_features)
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
        x = self._x
        if x is None:
            raise ValueError("backward has nothing to go back over: call the layer first")
        self._check("dy", dy, self.out_features)
        if len(dy) != len(x):
            raise ValueError(f"dy has shape {dy.shape}, and must have as many rows as x, {len(x)}")
        if self.grad_weight is None:
            self.grad_weight = np.empty_like(self.weight)
        np.matmul(dy.T, x, out=self.grad_weight)
        if self.bias is not None:
            if self.grad_bias is None:
                self.grad_bias = np.empty_like(self.bias)
            np.add.reduce(dy, axis=0, out=self.grad_bias)

    def parameters(self) -> Iterator[tuple[Array, Array | None]]:
        """Weight, and bias where there is one."""
        yield self.weight, self.grad_weight
        if self.bias is not None:
            yield self.bias, self.grad_bias

    def drop_bias(self, following: BatchNorm) -> None:
        """Leave the bias to the BatchNorm that follows; what the two compute together stays the same."""
        if following.num_features != self.out_features:
            raise ValueError(
                f"the BatchNorm after {self!r} has num_features {following.num_features}, "
                f"and must have {self.out_features}"
            )
        if self.bias is not None and following.running_mean is not None:
            following.running_mean -= self.bias
        self.bias = self.grad_bias = None

    def state_dict(self) -> dict[str, Array]:
        """Copies of weight and, where there is one, bias."""
        return {"weight": self.weight.copy()} | ({} if self.bias is None else {"bias": self.bias.copy()})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take weight and bias from a `state_dict` (ours, or torch's as NumPy arrays)."""
        mine = {"weight": self.weight} | ({} if self.bias is None else {"bias": self.bias})
        if state.keys() != mine.keys():
            raise ValueError(f"state has {sorted(state)}, and must have exactly {list(mine)}")
        new = {name: checks.state(name, state[name], mine[name]) for name in mine}
        for name, array in mine.items():
            array[...] = new[name]

    def __getstate__(self) -> dict[str, Any]:
        """Without the last batch: a copy or a pickle does not carry it."""
        return self.__dict__ | {"_x": None}

    def _check(self, name: str, array: Any, width: int) -> None:
        if not isinstance(array, np.ndarray):
            raise TypeError(f"{name} is a {type(array).__name__}, and must be an ndarray")
        if checks.data(name, array).dtype != self.dtype:
            raise TypeError(f"{name} has dtype {array.dtype}, and must have the layer's dtype {self.dtype}")
        if array.ndim != 2 or array.shape[1] != width:
            raise ValueError(f"{name} has shape {array.shape}, and must have shape (batch, {width})")

    def __repr__(self) -> str:
        return f"Linear({self.in_features}, {self.out_features}, bias={self.bias is not None}, dtype={self.dtype})"


def _initial(
    init: str | float, out_features: int, in_features: int, rng: np.random.Generator, dtype: np.dtype[Any]
) -> Array:
    """The weights at the start, of shape (out_features, in_features)."""
    shape = (out_features, in_features)
    kind: Any = dtype.type
    if init == "glorot":
        weight = rng.random(shape, kind)
        weight -= 0.5
        weight *= 2 * (6 / (in_features + out_features)) ** 0.5
        return weight
    if init == "he":
        std = (2 / in_features) ** 0.5
    elif isinstance(init, (int, float)) and not isinstance(init, bool) and 0 <= init < float("inf"):
        std = float(init)
    else:
        raise ValueError(f"init is {init!r}, and must be 'he', 'glorot' or a standard deviation of at least 0")
    weight = rng.standard_normal(shape, kind)
    weight *= std
    return weight
