"""fit: what it returns, what it accepts, and what Ctrl-C leaves. (Checkpoints: `test_nn_checkpoints.py`.)"""

import signal
import subprocess
import sys
import threading
from functools import partial

import numpy as np
import pytest
from test_exceptions import Interrupt
from test_nn_training import network, problem

from fastbn import nn
from fastbn.nn.schedules import cosine


def same_state(model, state):
    found = model.state_dict()
    assert found.keys() == state.keys()
    for name, array in found.items():
        np.testing.assert_array_equal(array, state[name], err_msg=name)


def still(model, **options):
    """An optimizer that changes nothing."""
    return nn.SGD(model, 1e-300, **options)


# ---- history ----


def test_losses_and_accuracies_are_means_over_rows():
    """Of a network that stays as it is, in batches of 150, 150 and 100 rows."""
    x, labels = problem()
    model = nn.Linear(6, 4, rng=0)
    history = nn.fit(model, x, labels, still(model), epochs=2, batch_size=150, validation=(x[:90], labels[:90]))
    loss = nn.SoftmaxCrossEntropy()
    assert history.losses == pytest.approx([loss(model(x), labels)] * 2, rel=1e-6)
    assert history.accuracies == [nn.accuracy(model, x, labels)] * 2
    assert history.validation_losses == pytest.approx([loss(model(x[:90]), labels[:90])] * 2)
    assert history.validation_accuracies == [nn.accuracy(model, x[:90], labels[:90])] * 2
    assert history.steps == 6 and history.best_epoch == 0 and history.seconds > 0 and not history.interrupted


def test_the_validation_is_in_eval_mode_in_parts_and_disturbs_nothing():
    x, labels = problem()
    many = np.tile(x, (6, 1)), np.tile(labels, 6)
    models = [network() for _ in range(2)]
    plain = nn.fit(models[0], x, labels, nn.Adam(models[0]), epochs=3, rng=1)
    seen = nn.fit(models[1], x, labels, nn.Adam(models[1]), epochs=3, rng=1, validation=many)
    same_state(models[0], models[1].state_dict())
    assert plain.losses == seen.losses
    assert seen.validation_accuracies[-1] == nn.accuracy(models[1], *many)


@pytest.mark.parametrize(
    ("loss", "width", "targets"),
    [
        (nn.MSELoss, 2, lambda x, labels: x[:, :2]),
        (nn.BCEWithLogitsLoss, 1, lambda x, labels: labels % 2),
    ],
    ids=["MSELoss", "BCEWithLogitsLoss"],
)
def test_other_losses(loss, width, targets):
    x, labels = problem()
    model = nn.Sequential(nn.Linear(6, 16, rng=0), nn.BatchNorm(16), nn.ReLU(), nn.Linear(16, width, rng=0))
    wanted = targets(x, labels)
    history = nn.fit(
        model, x, wanted, nn.Adam(model, 0.02), loss=loss(), epochs=8, rng=0, validation=(x, wanted)
    )  # fmt: skip
    assert history.losses[-1] < 0.5 * history.losses[0]
    assert history.accuracies == history.validation_accuracies == [] and len(history.validation_losses) == 8
    assert history.best_epoch == np.argmin(history.validation_losses)


