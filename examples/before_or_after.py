"""Where the normalization goes, and which bias it makes redundant.

Claims:

1. Batch normalization belongs before the nonlinearity, since Wu + b is "more likely to have a symmetric, non-sparse
   distribution" than the nonlinearity's output (Ioffe and Szegedy 2015, section 3.2). Others found that after it does
   as well or better (Mishkin, Sergievskiy and Matas 2017, "Systematic evaluation of convolution neural network advances
   on the ImageNet", section 3.2).
2. The bias of the layer before is redundant: the batch's mean takes it away, and beta does its work (section 3.2).

Protocol: MNIST, 3200 images to learn from, 800 to choose rates with, 1000 to test on; three hidden layers of 100 units,
Glorot's weights (He's for ReLU), plain SGD, batches of 60. Each network has the best of the same rates, chosen with one
seed on the 800 images, and is then trained from other seeds. For the second claim: two networks from the same weights,
on the same batches, one with the redundant biases and one without, in float32 and in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from _experiment import Report, run

from fastbn import nn
from fastbn.demo import BATCH, Images, load_images

Array = np.ndarray[Any, np.dtype[Any]]

WIDTHS = (100, 100, 100)
ACTIVATIONS: dict[str, type[nn.Layer]] = {"sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "ReLU": nn.ReLU}
PLACES = ("none", "before", "after")
RATES = (0.03, 0.1, 0.3, 1.0, 3.0)
EVERY = 25  # steps from one look at the test images to the next


# 1. Before or after.


def network(place: str, activation: str, seed: int) -> nn.Sequential:
    """The network with its BatchNorms before the activations, after them, or without."""
    rng, before = np.random.default_rng(seed), 28 * 28
    layers: list[nn.Layer] = []
    for width in WIDTHS:
        layers.append(nn.Linear(before, width, init="he" if activation == "ReLU" else "glorot", rng=rng))
        layers += [nn.BatchNorm(width)] if place == "before" else []
        layers.append(ACTIVATIONS[activation]())
        layers += [nn.BatchNorm(width)] if place == "after" else []
        before = width
    return nn.Sequential(*layers, nn.Linear(before, 10, init="glorot", rng=rng))


def batches(x: Array, labels: Array, steps: int, seed: int) -> Iterator[tuple[int, Array, Array]]:
    """So many shuffled batches, numbered from 1."""
    step, source = 0, nn.Batches(x, labels, BATCH, rng=seed)
    while True:
        for batch, batch_labels in source:
            if step == steps:
                return
            step += 1
            yield step, batch, batch_labels


def learn(model: nn.Sequential, images: Images, rate: float, steps: int, seed: int) -> Array:
    """Train, and give the accuracy on the images to test with at every look."""
    loss, optimizer, seen = nn.SoftmaxCrossEntropy(), nn.SGD(model, rate), []
    with np.errstate(all="ignore"):  # too high a rate overflows; such a network is then at chance, and not chosen
        for step, x, labels in batches(images.train, images.train_labels, steps, seed):
            loss(model.train()(x), labels)
            model.parameter_gradients(loss.backward())
            optimizer.step()
            if step % EVERY == 0:
                seen.append(nn.accuracy(model, images.test, images.test_labels))
    return np.array(seen)


def deviation(values: Array) -> float:
    """The sample's standard deviation over seeds; of one seed 0."""
    return float(values.std(ddof=min(1, len(values) - 1)))


def end(curve: Array) -> float:
    """The accuracy at the end of training, over the last four looks."""
    return float(curve[-4:].mean())


def shape(model: nn.Sequential, x: Array) -> tuple[float, float]:
    """Skewness, and the share of exact zeros, of what the BatchNorms are given: means over units and layers."""
    skews, zeros = [], []
    model.eval()
    for layer in model.layers:
        if isinstance(layer, nn.BatchNorm):
            deviation = x.std(axis=0, dtype=np.float64)
            lives = deviation > 1e-6  # a ReLU that is 0 for all images has no skewness
            standard = (x - x.mean(axis=0, dtype=np.float64))[:, lives] / deviation[lives]
            skews.append(np.abs((standard**3).mean(axis=0)).mean())
            zeros.append((x == 0).mean())
        x = layer(x)
    return float(np.mean(skews)), float(np.mean(zeros))


