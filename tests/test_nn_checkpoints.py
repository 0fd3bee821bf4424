"""Checkpoints: resumed bit for bit, the last whole one whatever happens, and what is refused."""

import errno
import os
import sys
from dataclasses import asdict
from functools import partial

import numpy as np
import pytest
from conftest import run_python
from test_nn_fit import at, interrupt
from test_nn_training import problem

from fastbn import files, nn
from fastbn.nn.checkpoints import KEY, Generators
from fastbn.nn.schedules import exponential

pytest.importorskip("safetensors.numpy", reason="safetensors is not installed: pip install safetensors")
posix = pytest.mark.skipif(os.name != "posix", reason="fork and SIGKILL are POSIX's")


class Training:
    """A network with everything that a step may depend on, and a data set of 5 batches."""

    def __init__(self, *, shared=True, bits=np.random.PCG64, optimizer=nn.Adam, **changes):
        self.rng = np.random.Generator(bits(5))
        other = self.rng if shared else 6
        self.model = nn.Sequential(
            nn.Linear(6, 16, rng=self.rng), nn.BatchNorm(16, momentum=None), nn.ReLU(), nn.Dropout(0.2, rng=self.rng),
            nn.Linear(16, 8, rng=self.rng), nn.BatchNorm(8), nn.Dropout(0.1, rng=other), nn.Linear(8, 4, rng=self.rng),
        )  # fmt: skip
        self.optimizer = optimizer(self.model, 0.02)
        x, labels = problem()
        self.arguments = {
            "x": x[:90], "targets": labels[:90], "batch_size": 20, "epochs": 3, "rng": self.rng,
            "schedule": partial(exponential, gamma=0.9), "validation": (x[100:150], labels[100:150]),
        } | changes  # fmt: skip

    def fit(self, **options):
        self.history = nn.fit(self.model, optimizer=self.optimizer, **self.arguments | options)
        return self

    def stop_at(self, step, **options):
        """The process dies."""

        def die():
            raise StopIteration

        with pytest.raises(StopIteration):
            self.fit(after_step=at(step, die), **options)


def same(one, other):
    """Bit for bit."""
    for a, b in ((one.model, other.model), (one.optimizer, other.optimizer)):
        for name, array in a.state_dict().items():
            assert array.tobytes() == b.state_dict()[name].tobytes(), name
    roots = [(training.rng, training.model) for training in (one, other)]
    np.testing.assert_equal(*(Generators(*root).get() for root in roots))
    histories = [asdict(training.history) | {"seconds": 0} for training in (one, other)]
    assert histories[0] == histories[1]


# ---- resuming ----


VARIANTS = {
    "all": {},
    "own generators": {"shared": False},
    "seeds": {"shared": False, "rng": 7},
    "MT19937": {"bits": np.random.MT19937, "shared": False, "optimizer": partial(nn.SGD, momentum=0.9)},
    "Philox, weights": {"bits": np.random.Philox, "sample_weight": np.arange(90) % 5},
    "regression": {"targets": problem()[0][:90, :4], "loss": nn.MSELoss(), "validation": None, "optimizer": nn.RMSprop},
}


@pytest.mark.parametrize(
    ("name", "every"), [("all", None), ("all", 1), *((name, 4) for name in VARIANTS)], ids=lambda value: str(value)
)
def test_resumed_bit_for_bit(name, every, tmp_path):
    """After a death at one step after the other; also where more epochs are asked for than before."""
    straight = Training(**VARIANTS[name]).fit()
    path = tmp_path / "training"
    options = {"checkpoint": path, "checkpoint_every": every}
    for step in range(1, 15) if (name, every) == ("all", 4) else (5, 11):
        Training(**VARIANTS[name]).stop_at(step, **options, epochs=2 if step <= 8 else 3)
        same(Training(**VARIANTS[name]).fit(**options, resume=True), straight)
        path.unlink()


def test_a_finished_training_is_there_at_once(tmp_path):
    first = Training().fit(checkpoint=tmp_path / "a")
    same(Training().fit(checkpoint=tmp_path / "a", resume=True, after_step=interrupt), first)


