"""Normalized inputs, and normalized hidden units, make the loss rounder.

Claims: gradient descent goes as slowly as the loss is elongated, and inputs of unequal scale, or whose means are not
0, elongate it (LeCun, Bottou, Orr and Müller 1998, "Efficient BackProp", sections 4.3 and 5); a hidden unit is an input
of the next layer, so normalizing it should help in the same way (Ioffe and Szegedy 2015, section 1).

Theory, for a quadratic loss with Hessian H: along an eigenvector of eigenvalue λ a step of rate η multiplies the
distance to the minimum by 1 - ηλ. Steps above 2/λmax diverge; the best rate is 2/(λmin + λmax), and the distance then
shrinks by (κ - 1)/(κ + 1) each step, where κ = λmax/λmin is the condition number: 1 for circles.

Protocol: (1) linear regression on two features, drawn at random with deviations 1 and 6, means 2 and 10 and correlation
0.4; full-batch gradient descent at each problem's best rate, by the Hessian, until the excess of the loss over its
minimum is a millionth of what it was. (2) scikit-learn's digits as they come (pixels from 0 to 16), a tanh network of
64, 64 and 10 units, full-batch gradient descent until the training loss is 0.02, at the best of rates a factor of 2
apart, found for each network by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Any

import numpy as np
from _experiment import Report, run
from sklearn.datasets import load_digits

from fastbn import nn

Array = np.ndarray[Any, np.dtype[Any]]


# Both parts: gradients and curvature of a network's loss over all its data.


def gradient(model: nn.Layer, loss: Any, x: Array, targets: Array) -> tuple[float, Array]:
    """The loss in training mode, and its gradient as one vector."""
    value = loss(model.train()(x), targets)
    model.parameter_gradients(loss.backward())
    return value, np.concatenate([g.ravel() for _, g in model.parameters() if g is not None])


def move(model: nn.Layer, vector: Array) -> None:
    """Add a vector to the parameters."""
    start = 0
    for parameter, _ in model.parameters():
        parameter += vector[start : start + parameter.size].reshape(parameter.shape)
        start += parameter.size


def along(model: nn.Layer, loss: Any, x: Array, targets: Array, direction: Array, length: float) -> Array:
    """The Hessian times a direction of unit length, by a central difference of the gradient."""
    move(model, length * direction)
    _, ahead = gradient(model, loss, x, targets)
    move(model, -2 * length * direction)
    _, behind = gradient(model, loss, x, targets)
    move(model, length * direction)
    return (ahead - behind) / (2 * length)


def descend(model: nn.Layer, loss: Any, x: Array, targets: Array, rate: float, goal: float, most: int) -> list[float]:
    """Gradient descent until the loss is at the goal, no longer finite, or for the most steps allowed: the losses."""
    optimizer, losses = nn.SGD(model, rate), []
    with np.errstate(all="ignore"):  # too high a rate overflows
        while len(losses) <= most:
            losses.append(gradient(model, loss, x, targets)[0])
            if not losses[-1] > goal or not np.isfinite(losses[-1]):
                break
            optimizer.step()
    return losses


# 1. Two features.


def two_features(rows: int) -> tuple[Array, Array]:
    """Badly scaled inputs, and targets that are linear in them but for some noise."""
    rng = np.random.default_rng(0)
    mean, deviation, correlation = np.array([2.0, 10.0]), np.array([1.0, 6.0]), 0.4
    mixed = rng.standard_normal((rows, 2)) @ np.linalg.cholesky([[1, correlation], [correlation, 1]]).T
    x = mean + deviation * mixed
    targets = x @ [1.5, -0.4] + 0.3 * rng.standard_normal(rows)
    return x, targets - targets.mean()


def decorrelated(x: Array) -> Array:
    """Whitened: means 0, covariance the identity. More than batch normalization does."""
    values, vectors = np.linalg.eigh(np.cov(x.T, bias=True))
    return (x - x.mean(axis=0)) @ vectors / np.sqrt(values)


def regression(*, batch_norm: bool) -> nn.Sequential:
    """w·x + b, of the inputs as they come or normalized (by γ = 1 and β = 0: w and b do their work)."""
    first: list[nn.Layer] = [nn.BatchNorm(2, affine=False, dtype=np.float64)] if batch_norm else []
    return nn.Sequential(*first, nn.Linear(2, 1, init=0.0, dtype=np.float64))


def curvature(model: nn.Layer, x: Array, targets: Array) -> Array:
    """The Hessian's eigenvalues, ascending."""
    size = sum(parameter.size for parameter, _ in model.parameters())
    rows = [along(model, nn.MSELoss(), x, targets, direction, 1.0) for direction in np.eye(size)]
    return np.linalg.eigvalsh((np.array(rows) + np.array(rows).T) / 2)


