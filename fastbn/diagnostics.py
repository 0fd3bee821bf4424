"""Diagnostics: what a network's gradients, loss and activations do, measured at one point of its training.

The measures of Santurkar, Tsipras, Ilyas and Madry (2018), "How Does Batch Normalization Help Optimization?", for any
`fastbn.nn` model, loss and batch: internal covariate shift as they define it (definition 2.1), and how the loss and its
gradient vary along the gradient (section 3.1); beside them gradient norms and activations, layer by layer.

Every function works on a copy of the model, in training mode, with the copy's random choices (dropout) the same at
each point that it looks at. The model, the loss and the optimizer that it is given stay as they are, bit for bit:
parameters, gradients, running statistics, modes, states of random generators, and the last batch, so that a call may
stand between a training step's forward and backward pass. The copy costs as much memory as the model has parameters.

A *layer* here is one of a `Sequential`'s list; a model that is no Sequential is one layer. Norms, differences and
cosines are taken in float64; the gradients themselves have the rounding errors of the model's dtype, below which no
difference means anything: build the model in float64 where steps are small.

>>> shift = internal_covariate_shift(model, nn.SoftmaxCrossEntropy(), x, labels, 0.1)   # doctest: +SKIP
>>> shift.l2, shift.cosine                                                             # doctest: +SKIP
>>> landscape(model, nn.SoftmaxCrossEntropy(), x, labels, [0.1, 0.2, 0.4]).smoothness  # doctest: +SKIP
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from math import nan, sqrt
from typing import Any, Protocol

import numpy as np

from . import checks, nn
from .statistics import Moments, moments

Array = np.ndarray[Any, np.dtype[Any]]


class Loss(Protocol):
    """What the functions here ask of a loss: those of `fastbn.nn`, or one's own."""

    def __call__(self, output: Array, targets: Any) -> float:
        """The loss of the model's output."""
        ...

    def backward(self) -> Array:
        """Its gradient with respect to that output."""
        ...


# ---- internal covariate shift ----


@dataclass(frozen=True, slots=True, eq=False)
class CovariateShift:
    """How far each layer's gradient moves when the layers below it are updated.

    Attributes
    ----------
    layers : tuple of int
        Places, in the model's list, of the layers that have parameters; the arrays follow this order.
    l2 : ndarray of float64, shape (len(layers),)
        ‖G - G'‖, the paper's measure. The first is 0: nothing lies below.
    cosine : ndarray of float64, shape (len(layers),)
        Of the angle between G and G'; NaN where either is 0.
    norm : ndarray of float64, shape (len(layers),)
        ‖G‖, to hold the first against.
    """

    layers: tuple[int, ...]
    l2: Array
    cosine: Array
    norm: Array


def internal_covariate_shift(
    model: nn.Layer, loss: Loss, x: Array, targets: Any, optimizer: nn.Optimizer | float
) -> CovariateShift:
    """Internal covariate shift of each layer, as Santurkar et al. define it: in terms of the optimization.

    For layer i with parameters W_i of k, and W' the parameters after one training step on the same batch::

        G_i  = ∇_{W_i} L(W_1, …, W_k; x, targets)
        G'_i = ∇_{W_i} L(W'_1, …, W'_{i-1}, W_i, …, W_k; x, targets)

    G is what the step uses for layer i, as all layers are updated at once; G' is what it would have used had the layers
    below been updated first. The shift is ‖G_i - G'_i‖, and the cosine of their angle (figure 3).

    Parameters
    ----------
    model : nn.Layer
        A `Sequential`. A BatchNorm counts as a layer of its own between the layers before and after it.
    loss : Loss
    x : ndarray of the model's dtype, shape (batch, ...)
    targets : array
        What the loss takes beside the model's output: labels, or values.
    optimizer : nn.Optimizer or float
        What makes the step: an optimizer of this model, of which a copy takes it (with momentum and all), or the
        learning rate of plain gradient descent.

    Returns
    -------
    CovariateShift

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what it was and what it must be.

    Notes
    -----
    One forward and backward pass for each layer that has parameters.

    References
    ----------
    Santurkar et al. (2018), definition 2.1 and figure 3.
    """
    if not isinstance(optimizer, nn.Optimizer):
        optimizer = checks.step_size("optimizer", optimizer)
    probe = _Probe(model, loss, x, targets, optimizer)
    assert probe.optimizer is not None
    _, before = probe.gradient()
    old = probe.parameters()
    probe.optimizer.step()
    new = probe.parameters()
    l2, cosine, norm = [], [], []
    for i in range(len(probe.layers)):
        probe.set_parameters(new[:i] + old[i:])
        _, after = probe.gradient()
        l2.append(_distance(before[i], after[i]))
        cosine.append(_cosine(before[i], after[i]))
        norm.append(_norm(before[i]))
    return CovariateShift(probe.layers, np.array(l2), np.array(cosine), np.array(norm))


# ---- the landscape along the gradient ----


