"""Conversions to and from the neighbours' parameters, and files: what comes back is equal, and trains on as there."""

# ruff: noqa: E501 - the tables have one case a line

import json
import os
import stat
import struct
import sys
from importlib.util import find_spec

import ml_dtypes
import numpy as np
import pytest
from conftest import generator, run_python, same_bits, sample

import fastbn
from fastbn import convert, nn

C = 5
VECTORS = ["weight", "bias", "running_mean", "running_var"]
NAMES = [*VECTORS, "num_batches_tracked"]
OPTIONS = [
    "num_features", "eps", "momentum", "unbiased", "trainable", "nan_policy", "axis", "activation", "negative_slope",
    "dtype", "training", "num_batches_tracked",
]  # fmt: skip
AFFINE = [True, "weight", "bias", False]


def filled(**settings):
    """A layer that is unlike a new one in everything it has."""
    layer, rng = fastbn.BatchNorm(C, **settings), generator(4)
    for name in VECTORS:
        if getattr(layer, name) is not None:
            getattr(layer, name)[...] = rng.uniform(0.5, 2, C)
    if layer.num_batches_tracked is not None:
        layer.num_batches_tracked = 7
    return layer


def equal(a, b):
    """The same bits and options."""
    for name in OPTIONS:
        assert getattr(a, name) == getattr(b, name), name
    for name in VECTORS:
        one, other = getattr(a, name), getattr(b, name)
        assert (one is None) == (other is None), name
        if one is not None:
            same_bits(one, other)
            assert one is not other and one.flags.writeable and one.flags.c_contiguous and one.dtype.isnative


def raises(error, words, call, *arguments, **options):
    with pytest.raises(error) as caught:
        call(*arguments, **options)
    for word in words.split(" … "):
        assert word in str(caught.value), str(caught.value)


# ---- torch ----


@pytest.mark.parametrize("prefix", ["", "net.1.bn."])
@pytest.mark.parametrize("affine", AFFINE)
@pytest.mark.parametrize("track", [True, False])
def test_torch_round_trip(affine, track, prefix):
    layer = filled(affine=affine, track_running_stats=track, eps=1e-3, momentum=None, axis=-1)
    state = convert.to_torch(layer, prefix)
    if not affine and not track:
        assert state == {}
        return
    other = {"net.1.other.weight": np.ones(9), "net.2.bn.weight": np.ones(9)} if prefix else {}
    back = convert.from_torch(state | other, prefix, eps=1e-3, momentum=None, axis=-1)
    if affine == "bias":  # torch has no such module
        assert (back.weight == 1).all()
        back.weight = None
    equal(layer, back)
    for value in state.values():
        value[...] = 0
    equal(layer, back)  # neither shares memory with the state


@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize(
    ("kind", "shape", "settings"),
    [
        ("BatchNorm1d", (9, C), {}),
        ("BatchNorm2d", (4, C, 3, 6), {"bias": False}),
        ("BatchNorm2d", (4, C, 3, 6), {"affine": False}),
    ],
)
def test_torch_trains_on(kind, shape, settings, momentum):
    """A module that has been trained is taken over; both go on alike; the layer's state goes back."""
    torch = pytest.importorskip("torch", reason="torch is not installed: make peers")
    theirs = getattr(torch.nn, kind)(C, eps=1e-3, momentum=momentum, **settings)
    theirs(torch.from_numpy(sample(shape, np.float32)))
    ours = convert.from_torch(theirs.state_dict(), eps=1e-3, momentum=momentum)
    assert ours.num_batches_tracked == 1
    for seed in (1, 2):
        x = sample(shape, np.float32, seed=seed)
        ours(x)
        theirs(torch.from_numpy(x))
    state = convert.to_torch(ours)
    want = theirs.state_dict()
    assert list(state) == list(want)
    for name, value in state.items():
        assert value.dtype == want[name].numpy().dtype and value.shape == want[name].numpy().shape
        np.testing.assert_allclose(value, want[name], rtol=1e-6, atol=1e-6 * np.abs(want[name].numpy()).max())
    again = getattr(torch.nn, kind)(C, eps=1e-3, momentum=momentum, **settings)
    again.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()})
    y = again.eval()(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(ours.eval()(x), y, rtol=1e-5, atol=1e-5)


def test_torch_tensors_that_numpy_cannot_read():
    torch = pytest.importorskip("torch", reason="torch is not installed: make peers")
    state = dict(torch.nn.BatchNorm1d(C).state_dict())
    gradient = state | {"weight": torch.ones(C, requires_grad=True)}
    raises(TypeError, "weight is a Tensor … requires grad … .detach().cpu().numpy()", convert.from_torch, gradient)
    half = {"bn." + name: value.bfloat16() if value.ndim else value for name, value in state.items()}
    raises(TypeError, "bn.weight is a Tensor … BFloat16 … .float().numpy()", convert.from_torch, half, "bn.")
    convert.from_torch({name: value.detach().cpu().float().numpy() for name, value in half.items()}, "bn.")


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64, ">f4", ">f8"], ids=str)
def test_stored_dtypes(stored):
    stored = np.dtype(stored)
    state = {name: value.astype(stored) for name, value in convert.to_torch(filled()).items() if value.ndim}
    layer = convert.from_torch(state)
    want = np.float64 if stored.itemsize == 8 else np.float32
    assert layer.dtype == want and layer.num_batches_tracked == 0
    for name in VECTORS:
        same_bits(getattr(layer, name), state[name].astype(want))
    assert convert.from_torch(state, dtype=np.float32).dtype == np.float32
    mixed = convert.from_torch(state | {"running_var": np.ones(C)})
    assert mixed.dtype == mixed.weight.dtype == np.float64


