"""Batch statistics against running statistics: what a batch-normalized network uses in training and in use.

In training, BN normalizes by the mean and variance of the batch; in use, by averages of them over many batches (Ioffe
and Szegedy 2015, section 3.1 and Algorithm 2). Libraries keep a running average, which each training step updates:
running ← (1 - m)·running + m·batch, where m is the momentum (torch's name for it; the larger, the faster it forgets).

Claims:

1. In use, batch statistics make an image's prediction depend on the images beside it, and fail on small batches and on
   batches that are unlike the training data; running statistics do not (section 3.1; Wu and Johnson 2021, "Rethinking
   'Batch' in BatchNorm", sections 3 and 5).
2. The running estimate has two errors. Noise: where the weights stand still, the mean of a batch of B values has
   variance σ²/B, and the running one m/(2 - m) of that: smaller momentum and larger batches are better. Lag: while the
   weights move, the estimate is of weights as they were some 1/m steps ago: larger momentum is better.
3. A pass over the training data with the weights as they are ("precise" statistics, `nn.update_bn`) has neither (Wu and
   Johnson 2021, section 3).

Protocol: MNIST, 4000 images to learn from, 1000 to test on; three hidden layers of 100 ReLUs, BN before each, plain SGD
at rate 0.3, batches of 60. Several estimates with their momenta are kept along one and the same training, so that
nothing else differs. What they should be: the statistics of all 4000 images, with the weights as they are at the end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from _experiment import Report, run

from fastbn import nn
from fastbn.demo import BATCH, Images, load_images

Array = np.ndarray[Any, np.dtype[Any]]

WIDTH, DEPTH, RATE = 100, 3, 0.3


def network(seed: int) -> nn.Sequential:
    """Linear, BN, ReLU, three times, and a Linear."""
    rng, before = np.random.default_rng(seed), 28 * 28
    layers: list[nn.Layer] = []
    for _ in range(DEPTH):
        layers += [nn.Linear(before, WIDTH, rng=rng), nn.BatchNorm(WIDTH), nn.ReLU()]
        before = WIDTH
    return nn.Sequential(*layers, nn.Linear(before, 10, rng=rng))


def norms(model: nn.Sequential) -> list[nn.BatchNorm]:
    """Its BatchNorms."""
    return [layer for layer in model.layers if isinstance(layer, nn.BatchNorm)]


def batches(images: Images, size: int, steps: int, seed: int) -> Iterator[tuple[Array, Array]]:
    """So many shuffled batches."""
    source, step = nn.Batches(images.train, images.train_labels, size, rng=seed), 0
    while True:
        for batch in source:
            if step == steps:
                return
            step += 1
            yield batch


def statistics(model: nn.Sequential) -> list[tuple[Array, Array]]:
    """Copies of the running means and variances, layer by layer."""
    return [(np.array(bn.running_mean), np.array(bn.running_var)) for bn in norms(model)]


def put(model: nn.Sequential, given: list[tuple[Array, Array]]) -> None:
    """Set the running means and variances."""
    for bn, (mean, var) in zip(norms(model), given, strict=True):
        bn.running_mean[...], bn.running_var[...] = mean, var


def exact(model: nn.Sequential, x: Array) -> list[tuple[Array, Array]]:
    """The statistics of all of x with the weights as they are: all of it in one batch."""
    before = statistics(model)
    nn.update_bn(model, x, batch_size=len(x))
    found = statistics(model)
    put(model, before)
    return found


def error(found: list[tuple[Array, Array]], true: list[tuple[Array, Array]], layer: int) -> tuple[float, float]:
    """Of one layer's estimate: that of the means, in true deviations; that of the deviations, as a share. RMS."""
    (mean, var), (true_mean, true_var) = found[layer], true[layer]
    lives = true_var > 1e-6  # leave out units that give the same for all images
    of_means = (mean - true_mean)[lives] / np.sqrt(true_var[lives])
    of_deviations = np.sqrt(var[lives] / true_var[lives]) - 1
    return float(np.sqrt(np.mean(of_means**2))), float(np.sqrt(np.mean(of_deviations**2)))


