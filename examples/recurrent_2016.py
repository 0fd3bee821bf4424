"""Experiment 8: batch normalization through time.

Cooijmans, Ballas, Laurent, Gülçehre and Courville (2017; arXiv 2016), "Recurrent Batch Normalization", normalize what
an LSTM's gates get from the past as well as what they get from the input, each by itself, and the cell on its way out
(section 3, equations 6 to 8), with a mean and variance of its own for each time step:

    (i, f, g, o)_t = BN(W_hh·h_{t-1}; γ_h) + BN(W_ih·x_t; γ_x) + b
    c_t = σ(f)·c_{t-1} + σ(i)·tanh(g)
    h_t = σ(o)·tanh(BN(c_t; γ_c, β_c))

They claim

1. that γ must start small: at 0.1 a gradient comes back through time nearly as long as it was, at 1, which puts tanh
   where it is flat, it vanishes (section 4, figure 1);
2. that this BN-LSTM converges faster than the LSTM, on digits read pixel by pixel, in order or permuted (section 5.1);
3. that it generalizes better, the more so on permuted digits, which ask for a longer memory;
4. that on sequences longer than any in training, the last step's statistics can stand for those of all later steps.

Protocol. *Gradients* (claim 1): as in their figure 1, an RNN, tanh(BN(W_ih·x_t + W_hh·h_{t-1})), before any training,
on 1000 of scikit-learn's digits, 64 steps of a pixel; ‖∂loss/∂h_t‖, averaged over the digits. W_hh is the identity, as
in the authors' code, or a random orthogonal matrix; h_0 is noise of deviation 0.1, as theirs. *Training* (claims 2, 3):
LSTM of 32 units, orthogonal W_hh, forget gates open (bias 1), softmax at the end, Adam, batches of 60, gradients cut to
length 1, h_0 = 0. The permutation is a true one, of fixed seed. Each network at each of three rates; the one with the
least training loss in the last epoch is shown. Then the statistics are estimated anew on the training set, as in the
paper. *Longer sequences* (claim 4): the 8 rows of a digit, then empty rows, 0 to 8 in training (drawn for each batch),
many more in the test: the network must keep its answer for longer than it ever had to.
"""

from functools import partial

import numpy as np
from _experiment import run
from matplotlib.figure import Figure
from recurrent_2015 import BATCH, best, digits, estimate_statistics, steps_to

from fastbn import nn

NETWORKS = {"LSTM": None, "BN-LSTM, γ from 0.1": 0.1, "BN-LSTM, γ from 1": 1.0}
LOOKS = {
    "LSTM": {"color": "tab:gray", "linestyle": "--"},
    "BN-LSTM, γ from 0.1": {"color": "tab:blue"},
    "BN-LSTM, γ from 1": {"color": "tab:orange"},
}
GAMMAS = {0.1: "#0b3d66", 0.3: "tab:blue", 0.5: "#7fb8e6", 1.0: "tab:orange"}
HIDDEN = 32
EMPTY = 8  # most empty rows in training
MORE = (0, 8, 12, 16, 24, 40, 72)  # in the test


# ---- gradients through time, before training ----


def gradient_norms(gamma, identity, x, labels, noise=0.1):
    """‖∂loss/∂h_t‖ for t = 1 to 64, averaged over the rows, of a new tanh RNN with a linear layer at the end.

    gamma: where BN's weight starts; None for an RNN without BN.
    """
    rng = np.random.default_rng(0)
    norm = {} if gamma is None else {"norm": "sum", "steps": x.shape[1], "gamma": gamma}
    rnn = nn.RNN(1, 100, batch_first=True, init="orthogonal", rng=rng, **norm)
    rnn.bias_ih_l0[...] = rnn.bias_hh_l0[...] = 0
    if identity:
        rnn.weight_hh_l0[...] = np.eye(100)
    last, linear = nn.LastStep(batch_first=True), nn.Linear(100, 10, init="glorot", rng=rng)
    loss = nn.SoftmaxCrossEntropy()
    h0 = noise * rng.standard_normal((len(x), 100), np.float32)
    loss(linear(last(rnn(x, h0=h0))), labels)
    rnn.backward(last.backward(linear.backward(loss.backward())))
    return np.linalg.norm(rnn.grad_hidden.astype(float), axis=2).mean(axis=1) * len(x)  # the loss is a mean over rows