def test_options_pass_on():
    layer = convert.from_torch(convert.to_torch(filled()), activation="leaky_relu", negative_slope=0.2, unbiased=False)
    assert (layer.activation, layer.negative_slope, layer.unbiased) == ("leaky_relu", 0.2, False)
    layer = convert.from_keras([np.ones(C)] * 4, unbiased=True, trainable=False)  # TensorFlow's fused kernel
    assert layer.unbiased and not layer.trainable


STATE = {name: np.ones(C, np.float32) for name in VECTORS} | {"num_batches_tracked": np.array(3)}
MEAN = -np.ones(C, np.float32)
MEAN[0] = -2e-3
BAD_STATES = {  # what is put into a state, None to take it out; the error
    "mean alone": ({"running_var": None}, ValueError, "lacks ['p.running_var']"),
    "count alone": ({"running_var": None, "running_mean": None}, ValueError, "lacks ['p.running_mean', 'p.running_var']"),
    "unknown": ({"gamma": np.ones(C)}, ValueError, "unknown keys ['p.gamma']"),
    "nothing": (dict.fromkeys(NAMES), ValueError, "none of ['p.weight', … parameters or statistics"),
    "short": ({"bias": np.ones(4)}, ValueError, "p.bias has shape (4,), and must have shape (5,)"),
    "rank": ({"weight": np.ones((C, 1))}, ValueError, "p.weight has shape (5, 1), and must have shape (channels,)"),
    "scalar": ({"weight": 1.0}, ValueError, "p.weight has shape (), and must have shape (channels,)"),
    "empty": ({"weight": np.ones(0)}, ValueError, "p.weight has shape (0,), and must have shape (channels,)"),
    "integers": ({"running_mean": np.ones(C, int)}, TypeError, "p.running_mean has dtype int64, and must be float16, bfl"),
    "complex": ({"weight": np.ones(C, complex)}, TypeError, "p.weight has dtype complex128, and must be"),
    "long": ({"weight": np.ones(C, np.longdouble)}, TypeError, "p.weight has dtype … and must be float16"),
    "None": ({"weight": [None] * C}, TypeError, "p.weight has dtype object, and must be"),
    "masked": ({"weight": np.ma.masked_less(np.ones(C), 2)}, TypeError, "p.weight is a masked array"),
    "count's shape": ({NAMES[4]: np.ones(1)}, ValueError, "p.num_batches_tracked has shape (1,)"),
    "count's value": ({NAMES[4]: np.array(2.5)}, ValueError, "p.num_batches_tracked is 2.5, and must be an integer"),
    "count under 0": ({NAMES[4]: -1}, ValueError, "p.num_batches_tracked is -1, and must be an integer"),
    "no variance": ({"running_var": MEAN}, ValueError, "p.running_var has -0.00"),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "error", "words"), BAD_STATES.values(), ids=BAD_STATES)
def test_bad_state(spoil, error, words):
    state = {"p." + name: value for name, value in (STATE | spoil).items() if value is not None}
    raises(error, words, convert.from_torch, state, "p.")


def test_bad_arguments_of_from_torch():
    raises(TypeError, "state is a list", convert.from_torch, [1])
    raises(TypeError, "prefix is a int", convert.from_torch, STATE, 3)
    raises(ValueError, "none of ['bnweight'", convert.from_torch, {"bn." + n: v for n, v in STATE.items()}, "bn")
    raises(ValueError, "eps is 0.0, and must be", convert.from_torch, STATE, eps=0.0)
    raises(ValueError, "momentum is 2.0, and must be", convert.from_torch, STATE, momentum=2.0)
    raises(TypeError, "bn is a dict, and must be a BatchNorm", convert.to_torch, STATE)


