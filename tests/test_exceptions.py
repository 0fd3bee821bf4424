"""What an exception leaves: statistics, layers and outputs as they were, and a network that can go on.

Errors about arguments are in `test_bad_input.py` and `test_layers.py`. Here something fails in the middle of a call: a
kernel, an allocation, or (KeyboardInterrupt) any line of Python.
"""

import copy
import os
import sys
import warnings
from contextlib import suppress
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
from conftest import load_kernels, parameters, run_python, runnable_sets, same_bits, sample

import fastbn
from fastbn import backends, nn

PACKAGE = os.path.dirname(fastbn.__file__) + os.sep
# Kernels that write a y or a dx.
WRITING = ["normalize", "normalize_usual", "forward", "forward_usual", "input_gradient", "backward"]
KERNELS = [*WRITING, "moments", "gradient_moments", "update_running_stats"]


# ---- operations ----


class Operation(NamedTuple):
    call: object  # does it
    kept: tuple  # arrays, layers and moments, as an error must leave them
    outs: tuple = ()  # arrays that it writes


X, DY, RESIDUAL = (sample((4, 3, 5), np.float32, seed=seed) for seed in range(3))
WEIGHT, BIAS, MEAN, VAR = parameters(3, np.float32)
MASK = sample((4, 5), np.float32, seed=4) > -1
for array in (X, DY, RESIDUAL, WEIGHT, BIAS, MEAN, VAR, MASK):
    array.flags.writeable = False


def filled(order="C", count=1):
    """Where an operation shall write; in Fortran's order it writes to another array first, and copies."""
    outs = tuple(np.full_like(X, 7, order=order) for _ in range(count))
    return outs if count > 1 else outs[0]


def trained(kind=fastbn.BatchNorm):
    """A layer after a step."""
    layer = kind(3, **({"virtual_batch_size": 2} if kind is fastbn.GhostBatchNorm else {}))
    step(layer)
    return layer


def step(layer):
    """What a step of training gives."""
    mask = (MASK,) if isinstance(layer, fastbn.MaskedBatchNorm) else ()
    y = layer(X.copy(), *mask).copy()
    return y, layer.backward(DY).copy(), layer.grad_weight, layer.grad_bias


def batch_norm_in_training(order):
    mean, var, out = MEAN.copy(), VAR.copy(), filled(order)
    call = lambda: fastbn.batch_norm(X, mean, var, WEIGHT, BIAS, training=True, out=out)  # noqa: E731
    return Operation(call, (mean, var), (out,))


def batch_norm_in_place(order):
    mean, var, x = MEAN.copy(), VAR.copy(), X.copy(order)
    return Operation(lambda: fastbn.batch_norm(x, mean, var, training=True, out=x), (mean, var), (x,))


def batch_norm(order):
    out = filled(order)
    return Operation(lambda: fastbn.batch_norm(X, MEAN, VAR, WEIGHT, BIAS, out=out), (MEAN, VAR), (out,))


def batch_norm_forward(order):
    out = filled(order)
    return Operation(lambda: fastbn.batch_norm_forward(X, WEIGHT, BIAS, out=out), (), (out,))


def batch_norm_eval_forward(order):
    out = filled(order)
    return Operation(lambda: fastbn.batch_norm_eval_forward(X, MEAN, VAR, WEIGHT, BIAS, out=out), (MEAN, VAR), (out,))


def batch_norm_backward(order):
    out, saved = filled(order), fastbn.batch_norm_forward(X, WEIGHT, BIAS)[1]
    return Operation(lambda: fastbn.batch_norm_backward(DY, saved, out=out), (saved.mean, saved.var), (out,))


def batch_norm_backward_of_a_sum(order):
    """The residual's gradient is dy itself, or what an activation left of it."""
    outs, saved = filled(order, 2), fastbn.batch_norm_forward(X, WEIGHT, BIAS, residual=RESIDUAL)[1]
    call = lambda: fastbn.batch_norm_backward(DY, saved, out=outs[0], out_residual=outs[1])  # noqa: E731
    return Operation(call, (saved.mean, saved.var), outs)


def moments(order):
    return Operation(lambda: fastbn.moments(X), ())


def layer_in_training(order):
    layer, out = trained(), filled(order)
    return Operation(lambda: layer(X, out=out), (layer,), (out,))


def layer_in_eval_mode(order):
    layer, out = trained().eval(), filled(order)
    return Operation(lambda: layer(X, out=out), (layer,), (out,))


