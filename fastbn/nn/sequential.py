"""Sequential: layers one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise, zip_longest
from typing import Any, Self

import numpy as np

from .batch_norm import BatchNorm
from .conv import Conv2d
from .layer import Layer
from .linear import Linear

Array = np.ndarray[Any, np.dtype[Any]]


class Sequential(Layer):
    """Layers one after the other.

    A `Linear` or a `Conv2d` directly before a `BatchNorm` loses its bias here (see `Linear`). A `BatchNorm` directly
    before a `ReLU` computes both in one pass over memory, to the same bits (where there is no NaN).

    Parameters
    ----------
    *layers : Layer
        Each an object of its own. A Sequential among them stands for its layers.

    Attributes
    ----------
    layers : list of Layer

    Examples
    --------
    >>> net = Sequential(Linear(64, 32), BatchNorm(32), ReLU(), Linear(32, 10))
    >>> net.layers[0]
    Linear(64, 32, bias=False, dtype=float32)
    """

    def __init__(self, *layers: Layer) -> None:
        self.layers: list[Layer] = []
        for number, layer in enumerate(layers):
            if not isinstance(layer, Layer):
                raise TypeError(f"layer {number} is {layer!r}, and must be a fastbn.nn layer")
            self.layers += layer.layers if isinstance(layer, Sequential) else [layer]
        if not self.layers:
            raise ValueError("layers is empty, and must be at least one layer")
        if len({id(layer) for layer in self.layers}) < len(self.layers):
            raise ValueError(
                "layers has the same object twice, and each must be one of its own: a layer keeps its input"
            )
        for layer, following in pairwise(self.layers):
            if isinstance(layer, (Linear, Conv2d)) and isinstance(following, BatchNorm):
                layer.drop_bias(following)

    def __call__(self, x: Array) -> Array:
        """The last layer's output, in its own memory: valid until the next call."""
        joined = False
        for layer, following in zip_longest(self.layers, self.layers[1:]):
            if joined:  # by the layer before
                joined = False
            elif joined := isinstance(layer, BatchNorm) and layer.joins(following):
                x = layer.with_relu(x, following)
            else:
                x = layer(x)
        return x

    def backward(self, dy: Array) -> Array:
        """dx, leaving each parameter's gradient."""
        for layer in reversed(self.layers):
            dy = layer.backward(dy)
        return dy

    def parameter_gradients(self, dy: Array) -> None:
        """`backward` without dx: what training needs, and less work."""
        for layer in reversed(self.layers[1:]):
            dy = layer.backward(dy)
        self.layers[0].parameter_gradients(dy)

    def parameters(self) -> Iterator[tuple[Array, Array | None]]:
        """Pairs of a parameter and its gradient, layer by layer."""
        for layer in self.layers:
            yield from layer.parameters()

    def train(self, mode: bool = True) -> Self:
        """Set every layer to training."""
        self.training = mode
        for layer in self.layers:
            layer.train(mode)
        return self

    def state_dict(self) -> dict[str, Array]:
        """Every layer's state, the names preceded by the layer's place: "0.weight", as torch's Sequential has them."""
        return {
            f"{i}.{name}": array for i, layer in enumerate(self.layers) for name, array in layer.state_dict().items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take every layer's state from a `state_dict` (ours, or that of torch's Sequential as NumPy arrays)."""
        before = self.state_dict()
        if state.keys() != before.keys():
            missing, unknown = sorted(before.keys() - state.keys()), sorted(state.keys() - before.keys())
            raise ValueError(f"state lacks {missing} and has unknown {unknown}")
        try:
            self._load(state)
        except (TypeError, ValueError):
            self._load(before)
            raise

    def _load(self, state: Mapping[str, Any]) -> None:
        for i, layer in enumerate(self.layers):
            layer.load_state_dict({name: state[f"{i}.{name}"] for name in layer.state_dict()})

    def __repr__(self) -> str:
        return "Sequential(\n" + "".join(f"    {layer!r},\n" for layer in self.layers) + ")"