def gradients(report):
    """Table and claims of figure 1; the norms, for the picture."""
    x, labels, *_ = digits()
    rows = 200 if report.quick else 1000
    x, labels = x[:rows], labels[:rows]
    found = {
        (identity, gamma): gradient_norms(gamma, identity, x, labels)
        for identity in (True, False)
        for gamma in (None, *GAMMAS)
    }
    steps = (64, 60, 48, 32, 16, 1)
    report.table(
        "Gradients before training, ‖∂loss/∂h_t‖ over that at t = 64",
        ["W_hh, γ", *(f"t = {t}" for t in steps)],
        [
            [
                f"{'identity' if identity else 'orthogonal'}, {'without BN' if gamma is None else gamma}",
                *(f"{norms[t - 1] / norms[-1]:.2g}" for t in steps),
            ]
            for (identity, gamma), norms in found.items()
        ],
    )

    def kept(identity, gamma):
        """From the end to the middle of the sequence, where the noise at its beginning plays no part."""
        norms = found[identity, gamma]
        return norms[31] / norms[-1]

    report.claim(
        "With γ = 0.1 a gradient is, 32 steps back, within a factor of 3 of what it was, with either W_hh.",
        all(1 / 3 < kept(identity, 0.1) < 3 for identity in (True, False)),
    )
    report.claim("With γ = 1 and the identity it vanishes: to less than a thousandth.", kept(True, 1.0) < 1e-3)
    report.claim("With γ = 1 and an orthogonal matrix it vanishes.", kept(False, 1.0) < 1, expected=False)
    still = gradient_norms(0.1, False, x, labels, noise=0.0)
    report.table(
        "Why h_0 is noise: γ = 0.1, orthogonal W_hh, ‖∂loss/∂h_t‖ over that at t = 64",
        ["h_0", *(f"t = {t}" for t in (16, 4, 2, 1))],
        [
            [name, *(f"{norms[t - 1] / norms[-1]:.2g}" for t in (16, 4, 2, 1))]
            for name, norms in (("noise of deviation 0.1", found[False, 0.1]), ("0", still))
        ],
    )
    return found


# ---- training on pixels ----


def network(gamma, pixels, steps):
    """From (batch, steps, pixels) to logits; gamma None: a plain LSTM."""
    rng = np.random.default_rng(0)
    norm = {} if gamma is None else {"norm": "recurrent", "steps": steps, "gamma": gamma}
    lstm = nn.LSTM(pixels, HIDDEN, batch_first=True, init="orthogonal", rng=rng, **norm)
    lstm.bias_ih_l0[...] = lstm.bias_hh_l0[...] = 0
    lstm.bias_ih_l0[HIDDEN : 2 * HIDDEN] = 1  # the forget gates
    return nn.Sequential(lstm, nn.LastStep(batch_first=True), nn.Linear(HIDDEN, 10, init="glorot", rng=rng))


def pixels(report):
    """Both orders; every network's best run."""
    quick = report.quick
    rates, epochs, level = ((0.01,), 2, 2.0) if quick else ((0.01, 0.03, 0.1), 20, 0.7)
    orders = {"in order": None, "permuted": np.random.default_rng(1).permutation(64)}
    tasks = {}
    for name, order in orders.items():
        data = digits(order)
        tasks[name] = found = {
            label: best(partial(network, gamma, 1, 64), data, nn.Adam, rates, epochs, 1.0)
            for label, gamma in NETWORKS.items()
        }
        steps = found["LSTM"]["epoch"] * epochs
        report.table(
            f"Pixels {name}, {steps} steps of training",
            ["network", "rate", "mean loss", f"steps to a loss of {level:g}", "last epoch's loss", "test accuracy"],
            [
                [label, f"{f['rate']:g}", f"{mean:.3f}", steps_to(f, level), f"{end:.3f}", f"{f['accuracy']:.3f}"]
                for label, f in found.items()
                for mean, end in [(f["curve"].mean(), f["curve"][-1])]
            ],
        )
        plain, small, one = found.values()
        error = (2 * plain["accuracy"] * (1 - plain["accuracy"]) / len(data[2])) ** 0.5
        report.claim(
            f"Pixels {name}: the BN-LSTM (γ from 0.1) converges faster, by the loss averaged over all steps.",
            small["curve"].mean() < 0.9 * plain["curve"].mean(), expected=None if quick else True,
        )  # fmt: skip
        report.claim(
            f"Pixels {name}: it generalizes better, by more than two standard errors of the test accuracy.",
            small["accuracy"] - plain["accuracy"] > 2 * error, expected=None,
        )  # fmt: skip
        report.claim(
            f"Pixels {name}: γ from 1 converges slower than γ from 0.1.",
            one["curve"].mean() > 1.03 * small["curve"].mean(), expected=None if quick else True,
        )  # fmt: skip
    return tasks


# ---- longer sequences ----


def with_empty_rows(x, rows):
    """The sequences, and so many empty rows after them."""
    return np.concatenate([x, np.zeros((len(x), rows, x.shape[2]), x.dtype)], axis=1)


