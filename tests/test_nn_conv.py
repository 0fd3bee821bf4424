"""Conv2d, pooling and Flatten: values, gradients, both layouts, memory, errors."""

import tracemalloc

import numpy as np
import pytest
from conftest import channels_last, gaps, read_only
from test_nn_layers import check_gradients

import fastbn
from fastbn import nn
from fastbn.nn import conv
from fastbn.nn.conv import Conv2d
from fastbn.nn.flatten import Flatten
from fastbn.nn.pooling import AvgPool2d, GlobalAvgPool2d, MaxPool2d

F64 = np.float64
AXES = [1, -1]


def laid_out(x, axis):
    """NCHW images as NCHW or NHWC."""
    return x if axis == 1 else np.ascontiguousarray(x.transpose(0, 2, 3, 1))


def back(x, axis):
    """The inverse."""
    return x if axis == 1 or x.ndim != 4 else x.transpose(0, 3, 1, 2)


def convolved(x, weight, bias, stride, padding):
    """The definition, for NCHW."""
    x = np.pad(x, ((0, 0), (0, 0), (padding[0],) * 2, (padding[1],) * 2))
    out, _, high, wide = weight.shape
    down, across = (x.shape[2] - high) // stride[0] + 1, (x.shape[3] - wide) // stride[1] + 1
    y = np.empty((len(x), out, down, across))
    for i, j in np.ndindex(down, across):
        window = x[:, :, i * stride[0] : i * stride[0] + high, j * stride[1] : j * stride[1] + wide]
        y[:, :, i, j] = np.einsum("ncij,ocij->no", window, weight) + bias
    return y


# in_channels, kernel_size, stride, padding
FORMS = [
    (3, 1, 1, 0),
    (3, 1, 2, 0),
    (3, 1, 1, 1),
    (3, 3, 1, 1),
    (1, 3, 1, 1),
    (1, (2, 3), (2, 1), 0),
    (2, (2, 3), (1, 3), (0, 2)),
    (2, (5, 4), 2, (2, 1)),
    (2, (7, 8), 1, 0),
]


def made(form, axis, dtype=F64):
    channels, kernel, stride, padding = form
    layer = Conv2d(channels, 4, kernel, stride, padding, rng=0, dtype=dtype, axis=axis)
    layer.bias[...] = np.random.default_rng(1).standard_normal(4)
    return layer