class Estimates:
    """Running statistics of several momenta, kept beside a training that itself needs none."""

    def __init__(self, momenta: Sequence[float]) -> None:
        ones = [(np.zeros(WIDTH), np.ones(WIDTH)) for _ in range(DEPTH)]
        self.of = {momentum: [(mean.copy(), var.copy()) for mean, var in ones] for momentum in momenta}

    def update(self, model: nn.Sequential) -> None:
        """Take in the last batch. The model's own momentum is 1: its running statistics are that batch's."""
        for momentum, estimate in self.of.items():
            for bn, (mean, var) in zip(norms(model), estimate, strict=True):
                mean += momentum * (bn.running_mean - mean)
                var += momentum * (bn.running_var - var)


def train(images: Images, steps: int, momenta: Sequence[float], seed: int) -> tuple[nn.Sequential, Estimates]:
    """The trained network, and the estimates at the end."""
    model, loss, estimates = network(seed), nn.SoftmaxCrossEntropy(), Estimates(momenta)
    for bn in norms(model):
        bn.momentum = 1.0
    optimizer = nn.SGD(model, RATE)
    for x, labels in batches(images, BATCH, steps, seed):
        loss(model.train()(x), labels)
        model.parameter_gradients(loss.backward())
        optimizer.step()
        estimates.update(model)
    return model, estimates


def watch(model: nn.Sequential, images: Images, steps: int, momenta: Sequence[float], seed: int) -> Estimates:
    """The estimates after so many batches of a network that stands still, from true statistics on: noise alone."""
    estimates, true = Estimates(momenta), exact(model, images.train)
    for estimate in estimates.of.values():
        for (mean, var), (true_mean, true_var) in zip(estimate, true, strict=True):
            mean[...], var[...] = true_mean, true_var
    for x, _ in batches(images, BATCH, steps, seed):
        model.train()(x)
        estimates.update(model)
    return estimates


# 1. In use.


def by_batch(model: nn.Sequential, x: Array, size: int, order: Array) -> Array:
    """Predictions by batch statistics, in batches of so many images, in the order given."""
    predictions = np.empty(len(x), np.intp)
    before = statistics(model)
    model.train()
    for start in range(0, len(x), size):
        rows = order[start : start + size]
        # fastbn refuses to train on one value a channel: its variance is 0 and its output beta, whatever it is. Twice
        # the same row gives just that.
        batch = x[np.repeat(rows, 2)] if len(rows) == 1 else x[rows]
        predictions[rows] = model(batch)[: len(rows)].argmax(axis=1)
    put(model, before)
    model.eval()
    return predictions


def in_use(report: Report, model: nn.Sequential, images: Images, sizes: Sequence[int]) -> tuple[Array, Array, float]:
    """Accuracy by batch size, for shuffled batches and for batches of one digit each."""
    x, labels, rng = images.test, images.test_labels, np.random.default_rng(3)
    by_running = model.eval()(x).argmax(axis=1)
    orders = [rng.permutation(len(x)) for _ in range(2)]
    sorted_order = orders[0][np.argsort(labels[orders[0]], kind="stable")]
    rows, shuffled, alike = [], [], []
    for size in sizes:
        one, other = (by_batch(model, x, size, order) for order in orders)
        of_one_digit = by_batch(model, x, size, sorted_order)
        shuffled.append(float(np.mean(one == labels)))
        alike.append(float(np.mean(of_one_digit == labels)))
        rows.append(
            [size, f"{shuffled[-1]:.3f}", f"{alike[-1]:.3f}", f"{np.mean(one != other):.1%}", len(np.unique(one))]
        )
    running = float(np.mean(by_running == labels))
    rows.append(["running statistics", *([f"{running:.3f}"] * 2), "0.0%", len(np.unique(by_running))])
    report.table(
        "Test accuracy by the statistics used",
        ["images in a batch", "shuffled", "sorted by digit", "predictions that change with the company", "digits seen"],
        rows,
    )
    return np.array(shuffled), np.array(alike), running


# 2. The running estimate.


