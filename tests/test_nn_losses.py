"""MSELoss, BCEWithLogitsLoss, sample weights of all three losses, and LeakyReLU: values, gradients, memory, errors."""

import tracemalloc

import numpy as np
import pytest
import scipy.special
from test_nn_layers import check_gradients, numeric_gradient

from fastbn import nn
from fastbn.nn.activations import LeakyReLU
from fastbn.nn.losses import BCEWithLogitsLoss, MSELoss, SoftmaxCrossEntropy

F64 = np.float64


def square(output, target):
    """Each row's loss."""
    return ((output - target) ** 2).reshape(len(output), -1).mean(axis=1)


def logistic(output, target):
    probability = scipy.special.expit(output)
    terms = -scipy.special.xlogy(target, probability) - scipy.special.xlogy(1 - target, 1 - probability)
    return terms.reshape(len(output), -1).mean(axis=1)


def cross_entropy(output, target):
    return -scipy.special.log_softmax(output, axis=1)[np.arange(len(output)), target]


# name → loss, each row's loss, the target that is drawn for an output's shape
LOSSES = {
    "square": (MSELoss, square, lambda rng, shape: rng.standard_normal(shape)),
    "logistic": (BCEWithLogitsLoss, logistic, lambda rng, shape: rng.random(shape)),
    "cross-entropy": (SoftmaxCrossEntropy, cross_entropy, lambda rng, shape: rng.integers(0, shape[1], shape[0])),
}
WEIGHTS = {
    "none": None,
    "some": np.array([0.5, 0, 3, 1.25, 0, 2, 1]),
    "integers": np.array([1, 0, 3, 1, 0, 2, 1]),
    "booleans": np.array([True, False, True, True, False, True, True]),
    "float16": np.array([60000, 1, 60000, 60000, 1, 60000, 60000], np.float16),
}


def drawn(name, shape=(7, 4)):
    loss, rows, target = LOSSES[name]
    rng = np.random.default_rng(0)
    return loss(), rows, 2 * rng.standard_normal(shape), target(rng, shape)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_its_gradient(name, weights):
    loss, rows, output, target = drawn(name)
    weight = WEIGHTS[weights]
    want = np.average(rows(output, target), weights=None if weight is None else weight.astype(F64))
    assert loss(output, target, weight) == pytest.approx(want, rel=1e-12)
    gradient = loss.backward().copy()
    assert gradient.shape == output.shape
    expected = numeric_gradient(lambda: loss(output, target, weight), output)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", LOSSES)
