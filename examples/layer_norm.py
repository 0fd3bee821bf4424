"""Experiment 9: layer normalization against batch normalization, at batches of 128 and of 4.

Claims (Ba, Kiros and Hinton 2016, "Layer Normalization"). (a) Section 3: normalizing each row by the mean and variance
of its own features needs no batch: training and use are the same computation, for any batch size, one included.
(b) Section 6.6, figure 6: on MNIST, an MLP with layer normalization is robust to the batch size, where one with batch
normalization suffers from batches of 4: LN trains faster and ends lower in test error there. (c) Section 5.1, table 1:
both are invariant to a rescaling of the whole weight matrix and of all data; LN alone to a rescaling of a single row of
data and to a re-centring of the weight matrix (one vector added to every unit's weights); BN alone to a rescaling of
one unit's weights and to a re-centring of the data (one vector added to every row).

Protocol: 4000 images of MNIST to learn from, 1000 to test on; 784-256-256-10 with ReLU, normalization before each ReLU
(the paper: 784-1000-1000-10 and all of MNIST, with Adam); Adam at rate 0.001 for both batch sizes; the same rows in the
same order for all; three seeds. Nothing is tuned.
"""

import numpy as np
from _experiment import run
from matplotlib.figure import Figure

from fastbn import nn
from fastbn.demo import load_images

HIDDEN = 256
RATE = 1e-3
EPOCHS, QUICK_EPOCHS = {128: 20, 4: 5}, {128: 4, 4: 1}
SEEDS = (0, 1, 2)
NORMS = {"LN": nn.LayerNorm, "BN": nn.BatchNorm, "none": None}


def network(norm, seed, dtype=np.float32):
    """From pixels to logits."""
    rng = np.random.default_rng(seed)
    layers, width = [], 784
    for _ in range(2):
        layers.append(nn.Linear(width, HIDDEN, rng=rng, dtype=dtype))
        if NORMS[norm] is not None:
            layers.append(NORMS[norm](HIDDEN, dtype=dtype))
        layers.append(nn.ReLU())
        width = HIDDEN
    return nn.Sequential(*layers, nn.Linear(width, 10, rng=rng, dtype=dtype))


def test(model, images):
    """Mean cross-entropy and share of wrong predictions, in eval mode."""
    model.eval()
    value = nn.SoftmaxCrossEntropy()(model(images.test), images.test_labels)
    wrong = float(np.mean(model(images.test).argmax(axis=1) != images.test_labels))
    model.train()
    return value, wrong


