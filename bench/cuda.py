"""The GPU path on a GPU: is every result right, and how fast is it? python bench/cuda.py [--check]

    --check     only check
    --seed N    the inputs' seed; without it, a new one, which is printed

Checked: each operation, data type, layout, activation and residual, on new random inputs, with outputs full of NaN
beforehand, against float64 on the host; and that a second call gives the same bits. An error is counted in units in the
last place of the sum of the sizes of what was added up, and must stay under LIMITS. In Numba's simulator
(NUMBA_ENABLE_CUDASIM=1) the same is done on a few tiny arrays, and nothing can be timed.

Timed, with CUDA events, each the least of REPEATS turns: fastbn, a device-to-device copy of x, and torch where it is
installed with CUDA (cuDNN), in turns, on the same memory. Before each turn the device is given copies to do, so that
calls queue up behind them, and what is measured is the device's work and not the host's. "called" is the other thing:
the wall time of one call that is waited for. Prints Markdown with the device's name; docs/performance.md says what is
asked.
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
REPEATS, CALLS, AHEAD = 10, 5, 20


# ---- correctness ----


def unit(dtype: np.dtype) -> float:
    return float(np.finfo(dtype).eps)


class Check:
    """One shape, axis and type: arrays on host and device, and the errors found."""

    def __init__(self, shape: tuple[int, ...], axis: int, dtype: Any, rng: np.random.Generator) -> None:
        self.axis, self.dtype = axis, np.dtype(dtype)
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

    def empty(self) -> Any:
        """An output to be written over."""
        return gpu.moved(np.full(self.x.shape, np.nan, self.dtype))

    def rows(self, array: np.ndarray) -> np.ndarray:
        """(1, channels, values), float64."""
        moved = np.moveaxis(array, self.axis, 0)
        return np.ascontiguousarray(moved, np.float64).reshape(1, len(self.weight), -1)

    def see(self, name: str, got: Any, want: np.ndarray, terms: np.ndarray) -> None:
        got = gpu.to_host(got)
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

    def describe(self) -> str:
        return f"shape {self.x.shape}, axis {self.axis}, {self.dtype}, {getattr(self, 'form', '')}"

    def again(self, first: Any, second: Any) -> None:
        for a, b in zip(first, second, strict=True):
            if a is not None and gpu.to_host(a).tobytes() != gpu.to_host(b).tobytes():
                raise SystemExit(f"two calls, two results: {self.describe()}")

    def run(self, activation: str | None, with_residual: bool, training: bool) -> None:
        self.form = f"{activation}, residual {with_residual}, training {training}"
        slope = {None: 1.0, "relu": 0.0, "leaky_relu": 0.125}[activation]
        x, dy, weight, bias = self.rows(self.x), self.rows(self.dy), *map(np.float64, (self.weight, self.bias))
        outer, channels, inner = x.shape
        added = self.rows(self.residual) if with_residual else None
        here = [gpu.moved(a) for a in (self.x, self.weight, self.bias, self.dy)]
        there = gpu.moved(self.residual) if with_residual else None
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
            self.see("mean", saved.mean, mean, np.sqrt(var))
            self.see("var", saved.var, var, var)
        self.again((y,), (forward()[0],))

        def backward() -> tuple[Any, ...]:
            outputs = {"out": self.empty()} | ({"out_residual": self.empty()} if with_residual else {})
            return fastbn.batch_norm_backward(here[3], saved, **outputs)

        got = backward()
        seen = self.rows(gpu.to_host(y))  # as the forward pass rounded it: z near 0 may have either sign
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
    rng = np.random.default_rng(seed)
    print(f"checking, seed {seed}")
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
        np.testing.assert_allclose(moments.mean, flat.mean((0, 2)), rtol=1e-6, atol=1e-6)
        worst = ", ".join(f"{name} {error:.2g}" for name, error in case.worst.items())
        print(f"  {'×'.join(map(str, shape))} axis {axis} {np.dtype(dtype)}: {worst} units "
              f"({time.perf_counter() - started:.1f} s)", flush=True)  # fmt: skip
    running()
    print("all is right")


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


# ---- speed ----


def torch_with_cuda() -> Any:
    try:
        import torch
    except ImportError:
        return None
    return torch if torch.cuda.is_available() else None


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


def measure(case: Timed, operation: str, ahead: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds of each, the least of all turns."""
    from numba import cuda

    calls = case.calls[operation]
    best = dict.fromkeys(calls, float("inf"))
    for call in calls.values():
        for _ in range(3):
            call()
    cuda.synchronize()
    names = list(calls)
    for turn in range(REPEATS):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start, end = cuda.event(), cuda.event()
            for _ in range(AHEAD):
                ahead()
            start.record()
            for _ in range(CALLS):
                calls[name]()
            end.record()
            end.synchronize()
            best[name] = min(best[name], start.elapsed_time(end) / CALLS)
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