def test_it_goes_on_where_it_was(tmp_path):
    """And not from the start: after dying at step 8 there are the steps after the last checkpoint."""
    for every, first in ((None, 6), (1, 8), (3, 7)):
        Training().stop_at(8, checkpoint=tmp_path / "a", checkpoint_every=every)
        seen = []
        Training().fit(checkpoint=tmp_path / "a", checkpoint_every=every, resume=True, after_step=seen.append)
        assert seen == list(range(first, 16))
        (tmp_path / "a").unlink()


def test_without_a_file_it_starts(tmp_path):
    same(Training().fit(checkpoint=tmp_path / "new", resume=True), Training().fit())
    assert os.listdir(tmp_path) == ["new"]


def test_ctrl_c_keeps_the_step_and_the_best(tmp_path):
    straight = Training().fit(epochs=4)
    for step in (3, 12):
        first = Training().fit(checkpoint=tmp_path / "a", epochs=4, after_step=at(step, interrupt))
        assert first.history.interrupted
        first = Training().fit(
            checkpoint=tmp_path / "a", resume=True, epochs=4,
            after_step=at(step + 1, lambda: __import__("signal").raise_signal(2)),
        )  # fmt: skip
        assert first.history.interrupted and first.history.steps == step + 1
        kept = nn.Checkpoint.load(tmp_path / "a")
        assert kept.notes["history"]["steps"] == step + 1
        if step == 3:
            assert kept.best is None
        else:  # and the best that is left is from before the checkpoint
            for name, array in first.model.state_dict().items():
                np.testing.assert_array_equal(array, kept.best[name])
        same(Training().fit(checkpoint=tmp_path / "a", resume=True, epochs=4), straight)
        (tmp_path / "a").unlink()


def test_the_file_is_plain_safetensors(tmp_path):
    from safetensors.numpy import load_file

    path = tmp_path / "a"
    training = Training().fit(checkpoint=path)
    tensors, checkpoint = load_file(path), nn.Checkpoint.load(path)
    for name, array in training.model.state_dict().items():
        assert tensors[f"model.{name}"].dtype == array.dtype and (tensors[f"model.{name}"] == array).all()
        assert (checkpoint.model[name] == array).all()
    fresh = Training()
    fresh.model.load_state_dict(checkpoint.best)
    best = training.history.validation_accuracies[training.history.best_epoch]
    assert nn.accuracy(fresh.model, *fresh.arguments["validation"]) == best


def test_generators_are_found_once_and_set_in_place():
    rng, other = np.random.default_rng(0), np.random.default_rng(1)
    again = np.random.Generator(rng.bit_generator)
    net = nn.Sequential(nn.Dropout(rng=rng), nn.Dropout(rng=other), nn.Dropout(rng=again))
    net.more = {"deep": [other, (np.random.Generator(np.random.SFC64(2)), net)]}
    found = Generators(rng, net)
    assert found.places == ["PCG64 0", "PCG64 0", "PCG64 1", "PCG64 0", "PCG64 1", "SFC64 2"]
    states = found.get()
    expected = rng.random(3), other.random(3)
    found.set(states)
    np.testing.assert_array_equal((again.random(3), net.layers[1].rng.random(3)), expected)


# ---- refusals ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 30}, "its batch_size is 20, and here it is 30"),
        ({"x": problem()[0][:90].astype(np.float64)}, r"its x is float32 \(90, 6\), and here it is float64"),
        ({"x": problem()[0][:80], "targets": problem()[1][:80]}, r"its x is float32 \(90, 6\)"),
        ({"targets": problem()[1][:90].astype(np.int16)}, "its targets is int64.*int16"),
        ({"validation": None}, "its validation is .*, and here it is None"),
        ({"sample_weight": np.ones(90)}, "its sample_weight is None"),
        ({"loss": nn.MSELoss(), "validation": None}, "its loss is SoftmaxCrossEntropy, and here it is MSELoss"),
        ({"optimizer": nn.RMSprop}, "its optimizer is Adam .*, and here it is RMSprop"),
        ({"optimizer": partial(nn.Adam, eps=1e-3)}, "its optimizer is .*1e-08.*0.001"),
        ({"shared": False}, "its random generators is .*PCG64 0.*PCG64 1"),
        ({"bits": np.random.MT19937}, "its random generators is .*PCG64.*MT19937"),
    ],
)
def test_another_training_is_refused(change, message, tmp_path):
    Training().fit(checkpoint=tmp_path / "a")
    before = (tmp_path / "a").read_bytes()
    other = Training(**change)
    state, draws = other.model.state_dict(), Generators(other.rng).get()
    with pytest.raises(ValueError, match=f"checkpoint '.*a' is of another training: {message}"):
        other.fit(checkpoint=tmp_path / "a", resume=True)
    assert (tmp_path / "a").read_bytes() == before
    for name, array in other.model.state_dict().items():
        np.testing.assert_array_equal(array, state[name])
    np.testing.assert_equal(Generators(other.rng).get(), draws)


