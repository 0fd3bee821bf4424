"""Batch normalization makes training faster (Ioffe and Szegedy 2015, "Batch Normalization: Accelerating Deep Network
Training by Reducing Internal Covariate Shift", arXiv 1502.03167, sections 4.1 and 4.2).

Their claims, each tried here on a network small enough for a CPU:

1. Section 4.1, figure 1: a sigmoid network of 3×100 units on MNIST learns in fewer steps and ends higher; the
   distribution of a unit's input moves less along training.
2. Section 4.2.2, figures 2 and 3: learning rates 5 and 30 times those of the plain network train the normalized one,
   in fewer steps still (14 times fewer at ×5 for Inception), while the plain one fails at ×5 already.
3. Section 4.2.2: with batch normalization, networks with saturating activations (sigmoids) can be deep.
4. Section 4.2.1: dropout is needed less.

Protocol: 3200 images of MNIST to learn from, 800 to choose the plain network's learning rate with, 1000 to test on.
Plain SGD, batches of 60. In each comparison both networks start from the same weights and see the images in the same
order. Nothing is tuned for the network with batch normalization: its rates are multiples of the plain one's best. Three
seeds; five for dropout. The sigmoid network is also tried from larger weights, which suit the plain one better.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from _experiment import Report, run

from fastbn import nn
from fastbn.demo import BATCH, HIDDEN, PERCENTILES, STD, UNIT, Images, load_images

Array = np.ndarray[Any, np.dtype[Any]]

EVERY = 25  # steps from one look at the test images to the next
CHANCE = 0.1  # ten digits


@dataclass(frozen=True)
class Net:
    """A network, with or without batch normalization, and the rates to choose the plain one's from."""

    name: str
    widths: tuple[int, ...]
    activation: type[nn.Layer]
    init: str | float
    rates: tuple[float, ...]
    multiples: tuple[int, ...]  # of the best of them
    steps: int


# The paper's, with its "small random Gaussian values". And a deeper one with ReLU, as Inception has, started as is
# usual for ReLU, in which nothing is set up against the plain network.
SIGMOID = Net("3×100 sigmoid", HIDDEN, nn.Sigmoid, STD, (2, 3, 4, 5), (1, 5, 30), 3000)
LARGER = replace(SIGMOID, name="From larger weights (deviation 0.1): 3×100 sigmoid", init=0.1, rates=(1, 2, 3),
                 multiples=(1, 5), steps=2000)  # fmt: skip
RELU = Net("6×100 ReLU", (100,) * 6, nn.ReLU, "he", (0.1, 0.2, 0.4), (1, 5, 10, 30, 60), 1000)


@dataclass
class Run:
    """What was seen of a network along its training."""

    steps: list[int] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)  # on the test images
    inputs: list[Array] = field(default_factory=list)  # percentiles of the last sigmoids' inputs, (3, units) each
    chosen_by: float = 0.0  # accuracy on the images to choose with, at the end


def network(
    widths: Sequence[int],
    activation: type[nn.Layer],
    init: str | float,
    *,
    batch_norm: bool,
    seed: int,
    dropout: float = 0.0,
) -> nn.Sequential:
    """From pixels to logits. Weights are drawn in the same order with and without batch normalization."""
    rng, noise = np.random.default_rng(seed), np.random.default_rng([seed, 1])  # noise: every dropout's mask is its own
    layers: list[nn.Layer] = []
    before = 28 * 28
    for width in widths:
        layers.append(nn.Linear(before, width, init=init, rng=rng))
        if batch_norm:  # before the nonlinearity (section 3.2); the Linear's bias is dropped, beta does its work
            layers.append(nn.BatchNorm(width))
        layers.append(activation())
        if dropout:
            layers.append(nn.Dropout(dropout, rng=noise))
        before = width
    return nn.Sequential(*layers, nn.Linear(before, 10, init=init, rng=rng))


def split(images: Images) -> tuple[Images, Images]:
    """Without a fifth of the images to learn from; and with that fifth to test on."""
    end = len(images.train) * 4 // 5
    train, labels = images.train[:end], images.train_labels[:end]
    choose = Images(images.name, train, labels, images.train[end:], images.train_labels[end:])
    return Images(images.name, train, labels, images.test, images.test_labels), choose


