"""Diagnostics: closed forms, slow direct computations, and a model that stays as it was."""

import copy
import pickle
import subprocess
import sys

import numpy as np
import pytest

from fastbn import diagnostics, nn

F64 = np.float64
PROBES = {
    "internal_covariate_shift": lambda net, loss, x, t: diagnostics.internal_covariate_shift(net, loss, x, t, 0.1),
    "landscape": lambda net, loss, x, t: diagnostics.landscape(net, loss, x, t, [0.1, 0.2]),
    "gradient_norms": diagnostics.gradient_norms,
    "activations": lambda net, loss, x, t: diagnostics.activations(net, x),
}


def network(dtype=F64, dropout=0.0):
    rng = np.random.default_rng(0)
    layers = [nn.Linear(5, 6, rng=rng, dtype=dtype), nn.BatchNorm(6, dtype=dtype), nn.ReLU()]
    if dropout:
        layers.append(nn.Dropout(dropout, rng=1))
    layers += [nn.Linear(6, 6, rng=rng, dtype=dtype), nn.Tanh(), nn.Linear(6, 3, rng=rng, dtype=dtype)]
    net = nn.Sequential(*layers)
    for parameter, _ in net.parameters():
        parameter += (0.1 * rng.standard_normal(parameter.shape)).astype(dtype)
    return net


def batch(dtype=F64, rows=12):
    rng = np.random.default_rng(2)
    return rng.standard_normal((rows, 5)).astype(dtype), rng.integers(0, 3, rows)


def gradients(net, loss, x, targets):
    """By layer, as one vector each; an empty one where there are no parameters."""
    net.train()
    loss(net(x), targets)
    net.parameter_gradients(loss.backward())
    return [np.concatenate([[], *(g.ravel() for _, g in layer.parameters())]) for layer in net.layers]


def cosine(a, b):
    return a @ b / np.sqrt((a @ a) * (b @ b))


# ---- closed forms ----


def least_squares(seed=3, rows=9, width=4):
    """A linear model with MSE: loss, gradient and Hessian are known."""
    rng = np.random.default_rng(seed)
    x, t = rng.standard_normal((rows, width)), rng.standard_normal((rows, 1))
    net = nn.Sequential(nn.Linear(width, 1, bias=False, rng=rng, dtype=F64))
    return net, x, t, net.layers[0].weight.ravel().copy(), 2 / rows * x.T @ x


def test_landscape_of_a_quadratic():
    net, x, t, w, hessian = least_squares()
    loss = np.mean((x @ w[:, None] - t) ** 2)
    g = 2 / len(x) * x.T @ (x @ w - t.ravel())
    steps = np.array([0.01, 0.3, 2.0])
    found = diagnostics.landscape(net, nn.MSELoss(), x, t, list(steps))
    np.testing.assert_array_equal(found.steps, steps)
    assert found.loss == pytest.approx(loss, rel=1e-12)
    assert found.gradient_norm == pytest.approx(np.linalg.norm(g), rel=1e-12)
    np.testing.assert_allclose(found.losses, loss - steps * (g @ g) + steps**2 / 2 * (g @ hessian @ g), rtol=1e-11)
    np.testing.assert_allclose(found.predicted, loss - steps * (g @ g), rtol=1e-11)
    np.testing.assert_allclose(found.distances, steps * np.linalg.norm(hessian @ g), rtol=1e-11)
    np.testing.assert_allclose(found.cosines, [cosine(g, g - a * hessian @ g) for a in steps], rtol=1e-11)
    assert found.smoothness == pytest.approx(np.linalg.norm(hessian @ g) / np.linalg.norm(g), rel=1e-11)
    assert found.loss_range == (found.losses.min(), found.losses.max())
    assert found.distance_range == (found.distances.min(), found.distances.max())


