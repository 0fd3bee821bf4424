"""LSTM: a recurrent layer whose cell keeps what its gates let it keep."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .. import checks
from .recurrent import Recurrent
from .step_norm import StepNorm

Array = np.ndarray[Any, np.dtype[Any]]


class LSTM(Recurrent):
    """One layer with torch's names and order of gates, i, f, g, o; optionally batch-normalized.

    (i, f, g, o)_t = W_ih·x_t + b_ih + W_hh·h_{t-1} + b_hh,
    c_t = σ(f)·c_{t-1} + σ(i)·tanh(g),  h_t = σ(o)·tanh(c_t).

    Parameters
    ----------
    input_size, hidden_size, bias, batch_first, steps, eps, momentum, init, rng, dtype
        As for `RNN`. "orthogonal" makes each gate's part of W_hh orthogonal.
    norm : {None, "input", "sum", "recurrent"}
        What is normalized, as for `RNN`; "recurrent" is the BN-LSTM (Cooijmans et al. 2017, equations 6 to 8), which
        also has h_t = σ(o)·tanh(BN(c_t)), that one with a bias (β).
    gamma : float, optional
        The weights of the normalizations (γ) at the start: by default 0.1 for "recurrent", otherwise 1.

    Attributes
    ----------
    weight_ih_l0, weight_hh_l0 : ndarray, shapes (4·hidden_size, input_size) and (4·hidden_size, hidden_size)
    bias_ih_l0, bias_hh_l0 : ndarray, shape (4·hidden_size,), or None
    input_norm, sum_norm, hidden_norm, cell_norm : BatchNorm, StepNorm or None
        The normalizations that there are.
    grad_weight_ih_l0, ... : ndarray or None
        Of the last `backward`, of the same shapes.
    grad_hidden : ndarray, shape (steps, batch, hidden_size), or None
        Of the last `backward`: the loss's gradient with respect to each hidden state, through all that follows it.
    grad_h0, grad_c0 : ndarray, shape (batch, hidden_size), or None

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what it was and what it must be.

    Notes
    -----
    As for `RNN`. A forget gate that begins open, as is often advised, is ``bias_ih_l0[hidden_size:2 * hidden_size] =
    1``.

    References
    ----------
    Hochreiter and Schmidhuber (1997), "Long Short-Term Memory"; Gers, Schmidhuber and Cummins (2000), for the forget
    gate; and those of `RNN`.
    """

    GATES = 4

    def __init__(self, input_size: int, hidden_size: int, **options: Any) -> None:
        super().__init__(input_size, hidden_size, **options)
        self.cell_norm: StepNorm | None = None
        if self.norm == "recurrent":
            self.cell_norm = self._step_norm(self.hidden_size, bias=True)
        self.grad_c0: Array | None = None
        # σ(z) = ½·tanh(½·z) + ½, so that one tanh serves all gates. With s = 1 for i, f, o and 0 for g, each is
        # y = (1 - s/2)·tanh((1 - s/2)·z) + s/2, and its slope is y·(s - y) + (1 - s).
        self._s = s = np.repeat(np.array([1, 1, 0, 1], self.dtype), self.hidden_size)
        self._factor, self._shift, self._rest = 1 - s / 2, s / 2, 1 - s

    def __call__(self, x: Array, h0: Array | None = None, c0: Array | None = None) -> Array:
        """All hidden states. `backward` reads x again: leave it as it is until then.

        Parameters
        ----------
        x : ndarray of the layer's dtype, shape (steps, batch, input_size), or (batch, steps, input_size)
            The latter if `batch_first`.
        h0, c0 : ndarray of the layer's dtype, shape (batch, hidden_size), optional
            The states before the first step; zeros, if None.

        Returns
        -------
        h : ndarray, shape (steps, batch, hidden_size), or (batch, steps, hidden_size)

        Raises
        ------
        TypeError, ValueError
            Naming the argument; running statistics are then as they were.
        """
        return self._walk(x, h0=h0, c0=c0)

    def last_state(self) -> dict[str, Array]:
        """Copies of the last call's final states: ``layer(x, **layer.last_state())`` goes on from there."""
        last = checks.called(self._last)
        return {"h0": last.h[-1].copy(), "c0": last.c[-1].copy()}

    def _open(self, x: Array, steps: int, batch: int, initial: Mapping[str, Array | None]) -> Any:
        last = super()._open(x, steps, batch, initial)
        last.c = self._states("c", steps, batch, initial["c0"])
        last.tanh_c = self._lend("tanh c", steps, batch, self.hidden_size)
        last.scratch = self._lend("scratch", batch, self.hidden_size)
        return last

    def _gates(self, array: Array) -> Any:
        """A step's gates (batch, 4·hidden_size) as four views (batch, hidden_size)."""
        return np.moveaxis(array.reshape(len(array), 4, self.hidden_size), 1, 0)

    def _cell(self, last: Any, t: int) -> None:
        z, c, tanh_c = last.z[t], last.c[t + 1], last.tanh_c[t]
        np.multiply(z, self._factor, out=z)
        np.tanh(z, out=z)
        np.multiply(z, self._factor, out=z)
        np.add(z, self._shift, out=z)
        i, f, g, o = self._gates(z)
        np.multiply(f, last.c[t], out=c)
        np.multiply(i, g, out=last.scratch)
        np.add(c, last.scratch, out=c)
        if self.cell_norm is None:
            np.tanh(c, out=tanh_c)
        else:
            self._normalize(self.cell_norm, t, c, tanh_c)
            np.tanh(tanh_c, out=tanh_c)
        np.multiply(o, tanh_c, out=last.h[t + 1])

    def _cell_backward(self, last: Any, t: int, dh: Array) -> None:
        z, dz, tanh_c, scratch = last.z[t], last.dz[t], last.tanh_c[t], last.scratch
        i, f, g, o = self._gates(z)
        di, df, dg, do = self._gates(dz)
        if t == len(last.z) - 1:
            last.dc = self.grad_c0 = self._lend("dc", *dh.shape)
            last.dc[...] = 0
            last.slope = self._lend("slope", *z.shape)
        # dc += dh·o·(1 - tanh²), through the normalization where there is one
        np.multiply(tanh_c, tanh_c, out=scratch)
        np.subtract(1, scratch, out=scratch)
        np.multiply(scratch, o, out=scratch)
        np.multiply(scratch, dh, out=scratch)
        if self.cell_norm is not None:
            self.cell_norm.backward_step(t, scratch, scratch)
        dc = np.add(last.dc, scratch, out=last.dc)
        np.multiply(dc, g, out=di)
        np.multiply(dc, last.c[t], out=df)
        np.multiply(dc, i, out=dg)
        np.multiply(dh, tanh_c, out=do)
        np.multiply(dc, f, out=dc)  # what the step before gets
        # all four by the slopes of σ and tanh
        slope = np.subtract(self._s, z, out=last.slope)
        np.multiply(slope, z, out=slope)
        np.add(slope, self._rest, out=slope)
        np.multiply(dz, slope, out=dz)

    def __getstate__(self) -> dict[str, Any]:
        """Without the last batch: a copy or a pickle does not carry it."""
        return super().__getstate__() | {"grad_c0": None}