@dataclass(frozen=True, slots=True, eq=False)
class Landscape:
    """The loss L and its gradient at w and at w - α·g, with g = ∇L(w), for several step sizes α.

    A loss that overflows on the way is infinite or NaN here, and so is what is computed from it.

    Attributes
    ----------
    steps : ndarray of float64, shape (n,)
        The step sizes α.
    loss : float
        L(w).
    gradient_norm : float
        ‖g‖, over all parameters.
    losses : ndarray of float64, shape (n,)
        L(w - α·g).
    distances : ndarray of float64, shape (n,)
        ‖∇L(w - α·g) - g‖: how well the gradient predicts those ahead ("gradient predictiveness": small is good).
    cosines : ndarray of float64, shape (n,)
        Of the angle between ∇L(w - α·g) and g; NaN where either is 0.
    """

    steps: Array
    loss: float
    gradient_norm: float
    losses: Array
    distances: Array
    cosines: Array

    @property
    def loss_range(self) -> tuple[float, float]:
        """The least and the largest of `losses`: the shaded region of the paper's figure 4(a)."""
        return float(self.losses.min()), float(self.losses.max())

    @property
    def distance_range(self) -> tuple[float, float]:
        """The least and the largest of `distances`: the shaded region of the paper's figure 4(b)."""
        return float(self.distances.min()), float(self.distances.max())

    @property
    def smoothness(self) -> float:
        """Effective β-smoothness: the largest of ‖∇L(w - α·g) - g‖ / (α·‖g‖), figure 4(c); NaN where g is 0.

        L is β-smooth where ‖∇L(u) - ∇L(v)‖ ≤ β·‖u - v‖ for all u and v; this is the least β that will do for w and the
        points looked at.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            return float((self.distances / (self.steps * self.gradient_norm)).max()) if self.gradient_norm else nan

    @property
    def predicted(self) -> Array:
        """What first-order theory says of `losses`: L(w) - α·‖g‖², shape (n,)."""
        predicted: Array = self.loss - self.steps * self.gradient_norm**2
        return predicted


def landscape(model: nn.Layer, loss: Loss, x: Array, targets: Any, steps: Sequence[float] | Array) -> Landscape:
    """Look along the gradient: variation of the loss, gradient predictiveness and effective β-smoothness.

    With g = ∇L(w), all of the model's parameters together, the loss and its gradient are taken at w - α·g for each
    step size α.

    Parameters
    ----------
    model, loss, x, targets
        As for `internal_covariate_shift`.
    steps : sequence of float
        Step sizes, each greater than 0. The paper takes those around the learning rate in use, up to 0.4.

    Returns
    -------
    Landscape

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what it was and what it must be.

    Notes
    -----
    One forward and backward pass for each step size, and one at w.

    References
    ----------
    Santurkar et al. (2018), section 3.1 and figure 4.
    """
    alphas = checks.step_sizes(steps)
    probe = _Probe(model, loss, x, targets)
    start = probe.parameters()
    value, gradients = probe.gradient()
    here = _flat(gradients)
    losses, distances, cosines = [], [], []
    for alpha in alphas:
        with np.errstate(over="ignore", invalid="ignore"):
            # Step and subtraction in the parameters' dtype: the point is then one that training could reach.
            moved = [
                [p - p.dtype.type(alpha) * g for p, g in zip(*layer, strict=True)]
                for layer in zip(start, gradients, strict=True)
            ]
        probe.set_parameters(moved)
        there_value, there = probe.gradient()
        losses.append(there_value)
        distances.append(_distance(here, _flat(there)))
        cosines.append(_cosine(here, _flat(there)))
    return Landscape(alphas, value, _norm(here), np.array(losses), np.array(distances), np.array(cosines))


# ---- layer by layer ----


@dataclass(frozen=True, slots=True, eq=False)
class GradientNorms:
    """The size of each layer's gradient.

    Attributes
    ----------
    layers : tuple of int
        Places, in the model's list, of the layers that have parameters; the arrays follow this order.
    loss : float
    gradient : ndarray of float64, shape (len(layers),)
        L2 norm of the loss's gradient with respect to the layer's parameters.
    parameters : ndarray of float64, shape (len(layers),)
        L2 norm of these parameters.
    """

    layers: tuple[int, ...]
    loss: float
    gradient: Array
    parameters: Array


def gradient_norms(model: nn.Layer, loss: Loss, x: Array, targets: Any) -> GradientNorms:
    """L2 norms of each layer's gradient: where it vanishes or explodes.

    Parameters
    ----------
    model, loss, x, targets
        As for `internal_covariate_shift`.

    Returns
    -------
    GradientNorms

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what it was and what it must be.
    """
    probe = _Probe(model, loss, x, targets)
    value, gradients = probe.gradient()
    norms = np.array([_norm(gradient) for gradient in gradients])
    return GradientNorms(probe.layers, value, norms, np.array([_norm(p) for p in probe.parameters()]))


@dataclass(frozen=True, slots=True, eq=False)
class Activation:
    """The distribution of one layer's output over a batch, unit by unit.

    Attributes
    ----------
    layer : int
        The layer's place in the model's list.
    name : str
        Its class. A pre-activation is the output of the Linear or BatchNorm before an activation.
    moments : Moments
        Count, mean and variance (`.var()`) of each unit.
    percentiles : ndarray of float64, shape (len(percentiles), units)
    """

    layer: int
    name: str
    moments: Moments
    percentiles: Array


def activations(
    model: nn.Layer,
    x: Array,
    *,
    percentiles: Sequence[float] | Array = (15, 50, 85),
    axis: int = 1,
    training: bool = True,
) -> list[Activation]:
    """How every layer's output is distributed over a batch.

    Parameters
    ----------
    model : nn.Layer
    x : ndarray of the model's dtype, shape (batch, ...)
    percentiles : sequence of float from 0 to 100
        Which to take; Ioffe and Szegedy (2015) show the 15th, 50th and 85th in figure 1.
    axis : int
        The axis of the units, or channels, in every layer's output. 1 suits images with channels first, -1 those with
        channels last; both suit arrays of shape (batch, units).
    training : bool
        Whether the model runs as in training (by the batch's statistics, with dropout) or as in use.

    Returns
    -------
    list of Activation
        One a layer, in order.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what it was and what it must be.
    """
    checks.instance("model", model, nn.Layer)
    x = checks.rows("x", x)
    shares = checks.percentiles(percentiles)
    axis = checks.integer("axis", axis)
    training = checks.flag("training", training)
    found = []
    for i, layer in enumerate(_layers(copy.deepcopy(model).train(training))):
        x = layer(x)
        own = moments(x, axis=axis)
        units = np.moveaxis(x, axis, -1).reshape(-1, own.mean.size)
        found.append(Activation(i, type(layer).__name__, own, np.percentile(units.astype(np.float64), shares, axis=0)))
    return found


# ---- the copy ----


class _Probe:
    """A copy of a model, its loss and its optimizer, with one batch: loss and gradient wherever they are asked for.

    Parameters and gradients are lists by layer of lists of arrays.
    """

    def __init__(
        self, model: nn.Layer, loss: Loss, x: Array, targets: Any, optimizer: nn.Optimizer | float | None = None
    ) -> None:
        checks.instance("model", model, nn.Layer)
        checks.loss(loss)
        self.x, self.targets = checks.rows("x", x), targets
        checks.some_parameters(model)
        if isinstance(optimizer, nn.Optimizer):
            checks.optimizer_of(optimizer, model)
        # At once, so that the optimizer's copy is the copied model's; what was copied on the way is left in `copied`.
        copied: dict[int, Any] = {}
        self.model, self.loss, mine = copy.deepcopy((model, loss, optimizer), copied)
        self.optimizer = nn.SGD(self.model, mine) if isinstance(mine, float) else mine
        generators = [thing for thing in copied.values() if isinstance(thing, np.random.Generator)]
        self._random = [(generator, generator.bit_generator.state) for generator in generators]
        self.model.train()
        every = list(_layers(self.model))
        self.layers = tuple(i for i, layer in enumerate(every) if any(True for _ in layer.parameters()))
        self._trained = [every[i] for i in self.layers]

    def gradient(self) -> tuple[float, list[list[Array]]]:
        """The loss, and copies of its gradients, at the present parameters; the same whenever it is called."""
        for generator, state in self._random:
            generator.bit_generator.state = state
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # a step may well lead nowhere
            value = float(self.loss(self.model(self.x), self.targets))
            self.model.parameter_gradients(self.loss.backward())
        return value, [[np.array(gradient) for _, gradient in layer.parameters()] for layer in self._trained]

    def parameters(self) -> list[list[Array]]:
        """Copies."""
        return [[parameter.copy() for parameter, _ in layer.parameters()] for layer in self._trained]

    def set_parameters(self, new: list[list[Array]]) -> None:
        """Take these values."""
        for layer, arrays in zip(self._trained, new, strict=True):
            for (parameter, _), array in zip(layer.parameters(), arrays, strict=True):
                parameter[...] = array


def _layers(model: nn.Layer) -> list[nn.Layer]:
    return model.layers if isinstance(model, nn.Sequential) else [model]


# ---- vectors: lists of arrays of any shapes ----


def _flat(by_layer: list[list[Array]]) -> list[Array]:
    return [array for layer in by_layer for array in layer]


def _dot(a: list[Array], b: list[Array]) -> float:
    with np.errstate(over="ignore", invalid="ignore"):
        return float(sum(np.vdot(u.astype(np.float64), v.astype(np.float64)) for u, v in zip(a, b, strict=True)))


def _norm(a: list[Array]) -> float:
    return sqrt(_dot(a, a))


def _distance(a: list[Array], b: list[Array]) -> float:
    with np.errstate(over="ignore", invalid="ignore"):
        return _norm([u.astype(np.float64) - v for u, v in zip(a, b, strict=True)])


def _cosine(a: list[Array], b: list[Array]) -> float:
    """Each is first brought to length 1, so that no product of small ones underflows."""
    lengths = _norm(a), _norm(b)
    if not all(0 < length < np.inf for length in lengths):
        return nan
    return _dot([u / lengths[0] for u in a], [v / lengths[1] for v in b])