def test_rounded_variance_passes():
    """E[x²] - mean² may come out a little under 0: eps is there for that."""
    var = np.full(C, -1e-9, np.float32)
    same_bits(convert.from_torch(STATE | {"running_var": var}).running_var, var)
    assert np.isnan(convert.from_torch(STATE | {"running_var": var * np.nan}).running_var).all()


# ---- the libraries whose momentum weighs the old statistics ----


def trained_by_formula(x, mean, var, gamma, beta, momentum, epsilon, axis):
    """Two steps as Keras, Flax and ONNX describe them: their momentum, and the population variance."""
    others = tuple(i for i in range(x[0].ndim) if i != axis % x[0].ndim)
    for batch in x:
        batch = batch.astype(np.float64)
        mean = momentum * mean + (1 - momentum) * batch.mean(others)
        var = momentum * var + (1 - momentum) * batch.var(others)
    column = [1] * x[0].ndim
    column[axis] = -1
    mean_, var_, gamma, beta = (np.reshape(v, column) for v in (mean, var, gamma, beta))
    return mean, var, gamma * (x[0] - mean_) / np.sqrt(var_ + epsilon) + beta


def trains_as_formula(layer, momentum, epsilon, axis, shape):
    x = [sample(shape, np.float32, axis, seed) for seed in (0, 1)]
    gamma = np.ones(C) if layer.weight is None else layer.weight
    beta = np.zeros(C) if layer.bias is None else layer.bias
    want = trained_by_formula(x, layer.running_mean, layer.running_var, gamma, beta, momentum, epsilon, axis)
    for batch in x:
        layer(batch)
    for got, expected in zip((layer.running_mean, layer.running_var, layer.eval()(x[0])), want, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())


def test_keras():
    weights = list(convert.to_torch(filled()).values())[:4]
    layer = convert.from_keras(weights)
    assert (layer.eps, layer.momentum, layer.axis, layer.unbiased) == (1e-3, 0.01, -1, False)
    for name, value in zip(VECTORS, weights, strict=True):
        same_bits(getattr(layer, name), value)
    trains_as_formula(layer, 0.99, 1e-3, -1, (3, 2, 4, C))  # few values: the unbiased variance would be 4 % more
    layer = convert.from_keras(weights, momentum=0.6, epsilon=0.1, axis=1)
    trains_as_formula(layer, 0.6, 0.1, 1, (4, C, 3))


@pytest.mark.parametrize("affine", AFFINE)
@pytest.mark.parametrize("by_name", [False, True], ids=["list", "mapping"])
def test_keras_round_trip(affine, by_name):
    layer = filled(affine=affine, momentum=0.1, eps=1e-3, axis=-1, unbiased=False)
    config, weights = convert.to_keras(layer)
    gamma, beta = affine in (True, "weight"), affine in (True, "bias")
    assert config == {"axis": -1, "momentum": 0.9, "epsilon": 1e-3, "center": beta, "scale": gamma}
    names = ["gamma"] * gamma + ["beta"] * beta + ["moving_mean", "moving_variance"]
    if by_name:
        weights = dict(zip(names, weights, strict=True))
    back = convert.from_keras(weights, **config)
    back.num_batches_tracked = 7  # which Keras does not count
    equal(layer, back)


def test_momentum_is_turned_in_decimal():
    """No 0.010000000000000009, and the way back is exact."""
    for theirs, ours in ((0.99, 0.01), (0.9, 0.1), (0.999, 0.001), (0.0, 1.0), (1, 0.0), (0.7, 0.3)):
        layer = convert.from_keras([np.ones(C)] * 4, momentum=theirs)
        assert layer.momentum == ours
        assert convert.to_keras(layer)[0]["momentum"] == theirs
    for momentum in generator(9).uniform(0, 1, 50):
        assert abs(1 - convert.from_keras([np.ones(C)] * 4, momentum=momentum).momentum - momentum) <= 2**-53


