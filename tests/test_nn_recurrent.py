"""RNN and LSTM through time, plain and batch-normalized: gradients, torch, statistics, memory, state, errors."""

import copy
import pickle
import tracemalloc

import numpy as np
import pytest
from test_nn_layers import numeric_gradient
from threadpoolctl import threadpool_limits

import fastbn
from fastbn import nn

F64 = np.float64
STEPS, BATCH, INPUT, HIDDEN = 4, 5, 3, 2

# Every kind of layer and normalization. gamma: 0.5, so that 0.1's small numbers hide nothing.
NORMS = (None, "input", "sum", "recurrent")
KINDS = {f"RNN {norm}": (nn.RNN, {"norm": norm}) for norm in NORMS}
KINDS |= {f"RNN relu {norm}": (nn.RNN, {"norm": norm, "nonlinearity": "relu"}) for norm in NORMS}
KINDS |= {f"LSTM {norm}": (nn.LSTM, {"norm": norm}) for norm in NORMS}
every_kind = pytest.mark.parametrize("kind", KINDS)
normalized = pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.endswith("None")])


def layer_of(kind, *, steps=STEPS, dtype=F64, **options):
    cls, given = KINDS[kind]
    options = {"gamma": 0.5, "rng": 0, "dtype": dtype} | given | options
    if options["norm"] in ("sum", "recurrent"):
        options["steps"] = steps
    layer = cls(INPUT, HIDDEN, **options)
    rng = np.random.default_rng(1)
    for parameter, _ in layer.parameters():  # away from what is equal at the start, as the normalizations' weights
        parameter += 0.3 * rng.standard_normal(parameter.shape)
    return layer


def sequences(seed=2, shape=(STEPS, BATCH, INPUT), dtype=F64):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def initial(layer, batch=BATCH, seed=3):
    """States before the first step that differ from row to row."""
    names = ("h0", "c0") if isinstance(layer, nn.LSTM) else ("h0",)
    return {name: sequences(seed + i, (batch, HIDDEN), layer.dtype) for i, name in enumerate(names)}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def by_the_formulas(layer, x, h, c=None, *, steps=None):
    """h_1 to h_T as the papers write them, (steps, batch, hidden); steps: eval mode, by statistics of so many steps."""
    state = layer.state_dict()
    seen = {}

    def bn(name, values, t):
        weight, bias = state[f"{name}.weight"], state.get(f"{name}.bias", 0)
        if steps is None:
            mean, var = values.mean(axis=0), values.var(axis=0)
            seen.setdefault(name, []).append((mean, values.var(axis=0, ddof=1)))
        else:
            t = min(t, steps - 1)
            mean, var = state[f"{name}.running_mean"][t], state[f"{name}.running_var"][t]
        return (values - mean) / np.sqrt(var + layer.eps) * weight + bias

    inputs = x @ state["weight_ih_l0"].T
    if layer.norm == "input":
        flat = inputs.reshape(-1, inputs.shape[-1])
        if steps is None:
            inputs = bn("input_norm", flat, 0).reshape(inputs.shape)
        else:
            mean, var = state["input_norm.running_mean"], state["input_norm.running_var"]
            inputs = (inputs - mean) / np.sqrt(var + layer.eps) * state["input_norm.weight"]
    hidden = []
    for t in range(len(x)):
        a, r = inputs[t], h @ state["weight_hh_l0"].T
        if layer.norm == "recurrent":
            z = bn("input_norm", a, t) + bn("hidden_norm", r, t)
        else:
            z = a + r if layer.norm != "sum" else bn("sum_norm", a + r, t)
        z = z + state.get("bias_ih_l0", 0) + state.get("bias_hh_l0", 0)
        if isinstance(layer, nn.LSTM):
            i, f, g, o = np.split(z, 4, axis=1)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(bn("cell_norm", c, t) if layer.norm == "recurrent" else c)
        else:
            h = np.tanh(z) if layer.nonlinearity == "tanh" else np.maximum(z, 0)
        hidden.append(h)
    return np.array(hidden), seen


# ---- what is computed ----