def learn(
    model: nn.Sequential, images: Images, rate: float, steps: int, *, seed: int, choose: Images | None = None,
    watch: bool = False,
) -> Run:  # fmt: skip
    """Train by plain SGD. A run whose loss is no longer finite is given up, and stays at chance."""
    seen, loss, optimizer = Run(), nn.SoftmaxCrossEntropy(), nn.SGD(model, rate)
    batches = nn.Batches(images.train, images.train_labels, BATCH, rng=seed)
    alive, step = True, 0
    with np.errstate(all="ignore"):  # what diverges overflows: that is what we want to see, not to be warned of
        while step < steps:
            for x, labels in batches:
                step += 1
                if alive:
                    alive = bool(np.isfinite(loss(model.train()(x), labels)))
                if alive:
                    model.parameter_gradients(loss.backward())
                    optimizer.step()
                if step % EVERY == 0:
                    seen.steps.append(step)
                    seen.accuracy.append(
                        nn.accuracy(model, images.test, images.test_labels) if alive else CHANCE,
                    )
                    if watch:
                        seen.inputs.append(percentiles(model, images.test))
                if step == steps:
                    break
        if choose is not None:
            seen.chosen_by = nn.accuracy(model, choose.test, choose.test_labels) if alive else CHANCE
    return seen


def percentiles(model: nn.Sequential, x: Array) -> Array:
    """Of each last hidden unit's input, over the images."""
    sigmoid = [layer for layer in model.layers if isinstance(layer, nn.Sigmoid)][-1]
    model.eval()
    for layer in model.layers:
        if layer is sigmoid:
            break
        x = layer(x)
    return np.percentile(x, PERCENTILES, axis=0)


def steadiness(inputs: list[Array]) -> tuple[float, float]:
    """How much the units' inputs move along training, as medians over the units.

    The distance that the median wanders, over the width of the distribution (85th - 15th percentile) at the end; and
    the greatest width over the least.
    """
    low, middle, high = np.moveaxis(np.array(inputs), 1, 0)  # (looks, units) each
    width = high - low
    wander = (middle.max(axis=0) - middle.min(axis=0)) / width[-1]
    return float(np.median(wander)), float(np.median(width.max(axis=0) / width.min(axis=0)))


def mean_curve(runs: Sequence[Run]) -> Array:
    """The accuracy along the steps, averaged over seeds: one run's wavers by a percent from look to look."""
    return np.mean([seen.accuracy for seen in runs], axis=0)


def first(curve: Array, goal: float) -> int | None:
    """The first step seen with at least this accuracy."""
    reached = np.flatnonzero(curve >= goal)
    return int(EVERY * (reached[0] + 1)) if len(reached) else None


def deviation(values: Array) -> Array:
    """The sample's standard deviation over seeds, the last axis; of one seed 0."""
    return values.std(axis=-1, ddof=min(1, values.shape[-1] - 1))


def end(curve: Array) -> float:
    """The accuracy at the end of training, over the last four looks."""
    return float(curve[-4:].mean())


@dataclass
class Sweep:
    """One net's runs: the plain one's to choose a rate, and both at multiples of that rate."""

    net: Net
    best: float
    runs: dict[tuple[bool, float], list[Run]]  # (batch norm?, rate) → one for each seed

    def curve(self, batch_norm: bool, multiple: float) -> Array:
        """The mean curve at so many times the plain network's best rate."""
        return mean_curve(self.runs[batch_norm, self.best * multiple])

    @property
    def goal(self) -> float:
        """The highest accuracy of the plain network at its best rate, as the paper's 72.2% is Inception's."""
        return float(self.curve(False, 1).max())


def sweep(net: Net, images: Images, choose: Images, seeds: int, *, watch: bool = False) -> Sweep:
    """Choose the plain network's rate; then train both at multiples of it."""

    def runs(batch_norm: bool, rate: float) -> list[Run]:
        return [
            learn(
                network(net.widths, net.activation, net.init, batch_norm=batch_norm, seed=seed), images, rate,
                net.steps, seed=100 + seed, choose=choose, watch=watch and not seed,
            )
            for seed in range(seeds)
        ]  # fmt: skip

    found = {(False, rate): runs(False, rate) for rate in net.rates}
    best = max(net.rates, key=lambda rate: np.mean([seen.chosen_by for seen in found[False, rate]]))
    for multiple in net.multiples:
        for batch_norm in (False, True):
            if (batch_norm, best * multiple) not in found:
                found[batch_norm, best * multiple] = runs(batch_norm, best * multiple)
    return Sweep(net, best, found)