def test_onnx():
    """onnx's own evaluator trains and infers with what goes out; fastbn with what comes in."""
    onnx = pytest.importorskip("onnx", reason="onnx is not installed: pip install onnx")
    from onnx import TensorProto, helper
    from onnx.reference import ReferenceEvaluator

    layer = filled(eps=1e-3, momentum=0.3, unbiased=False)
    inputs, attributes = convert.to_onnx(layer)
    assert attributes == {"epsilon": 1e-3, "momentum": 0.7}
    back = convert.from_onnx(**inputs, **attributes)
    back.num_batches_tracked = 7
    equal(layer, back)
    x = sample((3, C, 4), np.float32)

    def run(**more):
        outputs = ["Y", "mean", "var"] if more else ["Y"]
        node = helper.make_node("BatchNormalization", ["X", *inputs], outputs, **attributes, **more)
        shapes = dict.fromkeys((*inputs, "mean", "var"), (C,)) | dict.fromkeys("XY", x.shape)
        value = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shapes[name]) for name in shapes}
        graph = helper.make_graph([node], "g", [value[n] for n in ["X", *inputs]], [value[n] for n in outputs])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)])
        onnx.checker.check_model(model)
        return ReferenceEvaluator(model).run(None, {"X": x, **inputs})

    np.testing.assert_allclose(back.eval()(x), run()[0], rtol=1e-5, atol=1e-5)
    y = back.train()(x)
    for got, want in zip((y, back.running_mean, back.running_var), run(training_mode=1), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6 * np.abs(want).max())


def test_onnx_defaults_and_what_is_absent():
    layer = filled(affine="bias")
    inputs, _ = convert.to_onnx(layer)
    assert list(inputs) == ["scale", "B", "input_mean", "input_var"]
    assert (inputs["scale"] == 1).all() and (inputs["B"] == layer.bias).all()
    inputs, _ = convert.to_onnx(filled(affine=False))
    assert (inputs["scale"] == 1).all() and (inputs["B"] == 0).all()
    layer = convert.from_onnx(**inputs)
    assert (layer.eps, layer.momentum, layer.axis, layer.unbiased) == (1e-5, 0.1, 1, False)
    trains_as_formula(layer, 0.9, 1e-5, 1, (4, C, 3))


@pytest.mark.parametrize("affine", AFFINE)
def test_flax_round_trip(affine):
    layer = filled(affine=affine, momentum=0.1, eps=1e-3, axis=-1, unbiased=False)
    config, variables = convert.to_flax(layer)
    scale, bias = affine in (True, "weight"), affine in (True, "bias")
    assert config == {"axis": -1, "momentum": 0.9, "epsilon": 1e-3, "use_bias": bias, "use_scale": scale}
    assert list(variables["params"]) == ["scale"] * scale + ["bias"] * bias
    flat = {"scale": None, "bias": None} | variables["params"] | variables["batch_stats"]
    for given in (variables, flat):  # linen's, nnx's
        back = convert.from_flax(given, momentum=0.9, epsilon=1e-3)
        back.num_batches_tracked = 7
        equal(layer, back)


def test_flax():
    config, variables = convert.to_flax(filled())
    del variables["params"]["bias"]
    layer = convert.from_flax(variables)
    assert (layer.eps, layer.momentum, layer.axis, layer.unbiased, layer.bias) == (1e-5, 0.01, -1, False, None)
    trains_as_formula(layer, 0.99, 1e-5, -1, (3, 2, 4, C))
    assert config["momentum"] == 0.9


