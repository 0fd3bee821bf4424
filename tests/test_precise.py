"""update_bn: a network's running statistics, estimated anew."""

import numpy as np
import pytest
from conftest import F32, F64, generator, same_bits

import fastbn
from fastbn import nn
from fastbn.nn.layer import Layer
from fastbn.nn.update import update_bn
from fastbn.pieces import parts


def network(rng=0, **settings):
    """A Sequential in a Sequential; its statistics are those of some training steps."""
    inner = nn.Sequential(nn.Linear(5, 4, rng=rng), nn.BatchNorm(4, **settings), nn.ReLU())
    net = nn.Sequential(inner, nn.Linear(4, 3, rng=rng + 1), nn.BatchNorm(3, **settings), nn.Sigmoid())
    for seed in range(3):
        net(data(20, seed))
    return net


def data(rows, seed=9):
    return (generator(seed).standard_normal((rows, 5)) * 3 + 1).astype(F32)


def norms(net):
    return [layer for layer in net.layers if isinstance(layer, fastbn.BatchNorm)]


def statistics(net):
    return [(bn.running_mean.copy(), bn.running_var.copy(), bn.num_batches_tracked) for bn in norms(net)]


def inputs(net, x):
    """What reaches each BatchNorm in training, in float64 from float32's own layers."""
    found = []
    for layer in net.layers:
        if isinstance(layer, fastbn.BatchNorm):
            found.append(x.astype(F64))
        x = np.array(layer(x))
    return found