def layer_backward(order):
    layer, out = trained(), filled(order)
    return Operation(lambda: layer.backward(DY, out=out), (layer,), (out,))


def layer_of_a_network(order):
    layer, out = trained(nn.BatchNorm), filled(order)
    return Operation(lambda: layer(X, out=out), (layer,), (out,))


def moments_update(order):
    total = fastbn.moments(X)
    return Operation(lambda: total.update(DY), (total,))


def masked_forward(order):
    out = filled(order)
    call = lambda: fastbn.masked_batch_norm_forward(X, MASK, WEIGHT, BIAS, out=out)  # noqa: E731
    return Operation(call, (WEIGHT, BIAS), (out,))


def masked_backward(order):
    out, saved = filled(order), fastbn.masked_batch_norm_forward(X, MASK, WEIGHT, BIAS)[1]
    return Operation(lambda: fastbn.masked_batch_norm_backward(DY, saved, out=out), (saved.mean, saved.var), (out,))


def masked_layer(order):
    layer, out = trained(fastbn.MaskedBatchNorm), filled(order)
    return Operation(lambda: layer(X, MASK, out=out), (layer,), (out,))


def ghost_layer(order):
    layer, out = trained(fastbn.GhostBatchNorm), filled(order)
    return Operation(lambda: layer(X, out=out), (layer,), (out,))


def ghost_backward(order):
    layer, out = trained(fastbn.GhostBatchNorm), filled(order)
    return Operation(lambda: layer.backward(DY, out=out), (layer,), (out,))


def inplace_layer(order):
    layer, x = trained(fastbn.InplaceBatchNorm), X.copy(order)
    return Operation(lambda: layer(x), (layer,), (x,))


def inplace_backward(order):
    layer, out = trained(fastbn.InplaceBatchNorm), filled(order)
    return Operation(lambda: layer.backward(DY, out=out), (layer,), (out,))


def double_backward(order):
    saved = fastbn.batch_norm_forward(X, WEIGHT, BIAS, activation="leaky_relu")[1]
    call = lambda: fastbn.batch_norm_double_backward(DY, WEIGHT, BIAS, X, saved)  # noqa: E731
    return Operation(call, (saved.mean, saved.var, WEIGHT, BIAS))


PLAIN = [
    batch_norm_in_training, batch_norm_in_place, batch_norm, batch_norm_forward, batch_norm_eval_forward,
    batch_norm_backward, batch_norm_backward_of_a_sum, moments, moments_update, layer_in_training, layer_in_eval_mode,
    layer_backward, layer_of_a_network,
]  # fmt: skip
OPERATIONS = [
    *PLAIN, masked_forward, masked_backward, masked_layer, ghost_layer, ghost_backward, inplace_layer,
    inplace_backward, double_backward,
]  # fmt: skip
UPDATING = [
    batch_norm_in_training, batch_norm_in_place, layer_in_training, layer_of_a_network, masked_layer, ghost_layer,
    inplace_layer,
]  # fmt: skip


def over_backends(operations):
    """Backend and operation; for Numba only what needs no form of a kernel that would be compiled for it alone."""
    pairs = [(name, operation) for name in ("cython", "reference", "numba") for operation in operations]
    return [
        pytest.param(name, operation, id=f"{name}-{operation.__name__}")
        for name, operation in pairs
        if name != "numba" or operation in PLAIN
    ]


def use(name, monkeypatch):
    module = load_kernels(name if name != "cython" else f"cython {(runnable_sets() or ['x86-64'])[0]}")
    monkeypatch.setattr(backends, "_backend", module)
    return module


def look(things):
    """All that is in arrays, layers and moments, to the bit; of other objects which they are."""
    seen = []
    for thing in things:
        if isinstance(thing, np.ndarray):
            values = [thing]
        elif isinstance(thing, fastbn.Moments):
            values = [thing.count, thing.mean, thing.m2]
        else:
            values = vars(thing).values()
        for value in values:
            seen.append((id(value), value.tobytes()) if isinstance(value, np.ndarray) else value)
    return seen


# ---- a kernel, an allocation ----


