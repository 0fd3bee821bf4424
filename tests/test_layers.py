"""BatchNorm, the layer."""

import pickle
import re

import numpy as np
import pytest
from conftest import WIDE, parameters, same_bits, sample

import fastbn

KEYS = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
SHAPES = [((9, 3), 1), ((4, 3, 5), 1), ((4, 3, 5, 6), 1), ((2, 3, 4, 5, 6), 1), ((4, 5, 6, 3), -1), ((4, 5, 3), -1)]


def filled(**settings):
    layer = fastbn.BatchNorm(3, **settings)
    for name, value in zip(KEYS, parameters(3, np.float64), strict=False):
        if getattr(layer, name) is not None:
            getattr(layer, name)[...] = value
    return layer


def assert_unchanged(layer, before):
    after = layer.state_dict()
    assert after.keys() == before.keys()
    for name in before:
        same_bits(after[name], before[name])


@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
@pytest.mark.parametrize("layer_dtype", WIDE, ids=str)
def test_is_the_functions(kernels, dtype, shape, axis, layer_dtype):
    """Training, backward and evaluation are the functions', bit for bit."""
    x, dy = sample(shape, dtype, axis), sample(shape, dtype, axis, seed=2)
    layer = filled(axis=axis, dtype=layer_dtype, momentum=0.3, eps=1e-3)
    state = layer.state_dict()
    mean, var = state["running_mean"], state["running_var"]
    want, saved = fastbn.batch_norm_forward(x, state["weight"], state["bias"], eps=1e-3, axis=axis)
    fastbn.batch_norm(x, mean, var, training=True, momentum=0.3, axis=axis)

    y = layer(x)
    same_bits(y, want)
    same_bits(layer.running_mean, mean)
    same_bits(layer.running_var, var)
    assert layer.num_batches_tracked == 1
    for got, gradient in zip(
        (layer.backward(dy), layer.grad_weight, layer.grad_bias), fastbn.batch_norm_backward(dy, saved), strict=True
    ):
        same_bits(got, gradient)

    layer.eval()
    same_bits(layer(x), fastbn.batch_norm(x, mean, var, state["weight"], state["bias"], eps=1e-3, axis=axis))
    assert layer.num_batches_tracked == 1
    assert_unchanged(layer, state | {"running_mean": mean, "running_var": var, "num_batches_tracked": np.array(1)})


def test_out(kernels, dtype):
    x, dy = sample((4, 3, 5), dtype), sample((4, 3, 5), dtype, seed=2)
    layer, other, out = filled(), filled(), np.empty_like(x)
    assert layer(x, out=out) is out
    same_bits(out, other(x))
    assert layer.backward(dy, out=out) is out
    same_bits(out, other.backward(dy))
    assert layer.eval()(x, out=out) is out
    same_bits(out, other.eval()(x))


def test_modes():
    layer = fastbn.BatchNorm(3)
    assert layer.training
    assert layer.eval() is layer and not layer.training
    assert layer.train() is layer and layer.training
    assert not layer.train(False).training


def test_start():
    layer = fastbn.BatchNorm(3)
    assert (layer.weight == 1).all() and (layer.bias == 0).all()
    assert (layer.running_mean == 0).all() and (layer.running_var == 1).all() and layer.num_batches_tracked == 0
    for name in KEYS[:4]:
        assert getattr(layer, name).dtype == np.float32 and getattr(layer, name).shape == (3,)
    assert layer.grad_weight is None and layer.grad_bias is None
    assert "BatchNorm(3, " in repr(layer)


def test_reset():
    layer = fastbn.BatchNorm(3)
    mean = layer.running_mean
    layer(sample((5, 3), np.float32))
    layer.reset_running_stats()
    assert layer.running_mean is mean  # in place: others may hold it
    assert (mean == 0).all() and (layer.running_var == 1).all() and layer.num_batches_tracked == 0


def test_without_running_statistics(kernels):
    """The batch's statistics serve in both modes."""
    layer = fastbn.BatchNorm(3, track_running_stats=False)
    assert layer.running_mean is layer.running_var is layer.num_batches_tracked is None
    x = sample((5, 3), np.float32)
    y = layer(x)
    same_bits(layer.eval()(x), y)
    assert list(layer.state_dict()) == ["weight", "bias"]
    layer.reset_running_stats()


