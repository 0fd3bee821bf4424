"""Every gradient against central differences, in float64: each operation, each fused form, with and without parameters.

A small array is checked element by element; one that reaches blocks, chunks and tiles, along random directions. An
activation has a kink at 0, from which all z are kept away.
"""

from itertools import product
from typing import NamedTuple

import numpy as np
import pytest
from conftest import F64, column, generator, parameters

import fastbn

# One instruction set serves for all, whose bits are the same. Numba's kernels, which compile for each form, are held
# against the reference elsewhere.
ON = pytest.mark.parametrize("kernels", ["cython x86-64", "reference"], indirect=True)


class Form(NamedTuple):
    """What is fused: an activation, and whether a residual is added before it."""

    activation: str | None
    added: bool

    @property
    def settings(self):
        return {"activation": self.activation, "negative_slope": 0.3}

    def __str__(self):
        return " + ".join([*(["residual"] if self.added else []), self.activation or "none"])


FORMS = [Form(activation, added) for added, activation in product((False, True), (None, "relu", "leaky_relu"))]
forms = pytest.mark.parametrize("form", FORMS, ids=str)
modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])

SMALL = {
    "NC": ((7, 3), 1),
    "NCL": ((3, 2, 4), 1),
    "NCHW": ((2, 3, 2, 3), 1),
    "NHWC": ((2, 2, 2, 3), -1),
    "planes as columns": ((9, 2, 2), 1),
    "channels first": ((2, 7), 0),
}
LARGE = {
    "planes of several blocks": ((2, 3, 95, 95), 1),
    "planes as runs": ((3, 17, 23, 23), 1),
    "small planes": ((300, 3, 7, 6), 1),
    "rows in chunks": ((17001, 3), 1),
    "NHWC": ((3, 17, 17, 70), -1),
}


class Problem:
    """A loss Σ cotangent·y, its arguments, and its gradients by fastbn."""

    def __init__(self, shape, axis, form, training, weighted=True, biased=True):
        rng, channels = generator(21, *shape), shape[axis]
        # Two clusters: x̂ is near ±1, whatever else is done to it.
        x = rng.choice([-1, 1], shape) * rng.uniform(0.9, 1.3, shape)
        np.moveaxis(x, axis, -1)[:2] *= np.array([-1, 1]).reshape(-1, *[1] * (x.ndim - 1))
        x = x * column(rng.uniform(0.5, 2, channels), x.ndim, axis) + column(rng.normal(0, 2, channels), x.ndim, axis)
        self.form, self.training, self.axis = form, training, axis
        _, _, self.mean, self.var = parameters(channels, F64)
        if not training:  # statistics of other data, not far from this one's
            rest = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
            self.mean, self.var = x.mean(rest) + 0.1, x.var(rest) * 1.2
        self.arguments = {"x": x}
        if weighted:
            self.arguments["weight"] = rng.choice([-1, 1], channels) * rng.uniform(0.7, 1.5, channels)
        if biased:
            self.arguments["bias"] = rng.uniform(-0.2, 0.2, channels)
        self.cotangent = rng.standard_normal(shape)
        if form.added:
            plain, _ = self.forward(Form(None, False))
            residual = rng.standard_normal(shape)
            self.arguments["residual"] = np.where(np.abs(plain + residual) < 0.1, residual + 0.3, residual)
        z, _ = self.forward(Form(None, form.added))
        assert np.abs(z).min() > 0.02

    def forward(self, form=None):
        form, given = form or self.form, self.arguments
        settings = form.settings | {"axis": self.axis, "residual": given.get("residual") if form.added else None}
        weight, bias = given.get("weight"), given.get("bias")
        if self.training:
            return fastbn.batch_norm_forward(given["x"], weight, bias, **settings)
        return fastbn.batch_norm_eval_forward(given["x"], self.mean, self.var, weight, bias, **settings)

    def loss(self):
        return float((self.forward()[0] * self.cotangent).sum())

    def gradients(self):
        """By the arguments' names; None for those that are absent."""
        names = ("x", "weight", "bias", "residual")
        return dict(zip(names, fastbn.batch_norm_backward(self.cotangent, self.forward()[1]), strict=False))

    def slope(self, name, direction, step):
        """The loss's derivative along a direction of an argument."""
        argument = self.arguments[name]
        here = argument.copy()
        argument[...] = here + step * direction
        above = self.loss()
        argument[...] = here - step * direction
        below = self.loss()
        argument[...] = here
        return (above - below) / (2 * step)


@ON
@forms
@modes
@pytest.mark.parametrize(("weighted", "biased"), [*product((True, False), repeat=2)])
def test_elements(kernels, form, training, weighted, biased):
    """Truncation is about step², rounding about 1e-15/step."""
    shapes = SMALL.values() if weighted and biased else (SMALL["NC"], SMALL["NCL"])
    for shape, axis in shapes:
        problem = Problem(shape, axis, form, training, weighted, biased)
        gradients = problem.gradients()
        assert {name for name, gradient in gradients.items() if gradient is not None} == problem.arguments.keys()
        for name, argument in problem.arguments.items():
            want = np.empty(argument.shape)
            for i in np.ndindex(argument.shape):
                direction = np.zeros(argument.shape)
                direction[i] = 1
                want[i] = problem.slope(name, direction, 1e-5)
            np.testing.assert_allclose(gradients[name], want, rtol=1e-7, atol=1e-8, err_msg=f"{shape} {name}")


@ON
@forms
@modes
@pytest.mark.parametrize(("shape", "axis"), LARGE.values(), ids=LARGE)
def test_directions(kernels, form, training, shape, axis):
    problem = Problem(shape, axis, form, training)
    rng = generator(22)
    for name, gradient in problem.gradients().items():
        direction = rng.standard_normal(gradient.shape)
        want = problem.slope(name, direction, 3e-5)
        assert abs(float((gradient * direction).sum()) - want) <= 1e-7 * (np.linalg.norm(gradient) + 1), name
