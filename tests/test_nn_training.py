"""Optimizers, batches and the loop."""

import sys

import numpy as np
import pytest

from fastbn import nn


class Parameters(nn.Layer):
    """Two parameters whose gradients a test sets."""

    def __init__(self, dtype=np.float64):
        rng = np.random.default_rng(0)
        self.values = [rng.standard_normal((3, 4)).astype(dtype), rng.standard_normal(5).astype(dtype)]
        self.gradients = [np.zeros_like(value) for value in self.values]

    def parameters(self):
        yield from zip(self.values, self.gradients, strict=True)


def new_gradients(model, step):
    rng = np.random.default_rng(100 + step)
    for gradient in model.gradients:
        gradient[...] = rng.standard_normal(gradient.shape)


# name → (ours, the rule as the papers have it: (p, g, state, t) → p)


def sgd(p, g, state, t, lr=0.1, momentum=0.9):
    state["v"] = momentum * state.get("v", 0) + g
    return p - lr * state["v"]


def rmsprop(p, g, state, t, lr=0.02, alpha=0.9, eps=1e-8):
    state["v"] = alpha * state.get("v", 0) + (1 - alpha) * g**2
    return p - lr * g / (np.sqrt(state["v"]) + eps)


def adam(p, g, state, t, lr=0.02, first=0.8, second=0.95, eps=1e-3):
    state["m"] = first * state.get("m", 0) + (1 - first) * g
    state["v"] = second * state.get("v", 0) + (1 - second) * g**2
    return p - lr * (state["m"] / (1 - first**t)) / (np.sqrt(state["v"] / (1 - second**t)) + eps)


OPTIMIZERS = {
    "SGD": (lambda m, **k: nn.SGD(m, 0.1, **k), lambda p, g, s, t: p - 0.1 * g, ("SGD", {"lr": 0.1})),
    "SGD with momentum": (
        lambda m, **k: nn.SGD(m, 0.1, momentum=0.9, **k), sgd, ("SGD", {"lr": 0.1, "momentum": 0.9}),
    ),
    "RMSprop": (
        lambda m, **k: nn.RMSprop(m, 0.02, alpha=0.9, **k), rmsprop, ("RMSprop", {"lr": 0.02, "alpha": 0.9}),
    ),
    "Adam": (
        lambda m, **k: nn.Adam(m, 0.02, betas=(0.8, 0.95), eps=1e-3, **k), adam,
        ("Adam", {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-3}),
    ),
}  # fmt: skip


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_follow_the_rule(name, weight_decay):
    make, rule, _ = OPTIMIZERS[name]
    model = Parameters()
    optimizer = make(model, weight_decay=weight_decay)
    expected, states = [value.copy() for value in model.values], [{}, {}]
    for t in range(1, 6):
        new_gradients(model, t)
        for i, gradient in enumerate(model.gradients):
            expected[i] = rule(expected[i], gradient + weight_decay * expected[i], states[i], t)
        optimizer.step()
        for value, want in zip(model.values, expected, strict=True):
            np.testing.assert_allclose(value, want, rtol=1e-12)
    assert optimizer.steps == 5


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_torchs(name, weight_decay):
    torch = pytest.importorskip("torch")
    make, _, (theirs, options) = OPTIMIZERS[name]
    model = Parameters(np.float32)
    copies = [torch.nn.Parameter(torch.tensor(value)) for value in model.values]
    optimizer = make(model, weight_decay=weight_decay)
    reference = getattr(torch.optim, theirs)(copies, weight_decay=weight_decay, **options)
    for t in range(20):
        new_gradients(model, t)
        for copy, gradient in zip(copies, model.gradients, strict=True):
            copy.grad = torch.tensor(gradient)
        optimizer.step()
        reference.step()
    for value, copy in zip(model.values, copies, strict=True):
        np.testing.assert_allclose(value, copy.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_learning_rate_may_change():
    model = Parameters()
    optimizer = nn.SGD(model, 0.1)
    before = model.values[1].copy()
    model.gradients[1][...] = 1
    optimizer.lr = 2.0
    optimizer.step()
    np.testing.assert_allclose(model.values[1], before - 2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: nn.SGD(nn.Linear(2, 2), 0), ValueError, "lr is 0.0, and must be greater than 0"),
        (lambda: nn.SGD(nn.Linear(2, 2), "1"), TypeError, "lr is '1'"),
        (lambda: nn.SGD(nn.Linear(2, 2), float("nan")), ValueError, "lr is nan"),
        (lambda: nn.SGD(nn.Linear(2, 2), 0.1, momentum=1.0), ValueError, "momentum is 1.0.*less than 1"),
        (lambda: nn.SGD(nn.Linear(2, 2), 0.1, weight_decay=-1), ValueError, "weight_decay is -1.0"),
        (lambda: nn.RMSprop(nn.Linear(2, 2), alpha=1.5), ValueError, "alpha is 1.5"),
        (lambda: nn.Adam(nn.Linear(2, 2), betas=(0.9, 1)), ValueError, r"betas\[1\] is 1.0"),
        (lambda: nn.Adam(nn.Linear(2, 2), betas=0.9), TypeError, "betas is 0.9, and must be a pair of numbers"),
        (lambda: nn.Adam(nn.Linear(2, 2), eps=0), ValueError, "eps is 0.0"),
        (lambda: nn.Adam(nn.ReLU()), ValueError, "must have parameters"),
        (lambda: nn.Adam(nn.Linear(2, 2)).step(), ValueError, "call the model's backward first"),
    ],
)
def test_optimizer_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


