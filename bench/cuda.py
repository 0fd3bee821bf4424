"""The GPU path on a GPU: is every result right, and how fast is it? python bench/cuda.py [--check]

    --check     only check
    --seed N    the inputs' seed; without it, a new one, which is printed

Checked: each operation, data type, layout, activation and residual, on new random inputs, against float64 on the host;
and that a second call gives the same bits. Every new array, and all scratch memory, is full of NaN beforehand: memory
that was freed and is used again could still hold what is right. An error is counted in units in the last place of the
sum of the sizes of what was added up, and must stay under LIMITS. Then other memory orders, slices and addresses, calls
in place, empty batches, nan_policy, layers; and torch's and CuPy's arrays, and Numba's, on streams of their own. In
Numba's simulator (NUMBA_ENABLE_CUDASIM=1) the same is done on a few tiny arrays, without streams, and nothing can be
timed.

Timed, with CUDA events, each the least of REPEATS turns: fastbn, a device-to-device copy of x, and torch where it is
installed with CUDA (cuDNN), in turns, on the same memory. Before each turn the device is given copies to do, and calls
queue up behind them; no memory is freed meanwhile, which would wait for the device. A turn counts only if the device
was still at the copies when the last call had been queued: then what is measured is the device's work and not the
host's. Where that was never so, the figure is NaN. "called" is the other thing: the wall time of one call that is
waited for. Prints Markdown with the device's name; docs/performance.md says what is asked.
"""

# ruff: noqa: E402

from __future__ import annotations

import argparse
import os
import sys

# Numba's CUDA bindings are a package named cuda, and must not find this file in its place.
sys.path[:] = [path for path in sys.path if os.path.abspath(path) != os.path.dirname(os.path.abspath(__file__))]

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from itertools import product
from typing import Any

import numpy as np

if os.environ.get("NUMBA_ENABLE_CUDASIM") == "1":
    sys.setswitchinterval(5e-5)  # simulated threads wait for each other's turns

import fastbn
from fastbn import backends, gpu
from fastbn._kernels import reference

EPS = 1e-5
SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"
# Errors allowed, in units of the data's type (statistics and parameters' gradients: of the type computed in). Half data
# is rounded once, or twice where a residual's gradient comes between.
LIMITS = {"y": 6.0, "dx": 8.0, "dresidual": 0.5, "mean": 4.0, "var": 12.0, "dweight": 10.0, "dbias": 10.0}
HALF_LIMITS = {"y": 0.51, "dx": 1.0}

# Shape, channel axis.
CHECKED = [
    ((64, 64, 56, 56), 1), ((32, 2048, 7, 7), 1), ((33, 17, 13, 11), 1), ((3, 5, 999, 1001), 1), ((1000, 3, 5), 1),
    ((64, 56, 56, 64), -1), ((32, 7, 7, 2048), -1), ((21, 13, 11, 17), -1), ((4096, 256), 1), ((100003, 3), 1),
    ((2, 1), 1), ((64, 30001), 1), ((1, 2, 2), 1),
]  # fmt: skip
TINY = [((5, 3, 8), 1), ((2, 3, 7), 1), ((4, 3, 16), -1), ((21, 3), 1), ((2, 1), 1)]
FORMS = [(None, False), ("relu", False), ("leaky_relu", True), (None, True), ("relu", True)]

TIMED = [
    ((256, 64, 56, 56), "NCHW"), ((256, 64, 56, 56), "NHWC"), ((64, 256, 56, 56), "NCHW"), ((64, 256, 56, 56), "NHWC"),
    ((256, 512, 14, 14), "NCHW"), ((256, 512, 14, 14), "NHWC"), ((256, 2048, 7, 7), "NCHW"),
    ((256, 2048, 7, 7), "NHWC"), ((32, 128, 28, 28), "NCHW"), ((32, 128, 28, 28), "NHWC"),
    ((131072, 256), "NC"), ((4096, 256), "NC"),
]  # fmt: skip
TENSORS = {"forward": 2, "eval": 2, "backward": 3}  # that must be read or written
REPEATS, CALLS, AHEAD, MOST_AHEAD = 10, 5, 20, 640


# ---- memory ----