def test_smoothness_along_an_eigenvector_is_its_eigenvalue():
    net, x, _, w, hessian = least_squares()
    values, vectors = np.linalg.eigh(hessian)
    for value, vector in zip(values, vectors.T, strict=True):
        # The targets of which w - w* is that eigenvector, so that the gradient H·(w - w*) is along it.
        found = diagnostics.landscape(net, nn.MSELoss(), x, (x @ (w - vector))[:, None], [0.1, 1.0])
        assert found.smoothness == pytest.approx(value, rel=1e-9)


def test_smoothness_is_the_largest_over_the_steps():
    """L = w⁴ (two linear layers of one unit and one weight each would mix directions): L' = 4w³, along one axis."""

    class Fourth:
        def __call__(self, output, targets):
            self.output = output.copy()
            return float(np.sum(output**4))

        def backward(self):
            return 4 * self.output**3

    net = nn.Sequential(nn.Linear(1, 1, bias=False, dtype=F64))
    net.layers[0].weight[...] = w = 0.5
    g = 4 * w**3
    steps = np.array([0.5, 4.0, 1.0])  # to 0.25, -1.5 and 0
    found = diagnostics.landscape(net, Fourth(), np.ones((1, 1)), None, steps)
    ratios = np.abs(4 * (w - steps * g) ** 3 - g) / (steps * g)
    assert ratios.argmax() == 1
    assert found.smoothness == pytest.approx(ratios.max(), rel=1e-12)
    np.testing.assert_array_equal(found.cosines[:2], [1, -1])
    assert np.isnan(found.cosines[2])  # the gradient there is 0


def test_shift_of_a_chain():
    """ŷ = x·w1·w2·w3: with plain gradient descent each G and G' is written down."""
    w, x, t, lr = np.array([0.9, -1.2, 0.7]), np.array([1.0, -2.0, 0.5]), np.array([0.3, 1.0, -1.0]), 0.2
    net = nn.Sequential(*(nn.Linear(1, 1, bias=False, dtype=F64) for _ in w))
    for layer, weight in zip(net.layers, w, strict=True):
        layer.weight[...] = weight

    def gradient(w, i):
        return np.mean(2 * (x * w.prod() - t) * x * np.delete(w, i).prod())

    g = np.array([gradient(w, i) for i in range(3)])
    after = np.array([gradient(np.concatenate([(w - lr * g)[:i], w[i:]]), i) for i in range(3)])
    found = diagnostics.internal_covariate_shift(net, nn.MSELoss(), x[:, None], t, lr)
    assert found.layers == (0, 1, 2)
    np.testing.assert_allclose(found.norm, np.abs(g), rtol=1e-12)
    np.testing.assert_allclose(found.l2, np.abs(g - after), rtol=1e-11)
    np.testing.assert_array_equal(found.cosine, np.sign(g * after))
    assert found.l2[0] == 0 and found.l2[1] > 0.01


# ---- slow direct computations ----


def make_optimizers():
    return {
        "rate": lambda net: 0.3,
        "momentum": lambda net: nn.SGD(net, 0.3, momentum=0.9, weight_decay=0.1),
        "adam": lambda net: nn.Adam(net, 0.05),
    }


@pytest.mark.parametrize("kind", make_optimizers())
def test_shift_is_that_of_networks_built_for_it(kind):
    """For every layer a network of its own, loaded with the lower layers' new parameters; after two real steps."""
    net, loss, (x, labels) = network(), nn.SoftmaxCrossEntropy(), batch()
    optimizer = make_optimizers()[kind](net)
    if not isinstance(optimizer, float):
        for _ in range(2):
            gradients(net, loss, x, labels)
            optimizer.step()
    found = diagnostics.internal_covariate_shift(net, loss, x, labels, optimizer)

    before = net.state_dict()
    g = gradients(net, loss, x, labels)
    (nn.SGD(net, optimizer) if isinstance(optimizer, float) else optimizer).step()
    after = net.state_dict()
    trained = [i for i, layer in enumerate(net.layers) if len(g[i])]
    assert found.layers == tuple(trained) == (0, 1, 3, 5)
    for place, i in enumerate(trained):
        mixed = network()
        mixed.load_state_dict({name: (after if int(name.split(".")[0]) < i else before)[name] for name in before})
        there = gradients(mixed, loss, x, labels)[i]
        assert found.norm[place] == pytest.approx(np.linalg.norm(g[i]), rel=1e-12)
        assert found.l2[place] == pytest.approx(np.linalg.norm(g[i] - there), rel=1e-9, abs=1e-15)
        assert found.cosine[place] == pytest.approx(cosine(g[i], there), rel=1e-12)
    assert np.all(found.l2[1:] > 1e-4)


