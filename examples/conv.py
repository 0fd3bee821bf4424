"""Experiment 10: convolution, batch normalization, ReLU.

Claims. (a) Batch normalization of a convolution takes its statistics over the batch and all positions of a channel, so
that they are independent of how the image lies in memory: a network on channels-first images (NCHW) and one on
channels-last images (NHWC) are the same network (Ioffe and Szegedy 2015, section 3.2). (b) BatchNorm, ReLU and the
addition of a residual (He et al. 2016, section 3.2) can be one pass over memory, with the same result. (c) In use, a
BatchNorm is a scale and a shift, which can be folded into the convolution before it: same predictions, and less work
(Jacob et al. 2018, section 3.2). (d) With BatchNorm the network learns in fewer steps (Ioffe and Szegedy 2015, section
4.2). In use that is true of a network whose statistics fit its weights: along training they average over the weights of
the last steps, so the table also has a copy of the network with statistics estimated anew (nn.update_bn).

Protocol: 4000 images of MNIST to learn from, 1000 to test on. conv 16 → BN → ReLU → pool, conv 32 → BN → ReLU → pool,
a residual block conv 32 → BN → + x → ReLU, mean over the image, linear; SGD with momentum 0.9 at rate 0.05, batches of
64, the same initial weights and order of images for every network. Nothing is tuned. Times are the least of many runs
on one thread, taken in turns.
"""

from copy import deepcopy
from time import perf_counter

import numpy as np
from _experiment import run
from matplotlib.figure import Figure

import fastbn
from fastbn import nn
from fastbn.demo import load_images

RATE, BATCH, EPOCHS, EVERY = 0.05, 64, 4, 10
MARKS = (10, 30, 60, 120, 180, 240, 250)  # steps in the table; the last is the end of four epochs
PRECISE = "with BN, NHWC, after update_bn"
WIDTHS = (16, 32)


def laid_out(pixels, axis):
    """Rows of pixels as images: (N, 1, 28, 28) or (N, 28, 28, 1)."""
    side = int(pixels.shape[1] ** 0.5)
    return pixels.reshape((-1, 1, side, side) if axis == 1 else (-1, side, side, 1))


def network(axis, *, batch_norm=True):
    """From images to logits. The weights are drawn alike for both layouts."""
    rng = np.random.default_rng(0)

    def conv(inputs, outputs):
        return nn.Conv2d(inputs, outputs, 3, padding=1, axis=axis, rng=rng)

    def norm(channels):
        return [nn.BatchNorm(channels, axis=axis)] if batch_norm else []

    small, wide = WIDTHS
    layers = [conv(1, small), *norm(small), nn.ReLU(), nn.MaxPool2d(2, axis=axis)]
    layers += [conv(small, wide), *norm(wide), nn.ReLU(), nn.MaxPool2d(2, axis=axis)]
    if batch_norm:
        layers.append(nn.Residual(conv(wide, wide), nn.BatchNorm(wide, axis=axis, activation="relu")))
    else:
        layers += [conv(wide, wide), nn.ReLU()]  # nothing normalizes the sum: the plain network goes without it
    return nn.Sequential(*layers, nn.GlobalAvgPool2d(axis=axis), nn.Linear(wide, 10, rng=rng))


def train(model, images, axis, epochs, *, precise=None):
    """Losses by step, and (step, test accuracy) along the way.

    precise: a list, which at MARKS gets the accuracies of copies whose running statistics are estimated anew from the
    training images.
    """
    x, test = laid_out(images.train, axis), laid_out(images.test, axis)
    loss, optimizer, losses, seen = nn.SoftmaxCrossEntropy(), nn.SGD(model, RATE, momentum=0.9), [], []
    for _ in range(epochs):
        for batch, labels in nn.Batches(x, images.train_labels, BATCH, rng=np.random.default_rng(len(losses))):
            losses.append(loss(model(batch), labels))
            model.parameter_gradients(loss.backward())
            optimizer.step()
            if len(losses) % EVERY == 0:
                seen.append((len(losses), nn.accuracy(model, test, images.test_labels)))
                if precise is not None and len(losses) in MARKS:
                    again = deepcopy(model)
                    nn.update_bn(again, x)
                    precise.append((len(losses), nn.accuracy(again, test, images.test_labels)))
                model.train()
    model.eval()
    return np.array(losses), np.array(seen)


