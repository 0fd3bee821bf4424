"""The estimators: scikit-learn's own checks, what options do, weights, streams, and the scaler."""

import pickle
import signal
import threading
from itertools import pairwise

import numpy as np
import pytest

pytest.importorskip("sklearn", "1.6", reason="scikit-learn 1.6 or later is not installed")

from conftest import run_python
from sklearn.base import clone
from sklearn.datasets import load_digits, make_regression
from sklearn.exceptions import ConvergenceWarning, DataConversionWarning, NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import fastbn
from fastbn import nn
from fastbn.estimators import (
    BatchNormMLPClassifier,
    BatchNormMLPRegressor,
    StreamingStandardScaler,
    _BatchNorm,
    _GhostBatchNorm,
)

F32, F64 = np.float32, np.float64

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


# scikit-learn's checks, none of them expected to fail. Those of classifiers want a network that learns in few epochs.
@parametrize_with_checks(
    [
        BatchNormMLPClassifier(max_iter=30, learning_rate_init=0.01),
        BatchNormMLPRegressor(max_iter=30, learning_rate_init=0.01),
        BatchNormMLPClassifier((20, 20), activation="tanh", norm_position="after", solver="rmsprop", max_iter=40),
        BatchNormMLPRegressor(20, activation="leaky_relu", solver="adamw", learning_rate_init=0.05, max_iter=40),
        StreamingStandardScaler(),
    ]
)
def test_scikit_learns_checks(estimator, check):
    check(estimator)


def test_scikit_learns_check_that_needs_a_setting_before_scipy_is_loaded():
    code = (
        "from sklearn.utils.estimator_checks import check_array_api_input as check;"
        "from fastbn.estimators import *;"
        "[check(type(e).__name__, e, 'numpy', expect_only_array_outputs=False) for e in (BatchNormMLPClassifier(4),"
        "BatchNormMLPRegressor(4), StreamingStandardScaler())]; print('done')"
    )
    assert run_python(code, SCIPY_ARRAY_API="1").stdout == "done\n"


def digits(rows=600, dtype=F32):
    x, y = load_digits(return_X_y=True)  # in order of who wrote them
    some = np.random.default_rng(0).permutation(len(x))[:rows]
    return (x[some] / 16).astype(dtype), y[some]


def regression(outputs=1, dtype=F64):
    x, y = make_regression(200, 6, n_informative=4, n_targets=outputs, random_state=0)
    return x.astype(dtype), (y / y.std(axis=0)).astype(dtype)


def state(estimator):
    return estimator.network_.state_dict()


def same_state(one, other):
    a, b = state(one), state(other)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


# ---- what it learns, and with what ----


SETTINGS = [
    {},
    {"batch_norm": False, "max_iter": 40},
    {"norm_position": "after", "activation": "tanh"},
    {"activation": "logistic", "solver": "rmsprop"},
    {"activation": "leaky_relu", "solver": "adamw", "alpha": 0.01},
    {"solver": "sgd", "learning_rate_init": 0.5, "virtual_batch_size": 16},
    {"solver": "momentum", "learning_rate_init": 0.1, "learning_rate": "cosine", "dropout": 0.1},
    {"learning_rate": "exponential", "learning_rate_decay": 0.9, "class_weight": "balanced"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_digits_are_learned_with_every_option(settings):
    x, y = digits()
    settings = {"learning_rate_init": 0.01, "max_iter": 20, "batch_size": 50} | settings
    one = BatchNormMLPClassifier((32,), random_state=0, **settings).fit(x[:400], y[:400])
    assert one.score(x[400:], y[400:]) > 0.88
    assert one.loss_ == one.loss_curve_[-1] < 0.25 * one.loss_curve_[0]
    assert len(one.loss_curve_) == one.n_iter_ and one.t_ == one.n_iter_ * 400
    other = BatchNormMLPClassifier((32,), random_state=0, **settings).fit(x[:400], y[:400])
    same_state(one, other)
    assert np.abs(
        state(BatchNormMLPClassifier((32,), random_state=1, **settings).fit(x[:400], y[:400]))["0.weight"]
        - state(one)["0.weight"]
    ).max() > 0.01  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "layers"),
    [
        ({}, ["Linear", "_BatchNorm", "Linear", "_BatchNorm", "Linear"]),  # with ReLU in it
        ({"activation": "tanh"}, ["Linear", "_BatchNorm", "Tanh", "Linear", "_BatchNorm", "Tanh", "Linear"]),
        ({"norm_position": "after"}, ["Linear", "ReLU", "_BatchNorm", "Linear", "ReLU", "_BatchNorm", "Linear"]),
        ({"batch_norm": False, "dropout": 0.5}, ["Linear", "ReLU", "Dropout", "Linear", "ReLU", "Dropout", "Linear"]),
        ({"virtual_batch_size": 8}, ["Linear", "_GhostBatchNorm", "Linear", "_GhostBatchNorm", "Linear"]),
    ],
    ids=str,
)
def test_layers_stand_where_they_were_asked_for(settings, layers):
    model = BatchNormMLPClassifier((8, 7), max_iter=1, random_state=0, **settings).fit(*digits(100))
    assert [type(layer).__name__ for layer in model.network_.layers] == layers
    for layer, following in pairwise(model.network_.layers):
        if isinstance(following, nn.BatchNorm):
            assert isinstance(layer, nn.Linear | nn.ReLU)
            assert following.activation == ("relu" if "activation" not in settings and layers[1] != "ReLU" else None)
    assert not any(layer.training for layer in model.network_.layers)


