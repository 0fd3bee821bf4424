"""What every test shares: the kernels to run over, the data, the oracle and the budgets.

The oracle is `reference.py` on float64 copies of the inputs, reached without `layout.py`, so that a mistake in the
layout does not cancel out.
"""

import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from typing import NamedTuple

import hypothesis
import ml_dtypes
import numpy as np
import pytest

from fastbn import backends
from fastbn._kernels import reference

# Who is started in the background of a shell ignores Ctrl-C, and so would everything that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

hypothesis.settings.register_profile(
    "fastbn",
    deadline=None,
    derandomize=True,  # a failure is the same for everyone
    max_examples=50,
    # `kernels` is set up once for all examples, which is right: it holds no state of theirs.
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("fastbn")

F16, BF16 = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)
F32, F64 = np.dtype(np.float32), np.dtype(np.float64)
WIDE = [F32, F64]  # of data, parameters and statistics
HALF = [F16, BF16]  # of data alone
DTYPES = [*WIDE, *HALF]

# Errors allowed, in units in the last place of the data's dtype, of a scale that each check names: the size of the
# largest term that is rounded on the way. float64 has the larger numbers: there the mean has no low
# part, and the oracle rounds as much as what it is held against. Half data is computed on in float32, whose units are
# 2⁻¹³ of float16's and 2⁻¹⁶ of bfloat16's, and rounded once: half a unit, and a hundredth for float32's errors. dx has
# another half where a residual's gradient, itself of the data's type, is what it is computed from. Statistics and
# parameters' gradients are not rounded to half: their units are float32's.
ULPS = {
    #          float32  float64  float16  bfloat16
    "y":       {F32: 4, F64: 12, F16: 0.51, BF16: 0.51},
    "dx":      {F32: 6, F64: 12, F16: 1, BF16: 1},
    "mean":    {F32: 4, F64: 12},  # of the standard deviation
    "var":     {F32: 10, F64: 12},
    "dweight": {F32: 8, F64: 8},
    "dbias":   {F32: 8, F64: 8},
}  # fmt: skip


# ---- kernels ----

INSTRUCTION_SETS = ["x86-64-v4", "x86-64-v3", "x86-64"]
BACKENDS = [*(f"cython {isa}" for isa in INSTRUCTION_SETS), "numba", "reference"]


def runnable_sets():
    """The instruction sets that can run here; ["baseline"] on other machines than x86-64."""
    return backends.instruction_sets()


@contextmanager
def cache_sizes(level2, last_level):
    """Other caches, for every compiled instruction set: plans depend on them, results must not."""
    modules = [backends._load_instruction_set(isa) for isa in runnable_sets()]
    before = [module.caches() for module in modules]
    try:
        for module in modules:
            module.set_caches(level2, last_level)
        yield
    finally:
        for module, sizes in zip(modules, before, strict=True):
            module.set_caches(*sizes)