def by_momentum(
    report: Report, images: Images, steps: int, momenta: Sequence[float], seeds: int
) -> tuple[dict[str, Array], nn.Sequential, Estimates]:
    """Errors while training and standing still, and the accuracy that follows; the last network and its estimates."""
    moving, still, accuracy = (np.zeros((seeds, len(momenta))) for _ in range(3))
    precise = np.zeros(seeds)
    for seed in range(seeds):
        model, estimates = train(images, steps, momenta, seed)
        true = exact(model, images.train)
        noise = watch(model, images, min(steps, 300), momenta, 100 + seed)
        for i, momentum in enumerate(momenta):
            moving[seed, i], _ = error(estimates.of[momentum], true, 0)
            still[seed, i], _ = error(noise.of[momentum], true, 0)
            put(model, estimates.of[momentum])
            accuracy[seed, i] = nn.accuracy(model, images.test, images.test_labels)
        nn.update_bn(model, images.train)
        precise[seed] = nn.accuracy(model, images.test, images.test_labels)
    theory = np.array([(momentum / (2 - momentum) / BATCH) ** 0.5 for momentum in momenta])
    rows = [
        [f"{momentum:g}", *(f"{number:.3f}" for number in (*numbers, accuracy[:, i].mean(), accuracy[:, i].min()))]
        for i, (momentum, *numbers) in enumerate(zip(momenta, theory, still.mean(0), moving.mean(0), strict=True))
    ]
    rows.append(["update_bn", "", "", "", f"{precise.mean():.3f}", f"{precise.min():.3f}"])
    report.table(
        f"The running means of the first BatchNorm after {steps} steps in batches of {BATCH}, {seeds} "
        f"seed{'s' * (seeds > 1)}: RMS error in deviations; and the network's test accuracy with those statistics",
        ["momentum", "√(m/(2-m)/B)", "weights still", "weights moving", "accuracy", "lowest"],
        rows,
    )
    found = {"theory": theory, "still": still.mean(0), "moving": moving.mean(0), "accuracy": accuracy.mean(0)}
    return found | {"precise": precise}, model, estimates


def by_size(report: Report, model: nn.Sequential, images: Images, sizes: Sequence[int]) -> dict[str, Array]:
    """Averages over the whole of the training data, in batches of one size: what is left is the estimate's bias."""
    rows, ratios = [], {"unbiased": [], "population": [], "third": []}
    true = exact(model, images.train)
    for size in sizes:
        found = {}
        for unbiased in (True, False):
            for bn in norms(model):
                bn.unbiased = unbiased
            nn.update_bn(model, images.train, batch_size=size)
            found[unbiased] = statistics(model)
            for bn in norms(model):
                bn.unbiased = True
        lives = true[0][1] > 1e-6
        ratios["unbiased"].append(float(np.mean((found[True][0][1] / true[0][1])[lives])))
        ratios["population"].append(float(np.mean((found[False][0][1] / true[0][1])[lives])))
        lives = true[-1][1] > 1e-6
        ratios["third"].append(float(np.mean((found[True][-1][1] / true[-1][1])[lives])))
        put(model, found[True])
        rows.append(
            [
                size,
                f"{1 - 1 / size:.3f}",
                *(f"{ratios[name][-1]:.3f}" for name in ratios),
                *(f"{number:.3f}" for number in error(found[True], true, DEPTH - 1)),
                f"{nn.accuracy(model, images.test, images.test_labels):.3f}",
            ]
        )
    put(model, true)
    report.table(
        "update_bn by batch size: the running variance over the true one (mean over units), and what is left of error "
        "in the third BatchNorm",
        [
            "images in a batch", "(B-1)/B", "1st BN, unbiased", "1st BN, unbiased=False", "3rd BN, unbiased",
            "3rd BN: error of means", "of deviations", "accuracy",
        ],
        rows,
    )  # fmt: skip
    return {name: np.array(numbers) for name, numbers in ratios.items()}


def cure(report: Report, images: Images, model: nn.Sequential, estimates: Estimates) -> dict[str, tuple[float, float]]:
    """The errors in every layer before update_bn and after it, beside torch's momentum."""
    true, rows, found = exact(model, images.train), [], {}
    cases = {f"momentum {momentum:g}": estimate for momentum, estimate in estimates.of.items()}
    nn.update_bn(model, images.train, batch_size=500)
    cases["update_bn, batches of 500"] = statistics(model)
    for name, estimate in cases.items():
        errors = [error(estimate, true, layer) for layer in range(DEPTH)]
        found[name] = errors[-1]
        rows.append([name, *(f"{number:.3f}" for pair in errors for number in pair)])
    header = [f"{place} BN: {what}" for place in ("1st", "2nd", "3rd") for what in ("means", "deviations")]
    report.table("RMS errors of the running statistics at the end of training", ["estimate", *header], rows)
    return found


