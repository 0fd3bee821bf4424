"""AdamW, what decays, going on from a saved state bit for bit, and schedules."""

from functools import partial

import numpy as np
import pytest
from test_nn_training import Parameters, new_gradients, problem

from fastbn import nn
from fastbn.nn.optimizers import AdamW
from fastbn.nn.schedules import constant, cosine, exponential

OPTIMIZERS = {
    "SGD": lambda m: nn.SGD(m, 0.1),
    "SGD with momentum": lambda m: nn.SGD(m, 0.05, momentum=0.9, weight_decay=0.01),
    "RMSprop": lambda m: nn.RMSprop(m, 0.002),
    "Adam": lambda m: nn.Adam(m, 0.01, weight_decay=0.01),
    "AdamW": lambda m: AdamW(m, 0.01, weight_decay=0.1),
}


def test_adamw_follows_the_rule():
    model = Parameters()
    optimizer = AdamW(model, 0.02, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.3)
    want = [value.copy() for value in model.values]
    moments = [[0.0, 0.0] for _ in want]
    for t in range(1, 6):
        new_gradients(model, t)
        for i, g in enumerate(model.gradients):
            moments[i] = [0.8 * moments[i][0] + 0.2 * g, 0.95 * moments[i][1] + 0.05 * g**2]
            step = moments[i][0] / (1 - 0.8**t) / (np.sqrt(moments[i][1] / (1 - 0.95**t)) + 1e-3)
            want[i] = want[i] - 0.02 * (step + 0.3 * want[i])
        optimizer.step()
        for value, expected in zip(model.values, want, strict=True):
            np.testing.assert_allclose(value, expected, rtol=1e-12)


@pytest.mark.parametrize("options", [{}, {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.3}], ids=str)
def test_adamw_is_torchs(options):
    torch = pytest.importorskip("torch")
    model = Parameters(np.float32)
    copies = [torch.nn.Parameter(torch.tensor(value)) for value in model.values]
    optimizer, reference = AdamW(model, **options), torch.optim.AdamW(copies, **options)
    for t in range(20):
        new_gradients(model, t)
        for copy, gradient in zip(copies, model.gradients, strict=True):
            copy.grad = torch.tensor(gradient)
        optimizer.lr = reference.param_groups[0]["lr"] = optimizer.lr * 0.9
        optimizer.step()
        reference.step()
    for value, copy in zip(model.values, copies, strict=True):
        np.testing.assert_allclose(value, copy.detach().numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [nn.SGD, nn.RMSprop, nn.Adam, AdamW])
def test_vectors_decay_or_not(kind):
    """Model 0 without decay, 1 with it, 2 with it for matrices alone."""
    models = [Parameters() for _ in range(3)]
    optimizers = [kind(model, 0.1, weight_decay=decay) for model, decay in zip(models, (0.0, 0.5, 0.5), strict=True)]
    optimizers[2].decay_vectors = False
    for model, optimizer in zip(models, optimizers, strict=True):
        for step in range(3):
            new_gradients(model, step)
            optimizer.step()
    (matrix, vector), (decayed_matrix, decayed_vector), (third_matrix, third_vector) = (m.values for m in models)
    np.testing.assert_array_equal(third_matrix, decayed_matrix)
    np.testing.assert_array_equal(third_vector, vector)
    assert np.abs(decayed_matrix - matrix).max() > 1e-3 and np.abs(decayed_vector - vector).max() > 1e-3


# ---- state ----


def network():
    rng = np.random.default_rng(1)
    return nn.Sequential(nn.Linear(6, 16, rng=rng), nn.BatchNorm(16), nn.ReLU(), nn.Linear(16, 4, rng=rng))


def train(model, optimizer, steps):
    x, labels = problem()
    loss = nn.SoftmaxCrossEntropy()
    model.train()
    for step in steps:
        rows = slice(20 * step, 20 * step + 20)
        optimizer.lr *= 0.99
        loss(model(x[rows]), labels[rows])
        model.parameter_gradients(loss.backward())
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_is_the_run(name, tmp_path):
    straight = network()
    optimizer = OPTIMIZERS[name](straight)
    train(straight, optimizer, range(8))

    first = network()
    before = OPTIMIZERS[name](first)
    train(first, before, range(4))
    np.savez(tmp_path / "model.npz", **first.state_dict())
    np.savez(tmp_path / "optimizer.npz", **before.state_dict())
    resumed = network()
    after = OPTIMIZERS[name](resumed)
    with np.load(tmp_path / "model.npz") as file:
        resumed.load_state_dict(dict(file))
    with np.load(tmp_path / "optimizer.npz") as file:
        after.load_state_dict(dict(file))
    assert after.steps == 4 and after.lr == before.lr
    train(resumed, after, range(4, 8))
    for key, array in straight.state_dict().items():
        np.testing.assert_array_equal(resumed.state_dict()[key], array)
    for key, array in optimizer.state_dict().items():
        np.testing.assert_array_equal(after.state_dict()[key], array)