def test_without_affine(kernels):
    layer = fastbn.BatchNorm(3, affine=False)
    assert layer.weight is layer.bias is None
    x = sample((5, 3), np.float32)
    layer(x)
    layer.backward(x)
    assert layer.grad_weight is layer.grad_bias is None
    assert list(layer.state_dict()) == KEYS[2:]


def test_empty_batch(kernels):
    layer = filled()
    before = layer.state_dict()
    assert layer(np.empty((0, 3, 4), np.float32)).shape == (0, 3, 4)
    assert_unchanged(layer, before)
    assert layer.backward(np.empty((0, 3, 4), np.float32)).shape == (0, 3, 4)
    assert (layer.grad_weight == 0).all() and (layer.grad_bias == 0).all()


def test_backward_needs_a_forward():
    layer, x = filled(), sample((5, 3), np.float32)
    with pytest.raises(ValueError, match="training mode"):
        layer.backward(x)
    layer(x)
    layer.backward(x)
    layer.eval()(x)
    with pytest.raises(ValueError, match="training mode"):
        layer.backward(x)


# ---- state ----


@pytest.mark.parametrize(
    "settings", [{}, {"affine": False}, {"track_running_stats": False}, {"dtype": np.float64}], ids=str
)
def test_state_round_trip(settings):
    layer = filled(**settings)
    layer(sample((5, 3), np.float32))
    other = fastbn.BatchNorm(3, **settings)
    other.load_state_dict(layer.state_dict())
    assert_unchanged(other, layer.state_dict())


def test_state_is_torchs():
    state = fastbn.BatchNorm(3).state_dict()
    assert list(state) == KEYS
    assert state["num_batches_tracked"].shape == () and state["num_batches_tracked"].dtype.kind == "i"


def test_state_is_a_copy():
    layer = fastbn.BatchNorm(3)
    state = layer.state_dict()
    state["weight"][...] = 7
    assert (layer.weight == 1).all()
    layer.load_state_dict(state)
    state["weight"][...] = 9
    assert (layer.weight == 7).all()


def test_state_is_converted():
    """Statistics of another dtype are taken into the layer's own, in place."""
    layer = fastbn.BatchNorm(3)
    weight = layer.weight
    layer.load_state_dict(filled(dtype=np.float64).state_dict())
    assert layer.weight is weight and weight.dtype == np.float32
    same_bits(weight, parameters(3, np.float64)[0].astype(np.float32))


COUNT = "num_batches_tracked"
BAD_STATES = {  # what is put into a state, None to take it out
    "missing": ({"bias": None}, ValueError, ["bias"]),
    "unknown": ({"gamma": np.ones(3)}, ValueError, ["gamma"]),
    "shape": ({"running_var": np.ones(4)}, ValueError, ["running_var", "(4,)", "(3,)"]),
    "complex": ({"running_var": np.ones(3, complex)}, TypeError, ["running_var", "complex"]),
    "strings": ({"weight": np.array(["a", "b", "c"])}, TypeError, ["weight", "real"]),
    "an object": ({"weight": np.array([None] * 3)}, TypeError, ["weight", "object"]),
    "count's shape": ({COUNT: np.ones(1)}, ValueError, [COUNT, "(1,)", "()"]),
    "NaN count": ({COUNT: np.array(np.nan)}, ValueError, [COUNT, "nan"]),
    "infinite count": ({COUNT: np.array(np.inf)}, ValueError, [COUNT, "inf"]),
    "fraction": ({COUNT: np.array(2.5)}, ValueError, [COUNT, "2.5"]),
    "negative count": ({COUNT: np.array(-1)}, ValueError, [COUNT, "-1"]),
}


@pytest.mark.parametrize(("spoil", "error", "words"), BAD_STATES.values(), ids=BAD_STATES)
def test_bad_state_leaves_the_layer(spoil, error, words):
    layer = filled()
    before = layer.state_dict()
    state = fastbn.BatchNorm(3).state_dict() | spoil
    state = {name: value for name, value in state.items() if value is not None}
    with pytest.raises(error) as caught:
        layer.load_state_dict(state)
    assert_unchanged(layer, before)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("state", [None, 3, [("weight", 1)]], ids=str)
def test_state_is_no_mapping(state):
    with pytest.raises(TypeError, match="state"):
        fastbn.BatchNorm(3).load_state_dict(state)