def failing(backend, name, error, written):
    """The kernels, but that the one of this name fails; those that have written to an output gather in `written`."""

    def fail(*arguments, **settings):
        raise error("on purpose")

    def noted(known):
        def kernel(*arguments, **settings):
            result = getattr(backend, known)(*arguments, **settings)
            if not known.endswith("_usual") or result is not None:
                written.append(known)
            return result

        return kernel

    kernels = {known: getattr(backend, known) for known in dir(backend)}
    return SimpleNamespace(**kernels | {known: noted(known) for known in WRITING} | ({name: fail} if name else {}))


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize(("name", "operation"), over_backends(OPERATIONS))
def test_a_kernel_fails(name, operation, order, error, monkeypatch):
    """Each of them in turn; nothing has changed but what the kernels before it have written to `out`."""
    backend, failed = use(name, monkeypatch), []
    for kernel in KERNELS:
        monkeypatch.setattr(backends, "_backend", backend)
        call, kept, outs = operation(order)
        before, written = (look(kept), look(outs)), []
        monkeypatch.setattr(backends, "_backend", failing(backend, kernel, error, written))
        try:
            call()
        except error:
            failed.append(kernel)
            assert look(kept) == before[0], kernel
            assert written or look(outs) == before[1], kernel
    assert failed


ALLOCATIONS = ["empty", "zeros", "full", "empty_like", "zeros_like", "ascontiguousarray", "array"]


class Memory:
    """NumPy's functions that make arrays: at the n-th call of any there is none. `reached`: whether there was one."""

    def __init__(self, monkeypatch, n):
        self.left, self.reached = n, False
        for name in ALLOCATIONS:
            monkeypatch.setattr(np, name, self.function(getattr(np, name)))

    def function(self, real):
        def allocate(*arguments, **settings):
            self.left -= 1
            if self.left == 0:
                self.reached = True
                raise MemoryError("on purpose")
            return real(*arguments, **settings)

        return allocate


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize(("name", "operation"), over_backends(OPERATIONS))
def test_no_memory(name, operation, order, monkeypatch):
    """For each array that Python code makes, in turn: nothing has changed but what a kernel has written by then."""
    backend, written = use(name, monkeypatch), []
    operation(order).call()  # what is compiled or kept at first use is there
    monkeypatch.setattr(backends, "_backend", failing(backend, None, None, written))
    for n in range(1, 100):
        call, kept, outs = operation(order)
        before = look(kept), look(outs)
        written.clear()
        with monkeypatch.context() as patch:
            memory = Memory(patch, n)
            try:
                call()
            except MemoryError:
                assert memory.reached
        if not memory.reached:
            break
        assert look(kept) == before[0], f"allocation {n}"
        assert written or look(outs) == before[1], f"allocation {n}"
    else:
        pytest.fail("no end of allocations")


def test_no_memory_for_a_kernel():
    """A compiled kernel's scratch does not fit: it says so before it writes."""
    if not runnable_sets():
        pytest.skip("no compiled kernels here")
    if not sys.platform.startswith("linux") or "libasan" in os.environ.get("LD_PRELOAD", ""):
        pytest.skip("needs Linux's limit of a process's memory, and AddressSanitizer reserves more than any limit")
    run_python("""
import resource
import numpy as np, fastbn
channels = 1 << 22
x = np.ones((2, channels), np.float32)
out, mean, var = np.full_like(x, 7), np.full(channels, 7.0), np.full(channels, 7.0)
saved = fastbn.batch_norm_forward(x, out=out)[1]
dx = np.full_like(x, 7)
out[...] = 7
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (150 << 20), -1))  # the statistics fit, the scratch (224 MiB) does not
calls = {
    "training": lambda: fastbn.batch_norm(x, mean, var, training=True, out=out),
    "eval": lambda: fastbn.batch_norm(x, mean, var, out=out),
    "backward": lambda: fastbn.batch_norm_backward(x, saved, out=dx),
    "moments": lambda: fastbn.moments(x),
}
for name, call in calls.items():
    try:
        call()
    except MemoryError as error:
        assert "fastbn: no memory for a call's scratch" in str(error), (name, error)
    else:
        raise AssertionError(name)
for array in (out, dx, mean, var):
    assert (array == 7).all()
""")


# ---- what a layer is asked ----