@contextmanager
def poisoned() -> Iterator[None]:
    """New arrays, and scratch memory, are full of NaN until they are written. The simulator's scratch is so anyway."""
    plain, kernels = gpu.empty, gpu.kernels()
    work = kernels._work

    def memset(memory: Any, size: int, stream: Any) -> None:
        import_module("numba.cuda.cudadrv.driver").device_memset(memory, 0xFF, size, stream.numba)

    def empty(like: Any, shape: Any, dtype: Any, stream: Any, order: Any = None) -> Any:
        new = plain(like, shape, dtype, stream, order)
        if not new.size:
            return new
        library = gpu.library(new.owner)
        if library == "torch":
            new.owner.fill_(float("nan"))
        elif library == "cupy":
            new.owner.fill(float("nan"))
        elif SIMULATED:
            new.shadow[...] = np.nan
        else:
            memset(new.owner, new.size * new.dtype.itemsize, stream)
        return new

    def scratch(stream: Any, *parts: Any) -> Any:
        addresses = work(stream, *parts)
        if not SIMULATED:
            held = kernels._scratch.held[stream.key]
            memset(held, held.nbytes, stream)
        return addresses

    gpu.empty, kernels._work = empty, scratch
    try:
        yield
    finally:
        gpu.empty, kernels._work = plain, work


