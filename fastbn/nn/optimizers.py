"""Optimizers: torch's rules and names. A new one is a subclass of `Optimizer` in this file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .. import checks
from .layer import Layer

Array = np.ndarray[Any, np.dtype[Any]]


class Optimizer:
    """Walks a network's parameters after each `backward` and changes them in place.

    A subclass says how many arrays of state a parameter needs and writes `update`.

    Parameters
    ----------
    model : Layer
        Whose parameters to train: a `Sequential`, or any layer.
    lr : float
        The learning rate; may be set anew at any time.
    weight_decay : float
        ``weight_decay * parameter`` is added to each gradient, in place.
    states : int
        Arrays of state a parameter.

    Attributes
    ----------
    lr, weight_decay : float
    decay_vectors : bool
        Whether parameters of one axis (biases, BatchNorm's weight and bias) decay too, as they do in torch; True unless
        set otherwise.
    steps : int
        Taken so far.
    """

    decay_vectors = True

    def __init__(self, model: Layer, lr: float, weight_decay: float, states: int) -> None:
        self.model = model
        self.lr = _number("lr", lr, positive=True)
        self.weight_decay = _number("weight_decay", weight_decay)
        self.steps = 0
        parameters = [parameter for parameter, _ in model.parameters()]
        if not parameters:
            raise ValueError(f"model is {model!r}, and must have parameters to train")
        scratch = np.empty(max(p.nbytes for p in parameters), np.uint8)  # one for all, seen in each one's shape
        self._rooms = [
            (scratch[: p.nbytes].view(p.dtype).reshape(p.shape), *(np.zeros_like(p) for _ in range(states)))
            for p in parameters
        ]

    def step(self) -> None:
        """Change every parameter by its gradient of the last `backward`."""
        pairs = list(self.model.parameters())
        if any(gradient is None for _, gradient in pairs):
            raise ValueError("step needs gradients: call the model's backward first")
        self.steps += 1
        for (parameter, gradient), room in zip(pairs, self._rooms, strict=True):
            assert gradient is not None
            if self.weight_decay and (self.decay_vectors or parameter.ndim > 1):
                self.decay(parameter, gradient, room[0])
            self.update(parameter, gradient, *room)

    def decay(self, parameter: Array, gradient: Array, scratch: Array) -> None:
        """Add the weight decay to one parameter's gradient; the arguments are `update`'s."""
        np.multiply(parameter, self.weight_decay, out=scratch)
        np.add(gradient, scratch, out=gradient)

    def update(self, parameter: Array, gradient: Array, scratch: Array, *state: Array) -> None:
        """Change one parameter in place.

        Parameters
        ----------
        parameter, gradient : ndarray of one shape and dtype
        scratch : ndarray
            Of the same shape and dtype, to write to.
        *state : ndarray
            Of the same shape and dtype, 0 before the first step, kept from step to step.
        """
        raise NotImplementedError

    def state_dict(self) -> dict[str, Array]:
        """Copies of all that later steps depend on beside the model and the optimizer's own arguments.

        Returns
        -------
        state : dict
            "steps" (int64) and "lr" (float64), of shape (), and under "state.i.j" the j-th array of the i-th parameter,
            in the order of ``model.parameters()``, of that parameter's shape and dtype. An optimizer of the same
            arguments that takes it over, on a model that takes over the model's, goes on bit for bit.
        """
        return {"steps": np.array(self.steps, np.int64), "lr": np.array(float(self.lr))} | {
            name: array.copy() for name, array in self._states().items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave.

        Raises
        ------
        TypeError, ValueError
            Naming the keys that are missing or not known, or the array that is wrong; the optimizer is then as it was.
        """
        mine = self._states()
        checks.state_keys(state, ["steps", "lr", *mine])
        steps = int(checks.count("steps", state["steps"]))
        lr = _number("lr", checks.state("lr", state["lr"], np.empty(())))
        new = {name: checks.exact_state(name, state[name], array) for name, array in mine.items()}
        self.steps, self.lr = steps, lr
        for name, array in mine.items():
            array[...] = new[name]

    def _states(self) -> dict[str, Array]:
        return {f"state.{i}.{j}": array for i, room in enumerate(self._rooms) for j, array in enumerate(room[1:])}


class SGD(Optimizer):
    """v ← momentum·v + g,  p ← p - lr·v.

    Parameters
    ----------
    model : Layer
    lr, weight_decay
        As for `Optimizer`.
    momentum : float from 0 to 1
    """

    def __init__(self, model: Layer, lr: float, *, momentum: float = 0.0, weight_decay: float = 0.0) -> None:
        self.momentum = _number("momentum", momentum, below=1.0)
        super().__init__(model, lr, weight_decay, states=1 if momentum else 0)

    def update(self, parameter: Array, gradient: Array, scratch: Array, *state: Array) -> None:
        """One parameter; the state is v, if there is momentum."""
        if state:
            (velocity,) = state
            np.multiply(velocity, self.momentum, out=velocity)
            np.add(velocity, gradient, out=velocity)
            gradient = velocity
        np.multiply(gradient, self.lr, out=scratch)
        np.subtract(parameter, scratch, out=parameter)


class RMSprop(Optimizer):
    """v ← alpha·v + (1 - alpha)·g²,  p ← p - lr·g / (√v + eps).

    Parameters
    ----------
    model : Layer
    lr, weight_decay
        As for `Optimizer`.
    alpha : float from 0 to 1
        The weight of the old in the running mean of g².
    eps : float

    References
    ----------
    Tieleman and Hinton (2012), lecture 6.5.
    """

    def __init__(
        self, model: Layer, lr: float = 0.01, *, alpha: float = 0.99, eps: float = 1e-8, weight_decay: float = 0.0
    ) -> None:
        self.alpha = _number("alpha", alpha, below=1.0)
        self.eps = _number("eps", eps, positive=True)
        super().__init__(model, lr, weight_decay, states=1)

    def update(self, parameter: Array, gradient: Array, scratch: Array, *state: Array) -> None:
        """One parameter; the state is v."""
        (square,) = state
        np.multiply(gradient, gradient, out=scratch)
        np.multiply(scratch, 1 - self.alpha, out=scratch)
        np.multiply(square, self.alpha, out=square)
        np.add(square, scratch, out=square)
        np.sqrt(square, out=scratch)
        np.add(scratch, self.eps, out=scratch)
        np.divide(gradient, scratch, out=scratch)
        np.multiply(scratch, self.lr, out=scratch)
        np.subtract(parameter, scratch, out=parameter)


class Adam(Optimizer):
    """m ← β₁·m + (1 - β₁)·g,  v ← β₂·v + (1 - β₂)·g²,  p ← p - lr·m̂ / (√v̂ + eps).

    m̂ = m / (1 - β₁ᵗ) and v̂ = v / (1 - β₂ᵗ) at step t.

    Parameters
    ----------
    model : Layer
    lr, weight_decay
        As for `Optimizer`.
    betas : (float, float)
        β₁ and β₂.
    eps : float

    References
    ----------
    Kingma and Ba (2015), Algorithm 1.
    """

    def __init__(
        self,
        model: Layer,
        lr: float = 0.001,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        try:
            first, second = betas
        except (TypeError, ValueError):
            raise TypeError(f"betas is {betas!r}, and must be a pair of numbers") from None
        self.betas = _number("betas[0]", first, below=1.0), _number("betas[1]", second, below=1.0)
        self.eps = _number("eps", eps, positive=True)
        super().__init__(model, lr, weight_decay, states=2)

    def step(self) -> None:
        """Change every parameter by its gradient of the last `backward`."""
        # The states are the sums m / (1 - β₁) and v / (1 - β₂), which take two operations fewer than the means; the
        # rule's constants are then two numbers a step.
        first, second = self.betas
        time = self.steps + 1
        spread = ((1 - second) / (1 - second**time)) ** 0.5
        self._rate = self.lr * (1 - first) / (1 - first**time) / spread
        self._eps = self.eps / spread
        super().step()

    def update(self, parameter: Array, gradient: Array, scratch: Array, *state: Array) -> None:
        """One parameter; the states are m / (1 - β₁) and v / (1 - β₂)."""
        mean, square = state
        first, second = self.betas
        np.multiply(mean, first, out=mean)
        np.add(mean, gradient, out=mean)
        np.multiply(gradient, gradient, out=scratch)
        np.multiply(square, second, out=square)
        np.add(square, scratch, out=square)
        np.sqrt(square, out=scratch)
        np.add(scratch, self._eps, out=scratch)
        np.divide(mean, scratch, out=scratch)
        np.multiply(scratch, self._rate, out=scratch)
        np.subtract(parameter, scratch, out=parameter)


class AdamW(Adam):
    """`Adam` with decoupled weight decay: p ← p - lr·weight_decay·p, then Adam's step by the gradient alone.

    Parameters
    ----------
    model : Layer
    lr, betas, eps
        As for `Adam`.
    weight_decay : float

    References
    ----------
    Loshchilov and Hutter (2019), "Decoupled Weight Decay Regularization", Algorithm 2.
    """

    def __init__(
        self,
        model: Layer,
        lr: float = 0.001,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(model, lr, betas=betas, eps=eps, weight_decay=weight_decay)

    def decay(self, parameter: Array, gradient: Array, scratch: Array) -> None:
        """Shrink one parameter."""
        np.multiply(parameter, 1 - self.lr * self.weight_decay, out=parameter)


def _number(name: str, value: Any, *, positive: bool = False, below: float = float("inf")) -> float:
    """A float from 0 (or, if `positive`, above it) to below `below`."""
    if isinstance(value, (str, bytes, bool)):
        raise TypeError(f"{name} is {value!r}, and must be a number")
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} is {value!r}, and must be a number") from None
    if not (number > 0 if positive else number >= 0) or not number < below:
        least = "greater than 0" if positive else "at least 0"
        most = "finite" if below == float("inf") else f"less than {below:g}"
        raise ValueError(f"{name} is {number}, and must be {least} and {most}")
    return number