def test_weights_count_as_so_many_rows():
    """In one batch; and in several each row by its share of all rows, whatever is beside it."""
    x, labels = problem()
    weights = np.random.default_rng(3).integers(0, 4, len(x))
    weighted, repeated = (nn.Linear(6, 4, rng=0, dtype=np.float64) for _ in range(2))
    x = x.astype(np.float64)
    one = nn.fit(weighted, x, labels, nn.SGD(weighted, 0.5), sample_weight=weights, batch_size=1000, epochs=3)
    rows = np.repeat(np.arange(len(x)), weights)
    two = nn.fit(repeated, x[rows], labels[rows], nn.SGD(repeated, 0.5), batch_size=2000, epochs=3)
    np.testing.assert_allclose(weighted.weight, repeated.weight, rtol=1e-10)
    assert one.losses == pytest.approx(two.losses) and one.accuracies == pytest.approx(two.accuracies)

    # Steps of one rate and no momentum, so small that the order does not matter: their sum is the whole's.
    start = weighted.weight.copy()
    moves = []
    for batch_size in (1000, 20):
        weighted.weight[...] = start
        count = -(-np.count_nonzero(weights) // batch_size)
        nn.fit(
            weighted, x, labels, nn.SGD(weighted, 1e-7 / count), sample_weight=weights, batch_size=batch_size, rng=0
        )  # fmt: skip
        moves.append(weighted.weight - start)
    np.testing.assert_allclose(moves[1], moves[0], rtol=0.02, atol=1e-10)


def test_rows_of_weight_0_are_not_there():
    x, labels = problem()
    weights = np.arange(len(x)) % 2
    models = [network() for _ in range(2)]
    for model, data in zip(models, [(x, labels), (x[1::2], labels[1::2])], strict=True):
        nn.fit(model, *data, nn.Adam(model), rng=0, sample_weight=weights if model is models[0] else weights[1::2])
    same_state(models[0], models[1].state_dict())


def test_a_schedule_goes_on_from_call_to_call():
    x, labels = problem()
    rates = []
    model = network()
    optimizer = nn.SGD(model, 0.5)
    schedule = partial(cosine, steps=8)
    for _ in range(2):
        nn.fit(
            model, x, labels, optimizer, batch_size=100, schedule=schedule,
            after_step=lambda step: rates.append(optimizer.lr),
        )  # fmt: skip
        assert optimizer.lr == 0.5
    assert rates == [0.5 * schedule(step) for step in range(8)] and rates[7] < rates[0]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"validation": (np.zeros((3, 6), np.float32), np.zeros(2, int))}, ValueError, r"validation\[1\] has shape"),
        ({"validation": (np.zeros((0, 6), np.float32), np.zeros(0, int))}, ValueError, r"validation\[0\] has shape"),
        ({"sample_weight": np.zeros(400)}, ValueError, "sample_weight goes from 0.0 to 0.0"),
        ({"sample_weight": np.ones(3)}, ValueError, r"sample_weight has shape \(3,\)"),
        ({"resume": True}, ValueError, "checkpoint is None, and must be a path where resume is given"),
        ({"checkpoint_every": 3}, ValueError, "checkpoint is None.*checkpoint_every"),
        ({"checkpoint": 3}, TypeError, "path is a int"),
        ({"validation": problem()[:1]}, TypeError, r"validation is a tuple of 1, and must be a pair: \(x, targets\)"),
        ({"validation": 0.1}, TypeError, "validation is a float, and must be a pair"),
        ({"validation": problem()[0][:2]}, TypeError, "validation is a ndarray, and must be a pair"),
        ({"loss": nn.SoftmaxCrossEntropy}, TypeError, r"loss is <class .*, and must be a loss, as nn.MSELoss\(\) is"),
        ({"loss": "mse"}, TypeError, "loss is 'mse', and must be a loss"),
        ({"schedule": 0.9}, TypeError, "schedule is 0.9, and must be something that can be called, or None"),
        ({"after_step": 3}, TypeError, "after_step is 3, and must be something that can be called"),
        ({"optimizer": nn.SGD}, TypeError, "optimizer is the class SGD itself, and must be an instance of Optimizer"),
        ({"optimizer": "sgd"}, TypeError, "optimizer is a str, and must be a Optimizer"),
        ({"model": [nn.Linear(6, 4)]}, TypeError, "model is a list, and must be a Layer"),
        ({"model": nn.Linear}, TypeError, "model is the class Linear itself, and must be an instance of Layer"),
    ],
)
def test_errors(options, error, message):
    model = network()
    before = model.state_dict()
    with pytest.raises(error, match=message):
        nn.fit(options.pop("model", model), *problem(), options.pop("optimizer", still(model)), **options)
    same_state(model, before)