# How an array may lie in memory: of a shape and type, the memory and the array in it.
def _slice(shape: tuple[int, ...], dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    base = np.full((shape[0], 2 * shape[1], *shape[2:]), np.nan, dtype)
    return base, base[:, ::2]


def _odd(shape: tuple[int, ...], dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    base = np.full(int(np.prod(shape)) + 1, np.nan, dtype)
    return base, base[1:].reshape(shape)


def _last(axis: int) -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """That axis varies fastest."""

    def lay(shape: tuple[int, ...], dtype: Any) -> tuple[np.ndarray, np.ndarray]:
        others = [n for i, n in enumerate(shape) if i != axis]
        base = np.full((*others, shape[axis]), np.nan, dtype)
        return base, np.moveaxis(base, -1, axis)

    return lay


def _flipped(shape: tuple[int, ...], dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    base = np.full(shape, np.nan, dtype)
    return base, base[..., ::-1]


MEMORIES = {
    "[:, ::2]": _slice, "misaligned": _odd, "channels last": _last(1), "batch last": _last(0), "flipped": _flipped
}  # fmt: skip


class Window:
    """Values on the GPU in larger memory, or in another order: what other libraries' views are."""

    def __init__(self, values: np.ndarray, lay: Callable[..., tuple[np.ndarray, np.ndarray]]) -> None:
        self.lay, self.shape, self.dtype = lay, values.shape, values.dtype
        base, view = lay(values.shape, values.dtype)
        view[...] = values
        self.base = gpu.moved(base.reshape(-1))
        start, read_only = self.base.__cuda_array_interface__["data"]
        self.__cuda_array_interface__ = {
            "shape": view.shape, "typestr": view.dtype.str, "strides": view.strides, "version": 3,
            "data": (start + view.ctypes.data - base.ctypes.data, read_only), "stream": None,
        }  # fmt: skip

    def host(self) -> np.ndarray:
        """The values; what lies between them must still be NaN."""
        base, view = self.lay(self.shape, self.dtype)
        view[...] = 0
        between = np.isnan(base)
        base[...] = gpu.to_host(self.base).reshape(base.shape)
        if not np.isnan(base[between]).all():
            raise SystemExit(f"memory between an output's elements was written: shape {self.shape}, {self.dtype}")
        return view.copy()


def on_host(array: Any) -> np.ndarray:
    if isinstance(array, Window):
        return array.host()
    return array if isinstance(array, np.ndarray) else gpu.to_host(array)


# ---- correctness ----


def unit(dtype: np.dtype) -> float:
    return float(np.finfo(dtype).eps)


class Check:
    """One shape, axis and type: arrays on host and device, and the errors found."""

    def __init__(
        self, shape: tuple[int, ...], axis: int, dtype: Any, rng: np.random.Generator, memory: str | None = None
    ) -> None:
        self.axis, self.dtype, self.memory = axis, np.dtype(dtype), memory
        self.computed = np.dtype(np.float64 if self.dtype == np.float64 else np.float32)
        channels = shape[axis]
        column = [1] * len(shape)
        column[axis] = channels
        self.column = tuple(column)
        offset, spread = rng.normal(0, 3, column), rng.uniform(0.5, 2, column)
        self.x = (rng.standard_normal(shape) * spread + offset).astype(dtype)
        self.dy, self.residual = (rng.standard_normal(shape).astype(dtype) for _ in range(2))
        self.weight, self.bias = (rng.normal(m, 0.5, channels).astype(np.float32) for m in (1, 0))
        self.worst: dict[str, float] = {}

    def moved(self, values: np.ndarray) -> Any:
        """On the GPU, in the memory that is to be tried."""
        return gpu.moved(values) if self.memory is None else Window(values, MEMORIES[self.memory])

    def empty(self) -> Any:
        """An output to be written over."""
        return self.moved(np.full(self.x.shape, np.nan, self.dtype))

    def rows(self, array: np.ndarray) -> np.ndarray:
        """(1, channels, values), float64."""
        moved = np.moveaxis(array, self.axis, 0)
        return np.ascontiguousarray(moved, np.float64).reshape(1, len(self.weight), -1)

    def see(self, name: str, got: Any, want: np.ndarray, terms: np.ndarray) -> None:
        got = on_host(got)
        flat = self.rows(got) if got.shape == self.x.shape else got.astype(np.float64)
        u = unit(self.dtype) if got.shape == self.x.shape else max(unit(self.computed), unit(got.dtype))
        lowest = float(np.finfo(self.dtype).smallest_subnormal)
        with np.errstate(invalid="ignore"):
            error = float((np.abs(flat - want) / (u * np.abs(terms) + lowest)).max())
        limit = LIMITS[name]
        if self.dtype == np.float16 and name in HALF_LIMITS:
            limit = HALF_LIMITS[name]
        if not error <= limit:  # NaN is not
            raise SystemExit(f"{name} is off by {error:.3g} units, and at most {limit} are allowed: {self.describe()}")
        self.worst[name] = max(self.worst.get(name, 0.0), error)

    def deviation(self, mean: np.ndarray, var: np.ndarray) -> np.ndarray:
        """What a mean's error is a share of; float64 rounds the mean itself, too."""
        return np.sqrt(var) + np.abs(mean) * (unit(np.dtype(np.float64)) / unit(self.computed))

    def describe(self) -> str:
        memory = self.memory or "compact"
        return f"shape {self.x.shape}, axis {self.axis}, {self.dtype}, {memory}, {getattr(self, 'form', '')}"

    def again(self, first: Any, second: Any) -> None:
        for a, b in zip(first, second, strict=True):
            if a is not None and on_host(a).tobytes() != on_host(b).tobytes():
                raise SystemExit(f"two calls, two results: {self.describe()}")

    def run(self, activation: str | None, with_residual: bool, training: bool) -> None:
        self.form = f"{activation}, residual {with_residual}, training {training}"
        slope = {None: 1.0, "relu": 0.0, "leaky_relu": 0.125}[activation]
        x, dy, weight, bias = self.rows(self.x), self.rows(self.dy), *map(np.float64, (self.weight, self.bias))
        outer, channels, inner = x.shape
        added = self.rows(self.residual) if with_residual else None
        here = [self.moved(self.x), gpu.moved(self.weight), gpu.moved(self.bias), self.moved(self.dy)]
        there = self.moved(self.residual) if with_residual else None
        options = {
            "eps": EPS, "axis": self.axis, "activation": activation, "negative_slope": 0.125, "residual": there
        }  # fmt: skip

        mean, var = np.empty(channels), np.empty(channels)
        reference.moments(x, outer, channels, inner, mean, var, 1)
        var /= inner
        if not training:  # statistics of something else
            mean, var = mean + 0.5, var * 1.5
            mean, var = mean.astype(self.computed).astype(np.float64), var.astype(self.computed).astype(np.float64)
        want = np.empty_like(x)
        reference.normalize(x, want, outer, channels, inner, mean, var, weight, bias, EPS, added, slope, 1)

        def forward() -> tuple[Any, Any]:
            if training:
                return fastbn.batch_norm_forward(*here[:3], out=self.empty(), **options)
            statistics = (gpu.moved(v.astype(self.computed)) for v in (mean, var))
            return fastbn.batch_norm_eval_forward(here[0], *statistics, *here[1:3], out=self.empty(), **options)

        y, saved = forward()
        sigma = np.sqrt(var + EPS)
        xhat = (x - mean[:, None]) / sigma[:, None]
        far = 0 if training else np.abs(mean / sigma)[:, None]  # given statistics are rounded, or not near x's
        terms = np.abs(weight)[:, None] * (np.abs(xhat) + 1 + far) + np.abs(bias)[:, None]
        self.see("y", y, want, terms + (0 if added is None else np.abs(added)))
        if training:
            self.see("mean", saved.mean, mean, self.deviation(mean, var))
            self.see("var", saved.var, var, var)
        second = forward()
        self.again((y, saved.mean, saved.var), (second[0], second[1].mean, second[1].var))

        def backward() -> tuple[Any, ...]:
            outputs = {"out": self.empty()} | ({"out_residual": self.empty()} if with_residual else {})
            return fastbn.batch_norm_backward(here[3], saved, **outputs)

        got = backward()
        seen = self.rows(on_host(y))  # as the forward pass rounded it: z near 0 may have either sign
        dz = np.where(seen <= 0, dy * slope if slope else 0.0, dy)
        dx, dweight, dbias = np.empty_like(x), np.empty(channels), np.empty(channels)
        reference.backward(
            dz, x, dx, outer, channels, inner, mean, var, weight, None, EPS, dweight, dbias, training,
            None, None, 1.0, 1,
        )  # fmt: skip
        size = np.abs(dz)
        scale = (np.abs(weight) / sigma)[:, None]
        cut = np.where(
            size < float(np.finfo(self.dtype).smallest_normal), float(np.finfo(self.dtype).smallest_normal), size
        )
        dx_terms = cut
        if training:
            curve = (size * np.abs(xhat)).mean(2, keepdims=True)
            dx_terms = cut + size.mean(2, keepdims=True) + np.abs(xhat) * curve
        self.see("dx", got[0], dx, dx_terms * scale)
        self.see("dweight", got[1], dweight, (size * (np.abs(xhat) + 1)).sum((0, 2)))
        self.see("dbias", got[2], dbias, size.sum((0, 2)))
        if with_residual:
            self.see("dresidual", got[3], dz, dz)
        self.again(got, backward())
        if training and self.memory is None:
            self.in_place(here, saved, options, (y, *got))

    def in_place(self, here: list[Any], saved: Any, options: dict[str, Any], want: tuple[Any, ...]) -> None:
        """y over x, dx over dy, and dresidual over dy: the same bits as elsewhere."""
        self.form += ", in place"
        x, residual = gpu.moved(self.x), options["residual"]
        self.again((want[0],), (fastbn.batch_norm(x, None, None, *here[1:3], training=True, out=x, **options),))
        dy = gpu.moved(self.dy)
        self.again(want[1:], fastbn.batch_norm_backward(dy, saved, out=dy))
        if residual is not None:
            dy = gpu.moved(self.dy)
            self.again(want[1:], fastbn.batch_norm_backward(dy, saved, out_residual=dy))

    def far_from_zero(self) -> None:
        """A mean of 10⁶ deviations, float32: within 2e-6; and a constant channel is exactly bias."""
        if self.x[0].size * len(self.x) // len(self.weight) < 2 or self.dtype != np.float32:
            return
        x = (np.float64(self.dy) + 1e6).astype(np.float32)
        flat = self.rows(x)
        mean, var, want = np.empty(flat.shape[1]), np.empty(flat.shape[1]), np.empty_like(flat)
        reference.forward(flat, want, *flat.shape, None, None, EPS, mean, var, None, 1.0, 1)
        y = gpu.to_host(fastbn.batch_norm_forward(gpu.moved(x), axis=self.axis)[0])
        error = np.abs(self.rows(y) - want).max()
        if not error <= 2e-6:
            raise SystemExit(f"a mean of 10⁶ deviations: the error is {error:.3g}: {self.describe()}")
        constant = np.full(self.x.shape, 0.1, np.float32)
        y, saved = fastbn.batch_norm_forward(gpu.moved(constant), None, gpu.moved(self.bias), axis=self.axis)
        want = np.broadcast_to(self.bias.reshape(self.column), constant.shape)
        if not (gpu.to_host(y) == want).all() or gpu.to_host(saved.var).any():
            raise SystemExit(f"a constant channel is not bias: {self.describe()}")


def check(seed: int) -> None:
    print(f"checking, seed {seed}")
    rng = np.random.default_rng(seed)
    with poisoned():
        operations(rng)
        memories(rng)
        empty_batches()
        nan_policies(rng)
        running()
        libraries(rng)
    print("all is right")


def operations(rng: np.random.Generator) -> None:
    """Everything, in compact memory."""
    for (shape, axis), dtype in product(TINY if SIMULATED else CHECKED, (np.float32, np.float64, np.float16)):
        case = Check(shape, axis, dtype, rng)
        started = time.perf_counter()
        for i, (activation, with_residual) in enumerate(FORMS):
            for training in (True, False):
                if not SIMULATED or (i + training) % 2:  # which is slow
                    case.run(activation, with_residual, training)
        case.far_from_zero()
        moments = fastbn.moments(gpu.moved(case.x), axis=axis)
        flat = case.rows(case.x)
        mean, var, values = flat.mean((0, 2)), flat.var((0, 2)), flat.shape[2]
        case.form = "moments"
        case.see("mean", moments.mean, mean, case.deviation(mean, var))
        case.see("var", moments.var(), var, var)
        np.testing.assert_array_equal(moments.count, values)
        worst = ", ".join(f"{name} {error:.2g}" for name, error in case.worst.items())
        print(f"  {'×'.join(map(str, shape))} axis {axis} {np.dtype(dtype)}: {worst} units "
              f"({time.perf_counter() - started:.1f} s)", flush=True)  # fmt: skip


def memories(rng: np.random.Generator) -> None:
    """x, dy, the residual and all outputs as views of other memory: other orders, slices, odd addresses."""
    shape = (4, 3, 4) if SIMULATED else (16, 24, 14, 14)
    for memory, dtype in product(MEMORIES, (np.float32, np.float16)):
        case = Check(shape, 1, dtype, rng, memory)
        for activation, with_residual in FORMS[-1:] if SIMULATED else FORMS:
            for training in (True, False):
                if not SIMULATED or training:
                    case.run(activation, with_residual, training)
        moments = fastbn.moments(case.moved(case.x))
        flat = case.rows(case.x)
        case.see("mean", moments.mean, flat.mean((0, 2)), case.deviation(flat.mean((0, 2)), flat.var((0, 2))))
    print(f"  {', '.join(MEMORIES)}: right", flush=True)


def empty_batches() -> None:
    """Gradients are 0, running statistics stay; nothing is launched."""
    for shape in ((0, 3), (0, 3, 5), (4, 3, 0)):
        x, mean, var = np.empty(shape, np.float32), gpu.moved(np.full(3, 5.0)), gpu.moved(np.full(3, 7.0))
        weight = gpu.moved(np.ones(3, np.float32))
        y = fastbn.batch_norm(gpu.moved(x), mean, var, training=True)
        eval_y = fastbn.batch_norm(gpu.moved(x), mean, var)
        right = y.shape == eval_y.shape == shape
        right = right and (gpu.to_host(mean) == 5).all() and (gpu.to_host(var) == 7).all()
        _, saved = fastbn.batch_norm_forward(gpu.moved(x), weight, weight)
        dx, *others = fastbn.batch_norm_backward(gpu.moved(x), saved)
        right = right and dx.shape == shape and not any(gpu.to_host(g).any() for g in others)
        if not right or fastbn.moments(gpu.moved(x)).count:
            raise SystemExit(f"an empty batch of shape {shape}: gradients not 0, or statistics not kept")


def nan_policies(rng: np.random.Generator) -> None:
    """One NaN: it spoils its channel's statistics, or those stay, or it is an error."""
    x = rng.standard_normal((5, 3, 7)).astype(np.float32)
    x[1, 1, 1] = np.nan
    for policy in ("propagate", "skip_update", "raise"):
        mean, var = gpu.moved(np.zeros(3, np.float32)), gpu.moved(np.ones(3, np.float32))
        refused = False
        try:
            y = gpu.to_host(fastbn.batch_norm(gpu.moved(x), mean, var, training=True, nan_policy=policy))
        except ValueError:
            refused = True
        spoiled = np.isnan(gpu.to_host(mean)) | np.isnan(gpu.to_host(var))
        kept = (gpu.to_host(mean) == 0).all() and (gpu.to_host(var) == 1).all()
        right = spoiled.tolist() == [False, True, False] if policy == "propagate" else kept
        if refused != (policy == "raise") or not right:
            raise SystemExit(f"nan_policy={policy!r}: mean {gpu.to_host(mean)}, var {gpu.to_host(var)}")
        if not refused and np.isnan(y).any((0, 2)).tolist() != [False, True, False]:
            raise SystemExit(f"nan_policy={policy!r}: a NaN left its channel")


def running() -> None:
    """A layer on the GPU through training and eval mode, against one on the CPU."""
    rng = np.random.default_rng(1)
    mine, theirs = fastbn.BatchNorm(8, activation="relu"), fastbn.BatchNorm(8, activation="relu").cuda()
    for _ in range(3):
        x, dy = (rng.standard_normal((6, 8, 4, 3)).astype(np.float32) for _ in range(2))
        y = theirs(gpu.moved(x))
        np.testing.assert_allclose(gpu.to_host(y), mine(x), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(gpu.to_host(theirs.backward(gpu.moved(dy))), mine.backward(dy), rtol=1e-4, atol=1e-6)
    for name, value in mine.state_dict().items():
        np.testing.assert_allclose(theirs.state_dict()[name], value, rtol=1e-5)
    np.testing.assert_allclose(gpu.to_host(theirs.eval()(gpu.moved(x))), mine.eval()(x), rtol=1e-5, atol=1e-6)


# ---- other libraries' arrays, and streams ----


def torch_with_cuda() -> Any:
    try:
        import torch
    except ImportError:
        return None
    return torch if torch.cuda.is_available() else None


def cupy_with_cuda() -> Any:
    try:
        import cupy
    except ImportError:
        return None
    return cupy if cupy.cuda.is_available() else None


def libraries(rng: np.random.Generator) -> None:
    """forward, eval, backward and a layer on a stream that is not the default one, against the CPU.

    x and dy are written on that stream, behind other work: kernels on another one would read NaN.
    """
    torch, cupy = torch_with_cuda(), cupy_with_cuda()
    if torch is None:
        print("  torch: skipped, it is not there with CUDA")
    else:
        slow = torch.zeros(1 << 26, device="cuda")
        torch.cuda.synchronize()

        def torch_written(to: Any, values: np.ndarray) -> Any:
            source = torch.as_tensor(values).cuda()
            for _ in range(50):
                slow.add_(1)
            return to.copy_(source)

        with torch.cuda.stream(torch.cuda.Stream()):
            on_stream(
                rng, "torch", torch.Tensor, lambda v: torch.as_tensor(v).cuda(), torch_written, torch.movedim,
                lambda a: a.cpu().numpy(),
            )  # fmt: skip
    if cupy is None:
        print("  CuPy: skipped, it is not there with CUDA")
    else:
        load = cupy.zeros(1 << 20 if SIMULATED else 1 << 26, np.float32)
        cupy.cuda.Stream.null.synchronize()

        def cupy_written(to: Any, values: np.ndarray) -> Any:
            source = cupy.asarray(values)
            for _ in range(50):
                cupy.add(load, 1, out=load)
            to[...] = source
            return to

        with cupy.cuda.Stream(non_blocking=True):
            on_stream(rng, "CuPy", cupy.ndarray, cupy.asarray, cupy_written, cupy.moveaxis, cupy.asnumpy)
    if not SIMULATED:
        numba_on_stream(rng)


def on_stream(
    rng: np.random.Generator, name: str, kind: type, to_device: Callable[..., Any], written: Callable[..., Any],
    moveaxis: Callable[..., Any], back: Callable[..., Any],
) -> None:  # fmt: skip
    """One library, whose stream is set: compact, channels-last and sliced arrays."""

    def close(got: Any, want: np.ndarray) -> None:
        assert isinstance(got, kind), f"{name}: the result is a {type(got)}"
        np.testing.assert_allclose(back(got), want, rtol=1e-4, atol=1e-5)

    shape = (4, 6, 5, 3) if SIMULATED else (32, 48, 28, 28)
    channels = shape[1]
    for memory in ("compact", "channels last", "slice"):

        def new(values: np.ndarray, memory: str = memory) -> Any:
            if memory == "channels last":
                nothing = np.full((*shape[:1], *shape[2:], channels), np.nan, values.dtype)
                return written(moveaxis(to_device(nothing), -1, 1), values)
            nothing = np.full((shape[0], channels * (2 if memory == "slice" else 1), *shape[2:]), np.nan, values.dtype)
            array = to_device(nothing)
            return written(array[:, ::2] if memory == "slice" else array, values)

        x, dy, residual = (rng.standard_normal(shape).astype(np.float32) for _ in range(3))
        weight, bias, mean, var = (rng.uniform(0.5, 2, channels).astype(np.float32) for _ in range(4))
        here = [to_device(p) for p in (weight, bias)]
        options = {"activation": "relu"}
        y, saved = fastbn.batch_norm_forward(new(x), *here, residual=new(residual), **options)
        want, kept = fastbn.batch_norm_forward(x, weight, bias, residual=residual, **options)
        close(y, want)
        close(saved.mean, kept.mean)
        close(saved.var, kept.var)
        close(
            fastbn.batch_norm(new(x), *map(to_device, (mean, var)), *here),
            fastbn.batch_norm(x, mean, var, weight, bias),
        )
        _, saved = fastbn.batch_norm_forward(new(x), *here)  # without a kink, whose sides rounding decides
        _, kept = fastbn.batch_norm_forward(x, weight, bias)
        for got, gradient in zip(
            fastbn.batch_norm_backward(new(dy), saved), fastbn.batch_norm_backward(dy, kept), strict=True
        ):
            assert isinstance(got, kind)
            np.testing.assert_allclose(back(got), gradient, rtol=1e-4, atol=1e-6 * float(np.abs(dy).sum()))
        given = new(x)
        mine, theirs = fastbn.BatchNorm(channels), fastbn.BatchNorm(channels).cuda(like=given)
        close(theirs(given), mine(x))
        close(theirs.backward(new(dy)), mine.backward(dy))
        close(theirs.running_mean, mine.running_mean)
        close(theirs.running_var, mine.running_var)
        close(theirs.eval()(given), mine.eval()(x))
    print(f"  {name}, on a stream of its own: right", flush=True)


def numba_on_stream(rng: np.random.Generator) -> None:
    """Numba's arrays carry their stream. It and the default one wait for each other: a mix of these would pass."""
    from numba import cuda

    stream = cuda.stream()
    load, other = (cuda.device_array(1 << 26, np.float32) for _ in range(2))
    values, dy = (rng.standard_normal((32, 48, 28, 28)).astype(np.float32) for _ in range(2))
    sources = [cuda.to_device(v) for v in (values, dy)]
    x, gradient = (cuda.to_device(np.full_like(values, np.nan), stream=stream) for _ in range(2))
    cuda.synchronize()
    for _ in range(50):
        load.copy_to_device(other, stream=stream)
    for to, source in zip((x, gradient), sources, strict=True):
        to.copy_to_device(source, stream=stream)
    y, saved = fastbn.batch_norm_forward(x)
    dx = fastbn.batch_norm_backward(gradient, saved)[0]
    want, kept = fastbn.batch_norm_forward(values)
    np.testing.assert_allclose(gpu.to_host(y), want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(gpu.to_host(dx), fastbn.batch_norm_backward(dy, kept)[0], rtol=1e-4, atol=1e-5)
    print("  Numba, on a stream of its own: right", flush=True)


# ---- speed ----


class Timed:
    """One shape, layout and type: the calls that take turns."""

    def __init__(self, shape: tuple[int, ...], layout: str, dtype: Any, torch: Any) -> None:
        rng = np.random.default_rng(0)
        channels = shape[1]
        memory = (shape[0], *shape[2:], channels) if layout == "NHWC" else shape
        axis = -1 if layout == "NHWC" else 1
        values = [rng.standard_normal(memory, np.float32).astype(dtype) for _ in range(2)]
        self.bytes = values[0].nbytes
        x, dy, y, dx = (gpu.moved(v) for v in (*values, *values))
        weight, bias, mean, var = (gpu.moved(rng.random(channels, np.float32) + 0.5) for _ in range(4))
        _, saved = fastbn.batch_norm_forward(x, weight, bias, eps=EPS, axis=axis)
        self.calls: dict[str, dict[str, Callable[[], Any]]] = {
            "forward": {"fastbn": lambda: fastbn.batch_norm_forward(x, weight, bias, eps=EPS, axis=axis, out=y)},
            "eval": {"fastbn": lambda: fastbn.batch_norm(x, mean, var, weight, bias, eps=EPS, axis=axis, out=y)},
            "backward": {"fastbn": lambda: fastbn.batch_norm_backward(dy, saved, out=dx)},
        }
        self.copy = lambda: y.copy_to_device(x)
        for calls in self.calls.values():
            calls["copy"] = self.copy
        if torch is not None:
            self._torch(torch, x, dy, weight, bias, mean, var, layout)

    def _torch(self, torch: Any, x: Any, dy: Any, weight: Any, bias: Any, mean: Any, var: Any, layout: str) -> None:
        def labelled(array: Any) -> Any:  # (N, C, …), in the same memory
            tensor = torch.as_tensor(array, device="cuda")
            return tensor.movedim(-1, 1) if layout == "NHWC" else tensor

        batch_norm = torch.nn.functional.batch_norm
        tx, tdy = labelled(x), labelled(dy)
        w, b, m, v = (torch.as_tensor(p, device="cuda") for p in (weight, bias, mean, var))

        def forward(training: bool) -> Callable[[], Any]:
            def call() -> Any:
                with torch.no_grad():
                    return batch_norm(tx, None if training else m, None if training else v, w, b, training, 0.1, EPS)

            return call

        leaves = [t.detach().requires_grad_() for t in (tx, w, b)]
        y = batch_norm(leaves[0], None, None, leaves[1], leaves[2], True, 0.1, EPS)
        self.calls["forward"]["torch"], self.calls["eval"]["torch"] = forward(True), forward(False)
        self.calls["backward"]["torch"] = lambda: torch.autograd.grad(y, leaves, tdy, retain_graph=True)


def free() -> None:
    """What was freed and not yet given back: now, and not in the midst of what is timed."""
    from numba import cuda

    pending = getattr(cuda.current_context().memory_manager, "deallocations", None)  # Numba's own manager has it
    if pending is not None:
        pending.clear()


def measure(case: Timed, operation: str, ahead: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds of each, the least of all turns."""
    from numba import cuda

    calls = case.calls[operation]
    best = dict.fromkeys(calls, float("inf"))
    for call in calls.values():
        for _ in range(3):
            call()
    cuda.synchronize()
    names, copies = list(calls), AHEAD
    for turn in range(REPEATS):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            while True:
                start, end = cuda.event(), cuda.event()
                with cuda.defer_cleanup():  # to free memory is to wait for the device
                    for _ in range(copies):
                        ahead()
                    start.record()
                    for _ in range(CALLS):
                        calls[name]()
                    late = start.query()  # the device was done with the copies, and may have waited for the host
                    end.record()
                    end.synchronize()
                free()
                if not late:
                    best[name] = min(best[name], start.elapsed_time(end) / CALLS)
                if not late or copies >= MOST_AHEAD:
                    break
                copies *= 2
    best = {name: ms if np.isfinite(ms) else float("nan") for name, ms in best.items()}
    best["called"] = float("inf")
    for _ in range(REPEATS):
        started = time.perf_counter()
        calls["fastbn"]()
        cuda.synchronize()
        best["called"] = min(best["called"], (time.perf_counter() - started) * 1e3)
    return best


def speed() -> Iterator[str]:
    """The lines of a Markdown table."""
    torch = torch_with_cuda()
    large = gpu.moved(np.zeros(1 << 28, np.uint8).view(np.float32))
    other = gpu.moved(np.zeros(1 << 28, np.uint8).view(np.float32))
    peer = (
        "torch is not there" if torch is None else f"torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}"
    )
    yield f"{backends.config()['gpu']}. {peer}. Milliseconds, by events; bandwidth as a share of the copy's."
    yield ""
    heads = "operation, shape, layout, dtype, MB, copy, fastbn, of the copy's bandwidth, torch, torch / fastbn, called"
    yield f"| {' | '.join(heads.split(', '))} |"
    yield "| --- " * 11 + "|"
    for (shape, layout), dtype in product(TIMED, (np.float32, np.float16)):
        case = Timed(shape, layout, dtype, torch)
        for operation, tensors in TENSORS.items():
            ms = measure(case, operation, lambda: other.copy_to_device(large))
            share = ms["copy"] * tensors / 2 / ms["fastbn"]
            theirs = f"{ms['torch']:.4f} | {ms['torch'] / ms['fastbn']:.2f}" if "torch" in ms else "– | –"
            what = f"{operation} | {'×'.join(map(str, shape))} | {layout} | {np.dtype(dtype)}"
            figures = f"{case.bytes / 1e6:.0f} | {ms['copy']:.4f} | {ms['fastbn']:.4f} | {share:.0%}"
            yield f"| {what} | {figures} | {theirs} | {ms['called']:.3f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only check that results are right")
    parser.add_argument("--seed", type=int, default=None, help="of the inputs that are checked (default: a new one)")
    options = parser.parse_args()
    where = backends.config()["gpu"]
    if where.startswith("none"):
        raise SystemExit(f"no GPU, {where}; NUMBA_ENABLE_CUDASIM=1 checks in the simulator")
    print(where)
    check(int.from_bytes(os.urandom(4), "little") if options.seed is None else options.seed)
    if not options.check:
        if SIMULATED:
            raise SystemExit("a simulated GPU has no speed: --check is all there is")
        for line in speed():
            print(line, flush=True)


if __name__ == "__main__":
    main()