ONES, SHORT = np.ones(C), np.ones(4)
BAD_CALLS = {
    "keras: few": (convert.from_keras, ([ONES] * 3,), {}, ValueError, "weights has 3 arrays, and with these scale and center must have 4: ['gamma', "),
    "keras: many": (convert.from_keras, ([ONES] * 4,), {"scale": False}, ValueError, "must have 3: ['beta', 'moving_mean', "),
    "keras: names": (convert.from_keras, ({"gamma": ONES, "mean": ONES},), {}, ValueError, "lacks ['beta', … unknown ['mean']"),
    "keras: not a sequence": (convert.from_keras, (3,), {}, TypeError, "weights is a int"),
    "keras: shape": (convert.from_keras, ([ONES, SHORT, ONES, ONES],), {}, ValueError, "beta has shape (4,), and must"),
    "keras: order": (convert.from_keras, ([ONES, ONES, ONES, -ONES],), {}, ValueError, "moving_variance has -1.0 in channel 0"),
    "keras: integers": (convert.from_keras, ([[1] * C] * 4,), {}, TypeError, "gamma has dtype int64, and must be"),
    "keras: momentum": (convert.from_keras, ([ONES] * 4,), {"momentum": 1.5}, ValueError, "momentum is 1.5 … old statistics"),
    "keras: momentum None": (convert.from_keras, ([ONES] * 4,), {"momentum": None}, TypeError, "momentum is None, and must be a n"),
    "keras: epsilon": (convert.from_keras, ([ONES] * 4,), {"epsilon": 0}, ValueError, "epsilon is 0.0, and must be"),
    "keras: axis": (convert.from_keras, ([ONES] * 4,), {"axis": [3]}, TypeError, "axis is [3], and must be an integer"),
    "keras: center": (convert.from_keras, ([ONES] * 4,), {"center": "no"}, TypeError, "center is 'no', and must be True or F"),
    "keras: dtype": (convert.from_keras, ([ONES] * 4,), {"dtype": "f2"}, TypeError, "dtype is float16, and must be"),
    "onnx: None": (convert.from_onnx, (ONES, None, ONES, ONES), {}, TypeError, "B has dtype object, and must be"),
    "onnx: shape": (convert.from_onnx, (ONES, ONES, SHORT, ONES), {}, ValueError, "input_mean has shape (4,), and must"),
    "onnx: order": (convert.from_onnx, (ONES, ONES, ONES, -ONES), {}, ValueError, "input_var has -1.0 in channel 0"),
    "flax: kind": (convert.from_flax, ([ONES],), {}, TypeError, "variables is a list, and must be a mapping"),
    "flax: inner kind": (convert.from_flax, ({"params": 3},), {}, TypeError, "variables['params'] is a int"),
    "flax: lacks": (convert.from_flax, ({"params": {"scale": ONES}},), {}, ValueError, "lacks ['mean', 'var']"),
    "flax: unknown": (convert.from_flax, ({"params": {"kernel": 1}, "batch_stats": {"mean": ONES, "var": ONES}},), {}, ValueError, "unknown ['params.kernel']"),
    "flax: flat": (convert.from_flax, ({"mean": ONES, "kernel": 1},), {}, ValueError, "lacks ['var'] and has unknown ['kernel']"),
    "flax: shape": (convert.from_flax, ({"batch_stats": {"mean": ONES, "var": SHORT}},), {}, ValueError, "batch_stats.var has shape (4,)"),
    "flax: no module": (convert.from_flax, ({},), {}, ValueError, "lacks ['mean', 'var']"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "arguments", "options", "error", "words"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_calls(call, arguments, options, error, words):
    raises(error, words, call, *arguments, **options)


@pytest.mark.parametrize("convert_to", [convert.to_keras, convert.to_onnx, convert.to_flax], ids=lambda f: f.__name__)
def test_what_has_no_place_there(convert_to):
    for settings, words in (
        ({"activation": "relu"}, "bn.activation is 'relu', and must be None"),
        ({"momentum": None}, "bn.momentum is None … must be a number"),
        ({"track_running_stats": False}, "no running statistics"),
    ):
        raises(ValueError, words, convert_to, filled(**settings))
    raises(TypeError, "bn is a int, and must be a BatchNorm", convert_to, 3)
    if convert_to is convert.to_onnx:
        raises(ValueError, "bn.axis is -1, and must be 1", convert_to, filled(axis=-1))


def test_what_goes_out_is_copied():
    layer, same = filled(), filled()
    _, weights = convert.to_keras(layer)
    inputs, _ = convert.to_onnx(layer)
    _, variables = convert.to_flax(layer)
    for value in [*weights, *inputs.values(), *variables["params"].values(), *variables["batch_stats"].values()]:
        value[...] = 0
    equal(layer, same)


# ---- files ----

needs_safetensors = pytest.mark.skipif(
    find_spec("safetensors") is None, reason="safetensors is not installed: pip install safetensors"
)

SAVED = [
    {},
    {"affine": False, "track_running_stats": False},
    {"affine": "weight", "momentum": None, "unbiased": False, "trainable": False},
    {"affine": "bias", "activation": "leaky_relu", "negative_slope": 0.2, "axis": -1, "nan_policy": "skip_update"},
    {"dtype": np.float64, "eps": 1 / 3, "momentum": 0.1234567890123456789, "track_running_stats": False},
]


@needs_safetensors
@pytest.mark.parametrize("settings", SAVED, ids=str)
def test_save_and_load(tmp_path, settings):
    layer = filled(**settings).train(not settings)
    path = tmp_path / "bn.safetensors"
    convert.save(layer, path)
    assert os.listdir(tmp_path) == [path.name]
    back = convert.load(str(path))
    assert type(back) is fastbn.BatchNorm
    equal(layer, back)
    x = sample((4, 6, C) if layer.axis == -1 else (4, C, 6), np.float32, layer.axis)
    for mode in (False, True):
        same_bits(layer.train(mode)(x), back.train(mode)(x))
    equal(layer, back)
    before = path.read_bytes()
    convert.save(convert.load(path), path)
    assert path.read_bytes() == before  # one layer, one file


@needs_safetensors
def test_load_as_another_class(tmp_path):
    layer = nn.BatchNorm(C, eps=0.5)
    convert.save(layer, tmp_path / "a")
    back = convert.load(tmp_path / "a", nn.BatchNorm)
    assert type(back) is nn.BatchNorm
    equal(layer, back)


@needs_safetensors
def test_numpys_numbers_among_the_options(tmp_path):
    layer = filled()
    layer.eps, layer.axis, layer.momentum = np.float32(0.25), np.int64(1), np.float64(0.5)
    convert.save(layer, tmp_path / "a")
    equal(layer, convert.load(tmp_path / "a"))


@needs_safetensors
@pytest.mark.parametrize("settings", [{}, {"affine": False}, {"affine": "bias"}], ids=str)
def test_torch_reads_the_file(tmp_path, settings):
    torch = pytest.importorskip("torch", reason="torch is not installed: make peers")
    from safetensors.torch import load_file

    layer = filled(**settings)
    convert.save(layer, tmp_path / "a")
    module = torch.nn.BatchNorm2d(C, affine=layer.bias is not None)
    module.load_state_dict(load_file(tmp_path / "a"))
    x = sample((2, C, 3, 4), np.float32)
    y = module.eval()(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(layer.eval()(x), y, rtol=1e-5, atol=1e-5)
    assert module.num_batches_tracked == 7


@needs_safetensors
@pytest.mark.parametrize("kind", ["float32", "float64", "float16", "bfloat16"])
def test_torchs_file(tmp_path, kind):
    """With no options of ours: BatchNorm's defaults. bfloat16, too, which safetensors' NumPy reader does not know."""
    torch = pytest.importorskip("torch", reason="torch is not installed: make peers")
    from safetensors.torch import save_file

    module = torch.nn.BatchNorm1d(C, dtype=getattr(torch, kind))
    with torch.no_grad():
        module.weight.copy_(torch.linspace(-3, 1 / 3, C))
    save_file(module.state_dict(), tmp_path / "a")
    layer = convert.load(tmp_path / "a")
    want = fastbn.BatchNorm(C, dtype=np.float64 if kind == "float64" else np.float32)
    want.weight[...] = module.weight.detach().double().numpy()
    equal(layer, want)


def test_without_safetensors(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.delitem(sys.modules, "safetensors.numpy", raising=False)
    for call in (lambda: convert.save(filled(), tmp_path / "a"), lambda: convert.load(tmp_path / "a")):
        raises(ImportError, "pip install 'fastbn[io]'", call)
    assert not os.listdir(tmp_path)


class Stop(Exception):
    """What goes wrong in the middle."""


@needs_safetensors
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), Stop()], ids=repr)
@pytest.mark.parametrize("place", ["fsync", "replace"])
def test_what_stood_there_stays(tmp_path, monkeypatch, place, error):
    path = tmp_path / "bn"
    convert.save(filled(), path)
    before = path.read_bytes()
    written = []

    def fail(*arguments):
        written.extend(os.listdir(tmp_path))
        raise error

    monkeypatch.setattr(os, place, fail)
    for target in (path, tmp_path / "new"):
        with pytest.raises(type(error)):
            convert.save(filled(eps=0.5), target)
    assert len(written) > 2  # it was in the middle
    assert os.listdir(tmp_path) == ["bn"] and path.read_bytes() == before


@needs_safetensors
def test_a_disk_that_fills(tmp_path, monkeypatch):
    """Some of the file is written, and then no more."""
    convert.save(filled(), tmp_path / "bn")
    before = (tmp_path / "bn").read_bytes()
    real = open

    class Full:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *what):
            self.file.close()

        def write(self, data):
            self.file.write(data[:100])
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("builtins.open", lambda name, mode, *rest: Full(real(name, mode, *rest)))
    with pytest.raises(OSError, match="No space"):
        convert.save(filled(eps=0.5), tmp_path / "bn")
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["bn"] and (tmp_path / "bn").read_bytes() == before