def picture(
    sizes: Sequence[int], shuffled: Array, alike: Array, running: float, momenta: Sequence[float],
    errors: dict[str, Array],
) -> Any:  # fmt: skip
    """Accuracy against batch size; error and accuracy against momentum."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    use, estimate, accuracy = figure.subplots(1, 3)
    use.semilogx(sizes, shuffled, "o--", color="tab:gray", label="batch statistics, shuffled")
    use.semilogx(sizes, alike, "s:", color="tab:red", label="batch statistics, sorted by digit")
    use.axhline(running, color="tab:blue", label="running statistics")
    use.set(title="In use", xlabel="images in a batch", ylabel="test accuracy", ylim=(0, 1))
    use.legend(loc="center right")
    estimate.loglog(momenta, errors["theory"], color="black", linewidth=0.8, label="noise in theory")
    estimate.loglog(momenta, errors["still"], "s", color="tab:cyan", label="weights still: noise")
    estimate.loglog(momenta, errors["moving"], "o-", color="tab:blue", label="weights moving: noise and lag")
    estimate.set(title="Error of the running means", xlabel="momentum", ylabel="RMS error, in deviations")
    estimate.legend(loc="best")
    accuracy.semilogx(momenta, errors["accuracy"], "o-", color="tab:blue", label="running statistics")
    accuracy.axhline(errors["precise"].mean(), color="tab:green", label="after update_bn")
    accuracy.set(title="Accuracy with those statistics", xlabel="momentum", ylabel="test accuracy")
    accuracy.legend(loc="best")
    return figure


def main(report: Report) -> None:
    """In use; the estimate; the cure."""
    images, quick = load_images(), report.quick
    steps, seeds = (150, 1) if quick else (1000, 5)
    momenta = (0.01, 0.1, 1.0) if quick else (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    errors, model, estimates = by_momentum(report, images, steps, momenta, seeds)
    low, usual, high = 0, momenta.index(0.1), len(momenta) - 1
    report.claim(
        "With the weights still, the running means are the noisier the larger the momentum, as √(m/(2 - m)/B).",
        bool(np.all(np.diff(errors["still"]) > 0)) and abs(errors["still"][high] / errors["theory"][high] - 1) < 0.25,
    )
    report.claim(
        "While the weights move, the least error is neither at the least nor at the greatest momentum.",
        low < int(np.argmin(errors["moving"])) < high,
    )
    report.claim(
        "A momentum that is too small for the steps taken costs more than half a point of accuracy, beside 0.1.",
        errors["accuracy"][low] < errors["accuracy"][usual] - 0.005, expected=None if quick else True,
    )  # fmt: skip
    report.claim(
        "At momentum 0.1 the accuracy is within half a point of that with precise statistics.",
        abs(errors["accuracy"][usual] - errors["precise"].mean()) < 0.005, expected=None,
    )  # fmt: skip

    ratios = by_size(report, model, images, (2, 60) if quick else (2, 4, 10, 60, 500))
    report.claim(
        "Averaged over batches of 2, the unbiased variance of the first BatchNorm is right to 10%, and the population "
        "variance half of it.",
        abs(ratios["unbiased"][0] - 1) < 0.1 and abs(ratios["population"][0] - 0.5) < 0.05,
    )
    report.claim(
        "In batches of 2 the unbiased variance of the third BatchNorm is right to 10% too.",
        abs(ratios["third"][0] - 1) < 0.1, expected=None,
    )  # fmt: skip

    found = cure(report, images, model, estimates)
    report.claim(
        "update_bn leaves a smaller error than any of the momenta.",
        all(
            found["update_bn, batches of 500"][i] < min(pair[i] for name, pair in found.items() if "momentum" in name)
            for i in range(2)
        ),
    )

    nn.update_bn(model, images.train)
    sizes = (1, 10, 1000) if quick else (1, 2, 4, 10, 30, 100, 1000)
    shuffled, alike, running = in_use(report, model, images, sizes)
    ten = sizes.index(10)
    report.claim(
        "By the statistics of one image alone every image is the same digit to the network.", shuffled[0] < 0.2
    )
    report.claim(
        "On shuffled batches of 10, batch statistics cost more than a point of accuracy.",
        shuffled[ten] < running - 0.01,
    )
    report.claim("On batches of 10 images of one digit each, batch statistics fail.", alike[ten] < running - 0.3)
    report.claim(
        "On all 1000 shuffled test images in one batch they are as good as running statistics, to a point.",
        abs(shuffled[-1] - running) < 0.01,
    )
    report.picture(picture(sizes, shuffled, alike, running, momenta, errors))


if __name__ == "__main__":
    run(main)