def test_an_optimizer_of_another_model_is_refused():
    """It would train that one's parameters, by gradients that nobody computes; one of a part trains the part."""
    model, other = network(), network()
    before = model.state_dict()
    with pytest.raises(ValueError, match="optimizer is a SGD of another model, and must be one of this model"):
        nn.fit(model, *problem(), nn.SGD(other, 0.1))
    same_state(model, before)
    nn.fit(model, *problem(), nn.SGD(model.layers[-1], 0.1))
    after = model.state_dict()
    changed = {name for name in after if (after[name] != before[name]).any()}
    last = f"{len(model.layers) - 1}."
    assert {name for name in changed if not name.endswith(("running_mean", "running_var", "tracked"))} == {
        last + "weight", last + "bias",
    }  # fmt: skip


def with_label(label):
    x, labels = problem()
    labels[250] = label
    return x, labels


@pytest.mark.parametrize(
    ("validation", "error", "message"),
    [
        ((problem()[0].astype(np.float64), problem()[1]), TypeError, "x has dtype float64, and must have"),
        ((problem()[0][:, :5], problem()[1]), ValueError, r"x has shape \(.*, 5\)"),
        (with_label(4), ValueError, "labels goes from 0 to 4"),
        (with_label(-1), ValueError, "labels goes from -1 to 3"),
        ((problem()[0], problem()[1].astype(float)), TypeError, "labels has dtype float64"),
    ],
    ids=["dtype", "width", "label too large", "label too small", "no label"],
)
def test_validation_is_refused_before_the_first_step(validation, error, message):
    for mode in (False, True):
        model = network().train(mode)
        before = model.state_dict()
        with pytest.raises(error, match=f"validation does not suit model and loss: {message}"):
            nn.fit(model, *problem(), nn.SGD(model, 0.1), validation=validation)
        same_state(model, before)
        assert {layer.training for layer in (model, *model.layers)} == {mode}


def test_trying_the_validation_draws_no_random_numbers():
    """Not even of a loss that draws them at every call."""

    class Noisy(nn.MSELoss):
        def __init__(self):
            super().__init__()
            self.rng = np.random.default_rng(0)

        def __call__(self, outputs, targets):
            return super().__call__(outputs, targets + self.rng.standard_normal(targets.shape))

    x = problem()[0]
    models = [nn.Linear(6, 6, rng=0) for _ in range(2)]
    for model, validation in zip(models, (None, (x, x)), strict=True):
        nn.fit(model, x, x, nn.SGD(model, 0.1), loss=Noisy(), rng=0, validation=validation)
    same_state(models[0], models[1].state_dict())


def test_validation_by_the_batchs_own_statistics():
    """A layer that has no others cannot be tried on one row."""
    x, labels = problem()
    model = nn.Sequential(nn.Linear(6, 4, rng=0), nn.BatchNorm(4, track_running_stats=False))
    # The least and the greatest label are both the first row's.
    history = nn.fit(model, x, labels * 0, still(model), validation=(x, labels * 0))
    assert len(history.validation_losses) == 1


def test_a_last_batch_of_one_row_is_left_out_without_batch_norm_too():
    x, labels = problem()
    model = nn.Linear(6, 4)
    assert nn.fit(model, x[:65], labels[:65], still(model), batch_size=64).steps == 1


@pytest.mark.parametrize(("bad", "rate", "epoch"), [(np.nan, 0.1, 1), (None, 1e30, 1), (None, 0.1, 3)])
def test_a_loss_that_is_not_a_number_is_told_once(bad, rate, epoch):
    x, labels = problem()
    if bad is not None:
        x[7, 2] = bad
    model = network()
    with (
        np.errstate(all="ignore"),
        pytest.warns(RuntimeWarning, match=rf"epoch {epoch} is (nan|inf): look for NaN .* in x .*, lower the") as told,
    ):
        history = nn.fit(
            model, x, labels, nn.SGD(model, rate), epochs=5, rng=0,
            schedule=lambda step: 1 if step < 15 or epoch == 1 else 1e30,
        )  # fmt: skip
    assert len(told) == 1 and told[0].filename == __file__
    assert np.isfinite(history.losses).tolist() == [True] * (epoch - 1) + [False] * (6 - epoch)


# ---- the bar ----