@pytest.mark.parametrize("schedule", [None, partial(exponential, gamma=0.9)], ids=["", "schedule"])
def test_another_learning_rate_is_refused(schedule, tmp_path):
    """Neither the file's nor the one that is given would be what everyone expects."""
    path = tmp_path / "a"
    Training(schedule=schedule).stop_at(6, checkpoint=path)
    before = path.read_bytes()
    scheduled = float(nn.Checkpoint.load(path).optimizer["lr"])  # what it came to, and no start either
    for rate in (0.5, scheduled) if schedule else (0.5,):
        other = Training(schedule=schedule, optimizer=lambda model, lr, rate=rate: nn.Adam(model, rate))
        state = other.model.state_dict()
        with pytest.raises(ValueError, match=f"learning rate is 0.02, and here it is {rate:g}; resume with the same"):
            other.fit(checkpoint=path, resume=True)
        assert path.read_bytes() == before and other.optimizer.lr == rate and other.optimizer.steps == 0
        for name, array in other.model.state_dict().items():
            np.testing.assert_array_equal(array, state[name])


@pytest.mark.parametrize("rate", [0.02, 0.002], ids=["that at the start", "the checkpoint's"])
def test_a_learning_rate_that_after_step_changed(rate, tmp_path):
    """The one that goes on is the checkpoint's."""

    def slower(training, die=None):
        def after_step(step):
            if step == 4:
                training.optimizer.lr = 0.002
            if step == die:
                raise StopIteration

        return after_step

    straight, first = Training(schedule=None), Training(schedule=None)
    straight.fit(after_step=slower(straight))
    with pytest.raises(StopIteration):
        first.fit(after_step=slower(first, 8), checkpoint=tmp_path / "a")
    second = Training(schedule=None, optimizer=lambda model, lr: nn.Adam(model, rate))
    second.fit(after_step=slower(second), checkpoint=tmp_path / "a", resume=True)
    same(second, straight)
    assert second.optimizer.lr == 0.002


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm(16, eps=0.1), nn.BatchNorm(16, activation="relu"), nn.LayerNorm(16), nn.Tanh()], ids=repr
)
def test_another_model_is_refused(layer, tmp_path):
    Training().fit(checkpoint=tmp_path / "a")
    other = Training()
    other.model = nn.Sequential(*other.model.layers[:1], layer, *other.model.layers[2:])
    other.optimizer = nn.Adam(other.model, 0.02)
    with pytest.raises(ValueError, match="is of another training: its model is Sequential"):
        other.fit(checkpoint=tmp_path / "a", resume=True)


def test_a_model_must_have_all_in_its_state(tmp_path):
    class Forgets(nn.Linear):
        def state_dict(self):
            return {"bias": self.bias.copy()}

    model = Forgets(6, 4)
    with pytest.raises(ValueError, match="model has 28 numbers to train and only 4 in its state_dict, and must have"):
        nn.fit(model, *problem(), nn.SGD(model, 0.1), checkpoint=tmp_path / "a")
    assert os.listdir(tmp_path) == []