@every_kind
def test_forward_is_the_formulas(kind):
    layer, x = layer_of(kind), sequences()
    states = initial(layer)
    expected, _ = by_the_formulas(layer, x, *states.values())
    np.testing.assert_allclose(layer(x, **states), expected, rtol=1e-10, atol=1e-12)


@every_kind
def test_gradients_through_time(kind):
    layer, x = layer_of(kind), sequences()
    states = initial(layer)
    c = sequences(5, (STEPS, BATCH, HIDDEN))

    def value():
        return float(np.sum(c * layer(x, **states)))

    value()
    dx = layer.backward(c).copy()
    got = [dx, *(getattr(layer, f"grad_{name}").copy() for name in states)]
    got += [gradient.copy() for _, gradient in layer.parameters()]
    arrays = [x, *states.values(), *(parameter for parameter, _ in layer.parameters())]
    for gradient, array in zip(got, arrays, strict=True):
        np.testing.assert_allclose(gradient, numeric_gradient(value, array), rtol=1e-6, atol=1e-7)


@every_kind
def test_gradients_from_zero_states(kind):
    """W_hh·h_0 has no variance there, nor has what it passes on: normalized, it is 0."""
    layer, x = layer_of(kind), sequences()
    c = sequences(5, (STEPS, BATCH, HIDDEN))

    def value():
        return float(np.sum(c * layer(x)))

    value()
    dx = layer.backward(c).copy()
    gradients = [gradient.copy() for _, gradient in layer.parameters()]
    np.testing.assert_allclose(dx, numeric_gradient(value, x), rtol=1e-6, atol=1e-7)
    for (parameter, _), gradient in zip(layer.parameters(), gradients, strict=True):
        np.testing.assert_allclose(gradient, numeric_gradient(value, parameter), rtol=1e-6, atol=1e-7)


@every_kind
def test_batch_first_is_the_same_transposed(kind):
    layer, other = layer_of(kind), layer_of(kind, batch_first=True)
    x, dy = sequences(), sequences(5, (STEPS, BATCH, HIDDEN))
    turned = np.ascontiguousarray(x.swapaxes(0, 1))
    y, dx = layer(x).copy(), layer.backward(dy).copy()
    assert other(turned).shape == (BATCH, STEPS, HIDDEN)
    np.testing.assert_array_equal(other(turned).swapaxes(0, 1), y)
    np.testing.assert_array_equal(other.backward(dy.swapaxes(0, 1)).swapaxes(0, 1), dx)
    for (_, one), (_, two) in zip(layer.parameters(), other.parameters(), strict=True):
        np.testing.assert_array_equal(one, two)


@every_kind
def test_any_memory_order_is_the_same(kind):
    layer = layer_of(kind)
    x, dy = sequences(), sequences(5, (STEPS, BATCH, HIDDEN))
    y, dx = layer(x).copy(), layer.backward(dy).copy()
    np.testing.assert_array_equal(layer(np.asfortranarray(x)), y)
    np.testing.assert_array_equal(layer.backward(np.asfortranarray(dy)), dx)


@pytest.mark.parametrize("norm", ["input", None])
def test_parameter_gradients_are_those_of_backward(norm):
    layer = layer_of(f"LSTM {norm}")
    dy = sequences(5, (STEPS, BATCH, HIDDEN))
    layer(sequences())
    layer.backward(dy)
    whole = [gradient.copy() for _, gradient in layer.parameters()]
    for _ in range(2):  # and a second time: `backward` leaves what it needs
        layer.parameter_gradients(dy)
        for (_, gradient), expected in zip(layer.parameters(), whole, strict=True):
            np.testing.assert_array_equal(gradient, expected)


@every_kind
def test_without_bias(kind):
    layer, x = layer_of(kind, bias=False), sequences()
    assert layer.bias_ih_l0 is None and "bias_hh_l0" not in layer.state_dict()
    states = initial(layer)
    expected, _ = by_the_formulas(layer, x, *states.values())
    np.testing.assert_allclose(layer(x, **states), expected, rtol=1e-10, atol=1e-12)
    layer.backward(np.ones((STEPS, BATCH, HIDDEN)))
    assert all(gradient is not None for _, gradient in layer.parameters())