# ---- batches ----


def rows(count):
    return np.arange(count, dtype=np.float32)[:, np.newaxis] * np.ones(3, np.float32), np.arange(count)


def test_batches_cover_every_row_once_in_a_new_order():
    batches = nn.Batches(*rows(10), 4, rng=0)
    orders = []
    for _ in range(2):
        seen = [(x.copy(), labels.copy()) for x, labels in batches]
        assert [len(x) for x, _ in seen] == [4, 4, 2] and len(batches) == 3
        for x, labels in seen:
            np.testing.assert_array_equal(x[:, 2], labels)
        orders.append(np.concatenate([labels for _, labels in seen]))
        assert sorted(orders[-1]) == list(range(10))
    assert list(orders[0]) != list(orders[1])
    again = np.concatenate([labels.copy() for _, labels in nn.Batches(*rows(10), 4, rng=0)])
    np.testing.assert_array_equal(orders[0], again)


def test_a_last_batch_of_one_row_is_left_out():
    assert [len(x) for x, _ in nn.Batches(*rows(9), 4)] == [4, 4]
    assert [len(x) for x, _ in nn.Batches(*rows(3), 1)] == [1, 1, 1]
    assert [len(x) for x, _ in nn.Batches(*rows(3), 100)] == [3]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((np.zeros((0, 3)), np.zeros(0, int), 4), ValueError, r"x has shape \(0, 3\)"),
        (
            (np.zeros((2, 3)), np.zeros(3, int), 4),
            ValueError,
            r"targets has shape \(3,\), and must have.*\(2, ",
        ),
        ((np.zeros((2, 3), int), np.zeros(2, int), 4), TypeError, "x has dtype int64"),
        ((np.zeros((2, 3)), np.zeros(2, int), 0), ValueError, "batch_size is 0"),
    ],
)
def test_batches_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        nn.Batches(*arguments)


# ---- the loop ----


def problem():
    rng = np.random.default_rng(0)
    centres = 3 * rng.standard_normal((4, 6))
    labels = rng.integers(0, 4, 400)
    return (centres[labels] + rng.standard_normal((400, 6))).astype(np.float32), labels


def network():
    rng = np.random.default_rng(1)
    return nn.Sequential(nn.Linear(6, 16, rng=rng), nn.BatchNorm(16), nn.ReLU(), nn.Linear(16, 4, rng=rng))


@pytest.mark.parametrize(
    "optimizer",
    [lambda m: nn.SGD(m, 0.1, momentum=0.9), lambda m: nn.RMSprop(m, 0.005), lambda m: nn.Adam(m, 0.01)],
    ids=["SGD", "RMSprop", "Adam"],
)
def test_a_network_learns_batch_norm_included(optimizer):
    x, labels = problem()
    model = network()
    norm = model.layers[1]
    weight, bias = norm.weight.copy(), norm.bias.copy()
    losses = nn.fit(model, x[:300], labels[:300], optimizer(model), epochs=15, batch_size=32, rng=2).losses
    assert losses[-1] < 0.3 * losses[0]
    assert np.abs(norm.weight - weight).max() > 0.01 and np.abs(norm.bias - bias).max() > 0.01
    assert norm.num_batches_tracked == 15 * 10
    assert not model.training and nn.accuracy(model, x[300:], labels[300:]) > 0.9
    # In eval mode a row's answer does not depend on the rows beside it; in training it does.
    whole = model(x[:8]).copy()
    np.testing.assert_allclose(model(x[:2]), whole[:2], rtol=1e-5, atol=1e-6)
    whole = model.train()(x[:8]).copy()
    assert np.abs(model(x[:2]) - whole[:2]).max() > 0.01


