"""Layers, loss and Sequential: gradients by finite differences, memory, dtype, state, errors."""

import pickle
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import scipy.special

import fastbn
from fastbn import nn

F64 = np.float64


def numeric_gradient(f, array, step=1e-6):
    """Central differences of the number f() with respect to each element of `array`."""
    gradient = np.empty_like(array)
    for i in np.ndindex(array.shape):
        kept = array[i]
        array[i] = kept + step
        above = f()
        array[i] = kept - step
        gradient[i] = (above - f()) / (2 * step)
        array[i] = kept
    return gradient


def check_gradients(layer, x, seed=1):
    """dx and every parameter's gradient of Σ c·layer(x), against central differences."""
    c = np.random.default_rng(seed).standard_normal(layer(x).shape)

    def value():
        return float(np.sum(c * layer(x)))

    value()
    dx = layer.backward(c).copy()
    gradients = [gradient.copy() for _, gradient in layer.parameters()]
    np.testing.assert_allclose(dx, numeric_gradient(value, x), rtol=1e-6, atol=1e-7)
    for (parameter, _), gradient in zip(layer.parameters(), gradients, strict=True):
        np.testing.assert_allclose(gradient, numeric_gradient(value, parameter), rtol=1e-6, atol=1e-7)


LAYERS = {
    "linear": lambda: nn.Linear(4, 3, rng=0, dtype=F64),
    "linear without bias": lambda: nn.Linear(4, 3, bias=False, rng=0, dtype=F64),
    "batch norm": lambda: nn.BatchNorm(4, dtype=F64),
    "batch norm, not affine": lambda: nn.BatchNorm(4, affine=False, dtype=F64),
    "relu": nn.ReLU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "sequential": lambda: nn.Sequential(
        nn.Linear(4, 5, init="glorot", rng=0, dtype=F64),
        nn.BatchNorm(5, dtype=F64),
        nn.Sigmoid(),
        nn.Linear(5, 5, rng=1, dtype=F64),
        nn.Tanh(),
        nn.BatchNorm(5, dtype=F64),
        nn.Linear(5, 3, rng=2, dtype=F64),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_gradients(name):
    layer = LAYERS[name]()
    rng = np.random.default_rng(2)
    for parameter, _ in layer.parameters():
        parameter += 0.3 * rng.standard_normal(parameter.shape)
    check_gradients(layer, rng.standard_normal((6, 4)))


def test_parameter_gradients_are_those_of_backward():
    layer = LAYERS["sequential"]()
    rng = np.random.default_rng(3)
    x, dy = rng.standard_normal((6, 4)), rng.standard_normal((6, 3))
    layer(x)
    layer.backward(dy)
    whole = [gradient.copy() for _, gradient in layer.parameters()]
    layer(x)
    layer.parameter_gradients(dy)
    for (_, gradient), expected in zip(layer.parameters(), whole, strict=True):
        np.testing.assert_array_equal(gradient, expected)


def test_loss_and_its_gradient():
    rng = np.random.default_rng(4)
    logits, labels = rng.standard_normal((7, 5)), rng.integers(0, 5, 7)
    loss = nn.SoftmaxCrossEntropy()
    softmax = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert loss(logits, labels) == pytest.approx(-np.log(softmax[np.arange(7), labels]).mean(), rel=1e-12)
    gradient = loss.backward().copy()
    expected = numeric_gradient(lambda: loss(logits, labels), logits)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-9)


def test_loss_is_stable():
    loss = nn.SoftmaxCrossEntropy()
    logits = np.array([[1e4, 0, -1e4], [-1e4, 0, 1e4]], np.float32)
    assert loss(logits, np.array([0, 2])) == 0
    assert loss(logits, np.array([2, 2])) == 1e4
    np.testing.assert_array_equal(loss.backward(), np.array([[0.5, 0, -0.5], [0, 0, 0]], np.float32))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sigmoid_at_the_ends(dtype):
    x = np.array([-np.inf, -1e4, -80, 0, 80, 1e4, np.inf], dtype)
    y = nn.Sigmoid()(x)
    np.testing.assert_allclose(y, [0, 0, np.exp(-80.0), 0.5, 1, 1, 1], rtol=1e-6, atol=2e-38)
    assert np.isnan(nn.Sigmoid()(np.array([np.nan], dtype)))


def test_relu_passes_nothing_at_and_below_zero():
    layer = nn.ReLU()
    np.testing.assert_array_equal(layer(np.array([-1.0, 0.0, 2.0])), [0, 0, 2])
    np.testing.assert_array_equal(layer.backward(np.array([5.0, 5.0, 5.0])), [0, 0, 5])


def test_linear_starts_as_asked():
    he = nn.Linear(400, 300, rng=0).weight
    glorot = nn.Linear(400, 300, init="glorot", rng=0).weight
    assert he.std() == pytest.approx((2 / 400) ** 0.5, rel=0.02)
    assert glorot.std() == pytest.approx((2 / 700) ** 0.5, rel=0.02)
    assert np.abs(glorot).max() <= (6 / 700) ** 0.5
    assert nn.Linear(400, 300, init=0.01, rng=0).weight.std() == pytest.approx(0.01, rel=0.02)
    np.testing.assert_array_equal(he, nn.Linear(400, 300, rng=np.random.default_rng(0)).weight)


# ---- Sequential ----


def test_linear_before_batch_norm_drops_its_bias():
    net = nn.Sequential(
        nn.Linear(4, 5), nn.BatchNorm(5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.BatchNorm(5), nn.Linear(5, 2)
    )
    assert [layer.bias is None for layer in net.layers if isinstance(layer, nn.Linear)] == [True, False, False]
    assert len(list(net.parameters())) == 1 + 2 + 2 + 2 + 2


def test_dropping_a_bias_changes_nothing():
    rng = np.random.default_rng(5)
    linear, norm = nn.Linear(4, 5, rng=rng, dtype=F64), nn.BatchNorm(5, dtype=F64)
    linear.bias[...] = rng.standard_normal(5)
    norm.running_mean[...], norm.running_var[...] = rng.standard_normal(5), rng.random(5)
    x = rng.standard_normal((6, 4))
    expected = norm.eval()(linear(x)).copy()
    np.testing.assert_allclose(nn.Sequential(linear, norm).eval()(x), expected, rtol=1e-12)


def test_nested_sequential_is_flat():
    net = nn.Sequential(nn.Sequential(nn.Linear(4, 5)), nn.Sequential(nn.BatchNorm(5), nn.ReLU()))
    assert len(net.layers) == 3 and net.layers[0].bias is None


def test_train_and_eval_reach_every_layer():
    net = LAYERS["sequential"]()
    assert net.eval() is net and not any(layer.training for layer in net.layers)
    assert net.train() is net and all(layer.training for layer in net.layers) and net.training


def test_state_goes_round():
    rng = np.random.default_rng(6)
    x = rng.standard_normal((6, 4))
    one, other = LAYERS["sequential"](), LAYERS["sequential"]()
    for parameter, _ in one.parameters():
        parameter += rng.standard_normal(parameter.shape)
    one(x)
    other.load_state_dict(one.state_dict())
    np.testing.assert_array_equal(one.eval()(x), other.eval()(x))
    assert "0.bias" not in one.state_dict() and "1.running_var" in one.state_dict()


def test_bad_state_leaves_the_network_as_it_was():
    net = LAYERS["sequential"]()
    before = net.state_dict()
    state = {name: array + 1 for name, array in before.items()}
    state["6.weight"] = np.zeros((2, 2))
    with pytest.raises(ValueError, match="weight has shape"):
        net.load_state_dict(state)
    with pytest.raises(ValueError, match=r"lacks \['6.weight'\]"):
        net.load_state_dict({name: array for name, array in before.items() if name != "6.weight"})
    for name, array in net.state_dict().items():
        np.testing.assert_array_equal(array, before[name])


# ---- BatchNorm and ReLU in one pass ----


def by_hand(net, x, dy):
    """Layer after layer, in which nothing is joined: y, dx and the parameters' gradients."""
    for layer in net.layers:
        x = layer(x)
    y = x.copy()
    for layer in reversed(net.layers):
        dy = layer.backward(dy)
    return [y, dy.copy(), *(gradient.copy() for _, gradient in net.parameters())]


def joined(net, x, dy):
    return [net(x).copy(), net.backward(dy).copy(), *(gradient.copy() for _, gradient in net.parameters())]


def check_bits(monkeypatch, shape, dtype, frozen):
    rng = np.random.default_rng(13)
    nets = [nn.Sequential(nn.BatchNorm(5, dtype=dtype), nn.ReLU()) for _ in range(2)]
    for net in nets:
        net.layers[0].weight[...] = [-2, -0.5, 0, 1, 3]
        net.layers[0].bias[...] = [0.1, 0, -1, 2, 0]
        if frozen:
            net.layers[0].freeze()
    with monkeypatch.context() as patch:
        for method in ("function", "gradient"):  # nobody may call them
            patch.setattr(nets[0].layers[1], method, None)
        for _ in range(2):
            x, dy = (rng.standard_normal(shape).astype(dtype) for _ in range(2))
            for ours, expected in zip(joined(nets[0], x, dy), by_hand(nets[1], x, dy), strict=True):
                np.testing.assert_array_equal(ours, expected)
    for ours, expected in zip(nets[0].state_dict().values(), nets[1].state_dict().values(), strict=True):
        np.testing.assert_array_equal(ours, expected)
    np.testing.assert_array_equal(nets[0].eval()(x), nets[1].layers[1](nets[1].eval().layers[0](x)))


@pytest.mark.parametrize("dtype", [np.float32, F64])
@pytest.mark.parametrize("shape", [(17, 5), (6, 5, 4, 3)], ids=str)
@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
@pytest.mark.parametrize("backend", [None, "reference"])
def test_relu_joined_to_batch_norm_gives_the_same_bits(monkeypatch, backend, shape, dtype, frozen):
    with fastbn.config_context(backend=backend):
        check_bits(monkeypatch, shape, dtype, frozen)


def test_relu_joined_to_batch_norm_gives_the_same_bits_by_any_instruction_set(compiled, monkeypatch):
    check_bits(monkeypatch, (17, 5), np.float32, False)


def test_layers_that_were_joined_serve_by_themselves():
    rng = np.random.default_rng(14)
    net = LAYERS["sequential"]()
    net = nn.Sequential(nn.Linear(4, 5, rng=0, dtype=F64), nn.BatchNorm(5, dtype=F64), nn.ReLU(), net.layers[3])
    x, dy = rng.standard_normal((6, 4)), rng.standard_normal((6, 5))
    together = joined(net, x, dy)
    for ours, expected in zip(by_hand(net, x, dy), together, strict=True):
        np.testing.assert_array_equal(ours, expected)
    assert net.layers[1].activation is None and (net.layers[1](net.layers[0](x)) < 0).any()
    net(x)
    again = pickle.loads(pickle.dumps(net))
    for ours, expected in zip(joined(again, x, dy), together, strict=True):
        np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize(("rows", "threads"), [(4, 2), (1000, 1), (30000, 2)])
def test_batch_norm_between_matrix_products_has_a_team_only_where_it_is_large(monkeypatch, rows, threads):
    given = []
    serving = fastbn.backends.serving

    def recorded(asked=None):
        given.append(serving(asked)[1])
        return serving(asked)

    monkeypatch.setattr(fastbn.backends, "serving", recorded)
    layer, x = nn.BatchNorm(10), np.random.default_rng(16).standard_normal((rows, 10), np.float32)
    layer.backward(layer(x))
    assert set(given) == {threads}  # with 4 rows the kernels have no team, whatever they are given
    given.clear()
    with fastbn.config_context(num_threads=1):
        layer.backward(layer(x))
    assert set(given) == {1}


class Shifted(nn.BatchNorm):
    def __call__(self, x, residual=None, *, out=None):
        return super().__call__(x, residual, out=out) - 0.5


class Clipped(nn.ReLU):
    def function(self, x, y):
        np.clip(x, 0, 0.5, out=y)


@pytest.mark.parametrize(
    "layers",
    [
        lambda: [Shifted(5), nn.ReLU()],
        lambda: [nn.BatchNorm(5), Clipped()],
        lambda: [nn.BatchNorm(5, activation="leaky_relu"), nn.ReLU()],
        lambda: [nn.BatchNorm(5), nn.Tanh()],
        lambda: [nn.BatchNorm(5), nn.BatchNorm(5), nn.ReLU(), nn.ReLU(), nn.BatchNorm(5)],
    ],
    ids=["subclass", "subclass of the activation", "has an activation", "tanh", "a row of them"],
)
def test_only_the_plain_pair_is_joined(layers):
    rng = np.random.default_rng(15)
    x, dy = rng.standard_normal((7, 5)), rng.standard_normal((7, 5))
    for ours, expected in zip(
        joined(net := nn.Sequential(*layers()), x, dy), by_hand(nn.Sequential(*layers()), x, dy), strict=True
    ):
        np.testing.assert_array_equal(ours, expected)
    assert repr(net) == repr(nn.Sequential(*layers()))


def test_a_batch_norm_that_raises_keeps_no_activation():
    net = nn.Sequential(nn.BatchNorm(5), nn.ReLU())
    with pytest.raises(ValueError, match="x has shape"):
        net(np.zeros((2, 4)))
    assert net.layers[0].activation is None


def test_torch_state_loads_and_agrees():
    torch = pytest.importorskip("torch")
    theirs = torch.nn.Sequential(
        torch.nn.Linear(4, 5, bias=False), torch.nn.BatchNorm1d(5), torch.nn.Sigmoid(), torch.nn.Linear(5, 3)
    )
    ours = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm(5), nn.Sigmoid(), nn.Linear(5, 3))
    ours.load_state_dict({name: value.numpy() for name, value in theirs.state_dict().items()})
    x = np.random.default_rng(7).standard_normal((6, 4), np.float32)
    labels = np.array([0, 1, 2, 0, 1, 2])
    expected = torch.nn.functional.cross_entropy(theirs(torch.from_numpy(x)), torch.from_numpy(labels))
    expected.backward()
    loss = nn.SoftmaxCrossEntropy()
    assert loss(ours(x), labels) == pytest.approx(expected.item(), rel=1e-5)
    ours.parameter_gradients(loss.backward())
    for (_, gradient), parameter in zip(ours.parameters(), theirs.parameters(), strict=True):
        np.testing.assert_allclose(gradient, parameter.grad.numpy(), rtol=1e-4, atol=1e-6)


# ---- memory and dtype ----


def steady_network(dtype=np.float32):
    rng = np.random.default_rng(8)
    return nn.Sequential(
        nn.Linear(512, 512, rng=rng, dtype=dtype), nn.BatchNorm(512, dtype=dtype), nn.ReLU(),
        nn.Linear(512, 512, rng=rng, dtype=dtype), nn.Sigmoid(), nn.BatchNorm(512, dtype=dtype),
        nn.Linear(512, 512, rng=rng, dtype=dtype), nn.BatchNorm(512, dtype=dtype), nn.Tanh(),
        nn.Linear(512, 10, rng=rng, dtype=dtype),
    )  # fmt: skip


@pytest.mark.parametrize(
    "optimizer",
    [lambda m: nn.SGD(m, 0.1, momentum=0.9, weight_decay=1e-4), nn.RMSprop, nn.Adam],
    ids=["SGD", "RMSprop", "Adam"],
)
@pytest.mark.skipif(fastbn.backends.kernels().NAME == "reference", reason="the reference kernels work in new arrays")
def test_a_steady_step_allocates_nothing_of_a_batch_or_weight_size(optimizer):
    net, loss = steady_network(), nn.SoftmaxCrossEntropy()
    step = optimizer(net)
    rng = np.random.default_rng(9)
    x, labels = rng.standard_normal((600, 512), np.float32), rng.integers(0, 10, 600)
    batches = nn.Batches(x, labels, 256, rng=rng)  # 256, 256 and 88 rows

    def epoch():
        for batch, batch_labels in batches:
            loss(net(batch), batch_labels)
            net.parameter_gradients(loss.backward())
            step.step()

    epoch()
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
    # An activation of the smallest batch is 88·512·4 = 180 kB, of the others 524 kB, a weight 1 MB. What is left is a
    # few vectors of 512 channels at a time, float32 and float64.
    assert peak < 60_000


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_one_dtype_throughout(dtype):
    net, loss = steady_network(dtype), nn.SoftmaxCrossEntropy()
    optimizers = [nn.SGD(net, 0.1, momentum=0.9, weight_decay=0.1), nn.RMSprop(net), nn.Adam(net)]
    x = np.random.default_rng(10).standard_normal((8, 512)).astype(dtype)
    seen = []
    y = x
    for layer in net.layers:
        y = layer(y)
        seen.append(y)
    loss(y, np.arange(8))
    dy = loss.backward()
    for layer in reversed(net.layers):
        seen.append(dy)
        dy = layer.backward(dy)
    for optimizer in optimizers:
        optimizer.step()
        seen += [array for room in optimizer._rooms for array in room]
    seen += [dy, *(array for pair in net.parameters() for array in pair)]
    seen += [array for name, array in net.state_dict().items() if not name.endswith("num_batches_tracked")]
    assert {array.dtype for array in seen} == {np.dtype(dtype)}


def test_outputs_live_in_the_layers_own_memory():
    rng = np.random.default_rng(11)
    large, small = rng.standard_normal((6, 4)), rng.standard_normal((3, 4))
    for name in LAYERS:
        layer = LAYERS[name]()
        first = layer(large)
        assert not np.shares_memory(first, large), name
        second = layer(small)
        assert np.shares_memory(first, second) and second.shape[0] == 3, name
        np.testing.assert_array_equal(second, LAYERS[name]()(small))


def test_batch_norm_serves_channels_last_images():
    x = np.random.default_rng(12).standard_normal((2, 3, 3, 4))
    layer = nn.BatchNorm(4, axis=-1, dtype=F64)
    check_gradients(layer, x)
    out = np.empty_like(x)
    assert layer(x, out=out) is out and layer.backward(x, out=out) is out


def test_nn_needs_numpy_alone():
    code = (
        "import sys, fastbn; assert 'fastbn.nn' not in sys.modules; import fastbn.nn;"
        "print([m for m in ('numba', 'scipy', 'tqdm', 'matplotlib', 'sklearn', 'mlxtend') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# ---- errors ----


def linear():
    return nn.Linear(4, 3)


X = np.zeros((2, 4), np.float32)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: nn.Linear(0, 3), ValueError, "in_features is 0"),
        (lambda: nn.Linear(3, 2.5), TypeError, "out_features is 2.5"),
        (lambda: nn.Linear(3, 2, init="xavier"), ValueError, "init is 'xavier'"),
        (lambda: nn.Linear(3, 2, init=-1.0), ValueError, "must be 'he', 'glorot' or a standard deviation"),
        (lambda: nn.Linear(3, 2, dtype=np.float16), TypeError, "dtype is float16"),
        (lambda: linear()(X.astype(F64)), TypeError, "x has dtype float64.*float32"),
        (lambda: linear()(X.astype(int)), TypeError, "x has dtype int64"),
        (lambda: linear()(X[:, :3]), ValueError, r"x has shape \(2, 3\).*\(batch, 4\)"),
        (lambda: linear().backward(X), ValueError, "call the layer first"),
        (lambda: (layer := linear())(X) is layer.backward(X), ValueError, r"dy has shape \(2, 4\)"),
        (lambda: (layer := linear())(X) is layer.backward(X[:1, :3]), ValueError, "as many rows as x, 2"),
        (lambda: nn.Tanh().backward(X), ValueError, "call the layer first"),
        (lambda: (layer := nn.Tanh())(X) is layer.backward(X[:1]), ValueError, r"dy has shape \(1, 4\)"),
        (lambda: nn.ReLU()(X.astype(int)), TypeError, "x has dtype int64"),
        (lambda: nn.ReLU().load_state_dict({"weight": X}), ValueError, r"unknown \['weight'\]"),
        (lambda: linear().load_state_dict({"weight": X}), ValueError, "must have exactly"),
        (lambda: nn.BatchNorm(4).eval()(X[:0]) is nn.BatchNorm(4).backward(X), ValueError, "backward"),
        (nn.Sequential, ValueError, "layers is empty"),
        (lambda: nn.Sequential(linear(), "relu"), TypeError, "layer 1 is 'relu'"),
        (lambda: nn.Sequential(fastbn.BatchNorm(3)), TypeError, "must be a fastbn.nn layer"),
        (lambda: nn.Sequential(layer := nn.ReLU(), linear(), layer), ValueError, "same object twice"),
        (lambda: nn.Sequential(linear(), nn.BatchNorm(4)), ValueError, "num_features 4, and must have 3"),
        (lambda: nn.SoftmaxCrossEntropy()(X, np.array([0, 4])), ValueError, "labels goes from 0 to 4.*0 to 3"),
        (lambda: nn.SoftmaxCrossEntropy()(X, np.array([-1, 3])), ValueError, "labels goes from -1 to 3"),
        (lambda: nn.SoftmaxCrossEntropy()(X, np.array([0, 0, 0])), ValueError, r"labels has shape \(3,\)"),
        (lambda: nn.SoftmaxCrossEntropy()(X, np.array([0.0, 1.0])), TypeError, "labels has dtype float64"),
        (lambda: nn.SoftmaxCrossEntropy()(X[:0], np.array([], int)), ValueError, r"logits has shape \(0, 4\)"),
        (nn.SoftmaxCrossEntropy().backward, ValueError, "call the loss first"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_against_scipy():
    """Sigmoid and cross-entropy, also where the naive formula overflows."""
    x = np.concatenate([np.linspace(-90, 90, 181), [-1e4, 1e4]]).astype(np.float32)[:, None]
    np.testing.assert_allclose(
        nn.Sigmoid()(x), scipy.special.expit(x), rtol=2e-6, atol=2e-38
    )  # about the least normal float32
    logits = np.random.default_rng(0).normal(0, 50, (40, 7))
    labels = np.arange(40) % 7
    want = -scipy.special.log_softmax(logits, axis=1)[np.arange(40), labels].mean()
    np.testing.assert_allclose(nn.SoftmaxCrossEntropy()(logits.copy(), labels), want, rtol=1e-12)
