"""What a layer is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


@runtime_checkable
class Layer(Protocol):
    """What `Sequential` asks of a layer; subclass it to get the defaults, which suit a layer without parameters.

    Attributes
    ----------
    training : bool
        Set by `train` and `eval`.
    """

    training: bool = True

    def __call__(self, x: Array) -> Array:
        """y, in memory that belongs to the layer: valid until the next call."""
        ...

    def backward(self, dy: Array) -> Array:
        """dx of the last call, in memory that belongs to the layer, leaving the gradients that `parameters` yields."""
        ...

    def parameter_gradients(self, dy: Array) -> None:
        """`backward` without dx, which nobody asks of a network's first layer."""
        self.backward(dy)

    def parameters(self) -> Iterator[tuple[Array, Array | None]]:
        """Pairs of a parameter and its gradient of the last `backward`, always in the same order."""
        return iter(())

    def train(self, mode: bool = True) -> Self:
        """Behave as in training from now on."""
        self.training = mode
        return self

    def eval(self) -> Self:
        """Behave as in use from now on."""
        return self.train(False)

    def state_dict(self) -> dict[str, Array]:
        """Copies of what a trained layer is made of, under torch's names."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave.

        Raises
        ------
        TypeError, ValueError
            Naming the key that is missing, not known or wrong; the layer is then as it was.
        """
        if state:
            raise ValueError(f"state has unknown {sorted(state)}; a {type(self).__name__} has nothing to load")