def test_grad_hidden_is_the_gradient_of_each_state():
    """What reaches h_t through later steps: seen by starting anew from h_t and c_t."""
    layer, x = layer_of("LSTM None"), sequences()
    dy = np.zeros((STEPS, BATCH, HIDDEN))
    dy[-1] = sequences(5, (BATCH, HIDDEN))
    layer(x)
    layer.backward(dy)
    hidden = layer.grad_hidden.copy()
    np.testing.assert_array_equal(hidden[-1], dy[-1])
    layer(x[:2])
    states = layer.last_state()
    layer(x[2:], **states)
    layer.backward(dy[2:])
    np.testing.assert_allclose(layer.grad_h0, hidden[1], rtol=1e-12)
    np.testing.assert_allclose(layer.grad_hidden, hidden[2:], rtol=1e-12)


@pytest.mark.parametrize("cell", ["RNN", "LSTM"])
def test_last_state_goes_on(cell):
    layer, x = layer_of(f"{cell} None"), sequences()
    whole = layer(x).copy()
    layer(x[:2])
    np.testing.assert_allclose(layer(x[2:], **layer.last_state()), whole[2:], rtol=1e-12)


# ---- torch ----


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("cell", ["RNN", "RNN relu", "LSTM"])
def test_against_torch(cell, batch_first, dtype):
    torch = pytest.importorskip("torch")
    ours = layer_of(f"{cell} None", batch_first=batch_first, dtype=dtype)
    name, *relu = cell.split()
    options = {"nonlinearity": "relu"} if relu else {}
    theirs = getattr(torch.nn, name)(INPUT, HIDDEN, batch_first=batch_first, **options)
    theirs = theirs.to(getattr(torch, np.dtype(dtype).name))
    assert list(theirs.state_dict()) == list(ours.state_dict())
    ours.load_state_dict({key: value.numpy() for key, value in theirs.state_dict().items()})
    x = sequences(dtype=dtype)
    dy = sequences(5, (STEPS, BATCH, HIDDEN), dtype)
    if batch_first:
        x, dy = x.swapaxes(0, 1), dy.swapaxes(0, 1)
    states = initial(ours)
    their_x = torch.tensor(x, requires_grad=True)
    their_states = [torch.tensor(state[None], requires_grad=True) for state in states.values()]
    expected = theirs(their_x, tuple(their_states) if len(states) > 1 else their_states[0])[0]
    expected.backward(torch.tensor(dy))
    close = {"rtol": 1e-12, "atol": 1e-13} if dtype is np.float64 else {"rtol": 2e-5, "atol": 2e-6}
    np.testing.assert_allclose(ours(x, **states), expected.detach().numpy(), **close)
    np.testing.assert_allclose(ours.backward(dy), their_x.grad.numpy(), **close)
    for state, theirs_ in zip(states, their_states, strict=True):
        np.testing.assert_allclose(getattr(ours, f"grad_{state}"), theirs_.grad.numpy()[0], **close)
    for (_, gradient), parameter in zip(ours.parameters(), theirs.parameters(), strict=True):
        np.testing.assert_allclose(gradient, parameter.grad.numpy(), **close)


# ---- statistics ----