def folded(layers, axis):
    """The same layers in use, without any BatchNorm but a residual block's own (which adds x in its pass)."""
    result = []
    for layer in layers:
        before = result[-1] if result else None
        if isinstance(layer, nn.BatchNorm) and isinstance(before, nn.Conv2d):
            weight, bias = fastbn.fold(before.weight, before.bias, layer)
            conv = nn.Conv2d(before.in_channels, before.out_channels, before.kernel_size, before.stride,
                             before.padding, axis=axis)  # fmt: skip
            conv.load_state_dict({"weight": weight, "bias": bias})
            result[-1] = conv
        else:
            result.append(layer)
    return nn.Sequential(*result).eval()


def one_by_one(model, x):
    """The layers one after the other: a Sequential computes BatchNorm and the ReLU after it in one pass."""
    for layer in model.layers:
        x = layer(x)
    return x


def least(calls, seconds):
    """Least time of each call, taken in turns, in ms."""
    best, end = [np.inf] * len(calls), perf_counter() + seconds
    while perf_counter() < end:
        for i, call in enumerate(calls):
            start = perf_counter()
            call()
            best[i] = min(best[i], perf_counter() - start)
    return [1e3 * t for t in best]


def fused_against_parts(shape, axis, seconds):
    """act(bn(x) + r): one call, and NumPy's addition and maximum after the BatchNorm. Times, and whether equal."""
    rng = np.random.default_rng(0)
    x, residual = rng.standard_normal((2, *shape)).astype(np.float32)
    out, bn = np.empty_like(x), fastbn.BatchNorm(shape[axis], axis=axis)
    one = fastbn.BatchNorm(shape[axis], axis=axis, activation="relu")

    def parts():
        y = bn(x, out=out)
        np.add(y, residual, out=y)
        return np.maximum(y, 0, out=y)

    def fused():
        return one(x, residual, out=out)

    same = bool(np.abs(parts().copy() - fused()).max() <= 1e-6)  # fused, the sum is rounded once less
    return (*least([parts, fused], seconds), same)