def load_kernels(name):
    """The kernels of one of BACKENDS; skips, with the reason, where they cannot run."""
    if name.startswith("cython"):
        isa = name.removeprefix("cython ")
        available = runnable_sets()
        if available == ["baseline"] and isa == "x86-64":
            isa = "baseline"
        if isa not in available:
            pytest.skip(f"{isa}: what was built and runs here is {', '.join(available) or 'nothing'}")
        return backends._load_instruction_set(isa)
    try:
        return backends.load(name)
    except ImportError as error:
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    """Every test begins with the default settings, and leaves them."""
    for name in ("FASTBN_BACKEND", "FASTBN_ISA", "FASTBN_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(backends, "_backend", None)
    monkeypatch.setattr(backends, "_threads", 2)  # a team even on a machine of one core


@pytest.fixture(params=BACKENDS)
def kernels(request, settings, monkeypatch):
    """One backend and instruction set after the other, serving every call of the test."""
    module = load_kernels(request.param)
    monkeypatch.setattr(backends, "_backend", module)
    return module


@pytest.fixture(params=BACKENDS[: len(INSTRUCTION_SETS)])
def compiled(request, settings, monkeypatch):
    """The same, over the cython kernels alone."""
    module = load_kernels(request.param)
    monkeypatch.setattr(backends, "_backend", module)
    return module


@pytest.fixture(params=BACKENDS[:-1])
def native(request, settings, monkeypatch):
    """The same, over all but the reference, which works in float64 and in new arrays."""
    module = load_kernels(request.param)
    monkeypatch.setattr(backends, "_backend", module)
    return module


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    return request.param


@pytest.fixture(params=HALF, ids=str)
def half(request):
    return request.param


# ---- data ----


def computed(dtype):
    """What is computed in for data of `dtype`, and what its parameters have by default."""
    return F64 if dtype == F64 else F32


def unit(dtype):
    """From 1 to the next number."""
    return float(ml_dtypes.finfo(dtype).eps)


class Case(NamedTuple):
    """A shape, its channel axis, and what of the kernels it reaches."""

    shape: tuple
    axis: int
    why: str


CASES = [
    Case((7, 17), 1, "rows"),
    Case((2, 1), 1, "one channel of two values"),
    Case((1013, 1031), 1, "rows in blocks, more channels than a tile"),
    Case((17001, 3), 1, "rows in several chunks, split"),
    Case((3001, 130), 1, "rows in blocks, split over tiles"),
    Case((17, 5), 0, "channels first"),
    Case((7, 3, 5), 1, "few small planes: runs of several planes"),
    Case((1, 3, 7), 1, "one image"),
    Case((5, 1, 13), 1, "one channel"),
    Case((9, 5, 17, 19), 1, "planes under 512 as columns"),
    Case((11, 70, 17), 1, "columns, more than a tile"),
    Case((261, 2, 3, 5), 1, "columns in blocks"),
    Case((17, 2, 1, 511), 1, "planes of 511"),
    Case((17, 2, 3, 171), 1, "planes of 513: runs"),
    Case((3, 4, 23, 23), 1, "fewer than 8 images: runs"),
    Case((2, 3, 91, 91), 1, "planes of more than a block"),
    Case((3, 11, 40, 41), 1, "runs, fused"),
    Case((2, 3, 4, 5, 7), 1, "NCDHW"),
    Case((3, 5, 7, 6), -1, "NHWC"),
    Case((5, 31, 31, 13), -1, "NHWC in blocks"),
    Case((2, 3, 4, 5, 7), -1, "NDHWC"),
    Case((6, 3, 5), -2, "axis counted from the end"),
]


@pytest.fixture(params=CASES, ids=lambda case: case.why)
def case(request):
    return request.param


def generator(*seed):
    return np.random.default_rng([20150211, *seed])


def sample(shape, dtype, axis=1, seed=0):
    """Normal data; each channel has a mean and a deviation of its own."""
    rng = generator(seed)
    channel = [1] * len(shape)
    channel[axis] = shape[axis]
    mean, std = rng.normal(0, 1, channel), rng.uniform(0.5, 2, channel)
    return (rng.standard_normal(shape) * std + mean).astype(dtype)


def parameters(channels, dtype, seed=1):
    """weight, bias, running_mean, running_var."""
    rng = generator(seed)
    weight, bias, mean = rng.normal(1, 0.5, channels), rng.normal(0, 1, channels), rng.normal(0, 2, channels)
    return tuple(v.astype(dtype) for v in (weight, bias, mean, rng.uniform(0.5, 2, channels)))


def column(values, ndim, axis):
    """(channels,) values to stand beside an array of `ndim` axes."""
    shape = [1] * ndim
    shape[axis] = -1
    return np.asarray(values, F64).reshape(shape)


# The same values in other memory. Each takes a compact array and gives an equal one.
def fortran(x):
    return np.asfortranarray(x)


def channels_last(x):
    """Axis 1's values side by side in memory, as torch.channels_last."""
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)


def batch_inside(x):
    """An order that is neither: the batch is the fastest axis."""
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 0, -1)), -1, 0)


def gaps(x):
    wide = np.full((*x.shape[:-1], 2 * x.shape[-1]), np.nan, x.dtype)
    wide[..., ::2] = x
    return wide[..., ::2]


def padded(x):
    """A window of a larger array, as a channel-sliced or padded buffer gives."""
    wide = np.full([n + 3 for n in x.shape], np.nan, x.dtype)
    window = wide[tuple(slice(1, 1 + n) for n in x.shape)]
    window[...] = x
    return window


def negative(x):
    return np.flip(np.ascontiguousarray(np.flip(x)))


def read_only(x):
    x = x.copy()
    x.flags.writeable = False
    return x


def misaligned(x):
    """Starts at an odd element."""
    memory = np.empty(x.size + 1, x.dtype)[1:].reshape(x.shape)
    memory[...] = x
    return memory


def unaligned(x):
    """Starts at an odd byte: NumPy's `aligned` flag is off."""
    memory = np.empty(x.nbytes + 1, np.uint8)[1:].view(x.dtype).reshape(x.shape)
    memory[...] = x
    return memory


ORDERS = [fortran, channels_last, batch_inside]  # other orders: other sums, the output follows
COPIES = [gaps, padded, negative, read_only, misaligned, unaligned]  # the same order: the same bits


# ---- oracle ----


def canonical(x, axis):
    """(1, channels, all values of a channel) in float64: in this order NumPy sums in pairs, and loses least."""
    moved = np.moveaxis(np.asarray(x, F64), axis, 0)
    return np.ascontiguousarray(moved).reshape(1, moved.shape[0], -1)


def restore(flat, x, axis):
    return np.moveaxis(flat.reshape(np.moveaxis(x, axis, 0).shape), 0, axis)


def wide(p):
    return None if p is None else np.asarray(p, F64)


