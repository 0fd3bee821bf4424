"""Weighted: what layers with a weight and a bias have in common."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from .. import checks
from .batch_norm import BatchNorm
from .layer import Layer

Array = np.ndarray[Any, np.dtype[Any]]


class Weighted(Layer):
    """A layer whose parameters are a weight and a bias, either of which may be None.

    Attributes
    ----------
    weight, bias : ndarray or None
    grad_weight, grad_bias : ndarray or None
        Of the last `backward`, of the same shapes.
    """

    weight: Array | None
    bias: Array | None
    grad_weight: Array | None
    grad_bias: Array | None

    def parameters(self) -> Iterator[tuple[Array, Array | None]]:
        """Weight and bias, where there are any."""
        if self.weight is not None:
            yield self.weight, self.grad_weight
        if self.bias is not None:
            yield self.bias, self.grad_bias

    def state_dict(self) -> dict[str, Array]:
        """Copies of weight and bias, where there are any."""
        return {name: array.copy() for name, array in self._named()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take weight and bias from a `state_dict` (ours, or torch's as NumPy arrays)."""
        mine = dict(self._named())
        checks.state_keys(state, list(mine))
        new = {name: checks.state(name, state[name], mine[name]) for name in mine}
        for name, array in mine.items():
            array[...] = new[name]

    def drop_bias(self, following: BatchNorm) -> None:
        """Leave the bias to the BatchNorm that follows; what the two compute together stays the same."""
        if self.bias is not None and following.running_mean is not None:
            following.running_mean -= self.bias
        self.bias = self.grad_bias = None

    def _named(self) -> Iterator[tuple[str, Array]]:
        if self.weight is not None:
            yield "weight", self.weight
        if self.bias is not None:
            yield "bias", self.bias