# ---- bad arguments ----


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"num_features": 0}, ValueError, "num_features is 0, and must be at least 1"),
        ({"num_features": 2.5}, TypeError, "num_features is 2.5, and must be an integer"),
        ({"eps": 0.0}, ValueError, "eps is 0.0, and must be greater than 0"),
        ({"momentum": 1.5}, ValueError, "momentum is 1.5, and must be from 0 to 1"),
        ({"dtype": np.float16}, TypeError, "dtype is float16, and must be float32 or float64"),
        ({"activation": "gelu"}, ValueError, "activation is 'gelu', and must be None, 'relu' or 'leaky_relu'"),
        ({"dtype": "no such"}, TypeError, "dtype is 'no such', and must be float32 or float64"),
    ],
    ids=str,
)
def test_bad_settings(arguments, error, words):
    with pytest.raises(error, match=re.escape(words)):
        fastbn.BatchNorm(**{"num_features": 3} | arguments)


@pytest.mark.parametrize("axis", ["a", 1.5, None, 7], ids=repr)
def test_bad_axis(axis):
    """At the latest when the layer is called, by name."""
    error = ValueError if axis == 7 else TypeError
    with pytest.raises(error, match=f"axis is {axis!r}, and must be"):
        fastbn.BatchNorm(3, axis=axis)(np.ones((4, 3), np.float32))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        (np.ones((4, 5), np.float32), ValueError, ["x has shape (4, 5)", "3 channels", "num_features"]),
        (np.ones((4, 3), np.int64), TypeError, ["x has dtype int64", "float16, bfloat16, float32 or float64"]),
        (np.ones(3, np.float32), ValueError, ["x has shape (3,)", "2 to 5 axes"]),
        (None, TypeError, ["x is a NoneType"]),
    ],
    ids=["channels", "dtype", "rank", "None"],
)
def test_bad_input_leaves_the_layer(training, x, error, words):
    good = sample((5, 3), np.float32)
    layer = filled()
    layer(good)
    layer.train(training)
    before = layer.state_dict()
    with pytest.raises(error) as caught:
        layer(x)
    for word in words:
        assert word in str(caught.value)
    assert_unchanged(layer, before)
    layer.backward(good)  # what the last good call left still serves


def test_one_value_a_channel():
    layer = filled()
    before = layer.state_dict()
    with pytest.raises(ValueError, match="one value a channel"):
        layer(np.ones((1, 3), np.float32))
    assert_unchanged(layer, before)
    assert layer.eval()(np.ones((1, 3), np.float32)).shape == (1, 3)


def test_training_cannot_overwrite_x():
    """backward reads x; evaluation may."""
    layer, x = filled(), sample((5, 3), np.float32)
    before = layer.state_dict()
    with pytest.raises(ValueError, match="out overlaps x"):
        layer(x, out=x)
    assert_unchanged(layer, before)
    assert layer.eval()(x, out=x) is x


def test_changed_momentum_is_checked():
    """A layer's attributes may be set: what they are is checked when they are used."""
    layer = fastbn.BatchNorm(3)
    layer.momentum = 5
    with pytest.raises(ValueError, match=r"momentum is 5\.0, and must be from 0 to 1"):
        layer(np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32))
    assert layer.num_batches_tracked == 0 and (layer.running_var == 1).all()


def test_pickle_carries_no_batch():
    layer = fastbn.BatchNorm(3)
    layer(np.random.default_rng(0).standard_normal((100_000, 3)).astype(np.float32))
    blob = pickle.dumps(layer)
    assert len(blob) < 4000
    copied = pickle.loads(blob)
    np.testing.assert_equal(copied.state_dict(), layer.state_dict())
    with pytest.raises(ValueError, match="backward has nothing to go back over"):
        copied.backward(np.ones((4, 3), np.float32))


def test_a_networks_pickle_carries_no_batch():
    """Buffers, kept inputs and a residual's gradient stay behind."""
    from fastbn import nn

    net = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm(64), nn.ReLU(), nn.Linear(64, 64))
    x = np.ones((1000, 64), np.float32) * np.arange(1000, dtype=np.float32)[:, np.newaxis]
    net.backward(net(x).copy())
    plain = fastbn.BatchNorm(64)
    plain(x, x)
    plain.backward(x)
    assert len(pickle.dumps(net)) < 2.5 * 4 * 2 * 64 * 64  # parameters and their gradients
    assert len(pickle.dumps(plain)) < 10_000
    again = pickle.loads(pickle.dumps(net))
    same_bits(again.eval()(x), net.eval()(x))