def test_landscape_is_that_of_steps_taken():
    net, loss, (x, labels) = network(), nn.SoftmaxCrossEntropy(), batch()
    steps = [0.05, 0.7]
    found = diagnostics.landscape(net, loss, x, labels, steps)
    g = np.concatenate(gradients(net, loss, x, labels))
    for i, step in enumerate(steps):
        other = network()
        gradients(other, loss, x, labels)
        nn.SGD(other, step).step()
        there = np.concatenate(gradients(other, loss, x, labels))
        assert found.losses[i] == pytest.approx(loss(other(x), labels), rel=1e-12)
        assert found.distances[i] == pytest.approx(np.linalg.norm(there - g), rel=1e-10)
        assert found.cosines[i] == pytest.approx(cosine(there, g), rel=1e-12)


def test_gradient_norms_by_finite_differences():
    net, loss, (x, labels) = network(), nn.SoftmaxCrossEntropy(), batch()
    found = diagnostics.gradient_norms(net, loss, x, labels)
    assert found.layers == (0, 1, 3, 5)
    assert found.loss == pytest.approx(loss(net(x), labels), rel=1e-12)
    for place, i in enumerate(found.layers):
        squares = size = 0.0
        for parameter, _ in net.layers[i].parameters():
            size += np.sum(parameter**2)
            for at in np.ndindex(parameter.shape):
                kept, ends = parameter[at], []
                for step in (1e-6, -1e-6):
                    parameter[at] = kept + step
                    ends.append(loss(net(x), labels))
                parameter[at] = kept
                squares += ((ends[0] - ends[1]) / 2e-6) ** 2
        assert found.gradient[place] == pytest.approx(squares**0.5, rel=1e-6)
        assert found.parameters[place] == pytest.approx(size**0.5, rel=1e-12)


@pytest.mark.parametrize("training", [True, False])
def test_activations_unit_by_unit(training):
    net, (x, _) = network(), batch()
    net(x)  # so that the running statistics are not the batch's
    found = diagnostics.activations(net, x, percentiles=[0, 25, 100], training=training)
    net.train(training)
    y = x
    assert [one.layer for one in found] == list(range(6))
    assert [one.name for one in found] == ["Linear", "BatchNorm", "ReLU", "Linear", "Tanh", "Linear"]
    for one, layer in zip(found, net.layers, strict=True):
        y = layer(y)
        assert one.moments.count == len(x)
        np.testing.assert_allclose(one.moments.mean, y.mean(axis=0), rtol=1e-10, atol=1e-14)
        np.testing.assert_allclose(one.moments.var(), y.var(axis=0), rtol=1e-10, atol=1e-14)
        np.testing.assert_allclose(one.percentiles, np.percentile(y, [0, 25, 100], axis=0), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("axis", [1, -1])
def test_activations_of_images(axis):
    rng = np.random.default_rng(4)
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3, rng=rng, axis=axis), nn.BatchNorm(3, axis=axis), nn.Flatten(axis=axis), nn.Linear(12, 2)
    )
    x = rng.standard_normal((5, 2, 4, 4) if axis == 1 else (5, 4, 4, 2), np.float32)
    found = diagnostics.activations(net, x, axis=axis)
    assert [one.percentiles.shape for one in found] == [(3, 3), (3, 3), (3, 12), (3, 2)]
    assert found[0].moments.count == 20
    y = np.moveaxis(net.layers[0](x), axis, -1).reshape(-1, 3).astype(F64)
    np.testing.assert_allclose(found[0].percentiles, np.percentile(y, [15, 50, 85], axis=0), rtol=1e-6)
    np.testing.assert_allclose(found[0].moments.mean, y.mean(axis=0), rtol=1e-5)