def conditions(report: Report, x: Array, targets: Array) -> dict[str, tuple[float, int]]:
    """Condition number and steps for the inputs as they come, and as they become."""
    centred = x - x.mean(axis=0)
    cases = {
        "as they come": (regression(batch_norm=False), x),
        "means removed": (regression(batch_norm=False), centred),
        "batch normalized": (regression(batch_norm=True), x),
        "decorrelated too": (regression(batch_norm=False), decorrelated(x)),
    }
    # All four fit the same functions, and start from the same one, 0: one minimum for all.
    fit = np.linalg.lstsq(np.column_stack([x, np.ones(len(x))]), targets, rcond=None)
    least = float(fit[1][0]) / len(x)
    start = float(np.mean(targets**2))
    goal = least + 1e-6 * (start - least)
    found, rows = {}, []
    for name, (model, inputs) in cases.items():
        values = curvature(model, inputs, targets)
        condition = float(values[-1] / values[0])
        best = 2 / float(values[0] + values[-1])
        steps = len(descend(model, nn.MSELoss(), inputs, targets, best, goal, 100_000)) - 1
        shrinks = (condition - 1) / (condition + 1)  # the distance each step; the excess, its square
        expected = np.log(1e-6) / (2 * np.log(shrinks)) if shrinks > 1e-6 else 1.0
        found[name] = condition, steps
        rows.append(
            [name, f"{values[0]:.3g}", f"{values[-1]:.3g}", f"{condition:.2f}", f"{best:.3g}", steps, ceil(expected)]
        )
    report.table(
        "Linear regression on two features",
        ["inputs", "λmin", "λmax", "condition number", "best rate", "steps", "at most, in theory"],
        rows,
    )
    return found


def paths(x: Array, targets: Array) -> dict[bool, tuple[Array, Array, Array, float]]:
    """For the picture: the path of descent in the plane of the two weights, the minimum, the Hessian, and its κ.

    The means are removed from both, so that the third parameter, the bias, stays at its best and the plane is all.
    """
    centred, found = x - x.mean(axis=0), {}
    for batch_norm in (False, True):
        model = regression(batch_norm=batch_norm)
        inputs = centred / centred.std(axis=0) if batch_norm else centred
        scale = centred.std(axis=0) if batch_norm else np.ones(2)
        weight = next(model.parameters())[0]
        weight[...] = np.array([-0.5, 0.35]) * scale  # the same function for both
        hessian = 2 * inputs.T @ inputs / len(x)
        minimum = np.linalg.solve(hessian, 2 * inputs.T @ targets / len(x))
        values = np.linalg.eigvalsh(hessian)
        optimizer, loss, path = nn.SGD(model, 2 / float(values.sum())), nn.MSELoss(), []
        for _ in range(60):
            path.append(weight[0].copy())
            gradient(model, loss, centred, targets[:, None])
            optimizer.step()
        found[batch_norm] = np.array(path), minimum, hessian, float(values[1] / values[0])
    return found


# 2. Hidden units.

GOAL, MOST = 0.02, 400  # the training loss to reach, and the steps within which

