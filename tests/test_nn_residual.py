"""Residual: values and gradients, both layouts, state, memory, errors."""

import pickle
import tracemalloc

import numpy as np
import pytest
from test_nn_layers import check_gradients

from fastbn import nn

F32, F64 = np.float32, np.float64


def block(axis=1, dtype=F64, activation="relu", channels=3):
    """Two convolutions and a way around them: a ResNet's basic block."""
    made = nn.Residual(
        nn.Conv2d(channels, channels, 3, padding=1, axis=axis, rng=0, dtype=dtype),
        nn.BatchNorm(channels, axis=axis, dtype=dtype),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1, axis=axis, rng=1, dtype=dtype),
        nn.BatchNorm(channels, axis=axis, dtype=dtype, activation=activation),
    )
    rng = np.random.default_rng(2)
    for parameter, _ in made.parameters():
        parameter += (0.3 * rng.standard_normal(parameter.shape)).astype(dtype)
    return made


def images(axis, dtype=F64, batch=4):
    shape = (batch, 3, 4, 5) if axis == 1 else (batch, 4, 5, 3)
    return np.random.default_rng(3).standard_normal(shape).astype(dtype)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("axis", [1, -1])
def test_is_its_parts(axis, activation, training):
    """The same layers one after the other, x added by hand."""
    whole, x = block(axis, activation=activation).train(training), images(axis)
    parts = block(axis, activation=None).train(training).layers
    y = x
    for layer in parts:
        y = layer(y)
    y = y + x
    if activation:
        y = np.maximum(y, 0)
    np.testing.assert_allclose(whole(x), y, rtol=1e-12, atol=1e-12)
    for name, array in whole.state_dict().items():
        place, name = name.split(".")
        np.testing.assert_allclose(array, parts[int(place)].state_dict()[name], rtol=1e-12)


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("axis", [1, -1])
def test_gradients(axis, activation):
    check_gradients(block(axis, activation=activation), images(axis))
    check_gradients(nn.Residual(nn.Linear(3, 3, rng=0, dtype=F64), nn.BatchNorm(3, dtype=F64)), images(1)[:, :, 0, 0])


def test_in_a_sequential():
    """Stays one layer there, with torch's nested names; `parameter_gradients` leaves the same gradients."""
    net = nn.Sequential(block(), nn.GlobalAvgPool2d(), nn.Linear(3, 2, rng=0, dtype=F64))
    assert len(net.layers) == 3 and "0.1.running_mean" in net.state_dict()
    x, dy = images(1), np.ones((4, 2))
    net(x)
    net.backward(dy)
    gradients = [gradient.copy() for _, gradient in net.parameters()]
    net(x)
    net.parameter_gradients(dy)
    for one, (_, other) in zip(gradients, net.parameters(), strict=True):
        np.testing.assert_array_equal(one, other)
    net.eval()
    assert not net.layers[0].layers[1].training
    other = nn.Sequential(block(), nn.GlobalAvgPool2d(), nn.Linear(3, 2, rng=5, dtype=F64)).eval()
    other.load_state_dict(net.state_dict())
    y = net(x).copy()
    np.testing.assert_array_equal(other(x), y)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(net))(x), y)
    nn.update_bn(net, x)
    assert net.layers[0].layers[1].num_batches_tracked == 1


def test_a_step_allocates_little():
    layer, x = block(dtype=F32), np.random.default_rng(0).standard_normal((256, 3, 16, 16)).astype(F32)
    for _ in range(2):
        layer.backward(layer(x))
    tracemalloc.start()
    layer.backward(layer(x))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < x.nbytes / 4


def test_errors():
    with pytest.raises(TypeError, match=r"the last layer is ReLU.*, and must be a BatchNorm that follows others"):
        nn.Residual(nn.BatchNorm(3), nn.ReLU())
    with pytest.raises(TypeError, match="and must be a BatchNorm that follows others"):
        nn.Residual(nn.BatchNorm(3))
    narrower = nn.Residual(nn.Linear(3, 2), nn.BatchNorm(2))
    with pytest.raises(ValueError, match=r"residual has shape \(4, 3\)"):
        narrower(np.zeros((4, 3), F32))
    with pytest.raises(ValueError, match="state"):
        block().load_state_dict({})