def places(report: Report, images: Images, choose: Images, steps: int, seeds: int) -> dict[tuple[str, str], Array]:
    """Train every network from so many seeds: curves of shape (seeds, looks)."""
    curves, rows, shapes = {}, [], []
    for activation in ACTIVATIONS:
        for place in PLACES:
            rates = (0.3,) if report.quick else RATES
            score = {rate: end(learn(network(place, activation, 0), choose, rate, steps, 100)) for rate in rates}
            best = max(rates, key=lambda rate, score=score: score[rate])  # type: ignore[misc]
            found = []
            for seed in range(1, seeds + 1):
                model = network(place, activation, seed)
                found.append(learn(model, images, best, steps, 100 + seed))
                if seed == 1 and place != "none":
                    shapes.append([activation, place, *(f"{number:.2f}" for number in shape(model, images.test))])
            curves[activation, place] = np.array(found)
            mean = curves[activation, place].mean(axis=0)
            reached = np.flatnonzero(mean >= 0.9)
            ends = np.array([end(curve) for curve in found])
            rows.append(
                [
                    activation,
                    place,
                    f"{best:g}",
                    EVERY * (reached[0] + 1) if len(reached) else "never",
                    f"{ends.mean():.3f} ± {deviation(ends):.3f}",
                ]
            )
    report.table(
        f"Test accuracy, {seeds} seed{'s' * (seeds > 1)}: mean and standard deviation after {steps} steps",
        ["activation", "BN", "rate", "steps to 0.9", "accuracy"],
        rows,
    )
    report.table(
        "What BN is given in the trained networks, over units and test images",
        ["activation", "BN", "skewness, absolute", "share of zeros"],
        shapes,
    )
    return curves


# 2. The bias.


class AsGiven(nn.Sequential):
    """Layers one after the other, just as given: nn.Sequential would take the Linears' biases before BatchNorms."""

    def __init__(self, *layers: nn.Layer) -> None:
        self.layers = list(layers)


def bias_or_not(bias: bool, beta: bool, dtype: Any, start: float = 0.0) -> AsGiven:
    """Two hidden layers of 50, BN before tanh; each with a bias or not, each BN with beta or not."""
    rng, layers, before = np.random.default_rng(0), [], 28 * 28
    for width in (50, 50):
        linear = nn.Linear(before, width, bias=bias, init="glorot", rng=rng, dtype=dtype)
        if linear.bias is not None:
            linear.bias += start
        layers += [linear, nn.BatchNorm(width, affine=True if beta else "weight", dtype=dtype), nn.Tanh()]
        before = width
    return AsGiven(*layers, nn.Linear(before, 10, init="glorot", rng=rng, dtype=dtype))


def twins(
    one: nn.Sequential, other: nn.Sequential, x: Array, labels: Array, steps: int
) -> tuple[Array, float, tuple[bool, bool]]:
    """Train two networks on the same batches.

    Returns
    -------
    differences : ndarray, shape (steps,)
        The greatest difference of the two's logits on each batch, over the greatest logit.
    pull : float
        The greatest gradient on the first one's first bias along training, over that on its first weight.
    equal : (bool, bool)
        Whether the first batch's logits, and the predictions for all of x at the end, are the same.
    """
    losses = nn.SoftmaxCrossEntropy(), nn.SoftmaxCrossEntropy()
    optimizers = nn.SGD(one, 0.1), nn.SGD(other, 0.1)
    differences, pull, equal = [], 0.0, True
    for step, batch, batch_labels in batches(x, labels, steps, 1):
        logits = one.train()(batch), other.train()(batch)
        differences.append(np.abs(logits[0] - logits[1]).max() / np.abs(logits[0]).max())
        if step == 1:
            equal = bool(np.array_equal(*logits))
        for model, loss, optimizer, y in zip((one, other), losses, optimizers, logits, strict=True):
            loss(y, batch_labels)
            model.parameter_gradients(loss.backward())
            optimizer.step()
        first = one.layers[0]
        if first.grad_bias is not None:
            pull = max(pull, float(np.abs(first.grad_bias).max() / np.abs(first.grad_weight).max()))
    same = np.array_equal(one.eval()(x).argmax(axis=1), other.eval()(x).argmax(axis=1))
    return np.array(differences), pull, (equal, same)