NETWORKS = {  # inputs normalized?, hidden units normalized?
    "nothing": (False, False),
    "inputs": (True, False),
    "hidden units": (False, True),
    "both": (True, True),
}


def network(inputs: bool, hidden: bool, seed: int) -> nn.Sequential:
    """64 → 64 → 64 → 10, tanh, Glorot's weights; float64, for the differences of gradients."""
    rng, dtype = np.random.default_rng(seed), np.float64
    layers: list[nn.Layer] = [nn.BatchNorm(64, affine=False, dtype=dtype)] if inputs else []
    for _ in range(2):
        layers.append(nn.Linear(64, 64, init="glorot", rng=rng, dtype=dtype))
        layers += [nn.BatchNorm(64, dtype=dtype), nn.Tanh()] if hidden else [nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(64, 10, init="glorot", rng=rng, dtype=dtype))


def elongations(model: nn.Sequential, x: Array) -> list[float]:
    """For each Linear: the greatest eigenvalue over the mean one of E[h·hᵀ], of its input h with a 1 for the bias.

    For a squared loss that matrix is the Hessian in the weights of one unit, the layers before held still; for others
    it is its factor. Over the mean, and not over the least, which is 0: some pixels are always black.
    """
    found = []
    for layer in model.train().layers:
        if isinstance(layer, nn.Linear):
            with_one = np.column_stack([x, np.ones(len(x))])
            values = np.linalg.eigvalsh(with_one.T @ with_one / len(x))
            found.append(float(values[-1] / values.mean()))
        x = layer(x)
    return found


def sharpest(model: nn.Layer, x: Array, labels: Array) -> float:
    """The Hessian's largest eigenvalue in size, by power iteration."""
    size = sum(parameter.size for parameter, _ in model.parameters())
    direction, value = np.random.default_rng(0).standard_normal(size), 0.0
    for _ in range(30):
        direction /= np.linalg.norm(direction)
        product = along(model, nn.SoftmaxCrossEntropy(), x, labels, direction, 1e-4)
        value, direction = float(direction @ product), product
    return abs(value)


def best_descent(
    inputs: bool, hidden: bool, x: Array, labels: Array, goal: float, rates: Sequence[float], seed: int
) -> tuple[float, list[float]]:
    """The rate that reaches the goal soonest, and its losses."""
    best: tuple[float, list[float]] = (0.0, [])
    for rate in rates:
        # No rate need be followed for longer than the best before it took.
        steps = len(best[1]) - 2 if best[1] else MOST
        losses = descend(network(inputs, hidden, seed), nn.SoftmaxCrossEntropy(), x, labels, rate, goal, steps)
        if losses[-1] <= goal:
            best = rate, losses
    return best


def hidden_units(report: Report, x: Array, labels: Array, seeds: int) -> dict[str, list[list[float]]]:
    """Elongation at the start, the sharpest curvature, and the steps at the best rate, for the four networks."""
    # From the middle outwards: the sooner a good one is found, the less is spent on the others.
    rates = [2.0**power for power in ((0, 1, -1, 2, -2) if report.quick else (0, 1, -1, 2, -2, 3, -3, 4, -4))]
    curves, rows = {}, []
    for name, (inputs, hidden) in NETWORKS.items():
        first = network(inputs, hidden, 0)
        shapes, sharp = elongations(first, x), sharpest(first, x, labels)
        found = [best_descent(inputs, hidden, x, labels, GOAL, rates, seed) for seed in range(seeds)]
        curves[name] = [losses for _, losses in found]
        steps = [len(losses) - 1 for losses in curves[name]]
        rows.append(
            [
                name,
                *(f"{shape:.1f}" for shape in shapes),
                f"{sharp:.3g}",
                f"{2 / sharp:.3g}",
                " ".join(f"{rate:.3g}" for rate, _ in found),
                " ".join(map(str, steps)),
            ]
        )
    report.table(
        f"A tanh network on the digits; λmax/mean λ of what each layer sees, and the loss's λmax, at the start; best "
        f"rate and steps to a training loss of {GOAL}, for each of {seeds} starts",
        ["normalized", "1st layer", "2nd layer", "3rd layer", "λmax", "2/λmax", "best rate", "steps"],
        rows,
    )
    return curves