@pytest.mark.parametrize("momentum", [0.3, None])
@normalized
def test_running_statistics_are_those_of_each_step(kind, momentum):
    layer, norm = layer_of(kind, momentum=momentum), KINDS[kind][1]["norm"]
    expected = {}
    for batch in range(3):
        x, states = sequences(10 + batch), initial(layer, seed=20 + batch)
        _, seen = by_the_formulas(layer, x, *states.values())
        layer(x, **states)
        for name, moments in seen.items():
            rate = 1 / (batch + 1) if momentum is None else momentum
            mean, var = (np.array(values) for values in zip(*moments, strict=True))
            before = expected.get(name, (0.0, 1.0))
            expected[name] = before[0] + rate * (mean - before[0]), before[1] + rate * (var - before[1])
    state = layer.state_dict()
    assert len(expected) == {"input": 1, "sum": 1, "recurrent": 2 + isinstance(layer, nn.LSTM)}[norm]
    for name, (mean, var) in expected.items():
        if norm == "input":  # one for all steps
            mean, var = mean[0], var[0]
        np.testing.assert_allclose(state[f"{name}.running_mean"], mean, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(state[f"{name}.running_var"], var, rtol=1e-9, atol=1e-12)
        assert (state[f"{name}.num_batches_tracked"] == 3).all()


@normalized
def test_longer_sequences_reuse_the_last_trained_step(kind):
    """Room for 6 steps, trained on 4, used on 8; and the statistics do not change in use."""
    layer = layer_of(kind, steps=6)
    for seed in range(3):
        layer(sequences(seed), **initial(layer, seed=seed))
    layer.eval()
    before = layer.state_dict()
    x, states = sequences(9, (8, BATCH, INPUT)), initial(layer)
    expected, _ = by_the_formulas(layer, x, *states.values(), steps=STEPS)
    np.testing.assert_allclose(layer(x, **states), expected, rtol=1e-10, atol=1e-12)
    one = {name: state[:1] for name, state in states.items()}  # one row is no trouble here
    np.testing.assert_allclose(layer(x[:, :1], **one), expected[:, :1], rtol=1e-10, atol=1e-12)
    for name, array in layer.state_dict().items():
        np.testing.assert_array_equal(array, before[name])


@normalized
def test_statistics_can_be_estimated_anew(kind):
    layer, x = layer_of(kind, momentum=0.5), sequences()
    fresh = layer_of(kind, momentum=None)
    layer(sequences(8))
    layer.momentum = None
    layer.reset_running_stats()
    for other in (layer, fresh):
        other(x)
        other(sequences(7))
    for name, array in fresh.state_dict().items():
        np.testing.assert_array_equal(layer.state_dict()[name], array)


def test_update_bn_finds_the_sequence_wise_norm():
    layer, x = layer_of("LSTM input", batch_first=True), sequences(shape=(20, STEPS, INPUT))
    other = layer_of("LSTM input", batch_first=True, momentum=1.0)
    other(x)
    nn.update_bn(nn.Sequential(layer, nn.LastStep(batch_first=True)), x)
    np.testing.assert_allclose(layer.input_norm.running_mean, other.input_norm.running_mean, rtol=1e-12)
    assert layer.momentum == layer.input_norm.momentum == 0.1


@pytest.mark.parametrize("kind", ["RNN sum", "LSTM recurrent"])
def test_update_bn_finds_each_steps_norms(kind):
    """The plain average over batches, step by step; a failure changes nothing."""
    layer, other = layer_of(kind, batch_first=True), layer_of(kind, batch_first=True, momentum=None)
    x = sequences(shape=(20, STEPS, INPUT))
    layer(x[::-1])
    for half in (x[:10], x[10:]):
        other(half)
    nn.update_bn(nn.Sequential(layer, nn.LastStep(batch_first=True)), x, batch_size=10)
    for name, array in other.state_dict().items():
        np.testing.assert_array_equal(layer.state_dict()[name], array)
    assert layer.momentum == 0.1
    before = layer.state_dict()
    with pytest.raises(ValueError, match="steps"):
        nn.update_bn(layer, sequences(shape=(20, STEPS + 1, INPUT)))
    for name, array in before.items():
        np.testing.assert_array_equal(layer.state_dict()[name], array)


def test_an_untrained_layer_normalizes_by_mean_0_and_variance_1():
    layer, x = layer_of("RNN sum").eval(), sequences()
    expected, _ = by_the_formulas(layer, x, np.zeros((BATCH, HIDDEN)), steps=1)
    np.testing.assert_allclose(layer(x), expected, rtol=1e-10)


def test_gamma_starts_as_each_paper_has_it():
    for norm, gamma in (("input", 1), ("sum", 1), ("recurrent", 0.1)):
        steps = None if norm == "input" else 4
        layer = nn.LSTM(3, 2, norm=norm, steps=steps)
        weights = [norm.weight for _, norm in layer._norms()]
        assert weights and all((weight == np.float32(gamma)).all() for weight in weights)
        assert (nn.LSTM(3, 2, norm=norm, steps=steps, gamma=0.7).gamma) == 0.7
    assert layer.input_norm.bias is None and layer.hidden_norm.bias is None and layer.cell_norm.bias.shape == (2,)


@pytest.mark.parametrize("kind", ["RNN sum", "LSTM recurrent"])
def test_a_failed_call_leaves_the_statistics(kind, monkeypatch):
    """Also one that is stopped in the middle: the statistics come last."""
    layer, x = layer_of(kind), sequences()
    layer(x)
    before = layer.state_dict()

    def stopped(last, t):
        if t == 2:
            raise KeyboardInterrupt
        kept(last, t)

    kept = layer._cell
    monkeypatch.setattr(layer, "_cell", stopped)
    with pytest.raises(KeyboardInterrupt):
        layer(x)
    with pytest.raises(ValueError, match="nothing to go back over"):
        layer.backward(np.ones((STEPS, BATCH, HIDDEN)))
    for bad in (x[:, :1], np.concatenate([x, x])):
        with pytest.raises(ValueError, match="x has shape"):
            layer(bad)
    for name, array in layer.state_dict().items():
        np.testing.assert_array_equal(array, before[name])


# ---- start, state, memory, training ----


def test_weights_start_as_torchs_or_orthogonal():
    layer = nn.LSTM(300, 64, rng=0)
    for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0"):
        weight = getattr(layer, name)
        assert weight.dtype == np.float32 and np.abs(weight).max() <= 1 / 8
        assert weight.std() == pytest.approx(1 / 8 / 3**0.5, rel=0.1)
    orthogonal = nn.LSTM(300, 64, rng=0, init="orthogonal", dtype=F64)
    for gate in orthogonal.weight_hh_l0.reshape(4, 64, 64):
        np.testing.assert_allclose(gate @ gate.T, np.eye(64), atol=1e-12)
    np.testing.assert_array_equal(orthogonal.weight_ih_l0.astype(np.float32), layer.weight_ih_l0)
    assert repr(orthogonal) == "LSTM(300, 64, bias=True, batch_first=False, norm=None, dtype=float64)"
    layer = nn.RNN(3, 2, norm="sum", steps=7)
    assert "norm='sum', steps=7, gamma=1.0" in repr(layer) and "nonlinearity='tanh'" in repr(layer)


@every_kind
def test_state_goes_round(kind):
    one, other = layer_of(kind), layer_of(kind, rng=5)
    one(sequences(7))
    x = sequences()
    before = one.eval()(x).copy()
    other.load_state_dict(one.state_dict())
    np.testing.assert_array_equal(other.eval()(x), before)
    for twin in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        np.testing.assert_array_equal(twin(x), before)


@every_kind
def test_copies_carry_no_batch(kind):
    layer = layer_of(kind)
    layer(sequences(shape=(STEPS, 1000, INPUT)))
    layer.backward(np.ones((STEPS, 1000, HIDDEN)))
    assert len(pickle.dumps(layer)) < 12_000
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        with pytest.raises(ValueError, match="nothing to go back over"):
            twin.backward(np.ones((STEPS, 1000, HIDDEN)))


def test_a_copy_that_trains_leaves_the_first_alone():
    one = layer_of("LSTM recurrent")
    twin, before = copy.deepcopy(one), one.state_dict()
    optimizer = nn.SGD(twin, 0.1)
    twin(sequences())
    twin.backward(np.ones((STEPS, BATCH, HIDDEN)))
    optimizer.step()
    for name, array in one.state_dict().items():
        np.testing.assert_array_equal(array, before[name])
        assert not np.array_equal(array, twin.state_dict()[name]), name


def test_bad_state_leaves_the_layer_as_it_was():
    layer = layer_of("LSTM recurrent")
    layer(sequences())
    before = layer.state_dict()
    wrong = {
        "cell_norm.bias": (np.zeros(3), "bias has shape"),
        "hidden_norm.running_var": (np.ones((9, 8)), "running_var has shape"),
        "cell_norm.num_batches_tracked": (np.array([1, 1, 2, 0]), "4 integers of at least 0 that never rise"),
        "hidden_norm.num_batches_tracked": (np.array([1.5, 1, 1, 1]), "never rise"),
        "sum_norm.weight": (np.zeros(8), "unknown"),
    }
    for name, (value, message) in wrong.items():
        changed = {key: array + 1 for key, array in before.items()}
        with pytest.raises(ValueError, match=message):
            layer.load_state_dict(changed | {name: value})
        for key, array in layer.state_dict().items():
            np.testing.assert_array_equal(array, before[key])
    with pytest.raises(ValueError, match=r"state lacks \['bias_hh_l0'\]"):
        layer.load_state_dict({key: array for key, array in before.items() if key != "bias_hh_l0"})


@pytest.mark.skipif(fastbn.backends.kernels().NAME == "reference", reason="the reference kernels work in new arrays")
@pytest.mark.parametrize("norm", ["input", "recurrent", None])
def test_a_steady_step_allocates_nothing_of_a_sequences_size(norm):
    steps, batch, hidden = 10, 128, 96
    options = {"norm": norm} | ({"steps": steps} if norm == "recurrent" else {})
    net = nn.Sequential(
        nn.LSTM(32, hidden, batch_first=True, rng=0, **options),
        nn.LastStep(batch_first=True),
        nn.Linear(hidden, 10, rng=1),
    )
    loss, optimizer = nn.SoftmaxCrossEntropy(), nn.SGD(net, 0.1)
    x = sequences(shape=(300, steps, 32), dtype=np.float32)
    batches = nn.Batches(x, np.arange(300) % 10, batch, rng=0)  # 128, 128 and 44 rows

    def epoch():
        for rows, labels in batches:
            loss(net(rows), labels)
            net.parameter_gradients(loss.backward())
            optimizer.step()

    # Products this small gain nothing from a second thread, and lose much where another program has that core.
    with threadpool_limits(1, user_api="blas"):
        epoch()
        tracemalloc.start()
        try:
            epoch()
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            epoch()
            peak = tracemalloc.get_traced_memory()[1] - before
        finally:
            tracemalloc.stop()
    # The states of the smallest batch are 44·10·96·4 = 169 kB, its gates four times that. What is left are NumPy's
    # buffers for operands that are not contiguous, 8192 numbers each, two at a time; and the steps' statistics, float64
    # mean and variance of 2·384 + 96 features at 10 steps: 138 kB.
    assert peak < 90_000 + (150_000 if norm == "recurrent" else 0)


@pytest.mark.parametrize("kind", KINDS)
def test_training_reduces_the_loss(kind):
    """To tell the sign of the first step's sum at the end."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((256, 6, INPUT)).astype(np.float32)
    labels = (x[:, 0].sum(axis=1) > 0).astype(int)
    cls, given = KINDS[kind]
    options = given | ({"steps": 6} if given["norm"] in ("sum", "recurrent") else {})
    net = nn.Sequential(
        cls(INPUT, 16, batch_first=True, rng=rng, **options), nn.LastStep(batch_first=True), nn.Linear(16, 2, rng=rng)
    )
    losses = nn.fit(net, x, labels, nn.Adam(net, 0.01), epochs=30, batch_size=32, rng=1).losses
    assert losses[-1] < 0.6 * losses[0]
    assert nn.accuracy(net, x, labels) > 0.85


@pytest.mark.parametrize("batch_first", [False, True])
def test_last_step(batch_first):
    layer, x = nn.LastStep(batch_first=batch_first), sequences()
    turned = x.swapaxes(0, 1) if batch_first else x
    np.testing.assert_array_equal(layer(turned), x[-1])
    dx = layer.backward(np.ones((BATCH, INPUT)))
    assert dx.shape == turned.shape
    dx = dx.swapaxes(0, 1) if batch_first else dx
    assert (dx[:-1] == 0).all() and (dx[-1] == 1).all()
    assert repr(layer) == f"LastStep(batch_first={batch_first})" and not list(layer.parameters())


# ---- errors ----

X = np.zeros((STEPS, BATCH, INPUT))
DY = np.zeros((STEPS, BATCH, HIDDEN))


def called(kind, *, training=True, **options):
    layer = layer_of(kind, **options).train(training)
    layer(X)
    return layer


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: nn.RNN(0, 3), ValueError, "input_size is 0"),
        (lambda: nn.LSTM(3, 2.5), TypeError, "hidden_size is 2.5"),
        (lambda: nn.RNN(3, 2, nonlinearity="sigmoid"), ValueError, "nonlinearity is 'sigmoid'"),
        (lambda: nn.RNN(3, 2, norm="batch"), ValueError, "norm is 'batch'.*'input', 'sum', 'recurrent'"),
        (lambda: nn.RNN(3, 2, init="zeros"), ValueError, "init is 'zeros'"),
        (lambda: nn.RNN(3, 2, bias=1), TypeError, "bias is 1"),
        (lambda: nn.RNN(3, 2, batch_first="yes"), TypeError, "batch_first is 'yes'"),
        (lambda: nn.RNN(3, 2, dtype=np.float16), TypeError, "dtype is float16"),
        (lambda: nn.RNN(3, 2, norm="sum", steps=4, gamma=-1), ValueError, "gamma is -1"),
        (lambda: nn.RNN(3, 2, norm="sum"), ValueError, "steps is None, and must be the length of the longest"),
        (lambda: nn.RNN(3, 2, norm="sum", steps=0), ValueError, "steps is 0"),
        (lambda: nn.RNN(3, 2, norm="input", steps=4), ValueError, "steps is 4, and must be None with norm='input'"),
        (lambda: setattr(nn.RNN(3, 2), "momentum", 2), ValueError, "momentum is 2"),
        (lambda: layer_of("RNN None")(X.astype(np.float32)), TypeError, "x has dtype float32.*float64"),
        (lambda: layer_of("RNN None")(X.tolist()), TypeError, "x is a list"),
        (lambda: layer_of("RNN None")(X[0]), ValueError, r"x has shape \(5, 3\).*\(steps, batch, 3\) with batch_first"),
        (lambda: layer_of("RNN None", batch_first=True)(X[:, :, :2]), ValueError, r"\(batch, steps, 3\)"),
        (lambda: layer_of("RNN None")(X[:0]), ValueError, "without a step, and must have at least one step"),
        (lambda: layer_of("RNN None")(X, DY[0, :2]), ValueError, r"h0 has .* shape \(5, 2\): batch, hidden_size"),
        (lambda: layer_of("LSTM None")(X, c0=DY), ValueError, "c0 has shape"),
        (lambda: layer_of("LSTM None")(X, c0=[0]), TypeError, "c0 is a list"),
        (lambda: layer_of("RNN sum", steps=3)(X), ValueError, r"4 steps, and in training must have at most 3"),
        (lambda: layer_of("LSTM recurrent")(X[:, :1]), ValueError, "one value a channel"),
        (lambda: layer_of("RNN None").backward(DY), ValueError, "call the layer first"),
        (lambda: layer_of("RNN None").last_state(), ValueError, "call the layer first"),
        (lambda: called("RNN None").backward(DY[:2]), ValueError, r"dy has shape \(2, 5, 2\).*as the layer's result"),
        (lambda: called("RNN None").backward(X), ValueError, r"dy has shape \(4, 5, 3\)"),
        (lambda: called("RNN sum", training=False).backward(DY), ValueError, "one in training mode"),
        (lambda: called("LSTM input", training=False).backward(DY), ValueError, "one in training mode"),
        (lambda: nn.LastStep(batch_first=1), TypeError, "batch_first is 1"),
        (lambda: nn.LastStep()(X[0]), ValueError, r"x has shape \(5, 3\).*\(steps, batch, features\)"),
        (lambda: nn.LastStep().backward(X), ValueError, "call the layer first"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()