def biases(report: Report, images: Images, steps: int) -> dict[str, Array]:
    """With the redundant bias and without, and what differs."""
    x, labels = images.train, images.train_labels
    rows, lines = [], {}
    cases = {
        "bias (from 0), float32": (np.float32, (True, True, 0.0), (False, True, 0.0)),
        "bias (from 0), float64": (np.float64, (True, True, 0.0), (False, True, 0.0)),
        "bias from 3, float64": (np.float64, (True, True, 3.0), (False, True, 0.0)),
        "bias, no beta, float64": (np.float64, (True, False, 0.0), (False, False, 0.0)),
        "beta or not, float64": (np.float64, (False, True, 0.0), (False, False, 0.0)),
    }
    for name, (dtype, one, other) in cases.items():
        models = [bias_or_not(bias, beta, dtype, start) for bias, beta, start in (one, other)]
        differences, pull, (equal, same) = twins(models[0], models[1], x.astype(dtype), labels, steps)
        lines[name] = differences
        accuracies = [nn.accuracy(m, images.test.astype(dtype), images.test_labels) for m in models]
        rows.append(
            [
                name,
                "yes" if equal else "no",
                *(f"{differences[: steps // part].max():.0e}" for part in (10, 1)),
                f"{pull:.0e}" if one[0] else "",
                "yes" if same else "no",
                *(f"{accuracy:.3f}" for accuracy in accuracies),
            ]
        )
    report.table(
        f"A network with and one without a part, trained on the same batches for {steps} steps; differences of logits "
        "over the greatest logit",
        [
            "the part", "first step bit for bit", f"difference in {steps // 10} steps", f"in {steps}",
            "bias's gradient / weight's", "same predictions", "accuracy with", "without",
        ],
        rows,
    )  # fmt: skip
    return lines


def picture(curves: dict[tuple[str, str], Array], lines: dict[str, Array]) -> Any:
    """A panel for each activation, and one for the bias."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 8), layout="constrained")
    *panels, differences = figure.subplots(2, 2).ravel()
    styles = {
        "none": {"color": "tab:gray", "linestyle": "--", "label": "without BN"},
        "before": {"color": "tab:blue", "label": "BN before"},
        "after": {"color": "tab:orange", "label": "BN after"},
    }
    for axes, activation in zip(panels, ACTIVATIONS, strict=True):
        for place, style in styles.items():
            of_seeds = curves[activation, place]
            steps = EVERY * np.arange(1, of_seeds.shape[1] + 1)
            axes.plot(steps, of_seeds.mean(axis=0), **style)
            axes.fill_between(steps, of_seeds.min(axis=0), of_seeds.max(axis=0), alpha=0.15, color=style["color"],
                              linewidth=0)  # fmt: skip
        axes.set(title=f"{activation}, each at its best rate", xlabel="steps", ylabel="test accuracy", ylim=(0.7, 1))
        axes.legend(loc="lower right")
    for name, line in lines.items():
        differences.semilogy(np.arange(1, len(line) + 1), np.maximum(line, 1e-17), label=name)
    differences.set(title="Two networks, one without that part", xlabel="steps", ylabel="difference of the logits")
    differences.legend(loc="center right", fontsize="small")
    return figure


def main(report: Report) -> None:
    """Where BN goes; then the bias."""
    images = load_images()
    end_of_train = len(images.train) * 4 // 5
    train, labels = images.train[:end_of_train], images.train_labels[:end_of_train]
    choose = Images(images.name, train, labels, images.train[end_of_train:], images.train_labels[end_of_train:])
    images = Images(images.name, train, labels, images.test, images.test_labels)

    curves = places(report, images, choose, 100 if report.quick else 800, 1 if report.quick else 5)
    ends = {key: np.array([end(curve) for curve in of_seeds]) for key, of_seeds in curves.items()}
    lines = biases(report, images, 30 if report.quick else 300)
    for activation in ACTIVATIONS:
        # Seed by seed: both start from the same weights and see the same batches.
        gaps = ends[activation, "before"] - ends[activation, "after"]
        noise = deviation(gaps) / len(gaps) ** 0.5
        report.claim(
            f"{activation}: BN before the activation ends higher than after it (section 3.2); here by "
            f"{100 * gaps.mean():+.1f} ± {100 * noise:.1f} points.",
            gaps.mean() > 0, expected=None if report.quick or activation == "ReLU" else False,
        )  # fmt: skip
    report.claim(
        "Without the redundant bias the network learns the same: bit for bit at the first step, and in float64 to "
        "better than one part in a million along training (section 3.2).",
        lines["bias (from 0), float64"][0] == 0 and lines["bias (from 0), float64"].max() < 1e-6,
    )
    report.claim(
        "Where the bias starts makes no difference either: with 3 in place of 0 the logits are the same to one part "
        "in a million.",
        lines["bias from 3, float64"].max() < 1e-6,
    )
    report.claim(
        "The bias cannot stand in for beta: without beta too, a bias changes nothing.",
        lines["bias, no beta, float64"].max() < 1e-6 < lines["beta or not, float64"].max(),
    )
    report.picture(picture(curves, lines))


if __name__ == "__main__":
    run(main)