BAD = {  # what a trained layer of 3 channels refuses
    "x has too few channels": lambda layer: layer(X[:, :2]),
    "x is of integers": lambda layer: layer(X.astype(int)),
    "x is one value a channel": lambda layer: layer(X[:1, :, :1]),
    "residual of another shape": lambda layer: layer(X, RESIDUAL[1:]),
    "residual of another dtype": lambda layer: layer(X, RESIDUAL.astype(np.float64)),
    "out of another shape": lambda layer: layer(X, out=filled()[1:]),
    "out is x": lambda layer: over(layer, X.copy()),
    "out is a list": lambda layer: layer(X, out=X.tolist()),
    "out is made of the statistics": lambda layer: layer(X[:1], out=layer.running_mean.reshape(1, 3, 1)),
    "eps": lambda layer: changed(layer, eps=-1.0)(X),
    "momentum": lambda layer: changed(layer, momentum=2.0)(X),
    "momentum is a word": lambda layer: changed(layer, momentum="0.1")(X),
    "axis": lambda layer: changed(layer, axis=3)(X),
    "activation": lambda layer: changed(layer, activation="gelu")(X),
    "negative_slope": lambda layer: changed(layer, activation="leaky_relu", negative_slope=-1)(X),
    "weight of another length": lambda layer: changed(layer, weight=np.ones(4, np.float32))(X),
    "statistics of another length": lambda layer: changed(layer, running_var=np.ones(4, np.float32))(X),
    "read-only statistics": lambda layer: changed(layer, running_var=np.broadcast_to(np.float32(1), (3,)))(X),
    "dy of another shape": lambda layer: layer.backward(DY[1:]),
    "dy of another dtype": lambda layer: layer.backward(DY.astype(np.float64)),
    "dy is None": lambda layer: layer.backward(None),
    "dx over x": lambda layer: layer.backward(DY, out=layer._saved.x),
    "dx is read-only": lambda layer: layer.backward(DY, out=np.broadcast_to(np.float32(1), X.shape)),
    "out_residual without a residual": lambda layer: layer.backward(DY, out_residual=filled()),
    "an empty state": lambda layer: layer.load_state_dict({}),
    "a state of another shape": lambda layer: layer.load_state_dict(layer.state_dict() | {"running_var": np.ones(4)}),
    "a NaN count": lambda layer: layer.load_state_dict(layer.state_dict() | {"num_batches_tracked": np.array(np.nan)}),
}  # fmt: skip


def over(layer, x):
    return layer(x, out=x)


def changed(layer, **attributes):
    """A layer that shares all but these with it."""
    other = copy.copy(layer)
    other._saved = layer._saved
    for name, value in attributes.items():
        setattr(other, name, value)
    return other


@pytest.mark.parametrize("kind", [fastbn.BatchNorm, nn.BatchNorm], ids=["fastbn", "nn"])
@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_a_layer_refuses_and_stays(kind, bad):
    """Parameters, statistics, gradients and what the last forward pass left: to the bit, and the same arrays."""
    layer = trained(kind)
    things = layer, layer._saved.x, layer._saved.mean, layer._saved.var
    before = look(things)
    with pytest.raises((TypeError, ValueError)):
        bad(layer)
    assert look(things) == before
    same_bits(layer.backward(DY), trained(kind).backward(DY))


# ---- numbers that do not fit ----


@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
def test_a_state_that_does_not_fit(name):
    """Where NumPy is told to raise instead of warning, or Python is: all of a state is taken, or nothing."""
    state = fastbn.BatchNorm(3, dtype=np.float64).state_dict()
    for key in state:
        state[key] += 1
    state[name][1] = 1e300
    for strict in (lambda: np.errstate(over="raise"), warnings.catch_warnings):
        layer = trained()
        before = look([layer])
        with strict(), pytest.raises((FloatingPointError, RuntimeWarning, ValueError)):
            layer.load_state_dict(state)
        assert look([layer]) == before


@pytest.mark.parametrize("value", [np.inf, np.nan, 3e38, 1e-45])
@pytest.mark.parametrize("name", ["cython", "reference", "numba"])
def test_numpys_error_state_is_not_asked(name, value, monkeypatch):
    """What is not finite, overflows or underflows comes out of a call as a number, whatever np.errstate says."""
    use(name, monkeypatch)
    x = X.copy()
    x[1, 1, 1] = value

    def results():
        mean, var = MEAN.copy(), VAR.copy()
        y, saved = fastbn.batch_norm_forward(x, WEIGHT, BIAS)
        gradients = fastbn.batch_norm_backward(x, saved)
        z = fastbn.batch_norm(x, mean, var, training=True)
        return [
            a.tobytes() for a in (y, saved.mean, saved.var, *gradients, z, mean, var, fastbn.batch_norm(x, mean, var))
        ]

    with np.errstate(all="ignore"):
        want = results()
    with np.errstate(all="raise"):
        assert results() == want


# ---- an interrupt, anywhere ----