@needs_safetensors
@pytest.mark.skipif(os.name != "posix", reason="permissions and links are POSIX's")
def test_permissions_and_links(tmp_path):
    """A new file's are those of any new file, an old one's stay; a link stays a link."""
    (tmp_path / "any").write_bytes(b"")
    path, link = tmp_path / "bn", tmp_path / "link"
    convert.save(filled(), path)
    mode = lambda p: stat.S_IMODE(p.stat().st_mode)  # noqa: E731
    assert mode(path) == mode(tmp_path / "any")
    path.chmod(0o640)
    link.symlink_to(path.name)
    convert.save(filled(eps=0.5), link)
    assert mode(path) == 0o640 and link.is_symlink() and convert.load(path).eps == 0.5


@needs_safetensors
def test_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("plain", b"bytes", tmp_path / "path"):
        convert.save(filled(), path)
        equal(convert.load(path), filled())
    for call in (lambda p: convert.save(filled(), p), convert.load):
        raises(TypeError, "path is a int, and must be a str or path-like", call, 3)
    with pytest.raises(FileNotFoundError):
        convert.load("none")
    with pytest.raises(FileNotFoundError):
        convert.save(filled(), "none/a")
    with pytest.raises(OSError):
        convert.save(filled(), tmp_path)
    raises(TypeError, "bn is a str, and must be a BatchNorm", convert.save, "bn", "a")
    assert sorted(os.listdir(tmp_path)) == ["bytes", "path", "plain"]