def oracle_forward(x, weight, bias, axis, eps=1e-5, *, residual=None, slope=1.0):
    """y, mean and var in float64."""
    flat = canonical(x, axis)
    y, channels = np.empty_like(flat), flat.shape[1]
    mean, var = np.empty(channels), np.empty(channels)
    added = None if residual is None else canonical(residual, axis)
    reference.forward(flat, y, *flat.shape, wide(weight), wide(bias), eps, mean, var, added, slope, 1)
    return restore(y, x, axis), mean, var


def oracle_normalize(x, mean, var, weight, bias, axis, eps=1e-5, *, residual=None, slope=1.0):
    flat = canonical(x, axis)
    y = np.empty_like(flat)
    added = None if residual is None else canonical(residual, axis)
    reference.normalize(
        flat, y, *flat.shape, wide(mean), wide(var), wide(weight), wide(bias), eps, added, slope, 1
    )  # fmt: skip
    return restore(y, x, axis)


def oracle_backward(dy, x, mean, var, weight, axis, batch, eps=1e-5, *, y=None, slope=1.0):
    """dx, dweight, dbias and dresidual in float64. y: what the forward pass gave, if its activation had this slope.

    The oracle sees from y what was cut, as a z of its own may have another sign where it is near 0.
    """
    flat, flat_dy = canonical(x, axis), canonical(dy, axis)
    dx, channels, dresidual = np.empty_like(flat), flat.shape[1], flat_dy.copy()
    dweight, dbias = np.empty(channels), np.empty(channels)
    seen, cut = (None, None) if slope == 1 else (canonical(y, axis), dresidual)
    reference.backward(
        flat_dy, flat, dx, *flat.shape, wide(mean), wide(var), wide(weight), None, eps, dweight, dbias, batch,
        seen, cut, slope, 1,
    )  # fmt: skip
    return restore(dx, x, axis), dweight, dbias, restore(dresidual, x, axis)


# ---- checks ----


def close(name, got, want, scale, dtype):
    """Within ULPS[name] units in the last place of `scale`, for data of `dtype`; `got` may be narrower."""
    error_unit = ULPS[name][dtype] * unit(dtype) + (unit(got.dtype) if got.dtype != dtype else 0)
    allowed = np.maximum(error_unit * scale, np.finfo(F64).tiny)
    if got.dtype in HALF:  # float16's smallest numbers are not that small
        allowed += float(ml_dtypes.finfo(got.dtype).smallest_subnormal) / 2
    error = np.abs(got - want) / allowed
    worst = error.max(initial=0)
    assert worst <= 1, f"{name}: the error is {worst:.3g} times what is allowed"


def close_y(y, want, weight, bias, axis):
    """Scale: |weight·x̂| + |weight| + |bias|: where x̂ is near 0, the mean's error remains, which is relative to σ."""
    weight = column(1 if weight is None else weight, y.ndim, axis)
    bias = column(0 if bias is None else bias, y.ndim, axis)
    close("y", y, want, np.abs(want - bias) + np.abs(weight) + np.abs(bias), y.dtype)


def close_statistics(mean, var, want_mean, want_var, dtype):
    close("mean", mean, want_mean, np.sqrt(want_var), computed(dtype))
    close("var", var, want_var, want_var, computed(dtype))


def close_gradients(got, want, dy, x, mean, var, weight, axis, batch, eps=1e-5, *, cut=False):
    """Gradients of x, weight and bias. Scale: the sum of the sizes of each one's terms.

    cut: dy is what an activation left. If that is little, it may lie where x̂ is near 0 (see close_y); and half data's
    smallest numbers are rounded twice.
    """
    axis %= x.ndim
    sigma = np.sqrt(wide(var) + eps)
    slope = np.abs(1 if weight is None else wide(weight)) / sigma
    size, xhat = np.abs(wide(dy)), np.abs(wide(x) - column(mean, x.ndim, axis)) / column(sigma, x.ndim, axis)
    others = tuple(i for i in range(x.ndim) if i != axis)
    terms = np.maximum(size, float(ml_dtypes.finfo(x.dtype).smallest_normal)) if cut and x.dtype in HALF else size
    if batch:
        terms = size + size.mean(others, keepdims=True) + xhat * (size * xhat).mean(others, keepdims=True)
    close("dx", got[0], want[0], terms * column(slope, x.ndim, axis), x.dtype)
    if got[1] is not None:
        close("dweight", got[1], want[1], (size * (xhat + cut)).sum(others), computed(x.dtype))
    if got[2] is not None:
        close("dbias", got[2], want[2], size.sum(others), computed(x.dtype))


def same_bits(a, b):
    assert a.dtype == b.dtype and a.shape == b.shape
    assert a.tobytes() == b.tobytes()


def run_python(code, *, check=True, **env):
    """A fresh interpreter. Settings are by keyword; those of this process do not pass on."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("FASTBN_", "OMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", code], env=kept | env, capture_output=True, text=True, timeout=120, check=False
    )
    if check:
        assert done.returncode == 0, done.stderr
    return done