class Interrupt:
    """KeyboardInterrupt at the n-th line of fastbn's own code that is run inside it. `reached`: whether there was one.

    `counting()` says whether lines count now.
    """

    def __init__(self, n, counting=lambda: True):
        self.left, self.counting, self.reached = n, counting, False

    def trace(self, frame, event, argument):
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line" and self.counting():
            self.left -= 1
            if self.left == 0:
                self.reached = True
                raise KeyboardInterrupt
        return self.trace

    def __enter__(self):
        self.outer = sys.gettrace()
        sys.settrace(self.trace)
        return self

    def __exit__(self, *_):
        sys.settrace(self.outer)


def statistics(things):
    """A running mean and a running variance, as bytes; None where there are none."""
    for thing in things:
        if isinstance(thing, fastbn.BatchNorm):
            return thing.running_mean.tobytes(), thing.running_var.tobytes()
    return tuple(array.tobytes() for array in things[:2]) or None


@pytest.mark.parametrize(("name", "updating"), over_backends(UPDATING))
def test_interrupted_between_any_two_lines(name, updating, monkeypatch):
    """The running statistics are both old or both new, and a layer serves as if nothing had been."""
    use(name, monkeypatch)
    call, kept, _ = updating("C")
    before = statistics(kept)
    call()
    after = statistics(kept)
    assert before != after
    for n in range(1, 2000):
        call, kept, _ = updating("C")
        with suppress(KeyboardInterrupt), Interrupt(n) as interrupt:
            call()
        found = statistics(kept)
        assert found in (before, after), f"line {n}"
        for thing in kept:
            if isinstance(thing, fastbn.BatchNorm):
                for got, want in zip(step(thing), step(trained(type(thing))), strict=True):
                    same_bits(got, want)
        if not interrupt.reached:
            break
    assert 20 < n < 1999 and found == after


# ---- the trainer ----


def problem():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 24)
    return (3 * rng.standard_normal((4, 6))[labels] + rng.standard_normal((24, 6))).astype(np.float32), labels


def network():
    rng = np.random.default_rng(1)
    return nn.Sequential(
        nn.Linear(6, 8, rng=rng), nn.BatchNorm(8), nn.ReLU(), nn.Linear(8, 8, rng=rng),
        nn.BatchNorm(8, activation="relu"), nn.Linear(8, 4, rng=rng),
    )  # fmt: skip


OPTIMIZERS = {
    "SGD": lambda model: nn.SGD(model, 0.1, momentum=0.9, weight_decay=0.01),
    "RMSprop": lambda model: nn.RMSprop(model, 0.01),
    "Adam": lambda model: nn.Adam(model, 0.01),
}


def steps(optimizer, until):
    """The state after so many steps of fit, undisturbed."""
    x, labels = problem()
    model = network()

    def stop(step):
        if step == until:
            raise StopIteration

    with pytest.raises(StopIteration):
        nn.fit(model, x, labels, optimizer(model), batch_size=8, rng=3, after_step=stop)
    return model.state_dict()


class Stop:
    """An `after_step` that knows how many steps were taken, and ends the second with KeyboardInterrupt."""

    def __init__(self):
        self.taken = 0

    def __call__(self, step):
        self.taken = step
        if step == 2:
            raise KeyboardInterrupt

    def is_second(self):
        return self.taken == 1


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_fit_is_interrupted_anywhere(optimizer):
    """At every line of the second step: all is as before it, as after it or as at first, and predicts and trains."""
    x, labels = problem()
    moments = [network().state_dict(), steps(optimizer, 1), steps(optimizer, 2)]
    found = set()
    for n in range(1, 5000):
        model, stop = network(), Stop()
        chosen = optimizer(model)
        with Interrupt(n, stop.is_second) as interrupt:
            assert nn.fit(model, x, labels, chosen, batch_size=8, rng=3, after_step=stop).interrupted
        assert not any(layer.training for layer in (model, *model.layers)), n
        state = model.state_dict()
        same = [i for i, one in enumerate(moments) if all(a.tobytes() == one[k].tobytes() for k, a in state.items())]
        assert len(same) == 1, n
        found.add(same[0])
        fresh = network().eval()
        fresh.load_state_dict(state)
        same_bits(model(x), fresh(x))  # nothing of the interrupted step is left but the state
        if not interrupt.reached or n % 10 == 0:
            losses = nn.fit(model, x, labels, chosen, epochs=12, batch_size=8, rng=4).losses
            assert losses[-1] < losses[0] and all(np.isfinite(array).all() for array in model.state_dict().values())
        if not interrupt.reached:
            break
    assert 100 < n < 4999 and found == {0, 1, 2}