def test_a_file_is_not_replaced_unasked(tmp_path):
    Training().fit(checkpoint=tmp_path / "a")
    before = (tmp_path / "a").read_bytes()
    with pytest.raises(FileExistsError, match="a' exists, and must not, unless resume=True: to start anew, remove it"):
        Training().fit(checkpoint=tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == before


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "a"
    Training().fit(checkpoint=path)
    good = path.read_bytes()
    for end in (*range(0, len(good), len(good) // 15), len(good) - 1):
        path.write_bytes(good[:end])
        with pytest.raises(ValueError, match="a' is damaged, or no safetensors file: "):
            Training().fit(checkpoint=path, resume=True)
    for place in (*range(8, len(good), len(good) // 100), len(good) - 1):
        bad = bytearray(good)
        bad[place] ^= 1
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=r"a' is (damaged|a safetensors file, but no checkpoint|a checkpoint of)"):
            nn.Checkpoint.load(path)
    with pytest.raises(ValueError, match="a' is damaged: its contents do not have the checksum that they were saved"):
        nn.Checkpoint.load(path)  # of another last number
    path.write_bytes(good)
    nn.Checkpoint.load(path)


def test_other_files_are_refused(tmp_path):
    from safetensors.numpy import save_file

    path = tmp_path / "a"
    save_file({"weight": np.ones(3)}, path)
    with pytest.raises(ValueError, match=r"a' is a safetensors file, but no checkpoint of fastbn\.nn\.fit"):
        nn.Checkpoint.load(path)
    save_file({"weight": np.ones(3)}, path, {KEY: "{}", f"{KEY}.version": "7"})
    with pytest.raises(ValueError, match="a' is a checkpoint of format 7, and this fastbn reads format 1"):
        nn.Checkpoint.load(path)
    with pytest.raises(FileNotFoundError):
        nn.Checkpoint.load(tmp_path / "none")


@pytest.mark.parametrize("resume", [False, True])
def test_places_that_cannot_be_a_file(tmp_path, resume):
    """And nobody is told to remove them."""
    with pytest.raises(IsADirectoryError, match=r"checkpoint '.*' is a folder, and must be a file$"):
        Training().fit(checkpoint=tmp_path, resume=resume)
    with pytest.raises(FileNotFoundError, match=r"none.a' needs the folder '.*none', which must exist$"):
        Training().fit(checkpoint=tmp_path / "none" / "a", resume=resume)
    with pytest.raises(OSError, match=r"is a device or the like, and must be an ordinary file$"):
        Training().fit(checkpoint=os.devnull, resume=resume)


@pytest.mark.parametrize(
    "wrong",
    [
        {"x": problem()[0][:90].astype(np.float64)},
        {"targets": problem()[1][:90] + 1},
        {"validation": (problem()[0], problem()[1] + 1)},
        {"schedule": lambda step: "0.9"},
    ],
    ids=["dtype", "labels", "validation", "schedule"],
)
def test_a_call_that_fails_at_once_is_not_in_the_next_ones_way(wrong, tmp_path):
    for resume in (False, True):
        with pytest.raises((TypeError, ValueError)):
            Training(**wrong).fit(checkpoint=tmp_path / "a", resume=resume)
        assert os.listdir(tmp_path) == []
        same(Training().fit(checkpoint=tmp_path / "a", resume=resume), Training().fit())
        (tmp_path / "a").unlink()


class Interrupted(nn.Linear):
    """Ctrl-C in the middle of training steps, so many times."""

    times = 0

    def __call__(self, x):
        if self.training and self.times:
            self.times -= 1
            raise KeyboardInterrupt
        return super().__call__(x)


def test_what_an_earlier_call_left_stays(tmp_path, monkeypatch):
    """What Ctrl-C left, also of no step; and also where the next call fails before it has done one."""
    one, other = Training(), Training()
    for training in (one, other):
        training.model.layers[0].__class__ = Interrupted
    one.model.layers[0].times = 1
    one.fit(checkpoint=tmp_path / "a")
    assert one.history.interrupted and one.history.steps == 0
    before = (tmp_path / "a").read_bytes()

    def fails(*_):
        raise StopIteration

    monkeypatch.setattr(nn.SoftmaxCrossEntropy, "backward", fails)
    with pytest.raises(StopIteration):
        Training().fit(checkpoint=tmp_path / "b")
    assert os.listdir(tmp_path) == ["a"]
    with pytest.raises(StopIteration):
        other.fit(checkpoint=tmp_path / "a", resume=True)
    assert (tmp_path / "a").read_bytes() == before


def test_without_safetensors(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.delitem(sys.modules, "safetensors.numpy", raising=False)
    for call in (lambda: Training().fit(checkpoint=tmp_path / "a"), lambda: nn.Checkpoint.load(tmp_path / "a")):
        with pytest.raises(ImportError, match=r"checkpoints need the package safetensors.*pip install 'fastbn\[io\]'"):
            call()
    Training().fit()


# ---- the last whole one ----


@pytest.mark.parametrize("place", ["fsync", "replace"])
def test_a_full_disk(place, tmp_path, monkeypatch):
    path = tmp_path / "a"
    Training().stop_at(6, checkpoint=path)
    before = path.read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, place, full)
    training = Training()
    with pytest.raises(OSError, match=r"cannot write the checkpoint \(No space left on device\).*a'") as caught:
        training.fit(checkpoint=path, resume=True)
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(path)
    assert not training.model.training
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["a"] and path.read_bytes() == before
    same(Training().fit(checkpoint=path, resume=True), Training().fit())


def test_leftovers_are_removed_and_nothing_else(tmp_path):
    """Of this place alone: a name may have signs in it that stand for others in a pattern."""
    name = "a[1]*"
    others = [f".b.{'0' * 32}.tmp", f".a1x.{'0' * 32}.tmp", f".{name}.mine.tmp", f"{name}.{'0' * 32}.tmp"]
    for other in (*others, f".{name}.{'0' * 32}.tmp"):
        (tmp_path / other).write_bytes(b"half")
    files.remove_leftovers(str(tmp_path / name))
    assert sorted(os.listdir(tmp_path)) == sorted(others)


START = """
import os, random, signal, time
import numpy as np
from fastbn import nn
x = np.random.default_rng(0).standard_normal((64, 6)).astype(np.float32)
def train(**options):
    layers = nn.Linear(6, 200, rng=0), nn.BatchNorm(200), nn.ReLU(), nn.Dropout(0.1, rng=1), nn.Linear(200, 4, rng=0)
    model = nn.Sequential(*layers)
    options |= {"batch_size": 16, "rng": 2, "checkpoint": path, "resume": True, "checkpoint_every": 1}
    return nn.fit(model, x, (x[:, 0] > 0).astype(int), nn.Adam(model), **options)
"""


@posix
def test_killed_in_the_middle_of_a_save(tmp_path):
    """The process ends at its seventh save, in each of its calls: what stands is the sixth, whole."""
    code = (
        f"path = {str(tmp_path / 'a')!r}\n"
        + START
        + """
import builtins
real = {"open": open, "fsync": os.fsync, "replace": os.replace}
saves = 0

class Half:
    def __init__(self, file): self.file = file
    def __enter__(self): return self
    def __exit__(self, *_): self.file.close()
    def write(self, data):
        self.file.write(data[:len(data) // 2])
        self.file.flush()
        os._exit(9)

def ends(name):
    def call(*arguments):
        global saves
        saves += name == "open" and arguments[1:] == ("xb",)
        if saves == 7 and name == where:
            os._exit(9)
        found = real[name](*arguments)
        return Half(found) if (saves, name, where) == (7, "open", "write") else found
    return call

for where in ("open", "write", "fsync", "replace"):
    child = os.fork()
    if not child:
        builtins.open, os.fsync, os.replace = ends("open"), ends("fsync"), ends("replace")
        train(epochs=100)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert len(os.listdir(os.path.dirname(path))) == (1 if where == "open" else 2), "the half one is beside the whole"
    assert nn.Checkpoint.load(path).notes["history"]["steps"] == 5  # the first is of step 0
    assert train(epochs=2).steps == 8
    assert os.listdir(os.path.dirname(path)) == ["a"]
    os.unlink(path)
"""
    )
    run_python(code, OPENBLAS_NUM_THREADS="1", FASTBN_NUM_THREADS="1")


@posix
def test_killed_at_any_moment(tmp_path):
    """Children that do little but save are killed, time and again; the next goes on from what the last one left."""
    code = (
        f"path = {str(tmp_path / 'a')!r}\n"
        + START
        + """
train(epochs=1)
draw, before, halves = random.Random(0), 0, 0
for n in range(30):
    child = os.fork()
    if not child:
        train(epochs=10**6)
    time.sleep(0.005 + 0.06 * draw.random())
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    halves += len(os.listdir(os.path.dirname(path))) > 1
    steps = nn.Checkpoint.load(path).notes["history"]["steps"]
    assert steps >= before
    before = steps
history = train(epochs=before // 4 + 1)
assert history.steps == 4 * len(history.losses) and os.listdir(os.path.dirname(path)) == ["a"]
os.unlink(path)
straight = train(epochs=len(history.losses))
assert straight.losses == history.losses, "not bit for bit"
print(before, halves)
"""
    )
    run_python(code, OPENBLAS_NUM_THREADS="1", FASTBN_NUM_THREADS="1")