def test_a_layer_that_is_no_sequential():
    x, t = np.ones((3, 2)), np.zeros((3, 1))
    layer = nn.Linear(2, 1, rng=0, dtype=F64)
    assert diagnostics.gradient_norms(layer, nn.MSELoss(), x, t).layers == (0,)
    np.testing.assert_array_equal(diagnostics.internal_covariate_shift(layer, nn.MSELoss(), x, t, 0.1).l2, [0])
    assert [one.name for one in diagnostics.activations(layer, x)] == ["Linear"]


def test_a_recurrent_network():
    """Sequences of shape (steps, batch, features), the recurrent layer normalized: what a real step would see."""
    rng = np.random.default_rng(7)
    x, labels = rng.standard_normal((5, 8, 3)), rng.integers(0, 2, 8)
    net = nn.Sequential(nn.RNN(3, 4, norm="input", rng=0, dtype=F64), nn.LastStep(), nn.Linear(4, 2, rng=1, dtype=F64))
    loss = nn.SoftmaxCrossEntropy()
    found = diagnostics.landscape(net, loss, x, labels, [0.5])
    norms = diagnostics.gradient_norms(net, loss, x, labels)
    assert [one.percentiles.shape for one in diagnostics.activations(net, x, axis=-1)] == [(3, 4), (3, 4), (3, 2)]
    g = gradients(net, loss, x, labels)
    assert norms.layers == (0, 2)
    np.testing.assert_allclose(norms.gradient, [np.linalg.norm(g[0]), np.linalg.norm(g[2])], rtol=1e-12)
    nn.SGD(net, 0.5).step()
    assert found.losses[0] == pytest.approx(loss(net(x), labels), rel=1e-12)


# ---- what batch normalization makes of it ----


def test_weights_before_batch_norm_have_no_smoothness_along_themselves():
    """The loss does not depend on their length: the gradient is normal to them, and goes as one over it."""
    norms = []
    for scale in (1, 4):
        net, loss, (x, labels) = network(), nn.SoftmaxCrossEntropy(), batch()
        net.layers[1].eps = 1e-14
        net.layers[0].weight *= scale
        gradients(net, loss, x, labels)
        weight, gradient = net.layers[0].weight, net.layers[0].grad_weight
        assert abs(np.vdot(weight, gradient)) < 1e-12
        norms.append(diagnostics.gradient_norms(net, loss, x, labels).gradient[0])
    assert norms[0] == pytest.approx(4 * norms[1], rel=1e-9)


# ---- dropout ----


def test_dropout_is_the_same_at_every_point():
    """Linear, dropout, fixed sum and MSE: a quadratic, with the choices that the model would make next."""
    rng = np.random.default_rng(5)
    x, t = rng.standard_normal((8, 3)), rng.standard_normal((8, 4))
    net = nn.Sequential(nn.Linear(3, 4, bias=False, rng=rng, dtype=F64), nn.Dropout(0.5, rng=6))
    w = net.layers[0].weight.copy()
    found = diagnostics.landscape(net, nn.MSELoss(), x, t, [0.5, 1.5])
    factor = nn.Dropout(0.5, rng=6)(np.ones((8, 4)))
    assert 0 in factor and 2 in factor

    def gradient(w):
        return 2 / t.size * ((factor * (x @ w.T) - t) * factor).T @ x

    g = gradient(w)
    expected = [np.linalg.norm(gradient(w - step * g) - g) for step in (0.5, 1.5)]
    np.testing.assert_allclose(found.distances, expected, rtol=1e-11)
    again = diagnostics.landscape(net, nn.MSELoss(), x, t, [0.5, 1.5])
    np.testing.assert_array_equal(found.distances, again.distances)