def train(model, images, batch, epochs, seed):
    """At each of 20 points along training: (epochs, training loss since the last point, test loss, test error)."""
    loss, optimizer = nn.SoftmaxCrossEntropy(), nn.Adam(model, RATE)
    batches = nn.Batches(images.train, images.train_labels, batch, rng=np.random.default_rng(seed))
    every, seen, recent, steps = max(1, epochs * len(batches) // 20), [], [], 0
    for _ in range(epochs):
        for x, labels in batches:
            recent.append(loss(model(x), labels))
            model.parameter_gradients(loss.backward())
            optimizer.step()
            steps += 1
            if steps % every == 0:
                seen.append((steps / len(batches), float(np.mean(recent)), *test(model, images)))
                recent.clear()
    return np.array(seen)


def invariances(rows):
    """Largest change of the first normalized layer's output, relative to its own size, in the cases of table 1."""
    x, changes = rows.astype(np.float64), {}
    vector = np.random.default_rng(1).standard_normal(x.shape[1])
    cases = {
        "all weights, times 3": lambda w, x: (3 * w, x),
        "a vector added to every unit's weights": lambda w, x: (w + 0.1 * vector, x),
        "one unit's weights, times 3": lambda w, x: (np.where(np.arange(len(w))[:, None] == 5, 3 * w, w), x),
        "all data, times 3": lambda w, x: (w, 3 * x),
        "a vector added to every row of data": lambda w, x: (w, x + vector),
        "one row of data, times 3": lambda w, x: (w, np.where(np.arange(len(x))[:, None] == 5, 3 * x, x)),
    }
    for name, change in cases.items():
        apart = []
        for norm in ("LN", "BN"):
            linear = nn.Linear(784, HIDDEN, bias=False, rng=0, dtype=np.float64)
            layer = NORMS[norm](HIDDEN, eps=1e-12, dtype=np.float64)
            before = layer(linear(x)).copy()
            linear.weight[...], changed = change(linear.weight, x)
            apart.append(float(np.abs(layer(linear(changed)) - before).max() / np.abs(before).max()))
        changes[name] = apart
    return changes


def main(report):
    """Everything."""
    images = load_images()
    epochs = QUICK_EPOCHS if report.quick else EPOCHS
    seeds = SEEDS[:1] if report.quick else SEEDS
    curves = {  # (seeds, points, 4) of each
        (norm, batch): np.array([train(network(norm, seed), images, batch, epochs[batch], seed) for seed in seeds])
        for batch in epochs
        for norm in NORMS
    }
    mean = {key: curve.mean(axis=0) for key, curve in curves.items()}
    for batch in epochs:
        points = sorted({0, len(mean["LN", batch]) // 4, len(mean["LN", batch]) // 2, len(mean["LN", batch]) - 1})
        report.table(
            f"Batches of {batch}: test error, mean of {len(seeds)} seed{'s' * (len(seeds) > 1)}, by epochs",
            ["", *(f"{mean['LN', batch][i, 0]:.2f}" for i in points), "training loss at the end"],
            [[norm, *(f"{mean[norm, batch][i, 3]:.4f}" for i in points), f"{mean[norm, batch][-1, 1]:.4f}"]
             for norm in NORMS],
        )  # fmt: skip

    def ends(norm, batch):
        """Test error over the last quarter of training, mean and the seeds' standard error."""
        each = curves[norm, batch][:, -5:, 3].mean(axis=1)
        return each.mean(), each.std(ddof=1) / len(each) ** 0.5 if len(each) > 1 else 0.0

    report.table(
        "Test error over the last quarter of training (± standard error over seeds)",
        ["", *(f"batches of {batch}" for batch in epochs)],
        [[norm, *("{:.4f} ± {:.4f}".format(*ends(norm, batch)) for batch in epochs)] for norm in NORMS],
    )  # fmt: skip
    report.claim(
        "With batches of 4, LN's training loss is below BN's at the end.",
        mean["LN", 4][-1, 1] < mean["BN", 4][-1, 1],
    )
    report.claim(
        "With batches of 4, LN's test error is below BN's.",
        ends("LN", 4)[0] < ends("BN", 4)[0], expected=None,
    )  # fmt: skip
    report.claim(
        "With batches of 128, LN's test error is below BN's.",
        ends("LN", 128)[0] < ends("BN", 128)[0], expected=None,
    )  # fmt: skip
    suffers = {norm: mean[norm, 4][-1, 1] - mean[norm, 128][-1, 1] for norm in ("LN", "BN")}
    report.claim(
        "Going from batches of 128 to 4 costs BN more training loss than LN.",
        suffers["BN"] > suffers["LN"],
        expected=True,
    )

    changes = invariances(images.train[:128])
    report.table(
        "Change of the normalized output, relative to its largest value, when something is rescaled or shifted",
        ["", "LN", "BN"], [[name, *(f"{c:.0e}" for c in change)] for name, change in changes.items()],
    )  # fmt: skip
    small = {name: tuple(c < 1e-6 for c in change) for name, change in changes.items()}
    report.claim(
        "The invariances are those of the paper's table 1: both to a rescaling of all weights and of all data; BN "
        "alone to that of one unit's weights and to a shift of all data; LN alone to that of one row of data and to a "
        "shift of all units' weights.",
        list(small.values())
        == [(True, True), (True, False), (False, True), (True, True), (False, True), (True, False)],
    )
    model = network("LN", 0).train()
    x = images.test[:50]
    whole = model(x).copy()
    model.eval()
    alone = np.concatenate([model(x[i : i + 1]).copy() for i in range(len(x))])
    report.claim(
        "With LN, training on a batch and use on one row at a time give the same logits, to float32 rounding.",
        float(np.abs(whole - alone).max()) < 1e-4,
    )
    report.picture(draw(mean))


def draw(mean):
    """Training loss and test error by epochs, for each batch size."""
    figure = Figure(figsize=(10, 7), layout="constrained")
    styles = {"LN": ("tab:orange", "-"), "BN": ("tab:blue", "-"), "none": ("tab:gray", "--")}
    axes = figure.subplots(2, 2)
    for column, batch in zip(axes.T, (128, 4), strict=True):
        for norm, (color, style) in styles.items():
            seen = mean[norm, batch]
            column[0].plot(seen[:, 0], seen[:, 1], style, color=color, label={"none": "neither"}.get(norm, norm))
            column[1].plot(seen[:, 0], seen[:, 3], style, color=color)
        column[0].set(title=f"Batches of {batch}", ylabel="training loss", yscale="log")
        column[1].set(xlabel="epochs", ylabel="test error", yscale="log")
    axes[0, 0].legend()
    return figure


if __name__ == "__main__":
    run(main)