def test_a_weight_counts_rows(name):
    """2 is the row twice, 0 is the row left out, and a common factor is nothing."""
    loss, _, output, target = drawn(name)
    times = np.array([2, 0, 1, 1, 3, 1, 0])
    want = loss(np.repeat(output, times, axis=0), np.repeat(target, times, axis=0))
    unweighted = loss.backward().copy()
    for factor in (1, 1e-3):
        assert loss(output, target, factor * times) == pytest.approx(want, rel=1e-12)
        gradient = loss.backward()
        np.testing.assert_allclose(np.repeat(gradient / np.maximum(times, 1)[:, None], times, axis=0), unweighted)
        assert not gradient[times == 0].any()


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_torchs(name):
    torch = pytest.importorskip("torch")
    theirs = {"square": "MSELoss", "logistic": "BCEWithLogitsLoss", "cross-entropy": "CrossEntropyLoss"}[name]
    loss, _, output, target = drawn(name)
    for dtype in (np.float32, np.float64):
        x = torch.tensor(output.astype(dtype), requires_grad=True)
        goal = torch.tensor(target if target.dtype.kind == "i" else target.astype(dtype))
        value = getattr(torch.nn, theirs)()(x, goal)
        value.backward()
        assert loss(output.astype(dtype), target) == pytest.approx(
            value.item(), rel=1e-6 if dtype == np.float32 else 1e-12
        )
        gradient = loss.backward()
        assert gradient.dtype == dtype
        np.testing.assert_allclose(gradient, x.grad.numpy(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["square", "logistic"])
@pytest.mark.parametrize("shape", [(7,), (7, 1), (7, 2, 3)], ids=str)
def test_any_shape_of_output(name, shape):
    loss, rows, output, target = drawn(name, shape)
    weight = np.arange(7.0)
    assert loss(output, target) == pytest.approx(rows(output, target).mean(), rel=1e-12)
    assert loss(output, target, weight) == pytest.approx(np.average(rows(output, target), weights=weight), rel=1e-12)
    gradient = loss.backward().copy()
    assert gradient.shape == shape
    np.testing.assert_allclose(
        gradient, numeric_gradient(lambda: loss(output, target, weight), output), rtol=1e-6, atol=1e-9
    )


@pytest.mark.parametrize("name", ["square", "logistic"])
def test_a_column_takes_a_vector_of_targets(name):
    """What a network with one output gives, and what a data set has."""
    loss, _, output, target = drawn(name, (7, 1))
    want = loss(output, target)
    gradient = loss.backward().copy()
    assert loss(output, target[:, 0]) == want
    np.testing.assert_array_equal(loss.backward(), gradient)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_logistic_loss_is_stable(dtype):
    logits = np.array([-1e4, -80, -1e-3, 0, 1e-3, 80, 1e4], dtype)
    wide = logits.astype(F64)
    loss, unit = BCEWithLogitsLoss(), np.finfo(dtype).eps
    for target in (0.0, 0.25, 1.0):
        targets = np.full(7, target)
        terms = np.logaddexp(0, -wide) * target + np.logaddexp(0, wide) * (1 - target)
        got = np.array([loss(logits[i : i + 1], targets[i : i + 1]) for i in range(7)])
        np.testing.assert_allclose(got, terms, rtol=4 * unit, atol=1e-38)
        loss(logits, targets)
        exact = (scipy.special.expit(wide) - target) / 7
        np.testing.assert_allclose(loss.backward(), exact, rtol=4 * unit, atol=unit * target)


@pytest.mark.parametrize("targets", [np.array([0, 1, 1, 0]), np.array([False, True, True, False])])
def test_targets_may_be_integers_and_booleans(targets):
    output = np.random.default_rng(1).standard_normal(4).astype(np.float32)
    for loss in (BCEWithLogitsLoss(), MSELoss()):
        want = loss(output, targets.astype(np.float32))
        gradient = loss.backward().copy()
        assert loss(output, targets) == want
        np.testing.assert_array_equal(loss.backward(), gradient)
        assert gradient.dtype == np.float32


def test_a_regression_is_learned():
    rng = np.random.default_rng(2)
    x = rng.standard_normal((256, 3)).astype(np.float32)
    target = (np.sin(x[:, 0]) + x[:, 1] * 0.5).astype(np.float32)
    net = nn.Sequential(nn.Linear(3, 32, rng=rng), nn.BatchNorm(32), LeakyReLU(), nn.Linear(32, 1, rng=rng))
    loss, optimizer = MSELoss(), nn.Adam(net, 0.01)
    losses = []
    for _ in range(150):
        losses.append(loss(net(x), target))
        net.parameter_gradients(loss.backward())
        optimizer.step()
    assert losses[-1] < 0.05 * losses[0]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_a_steady_step_allocates_nothing_of_a_batchs_size(name, weighted):
    loss, _, output, target = drawn(name, (512, 256))
    output = output.astype(np.float32)
    target = target if target.dtype.kind == "i" else target.astype(np.float32)
    weight = np.ones(512, np.float32) if weighted else None

    def epoch():
        for rows in (512, 300):
            loss(output[:rows], target[:rows], None if weight is None else weight[:rows])
            loss.backward()

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
    assert peak < 40_000  # 300 rows of 256 are 307 kB


# ---- LeakyReLU ----


@pytest.mark.parametrize("slope", [0, 0.01, 0.3, 1])
def test_leaky_relu(slope):
    layer = LeakyReLU(slope)
    x = np.random.default_rng(3).standard_normal((5, 4))
    np.testing.assert_array_equal(layer(x), np.where(x > 0, x, slope * x))
    check_gradients(layer, x)
    layer(np.array([-1.0, 0.0, 2.0]))
    np.testing.assert_array_equal(layer.backward(np.full(3, 5.0)), [5 * slope, 5 * slope, 5])
    np.testing.assert_array_equal(layer(np.array([-np.inf, np.inf])), [-np.inf if slope else 0, np.inf])


def test_leaky_relu_is_torchs():
    torch = pytest.importorskip("torch")
    x = torch.tensor(np.random.default_rng(4).standard_normal((5, 4), np.float32), requires_grad=True)
    y = torch.nn.LeakyReLU(0.2)(x)
    y.backward(torch.ones_like(y))
    layer = LeakyReLU(0.2)
    np.testing.assert_allclose(layer(x.detach().numpy()), y.detach().numpy(), rtol=1e-6)
    np.testing.assert_allclose(layer.backward(np.ones((5, 4), np.float32)), x.grad.numpy(), rtol=1e-6)


# ---- errors ----


X = np.zeros((2, 4), np.float32)
LABELS = np.array([0, 3])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: MSELoss()(X, X[:1]), ValueError, r"targets has shape \(1, 4\).*predictions's shape \(2, 4\)"),
        (lambda: MSELoss()(X[:, 0], X[:, :1]), ValueError, r"targets has shape \(2, 1\)"),  # would broadcast
        (lambda: MSELoss()(X[:, :1], X[:1, 0]), ValueError, r"predictions's shape \(2, 1\) or \(2,\)"),
        (lambda: MSELoss()(X, X[:, 0]), ValueError, r"targets has shape \(2,\)"),
        (lambda: MSELoss()(X, np.full((2, 4), "1")), TypeError, "targets has dtype <U1"),
        (lambda: MSELoss()(X.astype(int), X), TypeError, "predictions has dtype int64"),
        (lambda: MSELoss()(X.astype(np.float16), X), TypeError, "predictions has dtype float16"),
        (lambda: MSELoss()(X[:0], X[:0]), ValueError, r"predictions has shape \(0, 4\)"),
        (lambda: MSELoss()(X[:, :0], X[:, :0]), ValueError, r"predictions has shape \(2, 0\)"),
        (MSELoss().backward, ValueError, "call the loss first"),
        (lambda: BCEWithLogitsLoss()(X, X - 1), ValueError, "targets goes from -1.0 to -1.0, and must be from 0 to 1"),
        (lambda: BCEWithLogitsLoss()(X, X + 2), ValueError, "targets goes from 2.0 to 2.0"),
        (lambda: BCEWithLogitsLoss()(X, X * np.nan), ValueError, "targets goes from nan to nan"),
        (lambda: BCEWithLogitsLoss()(X, X[:1]), ValueError, "targets has shape .*logits's shape"),
        (BCEWithLogitsLoss().backward, ValueError, "call the loss first"),
        (lambda: SoftmaxCrossEntropy()(X, LABELS, np.ones(3)), ValueError, r"sample_weight has shape \(3,\).*\(2,\)"),
        (lambda: SoftmaxCrossEntropy()(X, LABELS, np.ones((2, 1))), ValueError, r"sample_weight has shape \(2, 1\)"),
        (lambda: SoftmaxCrossEntropy()(X, LABELS, np.zeros(2)), ValueError, "sample_weight goes from 0.0 to 0.0"),
        (lambda: SoftmaxCrossEntropy()(X, LABELS, [1, -1]), ValueError, "sample_weight goes from -1 to 1"),
        (lambda: MSELoss()(X, X, [1, np.nan]), ValueError, "sample_weight goes from nan to nan"),
        (lambda: MSELoss()(X, X, [1, np.inf]), ValueError, "sample_weight goes from 1.0 to inf"),
        (lambda: BCEWithLogitsLoss()(X, X, ["a", "b"]), TypeError, "sample_weight has dtype <U1"),
        (lambda: LeakyReLU(-0.1), ValueError, "negative_slope is -0.1, and must be at least 0 and at most 1"),
        (lambda: LeakyReLU(1.5), ValueError, "negative_slope is 1.5"),
        (lambda: LeakyReLU("steep"), TypeError, "negative_slope is 'steep'"),
    ],
)
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("name", LOSSES)
def test_backward_once_after_a_call(name):
    loss, _, output, target = drawn(name)
    loss(output, target)
    loss.backward()
    with pytest.raises(ValueError, match="call the loss first, and backward once after it"):
        loss.backward()


def test_leaky_relu_says_what_it_is():
    assert repr(LeakyReLU(0.2)) == "LeakyReLU(0.2)" and isinstance(LeakyReLU(), nn.Layer)