@pytest.mark.parametrize(("activation", "variance"), [("relu", 2 / 64), ("leaky_relu", 2 / 64), ("tanh", 2 / 464)])
def test_weights_start_as_the_activation_asks(activation, variance):
    model = BatchNormMLPClassifier(400, activation=activation, max_iter=1, learning_rate_init=1e-30, random_state=0)
    assert model.fit(*digits(50)).network_.layers[0].weight.var() == pytest.approx(variance, rel=0.03)


def test_no_hidden_layer_is_logistic_regression():
    x, y = digits()
    model = BatchNormMLPClassifier((), max_iter=60, learning_rate_init=0.05, random_state=0).fit(x, y)
    assert [type(layer) for layer in model.network_.layers] == [nn.Linear] and model.score(x, y) > 0.95


@pytest.mark.parametrize("dtype", [F32, F64])
def test_predictions_are_those_of_the_network_in_eval_mode(dtype):
    x, y = digits(300, dtype)
    model = BatchNormMLPClassifier((16, 16), norm_position="after", max_iter=3, dropout=0.3, random_state=0).fit(x, y)
    assert {layer.dtype for layer in model.network_.layers if hasattr(layer, "dtype")} == {np.dtype(dtype)}
    logits = model.network_(x).astype(F64)
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    want = exponentials / exponentials.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(model.predict_proba(x), want, rtol=1e-4 if dtype is F32 else 1e-9)
    assert model.predict_proba(x).dtype == F64
    np.testing.assert_array_equal(model.predict(x), logits.argmax(axis=1))
    np.testing.assert_array_equal(model.predict(x), model.predict(x.astype(F64)))
    np.testing.assert_allclose(np.exp(model.predict_log_proba(x)), model.predict_proba(x))


def test_regression_of_one_and_several_outputs():
    for outputs in (1, 3):
        x, y = regression(outputs)
        model = BatchNormMLPRegressor((32,), max_iter=150, learning_rate_init=0.02, random_state=0).fit(x, y)
        assert model.predict(x).shape == y.shape and model.score(x, y) > 0.9 and model.n_outputs_ == outputs
        assert model.loss_ == pytest.approx(np.mean((model.predict(x) - y) ** 2), abs=0.1)
    x, y = regression(1, F32)
    assert BatchNormMLPRegressor(max_iter=1).fit(x, y).predict(x.astype(F64)).dtype == F32
    with pytest.warns(DataConversionWarning):
        assert BatchNormMLPRegressor(max_iter=1).fit(x, y[:, None]).predict(x).shape == y.shape


def test_one_seed_one_network_whatever_the_number_of_threads():
    x, y = digits()
    models = []
    for threads in (1, 2):
        fastbn.set_num_threads(threads)
        models.append(BatchNormMLPClassifier(32, dropout=0.2, max_iter=2, random_state=3).fit(x, y))
    same_state(*models)


