"""Experiment 5: the chain of one-unit layers.

Goodfellow, Bengio and Courville, "Deep Learning" (2016), section 8.7.1, introduce batch normalization with the
simplest of deep networks, one linear unit a layer: ŷ = x·w1·w2···wl. Its gradient says how to change each weight *if
the others stay*, and then all are changed at once: (w1 - ε·g1)·(w2 - ε·g2)···(wl - ε·gl) holds products of up to l of
the changes, and with weights above 1 the factors left over are exponentially large. They claim

1. that the step size is hard to choose, since the effect of a step on one layer depends so strongly on all others;
2. that normalizing each unit makes it easy: ŷ = wl·ĥ, whose ĥ has mean 0 and variance 1 whatever lies below;
3. that the lower layers of this *linear* chain are thereby made useless, as their weights no longer matter at all.

Protocol: 256 numbers x from a standard normal distribution, targets 2x plus noise of deviation 0.5, mean squared error,
the whole set as one batch, float64. All weights of a chain start at one value: 0.8, 1 or 1.25. BatchNorm without weight
and bias, as in the book, after every layer but the last. Everything is computed from two functions of
fastbn.diagnostics: `gradient_norms`, and `landscape`, which has the loss after a step and what first-order theory
predicts of it. Nothing is tuned; the last table shows the loss after training at each of eleven rates.
"""

from functools import partial

import numpy as np
from _experiment import run
from matplotlib.figure import Figure

from fastbn import diagnostics, nn

WEIGHTS = (0.8, 1.0, 1.25)
DEPTHS, QUICK_DEPTHS = (2, 5, 10, 20, 30, 40, 50), (2, 10, 20, 50)
NOISE = 0.5
SHARE = 0.1  # of the loss, that a step is to take away
ALONE = 0.1  # the step size of the fourth table
TRAINED, STEPS, QUICK_STEPS = 20, 300, 100  # the last table's depth and length of training
RATES = tuple(10 ** (half / 2) for half in range(-10, 1))  # from 1e-5 to 1
GRAYS, BLUES = ("#b0b0b0", "#7f7f7f", "#404040"), ("#7fb8e6", "tab:blue", "#0b3d66")  # a shade a weight
MARKERS = ("v", "o", "^")


def data(rows=256):
    """One batch of inputs and targets, of shape (rows, 1) each."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, 1))
    return x, 2 * x + NOISE * rng.standard_normal((rows, 1))


def chain(depth, weight, batch_norm, activation=None):
    """ŷ = x·w1···wl, with BatchNorm and an activation after every layer but the last."""
    layers = []
    for place in range(depth):
        linear = nn.Linear(1, 1, bias=False, dtype=np.float64)
        linear.weight[...] = weight
        layers.append(linear)
        if place < depth - 1:
            layers += [nn.BatchNorm(1, affine=False, dtype=np.float64)] if batch_norm else []
            layers += [activation()] if activation else []
    return nn.Sequential(*layers)


def arriving(model, x, t):
    """The gradient that arrives at the first layer's output, of each row's own loss: shape (rows,).

    Not with respect to w1, which batch normalization makes useless, as the third claim says.
    """
    loss = nn.MSELoss()
    loss(model(x), t)
    dy = loss.backward()
    for layer in reversed(model.layers[1:]):
        dy = layer.backward(dy)
    return dy.ravel() * len(x)  # the loss is a mean over the rows


def root_mean_square(values):
    """Of all of them."""
    return float(np.sqrt(np.mean(values**2)))


def share_of_few(values, few=10):
    """The part of the sum of squares that the largest `few` make up."""
    squares = np.sort(values**2)
    return float(squares[-few:].sum() / squares.sum())


def first_weight(model, x, t):
    """|∂L/∂w1|."""
    return float(diagnostics.gradient_norms(model, nn.MSELoss(), x, t).gradient[0])


def after_step(model, x, t, step):
    """The loss before and after one step of gradient descent on all weights, and what first-order theory predicts."""
    along = diagnostics.landscape(model, nn.MSELoss(), x, t, [step])
    return along.loss, along.predicted[0], along.losses[0]


def promised_step(model, x, t):
    """The step with which the loss falls by SHARE of itself, as L(w - ε·g) ≈ L(w) - ε·‖g‖² has it."""
    norms = diagnostics.gradient_norms(model, nn.MSELoss(), x, t)
    return SHARE * norms.loss / np.sum(norms.gradient**2)


def largest_alone(depth, weight, x, t, step):
    """The largest loss that a step on one weight alone leads to, the others as they are: over all the weights."""
    losses = []
    for place in range(depth):
        model, loss = chain(depth, weight, False), nn.MSELoss()
        loss(model(x), t)
        model.parameter_gradients(loss.backward())
        model.layers[place].weight -= step * model.layers[place].grad_weight
        losses.append(loss(model(x), t))
    return max(losses)


def train(depth, weight, batch_norm, x, t, steps):
    """The loss that gradient descent ends with, at each of RATES."""
    ends = []
    for rate in RATES:
        model, loss = chain(depth, weight, batch_norm), nn.MSELoss()
        optimizer = nn.SGD(model, rate)
        with np.errstate(over="ignore", invalid="ignore"):  # some rates diverge
            for _ in range(steps):
                loss(model(x), t)
                model.parameter_gradients(loss.backward())
                optimizer.step()
            ends.append(loss(model(x), t))
    return np.nan_to_num(ends, nan=np.inf)


def every(depths, measure):
    """measure(model) of the chains of each weight and depth: {weight: array over depths}, without and with BN."""
    return [
        {w: np.array([measure(depth, w, batch_norm) for depth in depths]) for w in WEIGHTS}
        for batch_norm in (False, True)
    ]


def rows(plain, normalized, form):
    """A table's rows from two such dicts."""
    return [
        [f"{name}, w = {w:g}", *(form(value) for value in values[w])]
        for name, values in (("without BN", plain), ("with BN", normalized))
        for w in WEIGHTS
    ]