def test_fit_is_the_same_every_time():
    x, labels = problem()
    states = []
    for _ in range(2):
        model = network()
        nn.fit(model, x, labels, nn.Adam(model), epochs=2, rng=3)
        states.append(model.state_dict())
    for name, array in states[0].items():
        np.testing.assert_array_equal(array, states[1][name])


def test_after_step_may_evaluate():
    x, labels = problem()
    model = network()
    seen = []
    modes = []

    def after_step(step):
        modes.append(model.training)
        seen.append((step, nn.accuracy(model.eval(), x, labels, batch_size=7)))

    nn.fit(model, x, labels, nn.SGD(model, 0.1), batch_size=100, after_step=after_step)
    assert [step for step, _ in seen] == [1, 2, 3, 4] and all(modes)
    assert model.layers[1].num_batches_tracked == 4


def test_accuracy_restores_the_mode_and_checks():
    x, labels = problem()
    model = network().train()
    one = nn.accuracy(model, x, labels, batch_size=64)
    assert model.training and model.layers[1].training and model.layers[1].num_batches_tracked == 0
    assert one == nn.accuracy(model.eval(), x, labels) and not model.training
    with pytest.raises(ValueError, match=r"labels has shape \(399,\), and must have shape \(400,\): one a row of x"):
        nn.accuracy(model, x, labels[1:])
    with pytest.raises(ValueError, match=r"x has shape \(0, 6\), and must have at least one row"):
        nn.accuracy(model, x[:0], labels[:0])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda labels: labels[:, None], ValueError, r"labels has shape \(400, 1\)"),
        (lambda labels: np.eye(4, dtype=int)[labels], ValueError, r"labels has shape \(400, 4\)"),
        (lambda labels: labels.astype(str), TypeError, "labels has dtype <U.*, and must be integers: the numbers of"),
        (lambda labels: labels.astype(float), TypeError, "labels has dtype float64"),
    ],
    ids=["column", "one-hot", "str", "float"],
)
def test_accuracy_takes_labels_alone(change, error, message):
    x, labels = problem()
    with pytest.raises(error, match=message):
        nn.accuracy(network(), x, change(labels))


def test_accuracy_takes_logits_of_classes_alone():
    x, labels = problem()
    model = nn.Linear(6, 1)
    with pytest.raises(ValueError, match=r"model gives outputs of shape \(400, 1\), and must give one logit a class"):
        nn.accuracy(model, x, labels)
    with pytest.raises(ValueError, match=r"model gives outputs of shape \(400, 2, 3\)"):
        nn.accuracy(nn.ReLU(), x.reshape(400, 2, 3), labels)
    assert model.training
    assert nn.accuracy(network(), x, labels.tolist()) == nn.accuracy(network(), x, labels.astype(np.uint8))


def test_fit_errors():
    x, labels = problem()
    model = network()
    with pytest.raises(TypeError, match="x has dtype float64, and must have the layer's dtype"):
        nn.fit(model, x.astype(np.float64), labels, nn.SGD(model, 0.1))
    with pytest.raises(ValueError, match="epochs is 0"):
        nn.fit(model, x, labels, nn.SGD(model, 0.1), epochs=0)
    with pytest.raises(ValueError, match="labels goes from 0 to 3, and must be from 0 to 1"):
        small = nn.Linear(6, 2)
        nn.fit(small, x, labels, nn.SGD(small, 0.1))


def test_the_bar_is_shown_only_when_asked(capsys):
    pytest.importorskip("tqdm")
    x, labels = problem()
    model = network()
    nn.fit(model, x, labels, nn.SGD(model, 0.1))
    assert capsys.readouterr().err == ""
    nn.fit(model, x, labels, nn.SGD(model, 0.1), progress="learning")
    assert "learning: 100%" in capsys.readouterr().err


def test_a_missing_tqdm_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    x, labels = problem()
    model = network()
    with pytest.raises(ImportError, match=r"tqdm: pip install 'fastbn\[demo\]'"):
        nn.fit(model, x, labels, nn.SGD(model, 0.1), progress=True)
    nn.fit(model, x, labels, nn.SGD(model, 0.1))
