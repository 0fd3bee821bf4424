"""Experiment 7: batch normalization in a recurrent network, where it takes x and where it goes through time.

Laurent, Pereyra, Brakel, Zhang and Bengio (2015), "Batch Normalized Recurrent Neural Networks", section 3, try two
places. Of the whole pre-activation, h_t = φ(BN(W_ih·x_t + W_hh·h_{t-1})), it stands between one time step and the next
("hidden-to-hidden"). Of what comes from the input alone, h_t = φ(BN(W_ih·x_t) + W_hh·h_{t-1}), it does not, and one
mean and variance over batch and time ("sequence-wise") will do ("input-to-hidden"). They claim

1. that hidden-to-hidden does not help training;
2. that input-to-hidden makes the training loss fall faster;
3. that it does not improve generalization.

Protocol: an LSTM reads a digit and a linear layer says at the end which one it was; softmax cross-entropy. Two tasks:
*rows*, the 20 rows of 20 pixels of MNIST's images (without their empty border), and *pixels*, the 64 pixels of
scikit-learn's digits one at a time, over which a gradient has to go back through 64 steps. Normalizations: γ starts at
1, β is left to the LSTM's own bias; hidden-to-hidden has statistics of its own for each time step. Same first weights,
same order of rows for all networks. The learning rate falls along a cosine. Each network is trained at each of a few
rates, and the one with the least training loss in the last epoch is shown: nothing is chosen by the test images. On the
second task gradients longer than 1 are cut to length 1.
"""

from functools import partial

import numpy as np
from _experiment import run
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

from fastbn import nn
from fastbn.demo import load_images

NORMS = {"without BN": None, "BN, input-to-hidden": "input", "BN, hidden-to-hidden": "sum"}
LOOKS = {
    "without BN": {"color": "tab:gray", "linestyle": "--"},
    "BN, input-to-hidden": {"color": "tab:blue"},
    "BN, hidden-to-hidden": {"color": "tab:orange"},
}
BATCH = 60


def rows_of_images(quick):
    """(images, 20 rows, 20 pixels): the box that MNIST's digits were scaled to fit; 8 × 8 where there is no MNIST."""
    images = load_images()
    side = int(images.train.shape[1] ** 0.5)
    border = slice(4, -4) if side == 28 else slice(None)
    train, test = (
        np.ascontiguousarray(x.reshape(-1, side, side)[:, border, border]) for x in (images.train, images.test)
    )
    part = slice(0, 1800 if quick else None)
    return train[part], images.train_labels[part], test, images.test_labels


def digits(order=None):
    """scikit-learn's digits pixel by pixel, (images, 64, 1), in reading order or another; four fifths to train on."""
    x, labels = load_digits(return_X_y=True)
    shuffled = np.random.default_rng(0).permutation(len(x))
    x, labels = (x[shuffled] / 16).astype(np.float32), labels[shuffled]
    x = x[:, slice(None) if order is None else order, np.newaxis]
    end = len(x) * 4 // 5
    return x[:end], labels[:end], x[end:], labels[end:]


def clip(model, most):
    """Scale the gradients so that all of them together are no longer than `most`; how long they were."""
    gradients = [gradient for _, gradient in model.parameters()]
    length = sum(float(np.vdot(g, g)) for g in gradients) ** 0.5
    if length > most:
        for gradient in gradients:
            gradient *= most / length
    return length


def train(model, optimizer, x, labels, epochs, *, most=np.inf):
    """The loss of each step, and the length of its gradient before the cut to `most`."""
    loss, losses, lengths = nn.SoftmaxCrossEntropy(), [], []
    model.train()
    batches = nn.Batches(x, labels, BATCH, rng=1)
    rate, steps = optimizer.lr, epochs * len(batches)
    for _ in range(epochs):
        for batch, batch_labels in batches:
            optimizer.lr = rate * nn.schedules.cosine(len(losses), steps=steps)
            losses.append(loss(model(batch), batch_labels))
            model.parameter_gradients(loss.backward())
            lengths.append(clip(model, most))
            optimizer.step()
    return np.array(losses), np.array(lengths)


def estimate_statistics(model, x):
    """Running statistics as plain averages over the training set, with the weights as they are now.

    Those from training lag behind: most of their batches met other weights. Without normalization this does nothing.
    """
    recurrent = model.layers[0]
    recurrent.momentum = None
    recurrent.reset_running_stats()
    model.train()
    for start in range(0, len(x) - 1, 4 * BATCH):
        model(x[start : start + 4 * BATCH])


def network(norm, x, hidden):
    """From (batch, steps, pixels) to logits, and its recurrent layer."""
    rng = np.random.default_rng(0)
    steps, pixels = x.shape[1:]
    recurrent = nn.LSTM(
        pixels, hidden, norm=norm, steps=steps if norm == "sum" else None, batch_first=True, rng=rng
    )  # fmt: skip
    return nn.Sequential(recurrent, nn.LastStep(batch_first=True), nn.Linear(hidden, 10, init="glorot", rng=rng))