def tell_sweep(report: Report, result: Sweep, seeds: int) -> None:
    """A table of one net's rates: steps to the plain network's best accuracy, and where each ends."""
    net, goal = result.net, result.goal
    own = first(result.curve(False, 1), goal)
    assert own is not None  # it is that curve's maximum
    rows = []
    for batch_norm, rate in sorted(result.runs):
        curve = mean_curve(result.runs[batch_norm, rate])
        steps = first(curve, goal)
        rows.append(
            [
                f"{'with' if batch_norm else 'without'} BN",
                f"{rate:g}",
                f"{rate / result.best:.2g}",
                first(curve, 0.9) or "never",
                steps or "never",
                f"{own / steps:.1f}" if steps else "",
                f"{end(curve):.3f}",
            ]
        )
    report.table(
        f"{net.name} units; test accuracy averaged over {seeds} seed{'s' * (seeds > 1)}; the goal is the plain "
        f"network's highest, {goal:.3f}",
        ["network", "rate", "multiple", "steps to 0.9", "steps to the goal", "times fewer", "accuracy at the end"],
        rows,
    )


def deep_sigmoid(
    report: Report, images: Images, steps: int, seeds: int, rates: Sequence[float]
) -> dict[tuple[bool, float], Array]:
    """Eight sigmoid layers at rates over three decades, from Glorot's weights, the initialization made for sigmoids.

    Returns the accuracies at the end, of shape (seeds,).
    """

    def accuracy(batch_norm: bool, rate: float, seed: int) -> float:
        model = network((100,) * 8, nn.Sigmoid, "glorot", batch_norm=batch_norm, seed=seed)
        return learn(model, images, rate, steps, seed=100 + seed).accuracy[-1]

    found = {
        (batch_norm, rate): np.array([accuracy(batch_norm, rate, seed) for seed in range(seeds)])
        for rate in rates
        for batch_norm in (False, True)
    }
    report.table(
        f"8×100 sigmoid units, test accuracy after {steps} steps: least to greatest of {seeds} "
        f"seed{'s' * (seeds > 1)}",
        ["rate", "without BN", "with BN"],
        [[f"{rate:g}", *(f"{found[bn, rate].min():.3f} to {found[bn, rate].max():.3f}" for bn in (False, True))]
         for rate in rates],
    )  # fmt: skip
    return found


def dropout(report: Report, images: Images, steps: int, seeds: int, shares: Sequence[float]) -> dict[bool, Array]:
    """Two layers of 128 ReLUs with dropout and without: accuracies of shape (shares, seeds)."""

    def accuracy(batch_norm: bool, share: float, seed: int) -> float:
        model = network((128, 128), nn.ReLU, "he", batch_norm=batch_norm, seed=seed, dropout=share)
        return end(np.array(learn(model, images, 0.1, steps, seed=100 + seed).accuracy))

    found = {
        batch_norm: np.array([[accuracy(batch_norm, share, seed) for seed in range(seeds)] for share in shares])
        for batch_norm in (False, True)
    }
    report.table(
        f"2×128 ReLU units, rate 0.1, test accuracy after {steps} steps: mean and standard deviation of {seeds} "
        f"seed{'s' * (seeds > 1)}",
        ["network", *(f"dropout {share:g}" for share in shares)],
        [
            [
                f"{'with' if batch_norm else 'without'} BN",
                *(f"{of_share.mean():.3f} ± {deviation(of_share):.3f}" for of_share in found[batch_norm]),
            ]
            for batch_norm in (False, True)
        ],
    )
    return found