def test_the_bar_tells_loss_accuracy_rate_and_time(capsys):
    pytest.importorskip("tqdm")
    x, labels = problem()
    model = network()
    history = nn.fit(
        model, x, labels, nn.Adam(model), epochs=2, progress="learning", validation=(x, labels)
    )  # fmt: skip
    last = capsys.readouterr().err.split("\r")[-1]
    assert "learning: 100%" in last and " 14/14 " in last and "step/s" in last and "<00:00" in last
    assert f"loss {history.losses[-1]:.4f}, accuracy {history.accuracies[-1]:.3f}" in last
    assert f"validation accuracy {history.validation_accuracies[-1]:.3f}" in last


def test_the_bar_of_an_interrupted_training_stays_where_it_was(capsys):
    pytest.importorskip("tqdm")
    model = network()
    nn.fit(model, *problem(), nn.Adam(model), epochs=2, progress=True, after_step=at(5, interrupt))
    assert " 5/14 " in capsys.readouterr().err.split("\r")[-1]


# ---- Ctrl-C ----


def interrupt():
    raise KeyboardInterrupt


def at(step, action):
    return lambda now: action() if now == step else None


def after(steps, **options):
    """The state after so many steps, undisturbed."""
    model = network()

    def stop():
        raise StopIteration

    with pytest.raises(StopIteration):
        nn.fit(model, *problem(), nn.SGD(model, 0.1), rng=1, after_step=at(steps, stop), **options)
    return model.state_dict()


def worse(step):
    """Learn for two epochs of 7 steps, and then run away."""
    return 1 if step < 14 else 100


@pytest.mark.parametrize("ctrl_c", [interrupt, lambda: signal.raise_signal(signal.SIGINT)], ids=["raised", "signal"])
@pytest.mark.parametrize(("step", "left", "epoch"), [(3, 3, None), (7, 7, None), (9, 7, 0), (20, 14, 1), (30, 14, 1)])
def test_ctrl_c_leaves_the_best_so_far(ctrl_c, step, left, epoch):
    """In the first epoch what there is, later the end of the best epoch; a signal at step 7 waits for that end."""
    model = network()
    if step == 7 and ctrl_c is not interrupt:
        epoch = 0
    history = nn.fit(
        model, *problem(), nn.SGD(model, 0.1), rng=1, epochs=9, schedule=worse, after_step=at(step, ctrl_c)
    )  # fmt: skip
    assert history.interrupted and history.steps == step and history.best_epoch == epoch
    assert len(history.losses) == len(history.accuracies) == (step - (epoch is None)) // 7
    assert not any(layer.training for layer in (model, *model.layers))
    same_state(model, after(left, schedule=worse, epochs=9))


def test_the_best_is_chosen_by_validation():
    x, labels = problem()
    model = network()
    history = nn.fit(
        model, x[:200], labels[:200], nn.SGD(model, 0.3), epochs=9, rng=0, validation=(x[200:], labels[200:]),
        schedule=lambda step: 1 + 50 * (step % 8 > 4), after_step=at(35, interrupt),
    )  # fmt: skip
    scores = list(zip(history.validation_accuracies, (-loss for loss in history.validation_losses), strict=True))
    assert len(scores) == 8 and scores[history.best_epoch] == max(scores) and max(scores) > scores[-1]
    assert nn.accuracy(model, x[200:], labels[200:]) == max(history.validation_accuracies)


class Sends(nn.ReLU):
    """A ReLU that gets Ctrl-C so many times in its call of this number."""

    def __init__(self, number, times):
        super().__init__()
        self.left, self.times = number, times

    def __call__(self, x):
        self.left -= 1
        for _ in range(self.times if self.left == 0 else 0):
            signal.raise_signal(signal.SIGINT)
        return super().__call__(x)