def test_threads_may_predict_together():
    x, y = digits()
    model = BatchNormMLPClassifier((32, 32), max_iter=1, random_state=0).fit(x, y)
    want = [model.predict_proba(x[i::4]) for i in range(4)]
    got = [[] for _ in range(4)]

    def predict(i):
        for _ in range(20):
            got[i].append(model.predict_proba(x[i::4]))

    threads = [threading.Thread(target=predict, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(4):
        for proba in got[i]:
            np.testing.assert_array_equal(proba, want[i])


def test_the_running_statistics_forget_their_start():
    """After one batch they are that batch's; after ten, each new one weighs 0.1."""
    x, _ = digits(100, F64)
    norm = _BatchNorm(64, unbiased=False, dtype=F64)
    norm(x)
    np.testing.assert_allclose(norm.running_mean, x.mean(axis=0), atol=1e-14)
    np.testing.assert_allclose(norm.running_var, x.var(axis=0), atol=1e-14)
    for _ in range(9):
        norm(x)
    norm(x + 1)
    np.testing.assert_allclose(norm.running_mean, x.mean(axis=0) + 0.1, atol=1e-13)


# ---- when it ends ----


def test_it_stops_when_the_loss_settles_and_warns_when_it_does_not():
    x, y = digits(200)
    model = BatchNormMLPClassifier(16, learning_rate_init=0.05, max_iter=300, random_state=0, n_iter_no_change=4)
    model.set_params(tol=0.01).fit(x, y)
    assert 5 < model.n_iter_ < 300 and model.best_loss_ == min(model.loss_curve_)
    better = [loss <= min(model.loss_curve_[:k], default=np.inf) - 0.01 for k, loss in enumerate(model.loss_curve_)]
    assert better[-6:] == [True, *5 * [False]]
    with pytest.warns(ConvergenceWarning, match=r"Maximum iterations \(2\)"):
        model.set_params(max_iter=2).fit(x, y)


def test_early_stopping_ends_with_the_best_network(monkeypatch):
    x, y = digits()
    kept = {}
    split = BatchNormMLPClassifier._split

    def recorded(self, *arguments):
        kept["parts"] = split(self, *arguments)
        return kept["parts"]

    monkeypatch.setattr(BatchNormMLPClassifier, "_split", recorded)
    model = BatchNormMLPClassifier(
        32, early_stopping=True, validation_fraction=0.25, learning_rate_init=0.02, max_iter=60, n_iter_no_change=5,
        random_state=0,
    ).fit(x, y)  # fmt: skip
    train, (held_x, held_y, _), *_ = kept["parts"]
    assert len(train) == 450 and len(held_x) == 150 and model.n_iter_ < 60
    np.testing.assert_allclose(np.bincount(held_y), np.bincount(y) / 4, atol=1)  # of each class its share
    assert len(model.validation_scores_) == model.n_iter_
    assert model.validation_scores_[-1] < max(model.validation_scores_)  # or this test shows nothing
    assert model.score(held_x, held_y) == model.best_validation_score_ == max(model.validation_scores_)
    regressor = BatchNormMLPRegressor(early_stopping=True, max_iter=3, random_state=0).fit(*regression())
    assert regressor.best_validation_score_ == max(regressor.validation_scores_)


def test_ctrl_c_leaves_a_network_that_works(monkeypatch):
    x, y = digits(200)
    model = BatchNormMLPClassifier(16, max_iter=100, random_state=0)

    def settled(self, held_out):
        if self.n_iter_ == 3:
            raise KeyboardInterrupt
        return False

    monkeypatch.setattr(BatchNormMLPClassifier, "_settled", settled)
    with pytest.warns(UserWarning, match="interrupted"):
        model.fit(x, y)
    assert model.n_iter_ == 3 and model.predict(x).shape == (200,) and not model.network_.layers[1].training


def ctrl_c_in_step(monkeypatch, number, press=lambda: signal.raise_signal(signal.SIGINT)):
    """In the middle of that step of Adam, counted from 1, with a weight that is not yet what it will be."""
    update, steps = nn.Adam.step, []

    def step(self):
        steps.append(1)
        if len(steps) == number:
            self.model.layers[0].weight += 1
            press()
            self.model.layers[0].weight -= 1
        update(self)

    monkeypatch.setattr(nn.Adam, "step", step)
    return steps


ONE_EPOCH = {"batch_size": 50, "max_iter": 1, "random_state": 0}  # of four steps, on 200 rows


@pytest.mark.parametrize("kind", [BatchNormMLPClassifier, BatchNormMLPRegressor])
def test_ctrl_c_waits_for_the_step_and_counts_the_rows(monkeypatch, kind):
    x, y = digits(200)
    whole = kind(8, **ONE_EPOCH).fit(x, y)
    for number in (1, 2, 6):  # in the first epoch and in the second
        model = kind(8, **ONE_EPOCH).set_params(max_iter=50)
        with monkeypatch.context() as patch:
            steps = ctrl_c_in_step(patch, number)
            with pytest.warns(UserWarning, match="Training interrupted by user"):
                assert model.fit(x, y) is model
        assert len(steps) == number == model._optimizer.steps and model.t_ == 50 * number
        assert model.n_iter_ == len(model.loss_curve_) == (2 if number == 6 else 1)
        assert model.loss_ == model.loss_curve_[-1] and np.isfinite(model.loss_)
        assert model.best_loss_ == min(model.loss_curve_)
        assert not any(layer.training for layer in model.network_.layers) and len(model.predict(x)) == 200
        if number == 6:
            assert model.loss_curve_[0] == whole.loss_
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("epoch", [1, 2])
def test_a_second_ctrl_c_takes_the_network_back_to_the_epochs_beginning(monkeypatch, epoch):
    x, y = digits(200)
    before = BatchNormMLPClassifier(8, **ONE_EPOCH)
    if epoch == 1:  # as it began: one step that moves nothing
        before.set_params(learning_rate_init=1e-30, batch_size=200)
    before.fit(x, y)

    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    model = BatchNormMLPClassifier(8, **ONE_EPOCH).set_params(max_iter=50)
    ctrl_c_in_step(monkeypatch, 4 * epoch - 1, twice)
    with pytest.warns(UserWarning, match="interrupted"):
        model.fit(x, y)
    if epoch == 2:
        same_state(model, before)
        assert model.loss_ == before.loss_
    else:
        np.testing.assert_allclose(state(model)["0.weight"], state(before)["0.weight"], rtol=1e-6)
        assert state(model)["1.running_mean"].max() == 0 and np.isnan(model.loss_)
    assert model.n_iter_ == len(model.loss_curve_) == epoch - 1 and model._optimizer.steps == 0
    assert len(model.predict(x)) == 200


def test_ctrl_c_in_early_stopping_leaves_the_best_network(monkeypatch):
    x, y = digits(200)
    model = BatchNormMLPClassifier(8, **ONE_EPOCH, early_stopping=True).set_params(max_iter=50)
    ctrl_c_in_step(monkeypatch, 9)
    kept = []
    load = nn.Sequential.load_state_dict
    monkeypatch.setattr(nn.Sequential, "load_state_dict", lambda self, given: kept.append(given) or load(self, given))
    with pytest.warns(UserWarning, match="interrupted"):
        model.fit(x, y)
    assert len(model.validation_scores_) == model.n_iter_ == 3
    assert model.best_validation_score_ == max(model.validation_scores_) and kept == [model._best[1]]


def test_ctrl_c_ends_the_loop_around_partial_fit(monkeypatch):
    x, y = digits(200)
    for press, steps, seen in [(1, 2, 100), (2, 0, 0)]:
        model = BatchNormMLPClassifier(8, batch_size=50, random_state=0)
        with monkeypatch.context() as patch:
            ctrl_c_in_step(patch, 2, lambda press=press: [signal.raise_signal(signal.SIGINT) for _ in range(press)])
            with pytest.raises(KeyboardInterrupt):
                model.partial_fit(x, y, range(10))
        assert model._optimizer.steps == steps and model.t_ == seen and model.n_iter_ == (steps > 0)
        assert not model.network_.layers[1].training and np.isfinite(state(model)["0.weight"]).all()
        model.partial_fit(x, y)
        assert model._optimizer.steps == steps + 4


def test_verbose_tells_each_epoch(capsys):
    BatchNormMLPClassifier(4, max_iter=2, verbose=True, early_stopping=True).fit(*digits(200))
    out = capsys.readouterr().out
    assert "Iteration 2, loss = " in out and out.count("Validation score: ") == 2


# ---- going on ----


def test_warm_start_goes_on():
    x, y = digits()
    model = BatchNormMLPClassifier(32, max_iter=5, warm_start=True, random_state=0).fit(x, y)
    first = model.loss_
    network = model.network_
    model.fit(x, y)
    assert model.network_ is network and model.loss_ < first and len(model.loss_curve_) == 10 and model.n_iter_ == 5
    model.set_params(warm_start=False).fit(x, y)
    assert model.network_ is not network and model.loss_curve_[-1] == first
    with pytest.raises(ValueError, match=r"y has classes \[11\], and must have no others than \[0, 1"):
        model.set_params(warm_start=True).fit(x, np.where(y == 3, 11, y))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"hidden_layer_sizes": (7,)},
            r"hidden_layer_sizes is \(7,\), and must be \(4,\), as in the fit that this one",
        ),
        ({"activation": "tanh"}, "activation is 'tanh', and must be 'relu', as in the fit that this one continues"),
        ({"batch_norm": False}, "batch_norm is False, and must be True"),
        ({"norm_position": "after"}, "norm_position is 'after', and must be 'before'"),
        ({"virtual_batch_size": 8}, "virtual_batch_size is 8, and must be None"),
        ({"dropout": 0.5}, "dropout is 0.5, and must be 0.0"),
    ],
    ids=str,
)
def test_a_changed_network_is_not_gone_on_with(change, message):
    x, y = digits(60)
    for kind in (BatchNormMLPClassifier, BatchNormMLPRegressor):
        model = kind(4, max_iter=1, warm_start=True, random_state=0).fit(x, y)
        before = state(model)
        model.set_params(hidden_layer_sizes=[4], solver="momentum", alpha=0.5).fit(x, y)  # the same network
        with pytest.raises(ValueError, match=message):
            model.set_params(**change).fit(x, y)
        with pytest.raises(ValueError, match=message):
            model.partial_fit(x, y)
        assert model.t_ == 120 and state(model).keys() == before.keys()
        model.set_params(warm_start=False).fit(x, y)
        model.partial_fit(x, y)