@needs_safetensors
def test_what_cannot_be_loaded_is_not_saved(tmp_path):
    layer = filled()
    layer.eps = float("nan")
    raises(ValueError, "eps is nan, and must be", convert.save, layer, tmp_path / "a")
    layer = filled()
    layer.bias = np.ones(C + 1)
    raises(ValueError, "bias has shape (6,), and must have shape (5,)", convert.save, layer, tmp_path / "a")
    assert not os.listdir(tmp_path)


def file(tensors, options):
    """A safetensors file's bytes; options: as they stand in the metadata, or None."""
    from safetensors.numpy import save

    text = options if options is None or isinstance(options, str) else json.dumps(options)
    return save(tensors, None if text is None else {"fastbn": text})


FIVE = {"num_features": C}
DEEP = "[" * 100_000
BAD_FILES = {  # tensors taken out (None) or put in; options; what the error has
    "lacks": ({"bias": None}, FIVE, "lacks ['bias']"),
    "lacks, torch": ({"running_var": None}, None, "lacks ['running_var']"),
    "unknown": ({"gamma": ONES}, FIVE, "unknown ['gamma']"),
    "unknown, torch": ({"gamma": ONES}, None, "unknown keys ['gamma']"),
    "no layer, torch": (dict.fromkeys(NAMES), None, "none of ['weight', "),
    "shape": ({"bias": SHORT}, FIVE, "bias has shape (4,), and must have shape (5,)"),
    "shape, torch": ({"bias": SHORT}, None, "bias has shape (4,), and must have shape (5,)"),
    "all shapes": ({}, {"num_features": 10**15}, "weight has shape (5,), and must have shape (1000000000000000,)"),
    "no num_features": ({}, {}, "num_features is None, and must be an integer"),
    "num_features": ({}, {"num_features": "5"}, "num_features is '5', and must be an integer"),
    "dtype": ({"weight": np.ones(C, np.uint8)}, FIVE, "weight has dtype U8, and must be one of F16, BF16, F32"),
    "integers": ({"weight": np.ones(C, int)}, FIVE, "weight has dtype int64, and must be float16"),
    "count": ({NAMES[4]: np.array(-1)}, FIVE, "num_batches_tracked is -1, and must be"),
    "one-sided": ({"bias": None}, FIVE | {"affine": True}, "lacks ['bias']"),
    "one-sided too many": ({}, FIVE | {"affine": "weight"}, "unknown ['bias']"),
    "a weight that is none": ({"weight": 2 * ONES}, FIVE | {"affine": "bias"}, "weight has other values than 1"),
    "affine": ({}, FIVE | {"affine": "gamma"}, "affine is 'gamma', and must be"),
    "affine a list": ({}, FIVE | {"affine": []}, "affine is [], and must be"),
    "track": ({}, FIVE | {"track_running_stats": 1}, "track_running_stats is 1, and must be True or False"),
    "training": ({}, FIVE | {"training": None}, "training is None, and must be True or False"),
    "eps": ({}, FIVE | {"eps": 0}, "eps is 0.0, and must be"),
    "momentum": ({}, FIVE | {"momentum": [1]}, "momentum is [1], and must be"),
    "activation": ({}, FIVE | {"activation": "gelu"}, "activation is 'gelu', and must be"),
    "activation a list": ({}, FIVE | {"activation": ["relu"]}, "activation is ['relu'], and must be"),
    "nan_policy": ({}, FIVE | {"nan_policy": 3}, "nan_policy is 3, and must be"),
    "dtype option": ({}, FIVE | {"dtype": "int8"}, "dtype is int8, and must be"),
    "axis": ({}, FIVE | {"axis": 1.5}, "axis is 1.5, and must be an integer"),
    "unknown option": ({}, FIVE | {"renorm": 1}, "its metadata has unknown options ['renorm']"),
    "no JSON": ({}, "{", "must have JSON of a layer's options"),
    "a list of options": ({}, "[1]", "must have JSON of a layer's options"),
    "deep": ({}, DEEP, "must have JSON of a layer's options"),
}  # fmt: skip


