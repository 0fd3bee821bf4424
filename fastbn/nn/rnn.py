"""RNN: h_t = tanh(W_ih·x_t + W_hh·h_{t-1} + b)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from .. import checks
from .recurrent import Recurrent

Array = np.ndarray[Any, np.dtype[Any]]


class RNN(Recurrent):
    """h_t = f(W_ih·x_t + b_ih + W_hh·h_{t-1} + b_hh), one layer, with torch's names; optionally batch-normalized.

    Parameters
    ----------
    input_size, hidden_size : int
    nonlinearity : {"tanh", "relu"}
        f.
    bias : bool
        Whether there are b_ih and b_hh. They do the same; there are two as torch has two.
    batch_first : bool
        Whether sequences are (batch, steps, features) and not (steps, batch, features).
    norm : {None, "input", "sum", "recurrent"}
        What is normalized. "input": BN(W_ih·x_t), with statistics over batch and time ("sequence-wise": Laurent et al.
        2015, section 3). "sum": BN(W_ih·x_t + W_hh·h_{t-1}). "recurrent": BN(W_ih·x_t) + BN(W_hh·h_{t-1})
        (Cooijmans et al. 2017, section 3). The last two have statistics of their own at each time step. None has a
        bias (β): the layer's own, added after it, does that work.
    steps : int, optional
        How many time steps have statistics: for "sum" and "recurrent", which must have it. Longer sequences are
        normalized in eval mode, from there on by the statistics of the last step that was trained.
    gamma : float, optional
        The weights of the normalizations (γ) at the start: by default 0.1 for "recurrent", as its paper advises, so
        that gradients pass through tanh and time; otherwise 1.
    eps, momentum
        Of the normalizations, as for `BatchNorm`.
    init : {"uniform", "orthogonal"}
        How the weights start: all uniform from -1/√hidden_size to 1/√hidden_size, as in torch, or W_hh orthogonal and
        the others so.
    rng : numpy.random.Generator or int, optional
        Where the weights are drawn from.
    dtype : {float32, float64}
        Of the parameters, and of the data that the layer takes.

    Attributes
    ----------
    weight_ih_l0, weight_hh_l0 : ndarray, shapes (hidden_size, input_size) and (hidden_size, hidden_size)
    bias_ih_l0, bias_hh_l0 : ndarray, shape (hidden_size,), or None
    input_norm, sum_norm, hidden_norm : BatchNorm, StepNorm or None
        The normalizations that there are.
    grad_weight_ih_l0, ... : ndarray or None
        Of the last `backward`, of the same shapes.
    grad_hidden : ndarray, shape (steps, batch, hidden_size), or None
        Of the last `backward`: the loss's gradient with respect to each hidden state, through all that follows it.
    grad_h0 : ndarray, shape (batch, hidden_size), or None

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what it was and what it must be.

    Notes
    -----
    All sequences of a batch have the same length: there is no mask for padding.

    References
    ----------
    Laurent et al. (2016), "Batch Normalized Recurrent Neural Networks". Cooijmans et al. (2017), "Recurrent Batch
    Normalization".
    """

    def __init__(self, input_size: int, hidden_size: int, *, nonlinearity: str = "tanh", **options: Any) -> None:
        self.nonlinearity = checks.choice("nonlinearity", nonlinearity, ("tanh", "relu"))
        super().__init__(input_size, hidden_size, **options)

    def __call__(self, x: Array, h0: Array | None = None) -> Array:
        """All hidden states. `backward` reads x again: leave it as it is until then.

        Parameters
        ----------
        x : ndarray of the layer's dtype, shape (steps, batch, input_size), or (batch, steps, input_size)
            The latter if `batch_first`.
        h0 : ndarray of the layer's dtype, shape (batch, hidden_size), optional
            The state before the first step; zeros, if None.

        Returns
        -------
        h : ndarray, shape (steps, batch, hidden_size), or (batch, steps, hidden_size)

        Raises
        ------
        TypeError, ValueError
            Naming the argument; running statistics are then as they were.
        """
        return self._walk(x, h0=h0)

    def last_state(self) -> dict[str, Array]:
        """A copy of the last call's final state: ``layer(x, **layer.last_state())`` goes on from there."""
        return {"h0": checks.called(self._last).h[-1].copy()}

    def _cell(self, last: Any, t: int) -> None:
        if self.nonlinearity == "tanh":
            np.tanh(last.z[t], out=last.h[t + 1])
        else:
            np.maximum(last.z[t], 0, out=last.h[t + 1])

    def _cell_backward(self, last: Any, t: int, dh: Array) -> None:
        h, dz = last.h[t + 1], last.dz[t]
        if self.nonlinearity == "tanh":
            np.multiply(h, h, out=dz)
            np.subtract(1, dz, out=dz)
        else:
            np.sign(h, out=dz)
        np.multiply(dz, dh, out=dz)

    def _options(self) -> Iterator[str]:
        yield from super()._options()
        yield f"nonlinearity={self.nonlinearity!r}"