@pytest.mark.parametrize(("step", "times", "left"), [(3, 1, 3), (3, 2, 0), (10, 1, 7), (10, 2, 7)])
def test_a_second_ctrl_c_does_not_wait_for_the_step(step, times, left):
    """By then running statistics are of this step and parameters of the last: back to a whole state."""
    model = network()
    model.layers[2] = Sends(step, times)
    history = nn.fit(model, *problem(), nn.SGD(model, 0.1), rng=1, epochs=3)
    assert history.interrupted and history.steps == (step if times == 1 else step - 1)
    same_state(model, after(left, epochs=3) if left else network().state_dict())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_other_handlers_and_other_threads_are_left_alone():
    model, heard = network(), []
    signal.signal(signal.SIGINT, lambda *_: heard.append(1))
    try:
        ours = signal.getsignal(signal.SIGINT)
        history = nn.fit(model, *problem(), still(model), after_step=at(2, lambda: signal.raise_signal(signal.SIGINT)))
        assert heard == [1] and not history.interrupted and signal.getsignal(signal.SIGINT) is ours
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    found = []
    thread = threading.Thread(
        target=lambda: found.append(nn.fit(model, *problem(), still(model), after_step=at(2, interrupt)))
    )
    thread.start()
    thread.join()
    assert found[0].interrupted and found[0].steps == 2


def test_a_ctrl_c_that_nobody_answers_is_raised_in_the_end():
    with pytest.raises(KeyboardInterrupt), nn.interrupt.Interrupt() as heard:
        signal.raise_signal(signal.SIGINT)
        assert heard.asked
    with nn.interrupt.Interrupt() as heard:
        signal.raise_signal(signal.SIGINT)
        heard.closing = True
        signal.raise_signal(signal.SIGINT)


def test_a_diverged_model_is_not_returned():
    model = network()
    with np.errstate(all="ignore"), pytest.warns(RuntimeWarning, match="the mean loss of epoch 1 is nan"):
        history = nn.fit(
            model, *problem(), nn.SGD(model, 1e30), rng=0, epochs=3, after_step=at(12, interrupt)
        )  # fmt: skip
    assert history.best_epoch is None and np.isnan(history.losses[0])
    same_state(model, network().state_dict())


class InTheLoop(Interrupt):
    """At a line of the loop itself; what layers leave when they are interrupted is tested there."""

    def trace(self, frame, event, argument):
        if frame.f_code.co_filename.endswith(("fit.py", "run.py", "interrupt.py")):
            return super().trace(frame, event, argument)
        return None


def test_interrupted_at_every_line_of_an_epochs_end():
    """Step 7, the epoch's end with its validation, step 8: the model is of one moment, the history in step with it."""
    whole = [network().state_dict(), *(after(step, epochs=3) for step in (6, 7, 8))]
    found = set()
    for n in range(1, 5000):
        model, taken = network(), [0]

        def note(step, taken=taken):
            taken[0] = step
            if step == 8:
                raise KeyboardInterrupt

        with InTheLoop(n, lambda taken=taken: taken[0] in (6, 7)) as stop:
            history = nn.fit(
                model, *problem(), nn.SGD(model, 0.1), epochs=3, rng=1, validation=problem(), after_step=note
            )  # fmt: skip
        state = model.state_dict()
        same = [i for i, one in enumerate(whole) if all((state[name] == one[name]).all() for name in state)]
        assert len(same) == 1 and history.interrupted and not model.training, n
        lists = history.losses, history.accuracies, history.validation_losses, history.validation_accuracies
        assert len({*map(len, lists)}) == 1, n
        assert history.best_epoch is None or (history.losses and same == [2]), n
        found.add((same[0], history.best_epoch))
        if not stop.reached:
            break
    assert 50 < n < 4999 and found >= {(0, None), (1, None), (2, None), (2, 0)}


def test_a_real_ctrl_c():
    """A process that trains on and on gets SIGINT from outside."""
    code = """
import numpy as np
from fastbn import nn
x = np.random.default_rng(0).standard_normal((400, 6)).astype(np.float32)
model = nn.Sequential(nn.Linear(6, 16, rng=0), nn.BatchNorm(16), nn.ReLU(), nn.Linear(16, 4, rng=0))
ready = lambda step: print("ready", flush=True) if step == 50 else None
history = nn.fit(model, x, (x[:, 0] > 0).astype(int), nn.Adam(model), epochs=10**7, after_step=ready)
print(history.interrupted, history.steps >= 50, model.training, np.isfinite(model(x)).all())
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert out == "True True False True\n" and error == "" and process.returncode == 0