def test_partial_fit_learns_a_stream():
    x, y = digits()
    model = BatchNormMLPClassifier(32, batch_size=50, learning_rate_init=0.01, random_state=0)
    for epoch in range(8):
        for start in range(0, 400, 100):
            names = np.array(list("abcdefghij"), object)
            model.partial_fit(
                x[start : start + 100], names[y[start : start + 100]], names if epoch == start == 0 else None
            )
    assert model.score(x[400:], names[y[400:]]) > 0.88
    assert model.n_iter_ == 1 and len(model.loss_curve_) == 32 and model._optimizer.steps == 64
    restored = pickle.loads(pickle.dumps(model))
    for one in (model, restored):
        one.partial_fit(x[:100], names[y[:100]])
    same_state(model, restored)


def test_schedules_set_the_rate():
    x, y = digits(100)
    for settings, want in [
        ({}, 0.01),
        ({"learning_rate": "exponential", "learning_rate_decay": 0.5}, 0.01 * 0.5**3),
        ({"learning_rate": "cosine"}, 0.005 * (1 + np.cos(0.75 * np.pi))),
    ]:
        model = BatchNormMLPClassifier(8, max_iter=4, learning_rate_init=0.01, **settings).fit(x, y)
        assert model._optimizer.lr == pytest.approx(want)