def main(report):
    """Everything."""
    x, t = data()
    depths = QUICK_DEPTHS if report.quick else DEPTHS
    header = ["depth", *map(str, depths)]

    def measure_gradient(depth, weight, batch_norm, activation=None):
        return root_mean_square(arriving(chain(depth, weight, batch_norm, activation), x, t))

    # ---- gradients by depth ----
    linear = every(depths, measure_gradient)
    report.table(
        "Gradient that arrives at the first layer's output, linear chain", header, rows(*linear, "{:.2g}".format)
    )
    plain, normalized = linear
    falls, grows = plain[0.8][-1] / plain[0.8][0], plain[1.25][-1] / plain[1.25][0]
    report.claim(
        "Without BN the gradient at the first layer vanishes with depth for weights of 0.8 and explodes for 1.25.",
        falls < 1e-3 and grows > 1e3,
    )
    same = np.array(list(normalized.values()))
    report.claim(
        "With BN the gradient that arrives at the first layer is the same for every depth, to within 0.1 %.",
        np.ptp(same) < 1e-3 * same.min(),
    )
    own = every(depths, lambda *chosen: first_weight(chain(*chosen), x, t))
    report.table("Gradient of the first weight itself, linear chain", header, rows(*own, "{:.1g}".format))
    report.claim(
        "With BN the linear chain's first weight gets no gradient (below a ten-thousandth of what arrives at its "
        "output): the lower layers are made useless, as the book says.",
        all(np.all(own[1][w] < 1e-4 * normalized[w]) for w in WEIGHTS),
    )

    # ---- with a nonlinearity, where lower layers do matter ----
    curved = {kind: every(depths, partial(measure_gradient, activation=kind)) for kind in (nn.Sigmoid, nn.Tanh)}
    for kind, values in curved.items():
        title = f"Gradient that arrives at the first layer's output, with {kind.__name__.lower()} units"
        report.table(title, header, rows(*values, "{:.2g}".format))
    for kind, expected in ((nn.Sigmoid, True), (nn.Tanh, False)):
        bent = np.array(list(curved[kind][1].values()))
        report.claim(
            f"With {kind.__name__.lower()} units and BN, the gradient that arrives at the first layer differs by a "
            "factor of less than 30 over all these depths and weights.",
            bent.max() < 30 * bent.min(),
            expected=expected,
        )
    report.claim(
        "With sigmoid units and no BN it vanishes, to less than 1e-20 at the largest depth, for every one of these "
        "weights.",
        max(values[-1] for values in curved[nn.Sigmoid][0].values()) < 1e-20,
    )

    report.table(
        "Share of the squared gradient that the 10 rows of 256 with the largest have (with BN, w = 1)",
        header,
        [[kind.__name__.lower(),
          *(f"{share_of_few(arriving(chain(depth, 1.0, True, kind), x, t)):.3f}" for depth in depths)]
         for kind in curved],
    )  # fmt: skip

    # ---- one step: what first-order theory promises, and what comes ----
    def kept(depth, weight, batch_norm):
        model = chain(depth, weight, batch_norm)
        before, _, after = after_step(model, x, t, promised_step(model, x, t))
        return after / before

    promised = every(depths, kept)
    report.table(
        f"Loss after one step, as a share of that before, where first-order theory promises {1 - SHARE:g}",
        header, rows(*promised, "{:.3g}".format),
    )  # fmt: skip
    report.claim(
        f"Without BN and with weights of 0.8, the step that first-order theory promises a loss of {1 - SHARE:g} times "
        "itself for makes it 10 times larger or worse from depth 20 on.",
        all(share > 10 for depth, share in zip(depths, promised[0][0.8], strict=True) if depth >= 20),
    )
    report.claim(
        "With BN the loss falls as promised (to 0.9 to 0.92 times itself) at every depth and weight.",
        all(np.all((share >= 0.9) & (share < 0.92)) for share in promised[1].values()),
    )

    # ---- one step that is safe for each layer alone ----
    alone = np.array([largest_alone(depth, 1.0, x, t, ALONE) for depth in depths])
    before, predicted, together = np.array([after_step(chain(d, 1.0, False), x, t, ALONE) for d in depths]).T
    before_bn, predicted_bn, together_bn = np.array([after_step(chain(d, 1.0, True), x, t, ALONE) for d in depths]).T
    report.table(
        f"Loss after one step of size {ALONE:g}, weights of 1",
        ["depth", "before", "one layer alone", "predicted for all", "all at once", "BN: before", "BN: predicted",
         "BN: all at once"],
        [[depth, *(f"{value:.3g}" for value in values)]
         for depth, *values in zip(depths, before, alone, predicted, together, before_bn, predicted_bn, together_bn,
                                   strict=True)],
    )  # fmt: skip
    deep = np.array(depths) >= 10
    report.claim(
        f"Without BN a step of {ALONE:g} lowers the loss if any one layer alone takes it, at every depth, and raises "
        "it if all take it at once, from depth 10 on.",
        bool(np.all(alone < before) and np.all(together[deep] > before[deep])),
    )
    report.claim(
        "With BN the same step on all weights at once lowers the loss at every depth, to within 10 % of what is "
        "predicted.",
        bool(np.all(together_bn < before_bn) and np.all(np.abs(together_bn / predicted_bn - 1) < 0.1)),
    )

    # ---- training ----
    steps = QUICK_STEPS if report.quick else STEPS
    slope = np.vdot(x, t) / np.vdot(x, x)
    least = float(np.mean((slope * x - t) ** 2))  # without BN; with it a little less, as it takes the mean of x away
    ends = [{w: train(TRAINED, w, batch_norm, x, t, steps) for w in WEIGHTS} for batch_norm in (False, True)]
    report.table(
        f"Loss of a linear chain of {TRAINED} after {steps} steps, by learning rate (the least is {least:.3f})",
        ["rate", *(f"{rate:.0e}" for rate in RATES)],
        rows(*ends, "{:.3g}".format),
    )
    trained = [np.array([ends[batch_norm][w] < 1.01 * least for w in WEIGHTS]) for batch_norm in (False, True)]
    report.claim(
        "With BN two or more of the rates train the chain, to within 1 % of the least loss, from each of the three "
        "starts.",
        np.count_nonzero(trained[1].all(axis=0)) >= 2,
    )
    report.claim(
        "Without BN no rate trains it from all three; from weights of 1.25 none does at all.",
        not trained[0].all(axis=0).any() and not trained[0][-1].any(),
    )

    report.picture(
        draw(depths, linear, curved[nn.Sigmoid], promised, (before, alone, together, before_bn, together_bn))
    )


