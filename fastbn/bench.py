"""python -m fastbn bench: the speed of the kernels on this machine, beside what memory allows and what others take."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from random import Random
from time import perf_counter, process_time, sleep
from typing import Any

import numpy as np

from . import backends
from .functional import batch_norm, batch_norm_backward, batch_norm_forward

Array = np.ndarray[Any, np.dtype[Any]]
Call = Callable[[], Any]

# (N, C, H, W) of layers of ResNet-50, from large planes to small ones.
SHAPES = ((32, 64, 112, 112), (32, 128, 28, 28), (32, 1024, 14, 14), (32, 512, 7, 7))
THREADS_SHAPE = (32, 128, 28, 28)  # for the table by threads: about the size of a cache
EPS = 1e-5
SECONDS = 0.6  # for a row
CALLS_A_TURN = 5
WARM_UP = 0.003  # seconds of calls that are not counted, a turn
WARM_UP_CALLS, WARM_UP_MOST = 8, 0.012  # and so many of them, if that takes no more seconds


# ---- taking times ----


def wait_until_quiet() -> None:
    """Sleep until no thread of this process runs: at most 50 ms."""
    for _ in range(50):
        before = process_time()
        sleep(0.001)
        if process_time() - before < 0.0003:
            return


def interleaved(functions: Sequence[Call], *, seconds: float, at_most: float = 0.0, least: int = 15) -> list[float]:
    """The least time of each function in seconds, called in turns: what else the machine does falls on all alike.

    The order of the turns changes from round to round. Before a turn all threads come to rest: a library's workers
    spin for milliseconds after a call, on the processor that the next one's workers want. Its first calls then wake
    its own workers and bring its arrays into cache (for arrays of about the cache's size, one call does not), and are
    not counted.

    Parameters
    ----------
    functions : sequence of callable
    seconds : float
        For how long to go on, all together, after one call of each.
    at_most : float
        For how long to go on while some function's least time stands alone, with no other turn's least within a tenth
        of it: a shared machine's memory may be twice as fast for the moment of one turn. It is looked for again, which
        gives the other functions more turns, but does not make sure that they meet such a moment.
    least : int
        Calls of each to count in any case.
    """
    for function in functions:
        function()
    turns: list[list[float]] = [[] for _ in functions]
    order, shuffled = list(range(len(functions))), Random(0)
    counted = 0
    start = perf_counter()
    collecting = gc.isenabled()
    gc.disable()
    try:
        while (
            counted < least
            or perf_counter() < start + seconds
            or (perf_counter() < start + at_most and not all(map(_seen_twice, turns)))
        ):
            shuffled.shuffle(order)
            for i in order:
                function = functions[i]
                wait_until_quiet()
                began, calls, spent = perf_counter(), 0, 0.0
                while spent < WARM_UP or (calls < WARM_UP_CALLS and spent < WARM_UP_MOST):
                    function()
                    calls, spent = calls + 1, perf_counter() - began
                turns[i].append(min(_time(function) for _ in range(CALLS_A_TURN)))
            counted += CALLS_A_TURN
    finally:
        if collecting:
            gc.enable()
    return [min(times) for times in turns]


def _time(function: Call) -> float:
    start = perf_counter()
    function()
    return perf_counter() - start


def _seen_twice(times: Sequence[float]) -> bool:
    return len(times) > 1 and sorted(times)[1] <= 1.1 * min(times)


def floor(x: Array, other: Array | None, out: Array, threads: int) -> list[Call]:
    """What memory allows, in the ways to reach it: out = x, or out = x + other. The best of them is the floor.

    By the kernels' own loads and stores, plain and streaming, on as many threads; without compiled kernels by NumPy.

    Parameters
    ----------
    x, other, out : ndarray
        Of one layout, without gaps.
    threads : int
    """
    x, out = np.ravel(x, order="K"), np.ravel(out, order="K")
    other = None if other is None else np.ravel(other, order="K")
    limit = _limit()
    if limit is None:
        return [lambda: np.copyto(out, x) if other is None else np.add(x, other, out=out)]
    return [partial(limit, x, other, out, streaming, threads) for streaming in (False, True)]


def _limit() -> Any:
    """The compiled copy and addition, or None."""
    try:
        return backends.load("cython").limit
    except ImportError:
        return None


# ---- plain NumPy: what one writes without a library ----


def numpy_forward(x: Array, weight: Array, bias: Array, axes: tuple[int, ...]) -> Array:
    """Training mode. weight and bias have x's rank."""
    mean = x.mean(axis=axes, keepdims=True)
    var = x.var(axis=axes, keepdims=True)
    y: Array = (x - mean) / np.sqrt(var + EPS) * weight + bias
    return y


def numpy_eval(x: Array, mean: Array, var: Array, weight: Array, bias: Array) -> Array:
    """Eval mode. All have x's rank."""
    y: Array = (x - mean) / np.sqrt(var + EPS) * weight + bias
    return y


def numpy_backward(dy: Array, x: Array, mean: Array, var: Array, weight: Array, axes: tuple[int, ...]) -> Array:
    """Training mode: dx. mean, var and weight have x's rank."""
    inverse = 1 / np.sqrt(var + EPS)
    xhat = (x - mean) * inverse
    dbias = dy.mean(axis=axes, keepdims=True)
    dweight = (dy * xhat).mean(axis=axes, keepdims=True)
    dx: Array = weight * inverse * (dy - dbias - xhat * dweight)
    return dx


# ---- torch: where it is installed ----


def torch_calls(
    x: Array, dy: Array, weight: Array, bias: Array, mean: Array, var: Array, threads: int,
    out: tuple[Array, Array] | None = None,
) -> dict[str, Call]:  # fmt: skip
    """torch.native_batch_norm: "forward", "eval" and "backward" as called, each call allocating its output.

    The channel axis is 1; a transposed view of channels-last memory is served as that.

    Parameters
    ----------
    x, dy : ndarray of float32, shape (N, C, ...)
    weight, bias, mean, var : ndarray of float32, shape (C,)
    threads : int
    out : (y, dx), optional
        To write into them, by torch's .out variants.

    Raises
    ------
    ImportError
    """
    torch: Any = import_module("torch")
    torch.set_num_threads(threads)
    x_, dy_, weight_, bias_, mean_, var_ = map(torch.from_numpy, (x, dy, weight, bias, mean, var))
    running = torch.zeros_like(mean_), torch.ones_like(var_)
    _, save_mean, save_invstd = torch.native_batch_norm(x_, weight_, bias_, *running, True, 0.1, EPS)
    outputs, grads, gradient = {}, {}, torch.ops.aten.native_batch_norm_backward.default
    if out is not None:
        spare = torch.empty_like(mean_), torch.empty_like(mean_)
        y, dx = map(torch.from_numpy, out)
        outputs, grads = {"out": (y, *spare)}, {"out0": dx, "out1": spare[0], "out2": spare[1]}
        gradient = torch.ops.aten.native_batch_norm_backward.out
    rest = (weight_, *running, save_mean, save_invstd, True, EPS, [True, True, True])
    return {
        "forward": lambda: torch.native_batch_norm(x_, weight_, bias_, *running, True, 0.1, EPS, **outputs),
        "eval": lambda: torch.native_batch_norm(x_, weight_, bias_, mean_, var_, False, 0.1, EPS, **outputs),
        "backward": lambda: gradient(dy_, x_, *rest, **grads),
    }


# ---- the tables ----


def measure(shape: tuple[int, ...], layout: str, *, seconds: float, torch: bool = False) -> dict[str, dict[str, float]]:
    """Times in seconds, by operation ("forward", "eval", "backward") and by who took them.

    "floor", "fastbn" (with out=), "fastbn called" (which allocates its output, as the next ones do), "NumPy" and, where
    it is asked for and installed, "torch".

    Parameters
    ----------
    shape : (N, C, H, W)
    layout : {"NCHW", "NHWC"}
        Of the memory.
    seconds : float
        For each operation.
    torch : bool
    """
    rng = np.random.default_rng(0)
    x, dy = _tensor(rng, shape, layout), _tensor(rng, shape, layout)
    y, dx = np.empty_like(x), np.empty_like(x)
    channels = shape[1]
    weight, bias = rng.random(channels, np.float32), rng.random(channels, np.float32)
    _, saved = batch_norm_forward(x, weight, bias, eps=EPS, out=y)
    mean, var = saved.mean.astype(np.float32), saved.var.astype(np.float32)
    threads = backends.num_threads()

    axes = tuple(d for d in range(x.ndim) if d != 1)
    mean_, var_, weight_, bias_ = (np.expand_dims(p, axes) for p in (mean, var, weight, bias))
    try:
        theirs = torch_calls(x, dy, weight, bias, mean, var, threads) if torch else {}
    except ImportError:
        theirs = {}

    def eval_into(out: Array | None) -> Array:
        return batch_norm(x, mean, var, weight, bias, eps=EPS, out=out)

    operations: dict[str, tuple[list[Call], Call, Call, Call]] = {
        "forward": (
            floor(x, None, y, threads),
            lambda: batch_norm_forward(x, weight, bias, eps=EPS, out=y),
            lambda: batch_norm_forward(x, weight, bias, eps=EPS),
            lambda: numpy_forward(x, weight_, bias_, axes),
        ),
        "eval": (
            floor(x, None, y, threads),
            lambda: eval_into(y),
            lambda: eval_into(None),
            lambda: numpy_eval(x, mean_, var_, weight_, bias_),
        ),
        "backward": (
            floor(dy, x, dx, threads),
            lambda: batch_norm_backward(dy, saved, out=dx),
            lambda: batch_norm_backward(dy, saved),
            lambda: numpy_backward(dy, x, mean_, var_, weight_, axes),
        ),
    }
    times = {}
    for operation, (floors, own, called, numpy) in operations.items():
        calls = [("floor", f) for f in floors] + [("fastbn", own), ("fastbn called", called), ("NumPy", numpy)]
        if operation in theirs:
            calls.append(("torch", theirs[operation]))
        times[operation] = least_of(calls, seconds=seconds, least=CALLS_A_TURN)
    return times


def least_of(
    calls: Sequence[tuple[str, Call]], *, seconds: float, at_most: float = 0.0, least: int = 15
) -> dict[str, float]:
    """`interleaved` by name: where several have one name, the best of them."""
    times: dict[str, float] = {}
    least_times = interleaved([call for _, call in calls], seconds=seconds, at_most=at_most, least=least)
    for (name, _), t in zip(calls, least_times, strict=True):
        times[name] = min(t, times.get(name, t))
    return times


def _tensor(rng: np.random.Generator, shape: tuple[int, ...], layout: str) -> Array:
    """Normal numbers, labelled (N, C, H, W), in memory as `layout` says."""
    n, c, h, w = shape
    if layout == "NHWC":
        return rng.standard_normal((n, h, w, c), np.float32).transpose(0, 3, 1, 2)
    return rng.standard_normal(shape, np.float32)


def by_threads(shape: tuple[int, ...], *, seconds: float) -> dict[str, dict[int, tuple[float, float]]]:
    """Times in seconds, by operation and number of threads: (floor, fastbn), both on as many threads. NCHW."""
    rng = np.random.default_rng(0)
    x, dy = _tensor(rng, shape, "NCHW"), _tensor(rng, shape, "NCHW")
    y, dx = np.empty_like(x), np.empty_like(x)
    _, saved = batch_norm_forward(x, eps=EPS, out=y)
    mean, var = saved.mean, saved.var
    operations: dict[str, tuple[Callable[[int], list[Call]], Callable[[int], Any]]] = {
        "forward": (
            lambda n: floor(x, None, y, n),
            lambda n: batch_norm_forward(x, eps=EPS, out=y, num_threads=n),
        ),
        "eval": (
            lambda n: floor(x, None, y, n),
            lambda n: batch_norm(x, mean, var, eps=EPS, out=y, num_threads=n),
        ),
        "backward": (
            lambda n: floor(dy, x, dx, n),
            lambda n: batch_norm_backward(dy, saved, out=dx, num_threads=n),
        ),
    }
    times: dict[str, dict[int, tuple[float, float]]] = {}
    for operation, (floors, own) in operations.items():
        calls = []
        for n in _thread_counts():
            calls += [(f"floor {n}", f) for f in floors(n)] + [(f"fastbn {n}", partial(own, n))]
        taken = least_of(calls, seconds=seconds, least=CALLS_A_TURN)
        times[operation] = {n: (taken[f"floor {n}"], taken[f"fastbn {n}"]) for n in _thread_counts()}
    return times


def _thread_counts() -> list[int]:
    """1, 2, 4 … up to all."""
    most: int = backends.config()["threads"]
    return sorted({2**i for i in range(most.bit_length()) if 2**i < most} | {most})


def lines() -> Iterator[str]:
    """The tables, line by line as they are measured."""
    config = backends.config()
    yield (
        f"fastbn {config['fastbn']}, backend {config['backend']}, {config['instruction set']}, "
        f"{config['threads']} threads. float32, milliseconds, the least of several."
    )
    how = "the better of plain and streaming stores, all threads"
    if _limit() is None:
        how = "NumPy on one thread (there are no compiled kernels here)"
    yield f"floor: a copy of x (forward, eval) or dy + x into dx (backward), by {how}."
    yield "GB/s: of the bytes that the floor moves. called: without out=, so that it allocates, as torch and NumPy do."
    yield ""
    yield (
        f"{'N×C×H×W':>13} {'layout':6} {'':8} {'floor':>7} {'fastbn':>7} {'÷ floor':>7} {'GB/s':>5} "
        f"{'called':>7} {'torch':>7} {'÷ called':>8} {'NumPy':>7} {'÷ called':>8}"
    )
    for shape in SHAPES:
        for layout in ("NCHW", "NHWC"):
            for operation, t in measure(shape, layout, seconds=SECONDS, torch=True).items():
                moved = (3 if operation == "backward" else 2) * 4 * np.prod(shape)
                called = t["fastbn called"]
                torch = f"{t['torch'] * 1e3:7.3g} {t['torch'] / called:8.1f}" if "torch" in t else f"{'–':>7} {'–':>8}"
                yield (
                    f"{'×'.join(map(str, shape)):>13} {layout:6} {operation:8} "
                    f"{t['floor'] * 1e3:7.3g} {t['fastbn'] * 1e3:7.3g} {t['fastbn'] / t['floor']:7.2f} "
                    f"{moved / t['fastbn'] / 1e9:5.0f} {called * 1e3:7.3g} {torch} "
                    f"{t['NumPy'] * 1e3:7.3g} {t['NumPy'] / called:8.1f}"
                )
    if len(_thread_counts()) == 1:
        return
    yield ""
    yield f"{'×'.join(map(str, THREADS_SHAPE))} NCHW by threads: fastbn and the floor on as many."
    yield ""
    yield f"{'':8} {'threads':>7} {'floor':>7} {'fastbn':>7} {'÷ floor':>7} {'speed-up':>8}"
    for operation, counts in by_threads(THREADS_SHAPE, seconds=SECONDS).items():
        for n, (lowest, own) in counts.items():
            times = f"{lowest * 1e3:7.3g} {own * 1e3:7.3g} {own / lowest:7.2f} {counts[1][1] / own:8.2f}"
            yield f"{operation:8} {n:7d} {times}"


def main() -> None:
    """Print the tables."""
    for line in lines():
        print(line, flush=True)