def test_alpha_shrinks_matrices_alone():
    x, y = digits(100)
    plain = BatchNormMLPClassifier(8, max_iter=1, solver="sgd", alpha=0.0, random_state=0).fit(x, y)
    decayed = BatchNormMLPClassifier(8, max_iter=1, solver="sgd", alpha=2.0, random_state=0).fit(x, y)
    start = BatchNormMLPClassifier(8, max_iter=1, solver="sgd", learning_rate_init=1e-30, random_state=0).fit(x, y)
    for name, array in state(decayed).items():
        expected = state(plain)[name]
        if name in ("0.weight", "2.weight"):
            expected = expected - 0.001 * 2 * state(start)[name]
        np.testing.assert_allclose(array, expected, rtol=1e-5, atol=1e-7)


# ---- weights ----


@pytest.mark.parametrize(
    "settings", [{}, {"norm_position": "after", "activation": "tanh"}, {"batch_norm": False}], ids=str
)
def test_a_weight_is_a_number_of_repetitions(settings):
    x, y = regression(2)
    repeats = np.random.default_rng(0).integers(0, 4, len(x))
    settings = {"batch_size": 10_000, "max_iter": 20, "random_state": 0} | settings
    weighted = BatchNormMLPRegressor(12, **settings).fit(x, y, sample_weight=0.1 * repeats)
    repeated = BatchNormMLPRegressor(12, **settings).fit(x.repeat(repeats, 0), y.repeat(repeats, 0))
    np.testing.assert_allclose(weighted.predict(x), repeated.predict(x), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(weighted.loss_curve_, repeated.loss_curve_, rtol=1e-9)
    other = BatchNormMLPRegressor(12, **settings).fit(x, y)
    assert np.abs(other.predict(x) - repeated.predict(x)).max() > 0.01


def test_equal_weights_are_none_and_zeros_are_not_there():
    x, y = digits(150)
    model = BatchNormMLPClassifier(8, max_iter=2, batch_size=20, random_state=0)
    plain = clone(model).fit(x[50:], y[50:])
    weights = np.full(150, 7.0)
    weights[:50] = 0
    same_state(plain, clone(model).fit(x, y, sample_weight=weights))


def test_weights_hold_for_their_own_call():
    x, y = digits(80)
    weights = np.random.default_rng(0).uniform(0.5, 2, 30)
    model = BatchNormMLPClassifier(8, random_state=0).partial_fit(x[:30], y[:30], range(10), weights)
    one = pickle.loads(pickle.dumps(model))
    same_state(model.partial_fit(x[30:], y[30:]), one.partial_fit(x[30:], y[30:], sample_weight=np.ones(50)))
    other = pickle.loads(pickle.dumps(BatchNormMLPClassifier(8, random_state=0).partial_fit(x[:30], y[:30], range(10))))
    assert np.abs(state(other.partial_fit(x[30:], y[30:]))["0.weight"] - state(one)["0.weight"]).max() > 1e-4


def test_a_row_counts_as_its_share_of_all_rows():
    """In batches of one plain SGD step each, a heavier row moves the network further: not relative to its batch."""
    x, y = digits(4, F64)[0], np.arange(4)
    settings = {"batch_norm": False, "batch_size": 2, "solver": "sgd", "max_iter": 1, "alpha": 0.0, "random_state": 0}
    model = BatchNormMLPClassifier((), **settings, learning_rate_init=1e-6)
    start = state(clone(model).set_params(learning_rate_init=1e-30).fit(x, y))["0.weight"]
    weights = np.array([1.0, 2.0, 4.0, 9.0])
    moved = state(model.fit(x, y, sample_weight=weights))["0.weight"] - start
    logits = x @ start.T
    error = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True) - np.eye(4)[y]
    want = -1e-6 * (weights / 4 / 2 * error.T) @ x  # divided by their mean, and by the rows of a batch
    np.testing.assert_allclose(moved, want, rtol=1e-3, atol=1e-12)


