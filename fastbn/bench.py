"""python -m fastbn bench: the speed of the kernels on this machine, beside a plain copy and plain NumPy."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from random import Random
from time import perf_counter, sleep
from typing import Any

import numpy as np

from .functional import batch_norm, batch_norm_backward, batch_norm_forward

Array = np.ndarray[Any, np.dtype[Any]]

# (N, C, H, W) of layers of ResNet-50, from large planes to small ones.
SHAPES = ((32, 64, 112, 112), (32, 64, 56, 56), (32, 128, 28, 28), (32, 1024, 14, 14), (32, 512, 7, 7))
EPS = 1e-5
SECONDS = 1.0  # for a row
CALLS_A_TURN = 5


def interleaved(
    functions: Sequence[Callable[[], Any]], *, seconds: float, least: int = 3, settle: float = 0.0
) -> list[float]:
    """The least time of each function in seconds, called in turn: what else the machine does falls on all alike.

    Parameters
    ----------
    functions : sequence of callable
    seconds : float
        For how long to go on, all together, after a first round that is not counted.
    least : int
        Rounds to take in any case.
    settle : float
        Seconds to wait before each function's turn, which then begins with a call that is not counted and goes on with
        some that are: for functions of several libraries, whose threads spin for a while after a call and get in the
        next one's way. (A processor that has slept needs a call or two to be fast again.)
    """
    for function in functions:
        function()
    best = [float("inf")] * len(functions)
    order, shuffled = list(range(len(functions))), Random(0)  # what the one before left in cache must not favour one
    end = perf_counter() + seconds
    rounds = 0
    collecting = gc.isenabled()
    gc.disable()
    try:
        while rounds < least or perf_counter() < end:
            shuffled.shuffle(order)
            for i in order:
                function = functions[i]
                if settle:
                    sleep(settle)
                    function()
                for _ in range(CALLS_A_TURN if settle else 1):
                    start = perf_counter()
                    function()
                    best[i] = min(best[i], perf_counter() - start)
            rounds += 1
    finally:
        if collecting:
            gc.enable()
    return best


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


# ---- the table ----


def measure(shape: tuple[int, ...], axis: int, *, seconds: float) -> dict[str, tuple[float, float, float]]:
    """Times in seconds of fastbn, of a copy of x and of plain NumPy, an operation: forward, eval, backward.

    Parameters
    ----------
    shape : tuple of int
    axis : int
        The channel axis.
    seconds : float
        For each operation.
    """
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal(shape, np.float32), rng.standard_normal(shape, np.float32)
    y, dx = np.empty_like(x), np.empty_like(x)
    channels = shape[axis]
    weight, bias = rng.random(channels, np.float32), rng.random(channels, np.float32)
    _, saved = batch_norm_forward(x, weight, bias, axis=axis, out=y)
    mean, var = saved.mean.astype(np.float32), saved.var.astype(np.float32)

    axes = tuple(d for d in range(x.ndim) if d != axis % x.ndim)
    mean_, var_, weight_, bias_ = (np.expand_dims(p, axes) for p in (mean, var, weight, bias))
    operations: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "forward": (
            lambda: batch_norm_forward(x, weight, bias, eps=EPS, axis=axis, out=y),
            lambda: numpy_forward(x, weight_, bias_, axes),
        ),
        "eval": (
            lambda: batch_norm(x, mean, var, weight, bias, eps=EPS, axis=axis, out=y),
            lambda: numpy_eval(x, mean_, var_, weight_, bias_),
        ),
        "backward": (
            lambda: batch_norm_backward(dy, saved, out=dx),
            lambda: numpy_backward(dy, x, mean_, var_, weight_, axes),
        ),
    }
    times = {}
    for name, (ours, plain) in operations.items():
        own, copy, numpy = interleaved((ours, lambda: np.copyto(y, x), plain), seconds=seconds)
        times[name] = own, copy, numpy
    return times


def main() -> None:
    """Print the table."""
    print("float32, least of several. copy: np.copyto of x. NumPy: plain NumPy, as one writes it without a library.")
    print(f"{'':>18}  {'':6} {'':8} {'ms':>8} {'÷ copy':>10} {'NumPy ÷ it':>11}")
    for n, c, h, w in SHAPES:
        for layout, shape, axis in (("NCHW", (n, c, h, w), 1), ("NHWC", (n, h, w, c), -1)):
            for name, (own, copy, numpy) in measure(shape, axis, seconds=SECONDS).items():
                print(
                    f"{f'{n}×{c}×{h}×{w}':>18}  {layout:6} {name:8} {own * 1e3:8.2f} "
                    f"{own / copy:9.2f}x {numpy / own:10.1f}x",
                    flush=True,
                )