def test_state_is_copied_both_ways():
    model = Parameters()
    optimizer = nn.Adam(model)
    new_gradients(model, 0)
    optimizer.step()
    state = optimizer.state_dict()
    assert list(state) == ["steps", "lr", "state.0.0", "state.0.1", "state.1.0", "state.1.1"]
    assert state["state.0.1"].shape == (3, 4) and state["steps"] == 1 and state["lr"] == 0.001
    state["state.0.0"] += 1
    assert np.abs(optimizer.state_dict()["state.0.0"] - state["state.0.0"]).min() > 0.5
    optimizer.load_state_dict(state)
    np.testing.assert_array_equal(optimizer.state_dict()["state.0.0"], state["state.0.0"])
    state["state.0.0"] += 1
    assert np.abs(optimizer.state_dict()["state.0.0"] - state["state.0.0"]).min() > 0.5
    assert list(nn.SGD(model, 0.1).state_dict()) == ["steps", "lr"]


def changed(**entries):
    return lambda state: {name: array for name, array in (state | entries).items() if array is not None}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (changed(lr=None), ValueError, r"state lacks \['lr'\]"),
        (changed(more=np.zeros(2)), ValueError, r"unknown \['more'\]"),
        (lambda state: [1, 2], TypeError, "state is a list, and must be a mapping"),
        (changed(steps=np.array(1.5)), ValueError, "steps is 1.5, and must be an integer"),
        (changed(lr=np.array(-1.0)), ValueError, "lr is -1.0, and must be at least 0"),
        (changed(lr=np.zeros(2)), ValueError, r"lr has shape \(2,\)"),
        (changed(**{"state.1.1": np.zeros(4)}), ValueError, r"state.1.1 has shape \(4,\) in state.*\(5,\)"),
        (
            changed(**{"state.1.1": np.zeros(5, np.float32)}),
            TypeError,
            "state.1.1 has dtype float32 in state, and must have dtype float64",
        ),
    ],
)
def test_bad_state_leaves_the_optimizer_as_it_was(change, error, message):
    model = Parameters()
    optimizer = nn.Adam(model)
    new_gradients(model, 0)
    optimizer.step()
    before = optimizer.state_dict()
    other = {"steps": np.array(7), "lr": np.array(0.5)} | {k: v + 1 for k, v in before.items() if k.startswith("state")}
    with pytest.raises(error, match=message):
        optimizer.load_state_dict(change(other))
    for name, array in optimizer.state_dict().items():
        np.testing.assert_array_equal(array, before[name])


# ---- schedules ----


def test_schedules_at_their_ends():
    assert [constant(step) for step in (0, 5)] == [1, 1]
    assert [exponential(step, gamma=0.5) for step in (0, 1, 3)] == [1, 0.5, 0.125]
    assert [cosine(step, steps=4) for step in (0, 2, 4, 9)] == pytest.approx([1, 0.5, 0, 0])
    assert [cosine(step, steps=4, final=0.2) for step in (0, 2, 4, 9)] == pytest.approx([1, 0.6, 0.2, 0.2])


@pytest.mark.parametrize(
    ("schedule", "theirs", "options"),
    [
        (partial(exponential, gamma=0.9), "ExponentialLR", {"gamma": 0.9}),
        (partial(cosine, steps=10, final=0.1), "CosineAnnealingLR", {"T_max": 10, "eta_min": 0.05}),
    ],
    ids=["exponential", "cosine"],
)
def test_schedules_are_torchs(schedule, theirs, options):
    torch = pytest.importorskip("torch")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.5)
    scheduler = getattr(torch.optim.lr_scheduler, theirs)(optimizer, **options)
    for step in range(11):
        assert 0.5 * schedule(step) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: exponential(1, gamma=0), "gamma is 0, and must be greater than 0 and at most 1"),
        (lambda: exponential(1, gamma=1.1), "gamma is 1.1"),
        (lambda: cosine(1, steps=0), "steps is 0, and must be at least 1"),
        (lambda: cosine(1, steps=3, final=2), "final is 2"),
    ],
)
def test_schedule_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