@pytest.mark.parametrize("virtual", [None, 5])
def test_the_weighted_layer_is_the_layer_of_repeated_rows(virtual):
    """y, dx and the parameters' gradients; in virtual batches each part has its own statistics."""
    rng = np.random.default_rng(1)
    x, dy, counts = rng.standard_normal((10, 3)), rng.standard_normal((10, 3)), rng.integers(1, 4, 10)
    options = {"activation": "relu", "unbiased": False, "dtype": F64}
    layer = _BatchNorm(3, **options) if virtual is None else _GhostBatchNorm(3, virtual_batch_size=virtual, **options)
    layer.row_weights = counts / 7
    y = layer(x).copy()
    dx = layer.backward(counts[:, None] * dy).copy()
    gradients = np.zeros(3), np.zeros(3)
    running = np.zeros(3)
    for k, part in enumerate([slice(0, 10)] if virtual is None else [slice(0, 5), slice(5, 10)]):
        plain = nn.BatchNorm(3, **options)
        repeats = counts[part]
        np.testing.assert_allclose(y[part], plain(x[part].repeat(repeats, 0))[np.cumsum(repeats) - 1], atol=1e-13)
        # All repetitions of a row have the same gradient, and the row has their sum.
        one = plain.backward(dy[part].repeat(repeats, 0))[np.cumsum(repeats) - 1]
        np.testing.assert_allclose(dx[part], one * repeats[:, None], atol=1e-13)
        gradients[0].__iadd__(plain.grad_weight)
        gradients[1].__iadd__(plain.grad_bias)
        running += (x[part].repeat(repeats, 0).mean(axis=0) - running) / (k + 1)
    np.testing.assert_allclose(layer.grad_weight, gradients[0], atol=1e-12)
    np.testing.assert_allclose(layer.grad_bias, gradients[1], atol=1e-12)
    np.testing.assert_allclose(layer.running_mean, running, atol=1e-13)


def test_class_weights_multiply_sample_weights():
    x, y = digits(200)
    model = BatchNormMLPClassifier(8, max_iter=2, random_state=0)
    of_classes = {c: 1.0 + c for c in range(10)}
    rows = np.random.default_rng(0).uniform(0.5, 2, 200)
    one = clone(model).set_params(class_weight=of_classes).fit(x, y, sample_weight=rows)
    same_state(one, clone(model).fit(x, y, sample_weight=rows * (1.0 + y)))
    part = clone(model).set_params(class_weight=of_classes).partial_fit(x[:20], y[:20], classes=range(10))
    same_state(part, clone(model).partial_fit(x[:20], y[:20], range(10), sample_weight=1.0 + y[:20]))


# ---- among other estimators ----


def test_pipeline_search_scores_clone_and_pickle():
    x, y = digits(300)
    pipeline = make_pipeline(
        StreamingStandardScaler(), BatchNormMLPClassifier(16, max_iter=8, learning_rate_init=0.02, random_state=0)
    )
    assert cross_val_score(pipeline, x, y, cv=2).min() > 0.75
    search = GridSearchCV(pipeline, {"batchnormmlpclassifier__norm_position": ["before", "after"]}, cv=2).fit(x, y)
    restored = pickle.loads(pickle.dumps(search))
    np.testing.assert_array_equal(restored.predict_proba(x), search.predict_proba(x))
    assert clone(search.best_estimator_).get_params().keys() == search.best_estimator_.get_params().keys()


def test_a_last_batch_of_one_row_is_left_out():
    assert BatchNormMLPClassifier(4, max_iter=2).fit(*digits(201)).t_ == 400
    assert BatchNormMLPClassifier(4, max_iter=2, batch_norm=False, batch_size=1).fit(*digits(3)).t_ == 6