def best(make, data, optimizer, rates, epochs, most):
    """Of the network that `make` makes, the run at the rate with the least training loss in the last epoch."""
    x, labels, test, test_labels = data
    runs = []
    for rate in rates:
        model = make()
        losses, lengths = train(model, optimizer(model, rate), x, labels, epochs, most=most)
        epoch = len(losses) // epochs
        estimate_statistics(model, x)
        runs.append(
            {
                "rate": rate,
                "curve": np.convolve(losses, np.full(epoch, 1 / epoch), "valid"),  # means over an epoch's steps
                "epoch": epoch,
                "longest": lengths.max(),
                "accuracy": nn.accuracy(model, test, test_labels),
            }
        )
    return min(runs, key=lambda found: found["curve"][-1])


def steps_to(found, level):
    """The first step at whose end the epoch behind it had a mean loss of `level` or less."""
    reached = np.flatnonzero(found["curve"] <= level)
    return f"{reached[0] + found['epoch']}" if reached.size else "not reached"


def task(report, title, data, hidden, optimizer, rates, epochs, levels, most):
    """One table; every network's best run."""
    found = {
        name: best(partial(network, norm, data[0], hidden), data, optimizer, rates, epochs, most)
        for name, norm in NORMS.items()
    }
    header = ["network", "rate", *(f"steps to a loss of {level:g}" for level in levels)]
    rows = [[name, f"{f['rate']:g}", *(steps_to(f, level) for level in levels)] for name, f in found.items()]
    header += ["last epoch's loss", "longest gradient", "test accuracy"]
    for row, f in zip(rows, found.values(), strict=True):
        row += [f"{f['curve'][-1]:.4f}", f"{f['longest']:.3g}", f"{f['accuracy']:.3f}"]
    report.table(title, header, rows)
    return found


def picture(tasks):
    """Training loss along the steps, a panel a task."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    for axes, (title, found) in zip(figure.subplots(1, 2), tasks.items(), strict=True):
        for name, f in found.items():
            steps = f["epoch"] + np.arange(len(f["curve"]))
            axes.plot(steps, f["curve"], label=name, **LOOKS[name])
        axes.set(title=title, xlabel="steps", ylabel="training loss, mean over an epoch", yscale="log")
        axes.legend()
    return figure


def main(report):
    """Both tasks."""
    quick = report.quick
    images = rows_of_images(quick)
    rows = task(
        report, f"Rows: {images[0].shape[1]} steps, LSTM of 64, SGD", images, 64, nn.SGD,
        (1.0,) if quick else (1.0, 3.0, 10.0), 3 if quick else 12, (1.0,) if quick else (0.5, 0.1, 0.02), np.inf,
    )  # fmt: skip
    pixels = task(
        report, "Pixels: 64 steps, LSTM of 32, Adam, gradients cut to length 1", digits(), 32, nn.Adam,
        (0.01,) if quick else (0.003, 0.01, 0.03, 0.1), 2 if quick else 12, (2.2,) if quick else (1.5, 1.0), 1.0,
    )  # fmt: skip
    plain, inputs, hidden = (rows[name]["curve"] for name in NORMS)
    report.claim("Rows: normalizing input-to-hidden makes the training loss fall faster.", inputs[-1] < 0.8 * plain[-1])
    report.claim(
        "Rows: normalizing hidden-to-hidden does not help training: the loss, averaged over all steps, is no less.",
        hidden.mean() >= plain.mean(),
        expected=False,
    )
    accuracies = [rows[name]["accuracy"] for name in NORMS]
    error = (2 * accuracies[0] * (1 - accuracies[0]) / len(images[2])) ** 0.5  # of the difference of two accuracies
    report.claim(
        "Rows: the test accuracy with input-to-hidden normalized is within two standard errors of that without.",
        abs(accuracies[1] - accuracies[0]) < 2 * error, expected=None,
    )  # fmt: skip
    plain, inputs, hidden = (pixels[name]["curve"] for name in NORMS)
    report.claim(
        "Pixels: normalizing input-to-hidden makes the training loss fall faster.", inputs[-1] < 0.8 * plain[-1],
        expected=None if quick else True,
    )  # fmt: skip
    report.claim(
        "Pixels: normalizing hidden-to-hidden does not help training: the loss, averaged over all steps, is no less.",
        hidden.mean() >= plain.mean(),
        expected=None if quick else True,
    )  # fmt: skip
    report.claim(
        "Pixels: normalizing hidden-to-hidden makes gradients at least ten times as long as they get without.",
        pixels["BN, hidden-to-hidden"]["longest"] > 10 * pixels["without BN"]["longest"],
    )
    report.picture(picture({"Rows (20 steps)": rows, "Pixels (64 steps)": pixels}))


if __name__ == "__main__":
    run(main)