@pytest.fixture(params=[1, 4000, conv.BLOCK], ids=["an image", "two images", "all"])
def block(request, monkeypatch):
    """How much is laid out at once, which changes no result."""
    monkeypatch.setattr(conv, "BLOCK", request.param)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_conv_is_what_its_definition_says(form, axis, block):
    layer = made(form, axis)
    x = np.random.default_rng(2).standard_normal((5, form[0], 7, 8))
    want = convolved(x, layer.weight, layer.bias, layer.stride, layer.padding)
    np.testing.assert_allclose(back(layer(laid_out(x, axis)), axis), want, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(back(layer(laid_out(x[:2], axis)), axis), want[:2], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_conv_is_torchs_values_and_gradients(form, axis, block):
    torch = pytest.importorskip("torch")
    channels, kernel, stride, padding = form
    layer = made(form, axis)
    theirs = torch.nn.Conv2d(channels, 4, kernel, stride, padding, dtype=torch.float64)
    theirs.load_state_dict({name: torch.tensor(value) for name, value in layer.state_dict().items()})
    rng = np.random.default_rng(3)
    x = torch.tensor(rng.standard_normal((5, channels, 7, 8)), requires_grad=True)
    y = theirs(x)
    dy = rng.standard_normal(y.shape)
    y.backward(torch.tensor(dy))
    same = {"rtol": 1e-11, "atol": 1e-11}
    np.testing.assert_allclose(back(layer(laid_out(x.detach().numpy(), axis)), axis), y.detach().numpy(), **same)
    for _ in range(2):  # going back twice is the same
        np.testing.assert_allclose(back(layer.backward(laid_out(dy, axis)), axis), x.grad.numpy(), **same)
        np.testing.assert_allclose(layer.grad_weight, theirs.weight.grad.numpy(), **same)
        np.testing.assert_allclose(layer.grad_bias, theirs.bias.grad.numpy(), **same)


LAYERS = {
    "conv": lambda axis: made((2, (3, 2), (1, 2), (1, 0)), axis),
    "conv of one channel": lambda axis: Conv2d(1, 3, 2, rng=0, dtype=F64, axis=axis),
    "pointwise conv, no bias": lambda axis: Conv2d(2, 3, 1, bias=False, rng=0, dtype=F64, axis=axis),
    "max": lambda axis: MaxPool2d(2, axis=axis),
    "max, overlapping": lambda axis: MaxPool2d((3, 2), (2, 1), axis=axis),
    "mean": lambda axis: AvgPool2d(2, axis=axis),
    "mean, overlapping": lambda axis: AvgPool2d((2, 3), 1, axis=axis),
    "mean, with gaps": lambda axis: AvgPool2d(2, 3, axis=axis),
    "global mean": lambda axis: GlobalAvgPool2d(axis=axis),
    "flatten": lambda axis: Flatten(axis=axis),
}  # fmt: skip


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("name", LAYERS)
def test_gradients(name, axis):
    x = np.random.default_rng(4).standard_normal((3, 1 if "one channel" in name else 2, 5, 4))
    check_gradients(LAYERS[name](axis), laid_out(x, axis))


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("name", LAYERS)
def test_any_memory_order_gives_the_same(name, axis):
    layer = LAYERS[name](axis)
    x = laid_out(np.random.default_rng(5).standard_normal((3, 1 if "one channel" in name else 2, 5, 4)), axis)
    y = layer(x).copy()
    dx = layer.backward(y).copy()
    for order in (channels_last, gaps, read_only, np.asfortranarray):
        np.testing.assert_allclose(layer(order(x)), y, rtol=1e-13, atol=1e-15, err_msg=order.__name__)
        np.testing.assert_allclose(layer.backward(order(y)), dx, rtol=1e-13, atol=1e-15, err_msg=order.__name__)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("name", LAYERS)
def test_batches_of_other_sizes(name, axis):
    """A batch smaller than the last one, an empty one, and the first again."""
    layer = LAYERS[name](axis)
    x = laid_out(np.random.default_rng(6).standard_normal((4, 1 if "one channel" in name else 2, 5, 4)), axis)
    y = layer(x).copy()
    dx = layer.backward(y).copy()
    for rows in (2, 0, 4):
        got = layer(x[:rows])
        np.testing.assert_allclose(got, y[:rows], rtol=1e-13, atol=1e-15)
        np.testing.assert_allclose(layer.backward(got.copy()), dx[:rows], rtol=1e-13, atol=1e-15)
        if not rows:
            assert all(not gradient.any() for _, gradient in layer.parameters())


@pytest.mark.parametrize("axis", AXES)
def test_a_pointwise_conv_reads_x_where_it_lies(axis):
    layer = Conv2d(3, 4, 1, axis=axis, rng=0)
    x = laid_out(np.zeros((2, 3, 5, 4), np.float32), axis)
    ((_, matrix),) = layer._matrices(x, (5, 4))
    assert np.shares_memory(matrix, x)
    ((_, matrix),) = layer._matrices(gaps(x), (5, 4))  # has no rows to read: they are laid out in the layer's memory
    assert np.shares_memory(matrix, layer._matrix._memory)


def test_a_bias_gradient_of_many_positions_is_accurate():
    rng = np.random.default_rng(7)
    dy = rng.random((64, 40, 40, 4), np.float32)
    layer = Conv2d(1, 4, 1, axis=-1)
    layer(np.zeros((64, 40, 40, 1), np.float32))
    layer.parameter_gradients(dy)
    np.testing.assert_allclose(layer.grad_bias, dy.sum(axis=(0, 1, 2), dtype=F64), rtol=2e-7)


def test_conv_starts_as_asked():
    he = Conv2d(16, 64, (3, 5), rng=0).weight
    glorot = Conv2d(16, 64, (3, 5), init="glorot", rng=0).weight
    assert he.shape == glorot.shape == (64, 16, 3, 5)
    assert he.std() == pytest.approx((2 / (16 * 15)) ** 0.5, rel=0.02)
    assert glorot.std() == pytest.approx((2 / (80 * 15)) ** 0.5, rel=0.02)
    assert np.abs(glorot).max() <= (6 / (80 * 15)) ** 0.5
    assert Conv2d(16, 64, 3, init=0.01, rng=0).weight.std() == pytest.approx(0.01, rel=0.02)
    np.testing.assert_array_equal(he, Conv2d(16, 64, (3, 5), rng=np.random.default_rng(0)).weight)


def test_conv_state_goes_round():
    one, other = Conv2d(2, 3, 3, rng=0), Conv2d(2, 3, 3, rng=1)
    other.load_state_dict(one.state_dict())
    np.testing.assert_array_equal(one.weight, other.weight)
    assert list(one.state_dict()) == ["weight", "bias"]
    with pytest.raises(ValueError, match=r"weight has shape \(3, 2, 2, 2\) in state"):
        other.load_state_dict(one.state_dict() | {"weight": np.zeros((3, 2, 2, 2))})
    with pytest.raises(ValueError, match=r"state lacks \['bias'\]"):
        other.load_state_dict({"weight": one.weight})
    np.testing.assert_array_equal(one.weight, other.weight)


@pytest.mark.parametrize("axis", AXES)
def test_dropping_a_bias_changes_nothing(axis):
    rng = np.random.default_rng(8)
    layer, norm = made((2, 3, 1, 1), axis), nn.BatchNorm(4, axis=axis, dtype=F64)
    norm.running_mean[...], norm.running_var[...] = rng.standard_normal(4), rng.random(4)
    x = laid_out(rng.standard_normal((3, 2, 5, 4)), axis)
    want = norm.eval()(layer(x)).copy()
    layer.drop_bias(norm)
    assert layer.bias is None and len(list(layer.parameters())) == 1
    np.testing.assert_allclose(norm(layer(x)), want, rtol=1e-12)


# ---- pooling ----


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("kernel, stride", [(2, None), ((2, 3), None), (3, 2), ((3, 2), (1, 2)), (2, 3), (1, 1)])
@pytest.mark.parametrize("kind", ["MaxPool2d", "AvgPool2d"])
def test_pooling_is_torchs(kind, kernel, stride, axis):
    torch = pytest.importorskip("torch")
    layer = {"MaxPool2d": MaxPool2d, "AvgPool2d": AvgPool2d}[kind](kernel, stride, axis=axis)
    rng = np.random.default_rng(9)
    x = torch.tensor(rng.integers(0, 4, (3, 2, 7, 8)).astype(np.float32), requires_grad=True)  # with ties
    y = getattr(torch.nn, kind)(kernel, stride)(x)
    dy = rng.standard_normal(y.shape, np.float32)
    y.backward(torch.tensor(dy))
    np.testing.assert_allclose(back(layer(laid_out(x.detach().numpy(), axis)), axis), y.detach().numpy(), rtol=1e-6)
    dx = layer.backward(laid_out(dy, axis))
    np.testing.assert_allclose(back(dx, axis), x.grad.numpy(), rtol=1e-5, atol=1e-6)


def test_a_maximum_of_equals_is_the_first_and_a_nan_stays():
    layer = MaxPool2d(2)
    x = np.array([[[[1, 5, 2, np.nan], [5, 5, 9, 3]]]])
    np.testing.assert_array_equal(layer(x), [[[[5, np.nan]]]])
    np.testing.assert_array_equal(layer.backward(np.full((1, 1, 1, 2), 7.0))[..., :2], [[[[0, 7], [0, 0]]]])


def test_windows_of_more_than_256_elements():
    x = np.random.default_rng(10).permutation(2 * 20 * 17).reshape(2, 1, 20, 17).astype(F64)
    layer = MaxPool2d((20, 17))
    np.testing.assert_array_equal(layer(x)[:, 0, 0, 0], x.max(axis=(1, 2, 3)))
    np.testing.assert_array_equal(layer.backward(np.ones((2, 1, 1, 1))), x == x.max(axis=(1, 2, 3), keepdims=True))


@pytest.mark.parametrize("axis", AXES)
def test_flatten_orders_features_as_torch_does(axis):
    x = np.random.default_rng(11).standard_normal((3, 2, 5, 4))
    np.testing.assert_array_equal(Flatten(axis=axis)(laid_out(x, axis)), x.reshape(3, -1))


# ---- a network ----


def network(axis, dtype=np.float32):
    """conv → BN + ReLU → pool, twice, then linear: one draw of weights whatever the layout."""
    rng = np.random.default_rng(12)

    def stage(channels, out, pool):
        convolution = Conv2d(channels, out, 3, padding=1, bias=False, rng=rng, dtype=dtype, axis=axis)
        norm = nn.BatchNorm(out, activation="relu", axis=axis, dtype=dtype)
        norm.weight[...] = 1 + 0.3 * rng.standard_normal(out)
        norm.bias[...] = 0.3 * rng.standard_normal(out)
        return convolution, norm, pool

    return nn.Sequential(
        *stage(1, 4, MaxPool2d(2, axis=axis)), *stage(4, 6, AvgPool2d(3, 2, axis=axis)),
        Flatten(axis=axis), nn.Linear(6 * 3 * 3, 10, rng=rng, dtype=dtype),
    )  # fmt: skip


def trained_one_step(net, x, labels):
    """Logits and gradients, in one list."""
    loss = nn.SoftmaxCrossEntropy()
    logits = net(x).copy()
    loss(logits, labels)
    net.backward(loss.backward())
    return [logits, *(gradient.copy() for _, gradient in net.parameters())]


def test_both_layouts_are_the_same_network():
    rng = np.random.default_rng(13)
    x, labels = rng.standard_normal((20, 1, 14, 14), np.float32), rng.integers(0, 10, 20)
    first, last = network(1), network(-1)
    for name, value in first.state_dict().items():
        np.testing.assert_array_equal(value, last.state_dict()[name])
    results = trained_one_step(first, x, labels), trained_one_step(last, laid_out(x, -1), labels)
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    # and in use, by running statistics that each has taken of the batch itself
    np.testing.assert_allclose(first.eval()(x), last.eval()(laid_out(x, -1)), rtol=1e-5, atol=1e-5)


def test_the_network_is_torchs():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(14)
    x, labels = rng.standard_normal((20, 1, 14, 14)), rng.integers(0, 10, 20)
    ours = network(-1, F64)
    theirs = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3, padding=1, bias=False), torch.nn.BatchNorm2d(4), torch.nn.ReLU(),
        torch.nn.MaxPool2d(2),
        torch.nn.Conv2d(4, 6, 3, padding=1, bias=False), torch.nn.BatchNorm2d(6), torch.nn.ReLU(),
        torch.nn.AvgPool2d(3, 2),
        torch.nn.Flatten(), torch.nn.Linear(6 * 3 * 3, 10),
    ).double()  # fmt: skip
    places = {"0": "0", "1": "1", "3": "4", "4": "5", "7": "9"}  # the ReLUs are layers of their own there
    theirs.load_state_dict(
        {places[name[0]] + name[1:]: torch.tensor(value) for name, value in ours.state_dict().items()}
    )
    logits = theirs(torch.tensor(x))
    torch.nn.functional.cross_entropy(logits, torch.tensor(labels)).backward()
    want = [logits.detach(), *(parameter.grad for parameter in theirs.parameters())]
    for got, expected in zip(trained_one_step(ours, laid_out(x, -1), labels), want, strict=True):
        np.testing.assert_allclose(got, expected.numpy(), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("axis", AXES)
def test_the_networks_gradients(axis):
    net = network(axis, F64)
    check_gradients(net, laid_out(np.random.default_rng(15).standard_normal((2, 1, 14, 14)), axis))


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.skipif(fastbn.backends.kernels().NAME == "reference", reason="the reference kernels work in new arrays")
def test_a_steady_step_allocates_nothing_of_a_batch_or_weight_size(axis):
    rng = np.random.default_rng(16)
    options = {"rng": rng, "axis": axis}
    net = nn.Sequential(
        Conv2d(4, 64, 3, padding=1, **options), nn.BatchNorm(64, activation="relu", axis=axis), MaxPool2d(2, axis=axis),
        Conv2d(64, 64, 3, stride=2, **options), AvgPool2d(2, 1, axis=axis), Conv2d(64, 64, 1, **options),
        Flatten(axis=axis), nn.Linear(64 * 9, 64, rng=rng),
    )  # fmt: skip
    top = GlobalAvgPool2d(axis=axis)
    x = laid_out(rng.standard_normal((80, 4, 20, 20), np.float32), axis)

    def epoch():
        for rows in (80, 80, 60):
            y = net(x[:rows])
            net.backward(y)
            images = x[:rows]
            top.backward(top(images))

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
    # An image array of the smallest batch is 138 kB or more, a 3×3 weight 147 kB. What is left is the 64 kB in which
    # NumPy converts booleans, piece by piece.
    assert peak < 90_000


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_one_dtype_throughout(dtype):
    net = network(-1, dtype)
    seen = [laid_out(np.random.default_rng(17).standard_normal((3, 1, 14, 14)).astype(dtype), -1)]
    for layer in net.layers:
        seen.append(layer(seen[-1]))
    for layer in reversed(net.layers):
        seen.append(layer.backward(seen[-1]))
    seen += [array for pair in net.parameters() for array in pair]
    assert {array.dtype for array in seen} == {np.dtype(dtype)}


# ---- errors ----


X = np.zeros((2, 3, 5, 4), np.float32)


def called(layer):
    layer(X)
    return layer


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Conv2d(0, 3, 3), ValueError, "in_channels is 0"),
        (lambda: Conv2d(3, 2.5, 3), TypeError, "out_channels is 2.5"),
        (lambda: Conv2d(3, 3, 0), ValueError, "kernel_size is 0, and must be at least 1"),
        (lambda: Conv2d(3, 3, (3, 3, 3)), ValueError, r"kernel_size is \(3, 3, 3\).*a pair"),
        (lambda: Conv2d(3, 3, 3, stride=(1, 0)), ValueError, r"stride is \(1, 0\)"),
        (lambda: Conv2d(3, 3, 3, padding="same"), TypeError, "padding is 'same', and must be an integer or a pair"),
        (lambda: Conv2d(3, 3, 3, padding=-1), ValueError, "padding is -1, and must be at least 0"),
        (lambda: Conv2d(3, 3, 3, bias="no"), TypeError, "bias is 'no'"),
        (lambda: Conv2d(3, 3, 3, init="xavier"), ValueError, "init is 'xavier'"),
        (lambda: Conv2d(3, 3, 3, axis=2), ValueError, "axis is 2, and must be 1"),
        (lambda: Conv2d(3, 3, 3, dtype=np.float16), TypeError, "dtype is float16"),
        (lambda: Conv2d(3, 3, 3)(X.astype(F64)), TypeError, "x has dtype float64.*float32"),
        (lambda: Conv2d(3, 3, 3)(X.tolist()), TypeError, "x is a list"),
        (lambda: Conv2d(2, 3, 3)(X), ValueError, r"x has shape .*\(batch, 2, height, width\) with axis=1"),
        (lambda: Conv2d(3, 3, 3, axis=-1)(X), ValueError, r"\(batch, height, width, 3\) with axis=-1"),
        (lambda: Conv2d(3, 3, 3)(X[0]), ValueError, r"x has shape \(3, 5, 4\)"),
        (lambda: Conv2d(3, 3, (6, 3))(X), ValueError, r"at least kernel_size, \(6, 3\); with their padding.*\(5, 4\)"),
        (lambda: Conv2d(3, 3, 3).backward(X), ValueError, "call the layer first"),
        (lambda: called(Conv2d(3, 3, 3)).backward(X), ValueError, r"dy has shape .*must have shape \(2, 3, 3, 2\)"),
        (lambda: called(Conv2d(3, 3, 1)).backward(X.astype(F64)), TypeError, "dy has dtype float64"),
        (lambda: Conv2d(3, 3, 3).drop_bias(nn.BatchNorm(4)), ValueError, "num_features 4, and must have 3"),
        (lambda: Conv2d(3, 3, 3).drop_bias(nn.BatchNorm(3, axis=-1)), ValueError, "has axis -1, and must have 1"),
        (lambda: MaxPool2d(0), ValueError, "kernel_size is 0"),
        (lambda: AvgPool2d(2, -1), ValueError, "stride is -1"),
        (lambda: AvgPool2d(2, axis=0), ValueError, "axis is 0"),
        (lambda: MaxPool2d(2)(X[0]), ValueError, r"\(batch, channels, height, width\) with axis=1"),
        (lambda: MaxPool2d(6)(X), ValueError, "x has shape .*at least kernel_size"),
        (lambda: MaxPool2d(2)(X.astype(int)), TypeError, "x has dtype int64"),
        (lambda: MaxPool2d(2).backward(X), ValueError, "call the layer first"),
        (lambda: called(MaxPool2d(2)).backward(X), ValueError, r"dy has shape .*\(2, 3, 2, 2\)"),
        (lambda: GlobalAvgPool2d()(X[:, :, :0]), ValueError, r"x has shape \(2, 3, 0, 4\)"),
        (lambda: GlobalAvgPool2d().backward(X), ValueError, "call the layer first"),
        (lambda: called(GlobalAvgPool2d()).backward(X), ValueError, r"dy has shape .*\(2, 3\)"),
        (lambda: Flatten(axis=3), ValueError, "axis is 3"),
        (lambda: Flatten()(X[0, 0, 0]), ValueError, "x has shape .*at least 2 axes"),
        (lambda: Flatten().backward(X), ValueError, "call the layer first"),
        (lambda: called(Flatten()).backward(X), ValueError, r"dy has shape .*\(2, 60\)"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_refused_call_leaves_the_layer_as_it_was():
    layer = called(Conv2d(3, 3, 1, rng=0))
    with pytest.raises(ValueError, match="x has shape"):
        layer(X[0])
    layer.backward(X)


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (Conv2d(3, 4, (1, 2)), "Conv2d(3, 4, (1, 2), stride=(1, 1), padding=(0, 0), bias=True, dtype=float32, axis=1)"),
        (MaxPool2d(2, axis=-1), "MaxPool2d((2, 2), stride=(2, 2), axis=-1)"),
        (GlobalAvgPool2d(), "GlobalAvgPool2d(axis=1)"),
        (Flatten(axis=-1), "Flatten(axis=-1)"),
    ],
)
def test_layers_say_what_they_are(layer, text):
    assert repr(layer) == text and isinstance(layer, nn.Layer)


def test_words_about_layouts_and_the_layer_after():
    with pytest.raises(ValueError, match=r"axis is 2, and must be 1 \(channels first\) or -1 \(channels last\)"):
        Conv2d(3, 4, 3, axis=2)
    conv = Conv2d(3, 4, 3)
    with pytest.raises(ValueError, match=r"the BatchNorm after Conv2d\(.*\) has num_features 5, and must have 4"):
        conv.drop_bias(nn.BatchNorm(5))
    with pytest.raises(ValueError, match=r"the BatchNorm after Conv2d\(.*\) has axis -1, and must have 1"):
        conv.drop_bias(nn.BatchNorm(4, axis=-1))


def test_sequential_drops_the_bias():
    """As of a Linear: the BatchNorm's own does its work."""
    net = nn.Sequential(Conv2d(3, 4, 3), nn.BatchNorm(4))
    assert net.layers[0].bias is None