# ---- the model stays as it was ----


def everything(thing):
    """All that an object holds, its arrays as bytes: what a copy or pickle leaves out too."""
    if isinstance(thing, np.ndarray):
        return thing.shape, thing.dtype.str, thing.tobytes(), id(thing)
    if isinstance(thing, np.random.Generator):
        return repr(thing.bit_generator.state)
    if isinstance(thing, (list, tuple)):
        return [everything(one) for one in thing]
    if isinstance(thing, dict):
        return {name: everything(one) for name, one in thing.items()}
    if hasattr(thing, "__dict__"):
        return everything(vars(thing))
    if hasattr(thing, "__slots__"):
        return [everything(getattr(thing, name)) for name in thing.__slots__]
    return repr(thing)


@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, F64])
def test_everything_stays_as_it_was(probe, training, dtype):
    net, loss, (x, labels) = network(dtype, dropout=0.3), nn.SoftmaxCrossEntropy(), batch(dtype)
    gradients(net, loss, x, labels)
    net.train(training)
    net.layers[5].training = not training  # layers need not agree
    before = everything(net), everything(loss), x.tobytes()
    PROBES[probe](net, loss, x, labels)
    assert (everything(net), everything(loss), x.tobytes()) == before


def test_a_probe_between_forward_and_backward_changes_no_bit():
    x, labels = batch(np.float32)
    ends = []
    for probes in ([], list(PROBES.values())):
        net, loss = network(np.float32, dropout=0.3), nn.SoftmaxCrossEntropy()
        optimizer = nn.SGD(net, 0.1, momentum=0.9)
        for _ in range(3):
            loss(net(x), labels)
            for probe in probes:
                probe(net, loss, x, labels)
            net.parameter_gradients(loss.backward())
            if probes:
                diagnostics.internal_covariate_shift(net, loss, x, labels, optimizer)
            optimizer.step()
        ends.append(pickle.dumps([net.state_dict(), optimizer.state_dict(), net.layers[3].rng.bit_generator.state]))
    assert ends[0] == ends[1]


class Failing(nn.Layer):
    """Raises in its n-th call from now on, counted over all copies."""

    left = 0

    def __call__(self, x):
        Failing.left -= 1
        if Failing.left < 0:
            raise KeyboardInterrupt
        return x

    def backward(self, dy):
        return dy


@pytest.mark.parametrize(("probe", "calls"), [("activations", 0), ("gradient_norms", 0), ("landscape", 2)])
@pytest.mark.parametrize("training", [True, False])
def test_everything_stays_as_it_was_after_an_exception(probe, calls, training):
    net, loss, (x, labels) = network(dropout=0.3), nn.SoftmaxCrossEntropy(), batch()
    net = nn.Sequential(net, Failing())
    Failing.left = 1
    gradients(net, loss, x, labels)
    net.train(training)
    before = everything(net), everything(loss), x.tobytes()
    Failing.left = calls
    with pytest.raises(KeyboardInterrupt):
        PROBES[probe](net, loss, x, labels)
    assert (everything(net), everything(loss), x.tobytes()) == before


def test_an_optimizer_stays_as_it_was():
    net, loss, (x, labels) = network(), nn.SoftmaxCrossEntropy(), batch()
    optimizer = nn.Adam(net, 0.1)
    gradients(net, loss, x, labels)
    optimizer.step()
    before = everything(optimizer)
    diagnostics.internal_covariate_shift(net, loss, x, labels, optimizer)
    assert everything(optimizer) == before and optimizer.model is net


def test_a_frozen_batch_norm_stays_frozen():
    net, loss, (x, labels) = network(), nn.SoftmaxCrossEntropy(), batch()
    net.layers[1].freeze()
    assert diagnostics.gradient_norms(net, loss, x, labels).layers == (0, 3, 5)
    expected = np.linalg.norm(gradients(net, loss, x, labels)[0])
    assert diagnostics.gradient_norms(net, loss, x, labels).gradient[0] == pytest.approx(expected, rel=1e-12)