def picture(
    sigmoid: Sweep, relu: Sweep, deep: dict[tuple[bool, float], Array], shares: Sequence[float], drop: dict[bool, Array]
) -> Any:
    """Six panels, one for each thing seen."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 8), layout="constrained")
    (curves, *inputs), (rates, depth, dropped) = figure.subplots(2, 3)
    inputs[1].sharey(inputs[0])
    plain, normalized = {"color": "tab:gray", "linestyle": "--"}, {"color": "tab:blue"}

    steps = np.arange(1, len(sigmoid.curve(False, 1)) + 1) * EVERY
    curves.plot(steps, sigmoid.curve(False, 1), label="without BN", **plain)
    curves.plot(steps, sigmoid.curve(True, 1), label="with BN, same rate", **normalized)
    curves.plot(steps, sigmoid.curve(True, 5), color="tab:blue", alpha=0.5, linestyle=":", label="with BN, rate ×5")
    curves.set(title="3×100 sigmoid units", xlabel="steps", ylabel="test accuracy", ylim=(0, 1))
    curves.legend(loc="lower right")
    for axes, batch_norm, color in zip(inputs, (False, True), ("tab:gray", "tab:blue"), strict=True):
        seen = sigmoid.runs[batch_norm, sigmoid.best][0]
        low, middle, high = np.array(seen.inputs)[:, :, UNIT].T
        axes.fill_between(seen.steps, low, high, color=color, alpha=0.25, linewidth=0, label="15th to 85th percentile")
        axes.plot(seen.steps, middle, color=color, label="median")
        axes.set(
            title=f"Input of one sigmoid, {'with' if batch_norm else 'without'} BN", xlabel="steps", ylabel="input"
        )
    inputs[0].legend(loc="upper right")

    for batch_norm, style in ((False, plain), (True, normalized)):
        name = f"{'with' if batch_norm else 'without'} BN"
        tried = sorted(rate for of, rate in relu.runs if of == batch_norm)
        ends = [end(mean_curve(relu.runs[batch_norm, rate])) for rate in tried]
        rates.semilogx(tried, ends, marker="o", label=name, **style)
        tried = sorted({rate for _, rate in deep})
        depth.semilogx(tried, [deep[batch_norm, rate].mean() for rate in tried], marker="o", label=name, **style)
        mean, spread = drop[batch_norm].mean(axis=1), deviation(drop[batch_norm])
        dropped.errorbar(shares, mean, spread, marker="o", capsize=4, label=name, **style)
    for multiple in (1, 5, 30):
        rates.axvline(relu.best * multiple, color="black", linewidth=0.5)
        rates.text(relu.best * multiple, 1.01, f"×{multiple}", ha="center", va="bottom", fontsize="small")
    rates.set_title("6×100 ReLU units", pad=16)
    rates.set(xlabel="learning rate", ylabel="test accuracy at the end", ylim=(0, 1))
    depth.set(title="8×100 sigmoid units", xlabel="learning rate", ylabel="test accuracy at the end", ylim=(0, 1))
    dropped.set(title="2×128 ReLU units", xlabel="dropout", ylabel="test accuracy at the end", xticks=shares)
    for axes in (rates, depth, dropped):
        axes.legend(loc="best")
    return figure


def small_network(report: Report, result: Sweep, seeds: int) -> None:
    """Claims about the paper's own network, and about its figure 1."""
    tell_sweep(report, result, seeds)
    plain, normalized = result.curve(False, 1), result.curve(True, 1)
    own, sooner = first(plain, 0.8), first(normalized, 0.8)
    report.claim(
        "The sigmoid network with BN is at an accuracy of 0.8 in less than half the steps, at the rate that is best "
        "for the plain one (section 4.1).",
        sooner is not None and (own is None or 2 * sooner < own),
    )
    report.claim("At that rate it ends higher (section 4.1).", end(normalized) > end(plain))
    report.claim(
        "At 5 times the rate the sigmoid network with BN learns and the plain one does not (section 4.2.2).",
        end(result.curve(True, 5)) > 0.8 and end(result.curve(False, 5)) < 0.3,
    )
    steady = {bn: steadiness(result.runs[bn, result.best][0].inputs) for bn in (False, True)}
    report.table(
        "Inputs of the 100 sigmoids of the last hidden layer along training, medians over the sigmoids, first seed",
        ["network", "wandering of the median / final width", "greatest width / least"],
        [[f"{'with' if bn else 'without'} BN", *(f"{number:.2f}" for number in steady[bn])] for bn in (False, True)],
    )
    report.claim(
        "The inputs' distribution is steadier with BN, in its width and in its median (section 4.1, figure 1).",
        steady[True][0] < steady[False][0] and steady[True][1] < steady[False][1],
    )


def from_larger_weights(report: Report, result: Sweep, seeds: int) -> None:
    """What becomes of the first claim when the plain network has an easier start."""
    tell_sweep(report, result, seeds)
    plain, normalized = result.curve(False, 1), result.curve(True, 1)
    for goal, expected in ((0.8, True), (0.9, False)):
        own, sooner = first(plain, goal), first(normalized, goal)
        report.claim(
            f"From larger weights, too, the network with BN is at an accuracy of {goal:g} in less than half the steps, "
            f"at the plain one's best rate (here {sooner or 'never'} with BN, {own or 'never'} without).",
            sooner is not None and (own is None or 2 * sooner < own), expected=expected,
        )  # fmt: skip
    report.claim(
        "From larger weights, too, the network with BN ends higher, at that rate or at 5 times as much.",
        max(end(normalized), end(result.curve(True, 5))) > end(plain), expected=None,
    )  # fmt: skip


