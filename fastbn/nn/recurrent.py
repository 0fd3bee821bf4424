"""What RNN and LSTM have in common: the walk through time, and batch normalization of what enters it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any, Self

import numpy as np

from .. import checks
from .batch_norm import BatchNorm
from .buffers import Buffer
from .layer import Layer
from .step_norm import StepNorm

Array = np.ndarray[Any, np.dtype[Any]]

NORMS = ("input", "sum", "recurrent")
NAMES = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")  # torch's


class Recurrent(Layer):
    """The base of `RNN` and `LSTM`: z_t = W_ih·x_t + W_hh·h_{t-1} + b, normalized as asked; a subclass makes h_t of it.

    All of a sequence lies in arrays of shape (steps, batch, width), so that the products with x, and the weights'
    gradients, are one matmul each for all steps. Only what depends on h_{t-1} goes step by step.

    A subclass sets `GATES`, the width of z in units of hidden_size, and writes `_cell` and `_cell_backward`.
    """

    GATES = 1

    weight_ih_l0: Array
    weight_hh_l0: Array
    bias_ih_l0: Array | None
    bias_hh_l0: Array | None

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        bias: bool = True,
        batch_first: bool = False,
        norm: str | None = None,
        steps: int | None = None,
        gamma: float | None = None,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        init: str = "uniform",
        rng: np.random.Generator | int | None = None,
        dtype: Any = np.float32,
    ) -> None:
        self.input_size = checks.positive("input_size", input_size)
        self.hidden_size = checks.positive("hidden_size", hidden_size)
        self.batch_first = checks.flag("batch_first", batch_first)
        self.norm = None if norm is None else checks.choice("norm", norm, NORMS)
        self.steps = checks.steps_to_normalize(steps, norm)
        if gamma is None:
            gamma = 0.1 if norm == "recurrent" else 1.0
        self.gamma = checks.number_in("gamma", gamma, 0)
        self.eps = checks.eps(eps)
        self._momentum = None if momentum is None else checks.momentum(momentum)
        self.dtype = checks.parameter_dtype(dtype)
        self._start(checks.flag("bias", bias), checks.choice("init", init, ("uniform", "orthogonal")), rng)
        width = self.GATES * self.hidden_size
        self.input_norm: BatchNorm | StepNorm | None = None  # of W_ih·x_t
        self.sum_norm: StepNorm | None = None  # of W_ih·x_t + W_hh·h_{t-1}
        self.hidden_norm: StepNorm | None = None  # of W_hh·h_{t-1}
        # None has a β: the layer's own bias does its work.
        if norm == "input":
            self.input_norm = BatchNorm(width, affine="weight", eps=self.eps, momentum=momentum, dtype=self.dtype)
            assert self.input_norm.weight is not None
            self.input_norm.weight[...] = self.gamma
        elif norm == "sum":
            self.sum_norm = self._step_norm(width)
        elif norm == "recurrent":
            self.input_norm, self.hidden_norm = self._step_norm(width), self._step_norm(width)
        self.grad_weight_ih_l0: Array | None = None
        self.grad_weight_hh_l0: Array | None = None
        self.grad_bias_ih_l0: Array | None = None
        self.grad_bias_hh_l0: Array | None = None
        self.grad_hidden: Array | None = None
        self.grad_h0: Array | None = None
        self._last: Any = None  # what the last call left for `backward`, by name
        self._memory: dict[str, Buffer] = {}

    # ---- forward ----

    def _walk(self, x: Array, **initial: Array | None) -> Array:
        """All hidden states of x, from the initial states by name; the running statistics last."""
        self._check_sequence("x", x, self.input_size)
        steps, batch = (x.shape[1], x.shape[0]) if self.batch_first else x.shape[:2]
        for name, state in initial.items():
            if state is not None:
                checks.of_layer(name, state, self.dtype)
                checks.initial_state(name, state, (batch, self.hidden_size))
        if self.training and self.steps is not None:
            checks.trainable_steps(x.shape, steps, self.steps)
            checks.enough_values(batch, x.shape)
        self._last = None
        last = self._open(x, steps, batch, initial)
        for norm in self.step_norms():
            norm.forget()
        self._input_terms(last)
        for t in range(len(last.z)):
            self._hidden_term(last, t)
            self._cell(last, t)
        if self.training:
            for norm in self.step_norms():
                norm.track()
        self._last = last
        return self._as_given(last.h[1:])

    def _open(self, x: Array, steps: int, batch: int, initial: Mapping[str, Array | None]) -> Any:
        """x in time order and the arrays of a walk: a, r, z are what x gives, what h gives, and both together."""
        x = x.swapaxes(0, 1) if self.batch_first else x
        if not x.flags.c_contiguous:
            contiguous = self._lend("x", *x.shape)
            np.copyto(contiguous, x)
            x = contiguous
        width = self.GATES * self.hidden_size
        last = SimpleNamespace(x=x, h=self._states("h", steps, batch, initial["h0"]), training=self.training)
        last.a = last.z = self._lend("a", steps, batch, width)
        last.r = self._lend("r", 1, batch, width)
        if self.sum_norm is not None or self.hidden_norm is not None:  # what they normalize must stay for `backward`
            last.z = self._lend("z", steps, batch, width)
        if self.hidden_norm is not None:
            last.r = self._lend("r", steps, batch, width)
            last.normal = self._lend("normal", batch, width)
        return last

    def _input_terms(self, last: Any) -> None:
        """a_t = W_ih·x_t for all t, normalized if that is all there is to normalize."""
        np.matmul(_rows(last.x), self.weight_ih_l0.T, out=_rows(last.a))
        if isinstance(self.input_norm, BatchNorm):
            last.z = self.input_norm(_rows(last.a)).reshape(last.a.shape)
        last.bias = None
        if self.bias_ih_l0 is not None and self.bias_hh_l0 is not None:
            last.bias = self.bias_ih_l0 + self.bias_hh_l0
            if last.z is last.a or isinstance(self.input_norm, BatchNorm):
                np.add(last.z, last.bias, out=last.z)
                last.bias = None  # done for all steps

    def _hidden_term(self, last: Any, t: int) -> None:
        """z_t complete: with r_t = W_hh·h_{t-1}."""
        a, z, r = last.a[t], last.z[t], last.r[t if self.hidden_norm is not None else 0]
        np.matmul(last.h[t], self.weight_hh_l0.T, out=r)
        if self.sum_norm is not None:  # z = BN(a + r) + b
            np.add(a, r, out=a)
            self._normalize(self.sum_norm, t, a, z)
        elif self.hidden_norm is not None:  # z = BN(a) + BN(r) + b
            assert isinstance(self.input_norm, StepNorm)
            self._normalize(self.input_norm, t, a, z)
            self._normalize(self.hidden_norm, t, r, last.normal)
            np.add(z, last.normal, out=z)
        else:  # z = a + r + b, or BN(a) + r + b
            np.add(z, r, out=z)
        if last.bias is not None:
            np.add(z, last.bias, out=z)

    def _normalize(self, norm: StepNorm, t: int, x: Array, out: Array) -> None:
        if self.training:
            norm.train_step(x, out)
        else:
            norm.eval_step(t, x, out)

    def _cell(self, last: Any, t: int) -> None:
        """Make last.h[t + 1] of last.z[t], which may be overwritten."""
        raise NotImplementedError

    # ---- backward ----

    def backward(self, dy: Array) -> Array:
        """dx of the last call, leaving the gradients that `parameters` yields, `grad_hidden` and `grad_h0`.

        With step-wise statistics this needs a call in training mode.

        Parameters
        ----------
        dy : ndarray of the result's shape and dtype
        """
        self.parameter_gradients(dy)
        last = self._last
        dx = self._lend("dx", *last.x.shape)
        np.matmul(_rows(last.da), self.weight_ih_l0, out=_rows(dx))
        return self._as_given(dx)

    def parameter_gradients(self, dy: Array) -> None:
        """`backward` without dx."""
        last = checks.called(self._last)
        self._check_sequence("dy", dy, self.hidden_size)
        checks.shape_of("dy", dy, self._as_given(last.h[1:]).shape)
        if self.norm is not None and not last.training:
            checks.something_kept(None)
        dy = dy.swapaxes(0, 1) if self.batch_first else dy
        steps, batch, width = last.z.shape
        last.dz = self._lend("dz", steps, batch, width)
        last.dr = last.da = last.dz
        if self.sum_norm is not None or self.hidden_norm is not None:
            last.dr = last.da = self._lend("dr", steps, batch, width)
        if self.hidden_norm is not None:
            last.da = self._lend("da", steps, batch, width)
        for norm in self.step_norms():
            norm.start_backward()
        # grad_hidden[t] is of the state after step t; what is left after step 0 goes to h0.
        self.grad_hidden = dh = self._lend("dh", steps, batch, self.hidden_size)
        self.grad_h0 = passed = self._lend("dh0", batch, self.hidden_size)
        passed[...] = 0
        for t in reversed(range(steps)):
            np.add(dy[t], passed, out=dh[t])
            self._cell_backward(last, t, dh[t])
            self._hidden_term_backward(last, t)
            np.matmul(last.dr[t], self.weight_hh_l0, out=passed)
        self._weights_backward(last)

    def _hidden_term_backward(self, last: Any, t: int) -> None:
        """last.dr[t] and last.da[t] of last.dz[t], where they are not the same."""
        if self.sum_norm is not None:
            self.sum_norm.backward_step(t, last.dz[t], last.dr[t])
        elif self.hidden_norm is not None:
            assert isinstance(self.input_norm, StepNorm)
            self.hidden_norm.backward_step(t, last.dz[t], last.dr[t])
            self.input_norm.backward_step(t, last.dz[t], last.da[t])

    def _weights_backward(self, last: Any) -> None:
        """The gradients of weights and biases: sums over batch and time."""
        if isinstance(self.input_norm, BatchNorm):
            last.da = self.input_norm.backward(_rows(last.dz)).reshape(last.dz.shape)
        for name in NAMES:
            if getattr(self, name) is not None and getattr(self, f"grad_{name}") is None:
                setattr(self, f"grad_{name}", np.empty_like(getattr(self, name)))
        np.matmul(_rows(last.da).T, _rows(last.x), out=self.grad_weight_ih_l0)
        np.matmul(_rows(last.dr).T, _rows(last.h[:-1]), out=self.grad_weight_hh_l0)
        if self.grad_bias_ih_l0 is not None and self.grad_bias_hh_l0 is not None:
            np.add.reduce(_rows(last.dz), axis=0, out=self.grad_bias_ih_l0)
            self.grad_bias_hh_l0[...] = self.grad_bias_ih_l0

    def _cell_backward(self, last: Any, t: int, dh: Array) -> None:
        """Write last.dz[t], of dh: the gradient of last.h[t + 1]."""
        raise NotImplementedError

    # ---- parameters and state ----

    def parameters(self) -> Iterator[tuple[Array, Array | None]]:
        """Weights and biases in torch's order, then those of the normalizations."""
        for name in NAMES:
            if getattr(self, name) is not None:
                yield getattr(self, name), getattr(self, f"grad_{name}")
        for _, norm in self._norms():
            yield from norm.parameters()

    @property
    def layers(self) -> list[Layer]:
        """The BatchNorm inside, if there is one: `update_bn` looks here."""
        return [self.input_norm] if isinstance(self.input_norm, BatchNorm) else []

    @property
    def momentum(self) -> float | None:
        """The weight of the new batch in the running statistics; None is their cumulative average over all batches."""
        return self._momentum

    @momentum.setter
    def momentum(self, value: float | None) -> None:
        self._momentum = None if value is None else checks.momentum(value)
        for _, norm in self._norms():
            norm.momentum = self._momentum

    def reset_running_stats(self) -> None:
        """Mean 0, variance 1, no batches tracked.

        With ``momentum=None`` and a pass over the data in training mode, the statistics are then estimated anew.
        """
        for _, norm in self._norms():
            norm.reset_running_stats()

    def train(self, mode: bool = True) -> Self:
        """Normalize by the batch's statistics from now on (or, with ``mode=False``, by the running ones)."""
        self.training = checks.flag("mode", mode)
        for layer in self.layers:
            layer.train(mode)
        return self

    def state_dict(self) -> dict[str, Array]:
        """Copies of all weights and statistics: torch's names, and "input_norm.weight" and so on."""
        state = {name: getattr(self, name).copy() for name in NAMES if getattr(self, name) is not None}
        for place, norm in self._norms():
            state |= {f"{place}.{name}": array for name, array in norm.state_dict().items()}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave (ours, or torch's as NumPy arrays where there is no norm)."""
        before = self.state_dict()
        checks.state_keys(state, list(before))
        try:
            self._load(state)
        except (TypeError, ValueError):
            self._load(before)
            raise

    def _load(self, state: Mapping[str, Any]) -> None:
        for name in NAMES:
            if getattr(self, name) is not None:
                getattr(self, name)[...] = checks.state(name, state[name], getattr(self, name))
        for place, norm in self._norms():
            norm.load_state_dict({name: state[f"{place}.{name}"] for name in norm.state_dict()})

    def _norms(self) -> Iterator[tuple[str, BatchNorm | StepNorm]]:
        """Every normalization with its name."""
        for place in ("input_norm", "sum_norm", "hidden_norm", "cell_norm"):
            norm = getattr(self, place, None)
            if norm is not None:
                yield place, norm

    def step_norms(self) -> list[StepNorm]:
        """Those with statistics for each step."""
        return [norm for _, norm in self._norms() if isinstance(norm, StepNorm)]

    # ---- small things ----

    def _start(self, bias: bool, init: str, rng: np.random.Generator | int | None) -> None:
        """Weights and biases: uniform from -1/√hidden_size to 1/√hidden_size as in torch, or W_hh orthogonal."""
        rng = np.random.default_rng(rng)
        rows, hidden = self.GATES * self.hidden_size, self.hidden_size
        shapes = ((rows, self.input_size), (rows, hidden), (rows,), (rows,))
        for name, shape in zip(NAMES, shapes, strict=True):
            start = rng.uniform(-(hidden**-0.5), hidden**-0.5, shape).astype(self.dtype)
            setattr(self, name, start if bias or not name.startswith("bias") else None)
        if init == "orthogonal":
            for gate in self.weight_hh_l0.reshape(self.GATES, hidden, hidden):
                q, r = np.linalg.qr(rng.standard_normal((hidden, hidden)))
                gate[...] = q * np.sign(np.diagonal(r))  # without the signs, not all rotations would be as likely

    def _step_norm(self, width: int, *, bias: bool = False) -> StepNorm:
        assert self.steps is not None
        return StepNorm(
            width, self.steps, weight=self.gamma, bias=bias, eps=self.eps, momentum=self._momentum, dtype=self.dtype
        )

    def _lend(self, name: str, *shape: int) -> Array:
        """Memory of the layer's own. The rows are one axis there, so that a smaller batch fits into it."""
        buffer = self._memory.setdefault(name, Buffer())
        rows = int(np.prod(shape[:-1]))
        return buffer.lend((rows, shape[-1]), self.dtype).reshape(shape)

    def _states(self, name: str, steps: int, batch: int, initial: Array | None) -> Array:
        """Memory for the states from before the first step to after the last."""
        states = self._lend(name, steps + 1, batch, self.hidden_size)
        states[0] = 0 if initial is None else initial
        return states

    def _as_given(self, sequence: Array) -> Array:
        return sequence.swapaxes(0, 1) if self.batch_first else sequence

    def _check_sequence(self, name: str, array: Any, width: int) -> None:
        checks.of_layer(name, array, self.dtype)
        checks.sequence(name, array, width, self.batch_first)

    def __getstate__(self) -> dict[str, Any]:
        """Without the last batch: a copy or a pickle does not carry it."""
        return self.__dict__ | {"_last": None, "grad_hidden": None, "grad_h0": None}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self._options())})"

    def _options(self) -> Iterator[str]:
        yield f"{self.input_size}, {self.hidden_size}"
        yield f"bias={self.bias_ih_l0 is not None}, batch_first={self.batch_first}, norm={self.norm!r}"
        if self.norm is not None:
            yield f"steps={self.steps}, gamma={self.gamma}, eps={self.eps}, momentum={self.momentum}"
        yield f"dtype={self.dtype}"


def _rows(sequence: Array) -> Array:
    """(steps, batch, width) as (steps·batch, width)."""
    return sequence.reshape(-1, sequence.shape[-1])