def train_to_wait(model, x, labels, epochs):
    """To name the digit after 0 to EMPTY empty rows."""
    loss, optimizer, rng = nn.SoftmaxCrossEntropy(), nn.Adam(model, 0.01), np.random.default_rng(2)
    batches = nn.Batches(x, labels, BATCH, rng=1)
    model.train()
    for _ in range(epochs):
        for batch, batch_labels in batches:
            loss(model(with_empty_rows(batch, int(rng.integers(EMPTY + 1)))), batch_labels)
            model.parameter_gradients(loss.backward())
            optimizer.step()


def one_for_all(model):
    """Give every step the statistics averaged over the steps: what they are for the paper's approach to improve on."""
    state = model.state_dict()
    for name, array in state.items():
        if name.endswith(("running_mean", "running_var")):
            array[...] = array.mean(axis=0)
    model.load_state_dict(state)


def longer(report):
    """Test accuracy after more empty rows than in training."""
    x, labels, test, test_labels = (part.reshape(len(part), 8, 8) if part.ndim == 3 else part for part in digits())
    found = {}
    for name, gamma in (("LSTM", None), ("BN-LSTM, last step's statistics go on", 0.1)):
        model = network(gamma, 8, 8 + EMPTY)
        train_to_wait(model, x, labels, 4 if report.quick else 30)
        estimate_statistics(model, with_empty_rows(x, EMPTY))

        def accuracies(model=model):
            return [nn.accuracy(model, with_empty_rows(test, rows), test_labels) for rows in MORE]

        found[name] = accuracies()
        if gamma is not None:
            one_for_all(model)
            found["BN-LSTM, one mean and variance for all steps"] = accuracies()
    report.table(
        f"Longer sequences: test accuracy after a digit's 8 rows and so many empty rows; in training 0 to {EMPTY}",
        ["network", *map(str, MORE)],
        [[name, *(f"{accuracy:.3f}" for accuracy in row)] for name, row in found.items()],
    )
    _, reused, shared = found.values()
    trained, more = MORE.index(EMPTY), MORE.index(12)
    report.claim(
        "Half as many empty rows again (12) cost the BN-LSTM less than 0.1 of accuracy, "
        "with the last step's statistics.",
        reused[trained] - reused[more] < 0.1, expected=None if report.quick else True,
    )  # fmt: skip
    report.claim(
        "One mean and variance for all steps, the average of theirs, would cost more than 0.2 on any of these lengths.",
        all(own - one > 0.2 for own, one in zip(reused[: more + 1], shared, strict=False)),
    )
    return found


# ---- together ----


def picture(norms, tasks, lengths):
    """Gradients with both matrices, the training loss of both tasks, accuracy on longer sequences."""
    figure = Figure(figsize=(9, 10), layout="constrained")
    panels = figure.subplot_mosaic([["identity", "orthogonal"], ["in order", "permuted"], ["longer", "longer"]])
    for axes, is_identity in ((panels["identity"], True), (panels["orthogonal"], False)):
        for gamma in (None, *GAMMAS):
            values = norms[is_identity, gamma]
            look = LOOKS["LSTM"] if gamma is None else {"color": GAMMAS[gamma]}
            label = "without BN" if gamma is None else f"γ = {gamma:g}"
            axes.plot(np.arange(1, len(values) + 1), values / values[-1], label=label, **look)
        name = "the identity" if is_identity else "orthogonal"
        axes.set(title=f"tanh RNN before training, W_hh {name}", xlabel="time step t", yscale="log")
        axes.set(ylabel="‖∂loss/∂h_t‖, at the end 1", ylim=(1e-10, 1e4))
        axes.legend(ncols=2)
    for name, found in tasks.items():
        axes = panels[name]
        for label, f in found.items():
            steps = f["epoch"] + np.arange(len(f["curve"]))
            axes.plot(steps, f["curve"], label=label, **LOOKS[label])
        axes.set(title=f"Digits pixel by pixel, {name}", xlabel="steps of training", ylim=(0, 2.4))
        axes.set(ylabel="training loss, mean over an epoch")
        axes.legend()
    looks = (LOOKS["LSTM"], LOOKS["BN-LSTM, γ from 0.1"], {"color": "tab:blue", "linestyle": ":"})
    axes = panels["longer"]
    for look, (name, accuracies) in zip(looks, lengths.items(), strict=True):
        axes.plot(MORE, accuracies, marker="o", label=name, **look)
    axes.axvspan(0, EMPTY, color="0.92", label="as in training")
    axes.set(title="Longer sequences", xlabel="empty rows after the digit", ylabel="test accuracy", ylim=(0, 1))
    axes.legend()
    return figure


def main(report):
    """Gradients, training, longer sequences."""
    norms = gradients(report)
    tasks = pixels(report)
    lengths = longer(report)
    report.picture(picture(norms, tasks, lengths))


if __name__ == "__main__":
    run(main)
