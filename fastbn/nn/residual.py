"""Residual: layers and a way around them, added in the last normalization's own pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Self

import numpy as np

from .batch_norm import BatchNorm
from .buffers import Buffer
from .layer import Layer
from .sequential import Sequential

Array = np.ndarray[Any, np.dtype[Any]]


class Residual(Layer):
    """y = act(bn(f(x)) + x): f the layers before the last, which is a `BatchNorm` and act its activation.

    The addition and the activation are part of the BatchNorm's pass over memory. x must have the shape of f(x).

    Parameters
    ----------
    *layers : Layer
        As for `Sequential`, at least two, the last a `BatchNorm` (``activation="relu"`` for a block of a ResNet).

    Attributes
    ----------
    layers : list of Layer

    Raises
    ------
    TypeError, ValueError
        Naming the layer.

    References
    ----------
    He, Zhang, Ren and Sun (2016), "Deep Residual Learning for Image Recognition", section 3.2, equation 1.

    Examples
    --------
    >>> block = Residual(Conv2d(8, 8, 3, padding=1), BatchNorm(8, activation="relu"))
    >>> block.layers[0].bias is None
    True
    """

    def __init__(self, *layers: Layer) -> None:
        whole = Sequential(*layers)  # checks them, and drops biases
        self.layers = whole.layers
        if len(self.layers) < 2 or not isinstance(self.layers[-1], BatchNorm):
            raise TypeError(f"the last layer is {self.layers[-1]!r}, and must be a BatchNorm that follows others")
        self._whole, self._before, self._norm = whole, Sequential(*self.layers[:-1]), self.layers[-1]
        self._around = Buffer()

    def __call__(self, x: Array) -> Array:
        """y, in the BatchNorm's memory: valid until the next call."""
        return self._norm(self._before(x), x)

    def backward(self, dy: Array) -> Array:
        """dx = f's + the way around's, leaving each parameter's gradient."""
        around = self._around.lend(dy.shape, dy.dtype)
        dx = self._before.backward(self._norm.backward(dy, out_residual=around))
        return np.add(dx, around, out=dx)

    def parameter_gradients(self, dy: Array) -> None:
        """`backward` without dx."""
        around = self._around.lend(dy.shape, dy.dtype)
        self._before.parameter_gradients(self._norm.backward(dy, out_residual=around))

    def parameters(self) -> Iterator[tuple[Array, Array | None]]:
        """Pairs of a parameter and its gradient, layer by layer."""
        return self._whole.parameters()

    def train(self, mode: bool = True) -> Self:
        """Set every layer to training."""
        self.training = mode
        self._whole.train(mode)
        return self

    def state_dict(self) -> dict[str, Array]:
        """Every layer's state, the names preceded by the layer's place, as a `Sequential` has them."""
        return self._whole.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take every layer's state from a `state_dict`."""
        self._whole.load_state_dict(state)

    def __repr__(self) -> str:
        return f"Residual({', '.join(map(repr, self.layers))})"