def draw(depths, linear, sigmoid, promised, step):
    """Four views by depth: gradients (linear, sigmoid), and a step (promised to lose a tenth; safe for one alone)."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    axes = figure.subplots(2, 2)

    def lines(ax, values):
        for batch_norm, shades, style in ((False, GRAYS, "--"), (True, BLUES, "-")):
            for w, shade, marker in zip(WEIGHTS, shades, MARKERS, strict=True):
                name = f"{'with' if batch_norm else 'without'} BN, w = {w:g}"
                ax.plot(depths, values[batch_norm][w], style, color=shade, marker=marker, markersize=5, label=name)
        ax.set(yscale="log", xlabel="depth")

    lines(axes[0, 0], linear)
    axes[0, 0].set(title="Linear chain: gradient at the first layer", ylabel="root mean square")
    axes[0, 0].legend(fontsize=8)
    lines(axes[0, 1], sigmoid)
    axes[0, 1].set(title="Sigmoid chain: gradient at the first layer", ylabel="root mean square")
    lines(axes[1, 0], promised)
    axes[1, 0].axhline(1 - SHARE, color="black", linestyle=":", label=f"promised: {1 - SHARE:g}")
    axes[1, 0].set(
        title="A step that should take a tenth off the loss", ylabel="loss after / loss before", ylim=(0.3, 1e12)
    )
    axes[1, 0].legend(*(part[-1:] for part in axes[1, 0].get_legend_handles_labels()), fontsize=8)
    before, alone, together, before_bn, together_bn = step
    last = axes[1, 1]
    last.plot(depths, together / before, "--", color="tab:gray", marker="o", label="without BN, all layers at once")
    last.plot(depths, alone / before, ":", color="tab:gray", marker="s", label="without BN, one layer alone")
    last.plot(depths, together_bn / before_bn, color="tab:blue", marker="o", label="with BN, all layers at once")
    last.set(yscale="log", xlabel="depth", ylabel="loss after / loss before", title=f"A step of {ALONE:g} from w = 1")
    last.legend(fontsize=8)
    return figure


if __name__ == "__main__":
    run(main)