# ---- errors ----


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"hidden_layer_sizes": (8, 0)}, ValueError, r"hidden_layer_sizes\[1\] is 0"),
        ({"hidden_layer_sizes": 2.5}, TypeError, r"hidden_layer_sizes\[0\] is 2.5"),
        ({"activation": "identity"}, ValueError, "activation is 'identity', and must be one of 'relu'"),
        ({"solver": "lbfgs"}, ValueError, "solver is 'lbfgs', and must be one of"),
        ({"norm_position": "between"}, ValueError, "norm_position is 'between'"),
        ({"learning_rate": "adaptive"}, ValueError, "learning_rate is 'adaptive'"),
        ({"batch_norm": "yes"}, TypeError, "batch_norm is 'yes', and must be True or False"),
        ({"max_iter": 0}, ValueError, "max_iter is 0"),
        ({"virtual_batch_size": 1}, ValueError, "virtual_batch_size is 1, and must be None or at least 2"),
        ({"batch_size": "all"}, ValueError, "batch_size is 'all', and must be 'auto' or an integer"),
        ({"batch_size": 1}, ValueError, "batch_size is 1, and must be at least 2 with batch_norm=True"),
        ({"alpha": -1}, ValueError, "alpha is -1, and must be at least 0 and finite"),
        ({"tol": float("nan")}, ValueError, "tol is nan"),
        ({"dropout": 1}, ValueError, "dropout is 1, and must be at least 0 and less than 1"),
        ({"learning_rate_init": 0}, ValueError, "learning_rate_init is 0, and must be greater than 0"),
        ({"learning_rate_decay": 1.5}, ValueError, "learning_rate_decay is 1.5.*at most 1"),
        ({"validation_fraction": None}, TypeError, "validation_fraction is None, and must be a number"),
        ({"solver": "sgd", "learning_rate_init": 1e30, "max_iter": 20}, ValueError, "training left .* not finite"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_bad_options_are_named(settings, error, message):
    with pytest.raises(error, match=message):
        BatchNormMLPClassifier(**({"hidden_layer_sizes": 4} | settings)).fit(*digits(50))


X, Y = np.eye(4), np.arange(4) % 2


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: BatchNormMLPClassifier().fit(X[:1], Y[:1]), ValueError, "n_samples=1, and must have at least 2 rows"),
        (lambda: BatchNormMLPClassifier().fit(X, Y, [0, 0, 0, 1]), ValueError, "n_samples=1"),
        (lambda: BatchNormMLPClassifier().fit(X, Y, [1, 1, 1, -1]), ValueError, "Negative values .* sample_weight"),
        (
            lambda: BatchNormMLPClassifier(class_weight={0: 0, 1: 1}).fit(X, Y, [1, 0, 1, 0]),
            ValueError, "sample_weight, times class_weight, is zero for every row",
        ),
        (
            lambda: BatchNormMLPClassifier(class_weight={0: -1.0, 1: 1.0}).fit(X, Y),
            ValueError, r"class_weight\[0\] is -1.0, and must be at least 0 and finite",
        ),
        (
            lambda: BatchNormMLPClassifier(class_weight={0: 1, 1: np.nan}).fit(X, Y, [1, 2, 3, 4]),
            ValueError, r"class_weight\[1\] is nan, and must be at least 0 and finite",
        ),
        (
            lambda: BatchNormMLPClassifier(class_weight={0: np.inf, 1: 1}).partial_fit(X, Y, [0, 1]),
            ValueError, r"class_weight\[0\] is inf, and must be at least 0 and finite",
        ),
        (
            lambda: BatchNormMLPClassifier(class_weight={"a": "b"}).fit(X, np.array(["a", "c"])[Y]),
            TypeError, r"class_weight\['a'\] is 'b', and must be a number",
        ),
        (lambda: BatchNormMLPClassifier().partial_fit(X, Y), ValueError, "classes is None, and must be all classes"),
        (lambda: BatchNormMLPClassifier().partial_fit(X, Y, [0, 2]), ValueError, r"y has classes \[1\]"),
        (
            lambda: BatchNormMLPClassifier().partial_fit(X, Y, [0, 1]).partial_fit(X, Y, [0, 1, 2]),
            ValueError, r"classes is \[0 1 2\], and must be None or as at first",
        ),
        (
            lambda: BatchNormMLPClassifier(class_weight="balanced").partial_fit(X, Y, [0, 1]),
            ValueError, "class_weight is 'balanced', and must be None or a dict in partial_fit",
        ),
        (
            lambda: BatchNormMLPClassifier(early_stopping=True).partial_fit(X, Y, [0, 1]),
            ValueError, "early_stopping is True, which partial_fit cannot serve",
        ),
        (
            lambda: BatchNormMLPRegressor(learning_rate="cosine").partial_fit(X, Y),
            ValueError, "learning_rate is 'cosine', which partial_fit cannot serve",
        ),
        (
            lambda: BatchNormMLPRegressor().partial_fit(X, Y).partial_fit(X, X),
            ValueError, "y has 4 outputs, and must have 1",
        ),
        (lambda: BatchNormMLPRegressor().predict(X), NotFittedError, "not fitted"),
        (lambda: StreamingStandardScaler().transform(X), NotFittedError, "not fitted"),
        (lambda: StreamingStandardScaler(with_std=1).fit(X), TypeError, "with_std is 1, and must be True or False"),
        (lambda: StreamingStandardScaler().fit(X * np.nan), ValueError, "contains NaN"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_missing_scikit_learn_is_named_with_its_extra():
    done = run_python("import sys; sys.modules['sklearn'] = None; import fastbn.estimators", check=False)
    assert done.returncode != 0 and "ImportError: fastbn.estimators needs scikit-learn" in done.stderr
    assert "pip install 'fastbn[sklearn]'" in done.stderr


# ---- the scaler ----


@pytest.mark.parametrize("with_mean", [True, False])
@pytest.mark.parametrize("with_std", [True, False])
@pytest.mark.parametrize("order", ["C", "F"])
def test_the_scaler_is_scikit_learns(with_mean, with_std, order):
    x = np.array(np.random.default_rng(0).normal(3, 2, (50, 4)), order=order)
    x[:, 2] = 5
    ours = StreamingStandardScaler(with_mean=with_mean, with_std=with_std).fit(x)
    theirs = StandardScaler(with_mean=with_mean, with_std=with_std).fit(x)
    for name in ("mean_", "var_", "scale_", "n_samples_seen_"):
        if getattr(theirs, name) is None:
            assert getattr(ours, name) is None
        else:
            np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), rtol=1e-13)
    np.testing.assert_allclose(ours.transform(x), theirs.transform(x), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(ours.inverse_transform(x), theirs.inverse_transform(x), rtol=1e-13)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("ratio", [0, 1e3, 1e6])
def test_the_scaler_is_right_at_large_means(dtype, ratio):
    x = np.random.default_rng(1).normal(ratio, 1, (20_000, 5)).astype(dtype)
    wide = x.astype(np.longdouble)
    want = ((wide - wide.mean(axis=0)) / wide.std(axis=0)).astype(F64)
    scaler = StreamingStandardScaler()
    for start in range(0, 20_000, 3000):
        scaler.partial_fit(x[start : start + 3000])
    y = scaler.transform(x)
    assert y.dtype == dtype and scaler.n_samples_seen_ == 20_000
    np.testing.assert_allclose(
        y, want, rtol=5e-7 if dtype is F32 else 1e-15, atol=5e-7 if dtype is F32 else 1e-15 * ratio + 1e-14
    )
    back = scaler.inverse_transform(y)
    np.testing.assert_allclose(back, x, rtol=2 * np.finfo(dtype).eps, atol=4 * np.finfo(dtype).eps)
    if ratio == 1e6 and dtype is F32:  # what scikit-learn errs there: the mean, rounded to float32
        assert np.abs(StandardScaler().fit(x).transform(x) - want).max() > 100 * np.abs(y - want).max()


def test_constant_features_have_scale_one():
    x = np.ones((1000, 5)) * [0.0, 0.1, -3e8, 1e-300, 1.0]
    x[::2, 4] += np.finfo(F64).eps  # constant but for rounding
    scaler = StreamingStandardScaler().fit(x[:300]).partial_fit(x[300:])
    np.testing.assert_array_equal(scaler.scale_, 1)
    assert np.abs(scaler.transform(x)).max() < 1e-15
    x = np.array([[1e20, 1e-30], [-1e20, 3e-30]])  # neither of these is constant
    np.testing.assert_allclose(StreamingStandardScaler().fit_transform(x), [[1, -1], [-1, 1]])


def test_copy_or_not():
    x = np.random.default_rng(2).normal(3, 2, (50, 4)).astype(F32)
    scaler = StreamingStandardScaler().fit(x)
    before = x.copy()
    y = scaler.transform(x)
    assert not np.shares_memory(y, x)
    np.testing.assert_array_equal(x, before)
    assert np.shares_memory(scaler.transform(x, copy=False), x)
    np.testing.assert_array_equal(x, y)
    assert np.shares_memory(scaler.set_params(copy=False).inverse_transform(x), x)
    np.testing.assert_allclose(x, before, rtol=1e-6, atol=1e-6)


def test_the_scaler_keeps_feature_names():
    pandas = pytest.importorskip("pandas")
    x = pandas.DataFrame({"a": [1.0, 2, 3], "b": [4.0, 4, 7]})
    scaler = StreamingStandardScaler().set_output(transform="pandas").fit(x)
    assert (
        list(scaler.feature_names_in_)
        == list(scaler.get_feature_names_out())
        == list(scaler.transform(x))
        == ["a", "b"]
    )