def main(report):
    """Everything."""
    fastbn.set_num_threads(1)
    images = load_images()
    epochs = 1 if report.quick else EPOCHS
    seconds = 0.3 if report.quick else 3.0

    # ---- the same network in both layouts ----
    models = {"with BN, NCHW": network(1), "with BN, NHWC": network(-1), "without BN": network(-1, batch_norm=False)}
    axes = dict(zip(models, (1, -1, -1), strict=True))
    start = laid_out(images.test, 1)[:BATCH], laid_out(images.test, -1)[:BATCH]
    untrained = float(np.abs(models["with BN, NCHW"](start[0]) - models["with BN, NHWC"](start[1])).max())
    for name in models:
        models[name] = network(axes[name], batch_norm=name != "without BN")  # running statistics as at the start
    curves, again = {}, []
    for name, model in models.items():
        curves[name] = train(model, images, axes[name], epochs, precise=again if name == "with BN, NHWC" else None)
    losses = curves["with BN, NHWC"][0]
    curves = {"with BN, NCHW": curves["with BN, NCHW"], "with BN, NHWC": curves["with BN, NHWC"],
              PRECISE: (losses, np.array(again)), "without BN": curves["without BN"]}  # fmt: skip
    marks = [mark for mark in MARKS if mark <= len(losses)]

    def accuracy(name, step):
        return next(a for s, a in curves[name][1] if s >= step)

    report.table(
        "Test accuracy by steps",
        ["", *map(str, marks)],
        [[name, *(f"{accuracy(name, step):.3f}" for step in marks)] for name in curves],
    )
    first, second = (curves[name][0] for name in ("with BN, NCHW", "with BN, NHWC"))
    apart = float(np.abs(first[:5] - second[:5]).max())
    report.table(
        "The two layouts apart (largest difference; rounding alone makes any)",
        ["", "logits before training", "loss in the first 5 steps", "test accuracy at the end"],
        [["NCHW against NHWC", f"{untrained:.1e}", f"{apart:.1e}",
          f"{abs(curves['with BN, NCHW'][1][-1, 1] - curves['with BN, NHWC'][1][-1, 1]):.3f}"]],
    )  # fmt: skip
    report.claim(
        "The network on channels-first images and the one on channels-last images are the same: equal logits and "
        "losses up to float32 rounding.",
        untrained < 1e-4 and apart < 1e-3,
    )
    early = marks[1]
    report.claim(
        f"With BN and running statistics the network is ahead after {early} steps, by 0.1 in test accuracy and more.",
        accuracy("with BN, NHWC", early) > accuracy("without BN", early) + 0.1,
    )
    report.claim(
        "With BN and running statistics it is ahead at every mark.",
        all(accuracy("with BN, NHWC", mark) > accuracy("without BN", mark) for mark in marks),
        expected=None,
    )
    report.claim(
        "With BN and statistics estimated anew (after update_bn) it is ahead at every mark, or level to 0.01.",
        all(accuracy(PRECISE, mark) > accuracy("without BN", mark) - 0.01 for mark in marks),
        expected=None,
    )

    # ---- one pass ----
    rows = []
    for name, shape, axis in (("NCHW", (32, 64, 28, 28), 1), ("NHWC", (32, 28, 28, 64), -1)):
        parts, fused, same = fused_against_parts(shape, axis, seconds)
        rows.append(
            [f"{name}, {'×'.join(map(str, shape))}", f"{parts:.2f}", f"{fused:.2f}", f"{parts / fused:.1f}", same]
        )
    report.table(
        "relu(bn(x) + residual) in training, ms: three steps against one pass",
        ["", "BN, np.add, np.maximum", "fused", "ratio", "equal to 1e-6"], rows,
    )  # fmt: skip
    report.claim(
        "The fused pass gives the same result and is faster than the three steps.",
        all(row[-1] and float(row[3]) > 1 for row in rows),
    )

    # ---- folding ----
    rows, agree, gains = [], [], []
    for name in ("with BN, NCHW", "with BN, NHWC"):
        model, axis = models[name], axes[name]
        less, test = folded(model.layers, axis), laid_out(images.test, axis)
        apart = float(np.abs(model(test).copy() - less(test)).max())
        same = np.mean(model(test).argmax(axis=1) == less(test).argmax(axis=1))
        agree.append(same == 1 and apart < 1e-3)
        some = test[:200]
        times = least(
            [lambda m=model, x=some: one_by_one(m, x), lambda m=model, x=some: m(x), lambda m=less, x=some: m(x)],
            seconds,
        )
        gains.append([times[0] / times[2], times[1] / times[2]])
        rows.append([name, f"{apart:.1e}", f"{same:.3f}", *(f"{t:.2f}" for t in times),
                     *(f"{gain:.2f}" for gain in gains[-1])])  # fmt: skip
    report.table(
        "BN folded into the convolutions before it (in use, 200 images)",
        ["", "logits apart", "same predictions", "ms, BN then ReLU", "ms, BN and ReLU in one pass", "ms, folded",
         "gain over the first", "over the second"], rows,
    )  # fmt: skip
    report.claim("Folded, the network predicts the same for every test image.", all(agree))
    one_after_the_other, in_one_pass = np.min(gains, axis=0)
    report.claim(
        "Folded, it is faster by 5 % and more than with BN and ReLU one after the other.",
        one_after_the_other > 1.05, expected=None,
    )  # fmt: skip
    report.claim(
        "Folded, it is faster by 5 % and more than with BN and ReLU in one pass.", in_one_pass > 1.05, expected=None
    )
    report.picture(draw(curves))


def draw(curves):
    """Loss and accuracy by steps."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    styles = {"with BN, NCHW": ("tab:blue", "-"), "with BN, NHWC": ("tab:cyan", ":"), "without BN": ("tab:gray", "--"),
              PRECISE: ("navy", "o-.")}  # fmt: skip
    for name, (losses, seen) in curves.items():
        color, style = styles[name]
        if name != PRECISE:  # its losses are those of the network it is a copy of
            left.plot(np.arange(1, len(losses) + 1), losses, style, color=color, label=name, linewidth=1)
        right.plot(*seen.T, style, color=color, label=name)
    left.set(xlabel="steps", ylabel="loss of the step's batch", title="Training loss", yscale="log")
    right.set(xlabel="steps", ylabel="accuracy", title="Test accuracy", ylim=(0, 1))
    right.legend(loc="lower right")
    return figure


if __name__ == "__main__":
    run(main)