def deeper_network(report: Report, result: Sweep, seeds: int) -> None:
    """How high a rate the ReLU networks bear."""
    tell_sweep(report, result, seeds)
    report.claim(
        "At 5 times the rate the plain ReLU network does not learn (section 4.2.2).",
        end(result.curve(False, 5)) < 0.3, expected=None,  # which rate is chosen hangs on a few images
    )  # fmt: skip
    report.claim(
        "At 10 times the rate the ReLU network with BN learns and the plain one does not.",
        end(result.curve(True, 10)) > 0.8 and end(result.curve(False, 10)) < 0.3,
    )


def high_rates(report: Report, result: Sweep, *, higher: bool | None) -> None:
    """The two figures of the paper that are about Inception."""
    best, goal = result.curve(False, 1), result.goal
    curve = result.curve(True, 30)
    report.claim(
        f"{result.net.name}: at 30 times the rate the network with BN learns, and ends higher than at 5 times "
        "(section 4.2.2).",
        end(curve) > end(result.curve(True, 5)), expected=higher,
    )  # fmt: skip
    own, others = first(best, goal), [first(result.curve(True, multiple), goal) for multiple in result.net.multiples]
    assert own is not None  # it is that curve's maximum
    ratio = max((own / steps for steps in others if steps), default=0.0)
    report.claim(
        f"{result.net.name}: the network with BN needs 14 times fewer steps than the plain one (section 4.2.2); here "
        f"at most {ratio:.1f} times.",
        ratio >= 14, expected=False,
    )  # fmt: skip


def main(report: Report) -> None:
    """Try the four claims."""
    images, choose = split(load_images())
    quick, seeds, sigmoid, relu = report.quick, 3, SIGMOID, RELU
    if quick:  # the rates that a full run chooses, and as many steps as show something
        seeds = 1
        sigmoid = replace(sigmoid, rates=(3,), multiples=(1, 5), steps=400)
        relu = replace(relu, rates=(0.1,), multiples=(1, 5, 10), steps=200)

    small = sweep(sigmoid, images, choose, seeds, watch=True)
    small_network(report, small, seeds)
    if not quick:
        from_larger_weights(report, sweep(LARGER, images, choose, seeds), seeds)
    deeper = sweep(relu, images, choose, seeds)
    deeper_network(report, deeper, seeds)
    if not quick:
        high_rates(report, small, higher=False)
        high_rates(report, deeper, higher=None)

    rates = (0.1, 1) if quick else (0.01, 0.1, 0.3, 1, 3, 10)
    deep = deep_sigmoid(report, images, 100 if quick else 800, seeds, rates)
    report.claim(
        "Eight sigmoid layers do not train without BN at any rate tried, from any seed, and do with BN at some, from "
        "every seed (section 4.2.2).",
        max(seen.max() for (bn, _), seen in deep.items() if not bn) < 0.2
        and max(seen.min() for (bn, _), seen in deep.items() if bn) > (0.6 if quick else 0.8),
    )

    shares = (0.0, 0.5) if quick else (0.0, 0.2, 0.5)
    drop = dropout(report, images, 50 if quick else 1200, 1 if quick else 5, shares)
    # The gain of the better of the dropouts, seed by seed: its mean, and the mean's standard error.
    gains = {bn: drop[bn][1 + int(drop[bn][1:].mean(axis=1).argmax())] - drop[bn][0] for bn in (False, True)}
    with_bn, without = (
        f"{100 * of.mean():+.1f} ± {100 * deviation(of) / len(of) ** 0.5:.1f}" for of in (gains[True], gains[False])
    )
    report.claim(
        f"The better dropout adds less with BN (here {with_bn} points) than without ({without}) (section 4.2.1).",
        gains[True].mean() < gains[False].mean(), expected=None if quick else True,
    )  # fmt: skip
    report.claim(
        "With BN and no dropout the network is at least as accurate as with dropout and no BN.",
        drop[True][0].mean() >= drop[False].mean(axis=1).max(), expected=None,
    )  # fmt: skip
    report.picture(picture(small, deeper, deep, shares, drop))


if __name__ == "__main__":
    run(main)