@pytest.mark.parametrize(("rows", "size"), [(60, 20), (61, 20), (101, 20), (3, 20), (2, 20), (7, 2)])
@pytest.mark.parametrize("unbiased", [True, False])
def test_averages_over_batches(rows, size, unbiased):
    """Each running statistic is the mean of the batches', whatever was there; all rows are used, none alone."""
    net, x = network(unbiased=unbiased), data(rows)
    before = net.state_dict()
    assert update_bn(net, x, batch_size=size) is None
    means, variances = [[], []], [[], []]
    cut = parts(rows, size, 2)
    assert len(cut) == (-(-rows // size) if size > 2 else 3)
    for part in cut:
        for k, value in enumerate(inputs(network(unbiased=unbiased), x[part])):
            means[k].append(value.mean(0))
            variances[k].append(value.var(0, ddof=int(unbiased)))
    for k, bn in enumerate(norms(net)):
        np.testing.assert_allclose(bn.running_mean, np.mean(means[k], axis=0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(bn.running_var, np.mean(variances[k], axis=0), rtol=1e-5)
        assert bn.num_batches_tracked == len(cut) and bn.momentum == 0.1
    for name, value in net.state_dict().items():
        if "running" not in name and "tracked" not in name:
            same_bits(value, before[name])


@pytest.mark.parametrize("unbiased", [True, False])
def test_one_full_batch_is_exact(unbiased):
    """And so evaluation is what training gives."""
    net, x = network(unbiased=unbiased), data(101)
    update_bn(net, x, batch_size=1000)
    for k, value in enumerate(inputs(network(unbiased=unbiased), x)):
        bn = norms(net)[k]
        np.testing.assert_allclose(bn.running_mean, value.mean(0), rtol=2e-6, atol=1e-6)
        np.testing.assert_allclose(bn.running_var, value.var(0, ddof=int(unbiased)), rtol=2e-6)
    if not unbiased:
        trained = net.train()(x).copy()
        update_bn(net, x)
        np.testing.assert_allclose(net.eval()(x), trained, rtol=1e-5)


def test_the_average_weighs_batches_alike():
    """Not the last ones more, as momentum would: with the batches turned around it is the same."""
    x = data(60) * np.linspace(1, 9, 60, dtype=F32)[:, None]
    one, other = network(), network()
    update_bn(one, x, batch_size=20)
    update_bn(other, np.concatenate([x[40:], x[20:40], x[:20]]), batch_size=20)
    for bn, turned in zip(norms(one), norms(other), strict=True):
        np.testing.assert_allclose(bn.running_mean, turned.running_mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(bn.running_var, turned.running_var, rtol=1e-4)


def test_modes_and_momenta_come_back():
    """Each layer's own; what is frozen or has no statistics is left alone."""
    net = nn.Sequential(
        nn.Linear(5, 4, rng=0), nn.BatchNorm(4, momentum=0.3), nn.BatchNorm(4, momentum=None), nn.BatchNorm(4),
        nn.BatchNorm(4, track_running_stats=False), nn.ReLU(),
    )  # fmt: skip
    net(data(20))
    frozen = net.layers[3].freeze()
    kept = frozen.state_dict()
    for mode in (True, False):
        net.train(mode)
        net.layers[1].eval()
        modes = [layer.training for layer in net.layers]
        update_bn(net, data(60), batch_size=30)
        assert [layer.training for layer in net.layers] == modes and net.training is mode
        assert [bn.momentum for bn in norms(net)] == [0.3, None, 0.1, 0.1]
        assert net.layers[1].num_batches_tracked == net.layers[2].num_batches_tracked == 2
        np.testing.assert_equal(frozen.state_dict(), kept)
        assert not frozen.trainable


def test_a_layer_alone_and_layers_of_ones_own():
    """A model need not be a Sequential."""
    bn, x = nn.BatchNorm(5), data(40)
    update_bn(bn, x)
    np.testing.assert_allclose(bn.running_mean, x.mean(0, dtype=F64), rtol=1e-5)

    class Twice(Layer):
        def __init__(self, inner):
            self.layers = [inner]

        def __call__(self, x):
            return self.layers[0](x)

        def backward(self, dy):
            return self.layers[0].backward(dy)

        def train(self, mode=True):
            self.training = mode
            self.layers[0].train(mode)
            return self

    net = network()
    update_bn(Twice(net), x)
    assert all(bn.num_batches_tracked == 1 for bn in norms(net))


def test_nothing_to_update():
    """No BatchNorm that could be: nothing is run."""
    frozen = nn.Sequential(nn.BatchNorm(5, trainable=False), nn.BatchNorm(5, track_running_stats=False))
    before = frozen.state_dict()
    for net in (nn.Sequential(nn.Linear(5, 3)), nn.ReLU(), frozen):
        update_bn(net, data(7))
    np.testing.assert_equal(frozen.state_dict(), before)


def test_nothing_to_go_back_over():
    net = network()
    dy = np.array(net(data(40)))
    update_bn(net, data(40))
    with pytest.raises(ValueError, match="nothing to go back over"):
        net.backward(dy)
    net(data(40))
    net.backward(dy)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_everything(error):
    """In the second batch, behind the first BatchNorm."""

    class Failing(nn.ReLU):
        calls = 0

        def function(self, x, y):
            super().function(x, y)
            self.calls += 1
            if self.calls == 2:
                raise error

    net = nn.Sequential(nn.Linear(5, 4, rng=0), nn.BatchNorm(4, momentum=0.2), Failing(), nn.BatchNorm(4))
    net.layers[1](data(20)[:, :4])
    net.eval()
    before, mean = net.state_dict(), net.layers[1].running_mean
    with pytest.raises(error):
        update_bn(net, data(60), batch_size=20)
    assert net.layers[2].calls == 2
    np.testing.assert_equal(net.state_dict(), before)
    assert net.layers[1].running_mean is mean and net.layers[1].momentum == 0.2
    assert not any(layer.training for layer in net.layers)


def test_batches_that_do_not_count():
    """By its nan_policy a BatchNorm may have skipped them all: there is no statistic to put in place."""
    net, x = network(nan_policy="skip_update"), data(40)
    before = statistics(net)
    x[:, 2] = np.nan
    with pytest.raises(ValueError, match=r"x has no batch that counts for BatchNorm\(4, .*, and must have one"):
        update_bn(net, x, batch_size=20)
    np.testing.assert_equal(statistics(net), before)
    x = data(40)
    x[3, 2] = np.nan
    update_bn(net, x, batch_size=20)  # the second batch counts
    assert [bn.num_batches_tracked for bn in norms(net)] == [1, 1]


BAD = {
    "model": ({"model": "net"}, TypeError, "model is a str, and must be a Layer"),
    "a plain BatchNorm": ({"model": fastbn.BatchNorm(5)}, TypeError, "model is a BatchNorm, and must be a Layer"),
    "x is a list of ints": ({"x": [[1, 2]]}, TypeError, "x has dtype int64"),
    "no rows": ({"x": np.empty((0, 5), F32)}, ValueError, r"x has shape \(0, 5\), and must have at least one row"),
    "a number": ({"x": np.float32(1)}, ValueError, r"x has shape \(\), and must have at least one row"),
    "one row": ({"x": np.ones((1, 5), F32)}, ValueError, "one value a channel"),
    "another width": ({"x": np.ones((20, 4), F32)}, ValueError, "x has shape"),
    "batch_size 0": ({"batch_size": 0}, ValueError, "batch_size is 0, and must be at least 1"),
    "batch_size float": ({"batch_size": 8.0}, TypeError, "batch_size is 8.0, and must be an integer"),
}


@pytest.mark.parametrize(("arguments", "error", "words"), BAD.values(), ids=BAD)
def test_bad_arguments(arguments, error, words):
    net = network().eval()
    before = net.state_dict()
    with pytest.raises(error, match=words):
        update_bn(**({"model": net, "x": data(40)} | arguments))
    np.testing.assert_equal(net.state_dict(), before)
    assert not any(layer.training for layer in net.layers)
    assert {bn.momentum for bn in norms(net)} == {0.1}