def picture(planes: dict[bool, tuple[Array, Array, Array, float]], curves: dict[str, list[list[float]]]) -> Any:
    """The contours and paths of the two features, and the losses of the digits' networks."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.4), layout="constrained")
    *contours, losses = figure.subplots(1, 3)
    reach = 0.0
    for path, minimum, _, _ in planes.values():
        reach = max(reach, np.abs(path - minimum).max() * 1.15)
    for axes, (batch_norm, (path, minimum, hessian, condition)) in zip(contours, planes.items(), strict=True):
        steps = np.linspace(-reach, reach, 201)
        offset = np.stack(np.meshgrid(steps, steps), axis=-1)
        excess = np.einsum("...i,ij,...j", offset, hessian, offset) / 2
        start = (path[0] - minimum) @ hessian @ (path[0] - minimum) / 2
        axes.contour(minimum[0] + steps, minimum[1] + steps, excess, levels=start * 4.0 ** np.arange(-5, 4),
                     colors="tab:olive", linewidths=0.8)  # fmt: skip
        axes.plot(*path.T, ".-", color="tab:blue" if batch_norm else "tab:gray", label="gradient descent, 60 steps")
        axes.plot(*minimum, "k+", markersize=12, label="minimum")
        axes.set(
            title=f"{'Normalized' if batch_norm else 'Not normalized'}: condition number {condition:.1f}",
            xlabel="weight of feature 1",
            ylabel="weight of feature 2",
            aspect="equal",
        )
        axes.legend(loc="upper right")
    styles = {
        "nothing": {"color": "tab:gray", "linestyle": "--"},
        "inputs": {"color": "tab:cyan"},
        "hidden units": {"color": "tab:blue", "linestyle": ":"},
        "both": {"color": "tab:blue"},
    }
    for name, of_seeds in curves.items():
        losses.loglog(np.arange(1, len(of_seeds[0]) + 1), of_seeds[0], label=name, **styles[name])
    losses.set(title="Digits, each network at its best rate", xlabel="steps", ylabel="training loss")
    losses.legend(loc="lower left", title="normalized", fontsize="small")
    return figure


def main(report: Report) -> None:
    """Two features; then hidden units."""
    x, targets = two_features(1000)
    found = conditions(report, x, targets[:, None])
    raw, normalized = found["as they come"], found["batch normalized"]
    report.claim(
        "Normalizing two badly scaled inputs lowers the condition number, and the steps of gradient descent at each "
        "one's best rate, by more than a factor of 10.",
        normalized[0] * 10 < raw[0] and normalized[1] * 10 < raw[1],
    )
    report.claim(
        "Batch normalization rounds what comes of scales and means, not what comes of correlation: only decorrelated "
        "inputs have condition number 1.",
        normalized[0] > 1.5 and abs(found["decorrelated too"][0] - 1) < 1e-6,
    )

    digits, labels = load_digits(return_X_y=True)
    rows = 300 if report.quick else 1000
    curves = hidden_units(report, digits[:rows], labels[:rows], 1 if report.quick else 3)
    steps = {name: [len(losses) for losses in of_seeds] for name, of_seeds in curves.items()}
    report.claim(
        "With the inputs normalized the network needs fewer steps, from every start.",
        max(steps["inputs"]) < min(steps["nothing"]),
    )
    report.claim(
        "With the hidden units normalized it needs fewer steps, from every start.",
        max(steps["hidden units"]) < min(steps["nothing"]),
    )
    report.claim(
        "With both it needs fewer steps than with the inputs alone, from every start.",
        max(steps["both"]) < min(steps["inputs"]), expected=None if report.quick else False,
    )  # fmt: skip
    report.picture(picture(paths(x, targets), curves))


if __name__ == "__main__":
    run(main)