@needs_safetensors
@pytest.mark.parametrize(("spoil", "options", "words"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_file(tmp_path, spoil, options, words):
    tensors = {name: value for name, value in (STATE | spoil).items() if value is not None}
    (tmp_path / "a").write_bytes(file(tensors, options))
    raises(ValueError, "a' holds no BatchNorm: … " + words, convert.load, tmp_path / "a")


@needs_safetensors
def test_missing_options_are_the_defaults(tmp_path):
    """As a file of an earlier version may lack some."""
    (tmp_path / "a").write_bytes(file(STATE, FIVE))
    want = fastbn.BatchNorm(C)
    want.running_mean[...], want.bias[...], want.num_batches_tracked = 1, 1, 3
    equal(convert.load(tmp_path / "a"), want)


@needs_safetensors
def test_no_safetensors_file(tmp_path):
    whole, path = file(STATE, FIVE), tmp_path / "a"
    zip_file = b"PK\x03\x04" + bytes(500)  # as torch.save writes
    cut = [whole[:n] for n in range(0, len(whole), 11)]
    for data in [*cut, zip_file, whole + b"\0", struct.pack("<Q", 2**63) + whole[8:]]:
        path.write_bytes(data)
        raises(ValueError, "a' is not a safetensors file", convert.load, path)


def test_imports_nothing():
    code = "import sys, fastbn.convert; print({m.split('.')[0] for m in sys.modules})"
    loaded = run_python(code).stdout
    for name in ("torch", "keras", "jax", "flax", "onnx", "safetensors", "ml_dtypes"):
        assert repr(name) not in loaded


def test_methods_and_classes(tmp_path):
    """BatchNorm.save and load are the functions; a layer comes back as what it was, with what it was made with."""
    x = sample((12, 3, 5), np.float32)
    ghost = fastbn.GhostBatchNorm(3, virtual_batch_size=4, eps=1e-3)
    ghost(x)
    ghost.save(tmp_path / "ghost")
    again = fastbn.GhostBatchNorm.load(tmp_path / "ghost")
    assert type(again) is fastbn.GhostBatchNorm and repr(again) == repr(ghost)
    same_bits(again(x), ghost(x))
    with pytest.raises(ValueError, match="it holds a GhostBatchNorm, and must be loaded as one, not as a BatchNorm"):
        fastbn.BatchNorm.load(tmp_path / "ghost")
    plain = fastbn.BatchNorm(3)
    plain.save(tmp_path / "plain")
    assert fastbn.BatchNorm.load(tmp_path / "plain", momentum=0.5).momentum == 0.5
    assert type(fastbn.InplaceBatchNorm.load(tmp_path / "plain")) is fastbn.InplaceBatchNorm
    assert fastbn.GhostBatchNorm.load(tmp_path / "plain", virtual_batch_size=7).virtual_batch_size == 7
    with pytest.raises(ValueError, match=r"holds no BatchNorm: affine is given, and must come from the file's tensors"):
        fastbn.BatchNorm.load(tmp_path / "plain", affine=False)


def test_options_beside_torchs_file(tmp_path):
    """A file without options takes those that are given, and its variances are looked at."""
    safetensors = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
    state = convert.to_torch(fastbn.BatchNorm(3))
    safetensors.save_file(state, tmp_path / "torch")
    layer = fastbn.BatchNorm.load(tmp_path / "torch", dtype=np.float64, training=False, axis=-1)
    assert layer.dtype == np.float64 and not layer.training and layer.axis == -1
    safetensors.save_file(state | {"running_var": np.full(3, -1, np.float32)}, tmp_path / "torch")
    with pytest.raises(ValueError, match=r"running_var has -1\.0 in channel 0, and must be variances: at least 0"):
        fastbn.BatchNorm.load(tmp_path / "torch")


def test_half_of_the_statistics():
    state = convert.to_torch(fastbn.BatchNorm(3))
    del state["running_var"]
    with pytest.raises(ValueError, match="and must have running_mean and running_var, or no statistics at all"):
        convert.from_torch(state)