# ---- far steps, nothing to see, errors ----


def test_a_step_too_far_says_so_without_a_warning():
    x = np.ones((2, 1), np.float32)
    net = nn.Sequential(*(nn.Linear(1, 1, bias=False, init=1.0, rng=i) for i in range(3)))
    found = diagnostics.landscape(net, nn.MSELoss(), x, x, [1e-3, 1e30])
    assert np.isfinite(found.losses[0]) and not np.isfinite(found.losses[1])
    assert not np.isfinite(found.smoothness)


def test_no_gradient_has_no_direction():
    net, x, *_ = least_squares()
    found = diagnostics.landscape(net, nn.MSELoss(), x, net(x).copy(), [0.1])
    assert found.gradient_norm == 0 and np.isnan(found.smoothness) and np.isnan(found.cosines[0])
    assert found.losses[0] == found.loss == 0


def test_fastbn_does_not_import_it():
    code = "import sys, fastbn, fastbn.nn; print('fastbn.diagnostics' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


NET, LOSS, (X, LABELS) = network(), nn.SoftmaxCrossEntropy(), batch()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: diagnostics.gradient_norms("net", LOSS, X, LABELS), TypeError, "model is a str, and must be a Layer"),
        (lambda: diagnostics.gradient_norms(NET, np.mean, X, LABELS), TypeError, "loss is .*, and must be a loss, as"),
        (lambda: diagnostics.gradient_norms(NET, nn.MSELoss, X, LABELS), TypeError, "must be a loss, as"),
        (lambda: diagnostics.gradient_norms(NET, LOSS, X[:0], LABELS), ValueError, r"x has shape \(0, 5\)"),
        (
            lambda: diagnostics.gradient_norms(nn.ReLU(), LOSS, X, LABELS),
            ValueError,
            r"model is ReLU\(\), and must have parameters to take gradients of",
        ),
        (lambda: diagnostics.landscape(NET, LOSS, X, LABELS, []), ValueError, "must be a sequence of step sizes"),
        (lambda: diagnostics.landscape(NET, LOSS, X, LABELS, 0.1), ValueError, "must be a sequence of step sizes"),
        (lambda: diagnostics.landscape(NET, LOSS, X, LABELS, [0.1, 0]), ValueError, "steps is 0.0.*greater than 0"),
        (lambda: diagnostics.landscape(NET, LOSS, X, LABELS, [np.inf]), ValueError, "steps is inf.*finite"),
        (
            lambda: diagnostics.internal_covariate_shift(NET, LOSS, X, LABELS, nn.SGD(network(), 0.1)),
            ValueError,
            "optimizer is a SGD of another model, and must be",
        ),
        (
            lambda: diagnostics.internal_covariate_shift(NET, LOSS, X, LABELS, None),
            TypeError,
            "optimizer is None, and must be an nn.Optimizer or a learning rate",
        ),
        (lambda: diagnostics.internal_covariate_shift(NET, LOSS, X, LABELS, -1), ValueError, "optimizer is -1"),
        (lambda: diagnostics.activations(NET, X, percentiles=[101]), ValueError, "percentiles is 101"),
        (
            lambda: diagnostics.activations(NET, X, percentiles="all"),
            ValueError,
            "percentiles is 'all', and must be a sequence of numbers from 0",
        ),
        (lambda: diagnostics.activations(NET, X, axis=0.5), TypeError, "axis is 0.5"),
        (lambda: diagnostics.activations(NET, X, training=1), TypeError, "training is 1"),
    ],
)
def test_errors(call, error, message):
    before = copy.deepcopy(NET.state_dict())
    with pytest.raises(error, match=message):
        call()
    for name, array in NET.state_dict().items():
        np.testing.assert_array_equal(array, before[name])
