"""Dropout: what is dropped, gradients, repetition, memory, errors."""

import copy
import tracemalloc

import numpy as np
import pytest

from fastbn import nn
from fastbn.nn.dropout import Dropout


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_share_dropped_and_the_factor(p, dtype):
    x = np.ones((400, 500), dtype)
    layer = Dropout(p, rng=0)
    y = layer(x)
    assert y.dtype == dtype and not np.shares_memory(x, y)
    np.testing.assert_allclose(np.unique(y), [0, 1 / (1 - p)], rtol=1e-6)
    assert (y == 0).mean() == pytest.approx(p, abs=5 * (p * (1 - p) / x.size) ** 0.5)
    # each number by itself: neither rows nor columns go together
    assert np.ptp((y == 0).mean(axis=0)) > 0 and np.ptp((y == 0).mean(axis=1)) > 0


def test_the_gradient_by_finite_differences():
    x = np.random.default_rng(1).standard_normal((5, 4))
    c = np.random.default_rng(2).standard_normal((5, 4))
    layer = Dropout(0.4, rng=0)
    state = layer.rng.bit_generator.state

    def value():
        layer.rng.bit_generator.state = state
        return float(np.sum(c * layer(x)))

    value()
    dx = layer.backward(c).copy()
    np.testing.assert_array_equal(layer.backward(c), dx)
    assert (dx == 0).any() and (dx != 0).any()
    for i in np.ndindex(x.shape):
        kept = x[i]
        x[i] = kept + 1e-6
        above = value()
        x[i] = kept - 1e-6
        assert (above - value()) / 2e-6 == pytest.approx(dx[i], rel=1e-6, abs=1e-7)
        x[i] = kept


def test_eval_is_the_identity_and_draws_nothing():
    x = np.random.default_rng(3).standard_normal((5, 4))
    layer = Dropout(0.5, rng=0)
    before = copy.deepcopy(layer.rng.bit_generator.state)
    assert layer.eval()(x) is x and layer.backward(x) is x
    assert layer.rng.bit_generator.state == before
    assert (layer.train()(x) == 0).any()
    layer.p = 0.0
    assert layer(x) is x and layer.backward(x) is x


def test_all_may_be_dropped():
    layer = Dropout(1.0)
    x = np.ones((3, 4), np.float32)
    assert not layer(x).any() and not layer.backward(x).any()


def test_training_goes_on_from_a_saved_state():
    x = np.ones((6, 7), np.float32)
    layer = Dropout(0.5, rng=4)
    layer(x)
    state = copy.deepcopy(layer.rng.bit_generator.state)
    further = [layer(x).copy() for _ in range(3)]
    assert (further[0] != further[1]).any()
    other = Dropout(0.5, rng=99)
    other.rng.bit_generator.state = state
    for want in further:
        np.testing.assert_array_equal(other(x), want)
    np.testing.assert_array_equal(Dropout(0.5, rng=4)(x), Dropout(0.5, rng=np.random.default_rng(4))(x))


def test_a_generator_may_be_shared():
    rng = np.random.default_rng(5)
    one, other = Dropout(0.5, rng=rng), Dropout(0.5, rng=rng)
    x = np.ones((6, 7), np.float32)
    assert one.rng is other.rng and (one(x) != other(x)).any()


def test_in_a_network():
    rng = np.random.default_rng(6)
    net = nn.Sequential(nn.Linear(4, 50, rng=rng), nn.ReLU(), Dropout(0.5, rng=rng), nn.Linear(50, 3, rng=rng))
    x = rng.standard_normal((6, 4), np.float32)
    assert (net(x).copy() != net(x)).any()
    np.testing.assert_array_equal(net.eval()(x).copy(), net(x))
    assert list(net.state_dict()) == ["0.weight", "0.bias", "3.weight", "3.bias"]


def test_any_shape_and_order():
    for shape in [(7,), (2, 3, 4, 5), (0, 4)]:
        x = np.asfortranarray(np.ones(shape, np.float32))
        layer = Dropout(0.5, rng=0)
        y = layer(x).copy()
        np.testing.assert_array_equal(layer.backward(x), y)


def test_a_steady_step_allocates_nothing_of_a_batchs_size():
    layer = Dropout(0.5, rng=0)
    x = np.ones((512, 1024), np.float32)

    def epoch():
        for rows in (512, 300):
            layer.backward(layer(x[:rows]))

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
    assert peak < 100_000  # the 64 kB in which NumPy converts booleans, piece by piece; a mask of 300 rows is 307 kB


X = np.zeros((2, 4), np.float32)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Dropout(-0.1), ValueError, "p is -0.1, and must be at least 0 and at most 1"),
        (lambda: Dropout(1.5), ValueError, "p is 1.5"),
        (lambda: Dropout(float("nan")), ValueError, "p is nan"),
        (lambda: Dropout("half"), TypeError, "p is 'half'"),
        (lambda: Dropout()(X.astype(int)), TypeError, "x has dtype int64"),
        (lambda: Dropout().backward(X), ValueError, "call the layer first"),
        (lambda: (layer := Dropout())(X) is layer.backward(X[:1]), ValueError, r"dy has shape \(1, 4\)"),
        (lambda: (layer := Dropout(0))(X) is layer.backward(X[:1]), ValueError, r"dy has shape \(1, 4\)"),
        (lambda: Dropout().load_state_dict({"p": X}), ValueError, r"unknown \['p'\]"),
    ],
)
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_it_says_what_it_is():
    assert repr(Dropout(0.25)) == "Dropout(0.25)" and isinstance(Dropout(), nn.Layer)
