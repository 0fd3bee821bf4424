"""What is measured: the arrays of a case, fastbn's calls on them, and the floor that they are held against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import fastbn
from fastbn import backends
from fastbn import bench as user_bench

EPS = user_bench.EPS
Call = Callable[[], Any]

# Tensors that each operation must read or write: what the floor moves.
TENSORS = {"forward": 2, "normalize": 2, "backward": 3}


@dataclass
class Case:
    """The arrays of one shape and layout: x, dy and the outputs; parameters and statistics a channel, float32.

    The channel axis is 1; channels-last arrays are the transposed view of their memory.
    """

    shape: tuple[int, ...]
    layout: str
    x: np.ndarray
    dy: np.ndarray
    y: np.ndarray
    dx: np.ndarray
    weight: np.ndarray
    bias: np.ndarray
    mean: np.ndarray
    var: np.ndarray
    threads: int

    def out(self, operation: str) -> np.ndarray:
        return self.dx if operation == "backward" else self.y

    @property
    def reduced(self) -> tuple[int, ...]:
        """All axes but the channels'."""
        return tuple(d for d in range(self.x.ndim) if d != 1)


def make_case(shape: tuple[int, ...], layout: str, dtype: Any = np.float32) -> Case:
    rng = np.random.default_rng(0)
    channels = shape[1]
    x, dy = tensor(rng, shape, layout, dtype), tensor(rng, shape, layout, dtype)
    moments = fastbn.moments(x)
    return Case(
        shape, layout, x, dy, np.empty_like(x), np.empty_like(x),
        rng.random(channels, np.float32) + 0.5, rng.random(channels, np.float32),
        moments.mean.astype(np.float32), moments.var().astype(np.float32), backends.num_threads(),
    )  # fmt: skip


def tensor(rng: np.random.Generator, shape: tuple[int, ...], layout: str, dtype: Any = np.float32) -> np.ndarray:
    """Normal numbers, labelled (N, C, …), in memory as `layout` says."""
    if layout == "NHWC":
        values = rng.standard_normal((shape[0], *shape[2:], shape[1]), np.float32).transpose(0, 3, 1, 2)
    else:
        values = rng.standard_normal(shape, np.float32)
    return values.astype(dtype, order="K", copy=False)


# ---- fastbn's calls: `options` are the function's own ----


def forward(case: Case, out: np.ndarray | None, **options: Any) -> Call:
    return lambda: fastbn.batch_norm_forward(case.x, case.weight, case.bias, eps=EPS, out=out, **options)


def normalize(case: Case, out: np.ndarray | None, **options: Any) -> Call:
    c = case
    return lambda: fastbn.batch_norm(c.x, c.mean, c.var, c.weight, c.bias, eps=EPS, out=out, **options)


def backward(case: Case, out: np.ndarray | None, *, num_threads: int | None = None, **options: Any) -> Call:
    """`options`: of the forward pass."""
    _, saved = fastbn.batch_norm_forward(case.x, case.weight, case.bias, eps=EPS, **options)
    where = {"out": out, "num_threads": num_threads}
    if saved.residual:
        where["out_residual"] = np.empty_like(case.x)
    return lambda: fastbn.batch_norm_backward(case.dy, saved, **where)


CALLS = {"forward": forward, "normalize": normalize, "backward": backward}


def kernel_call(kernels: Any, operation: str, case: Case) -> Call:
    """The kernel of a backend, called with what the function above calls it with, and nothing around it."""
    c = case
    x, dy, y, dx = (np.ravel(a, order="K") for a in (c.x, c.dy, c.y, c.dx))
    inner = 1 if c.layout in ("NHWC", "NC") else c.x[0, 0].size
    shape = (x.size // (c.shape[1] * inner), c.shape[1], inner)
    mean, var = c.mean.astype(np.float64), c.var.astype(np.float64)
    no_activation = 1.0
    if operation == "forward":
        args = (x, y, *shape, c.weight, c.bias, EPS, mean, var, None, no_activation, c.threads)
    elif operation == "normalize":
        args = (x, y, *shape, c.mean, c.var, c.weight, c.bias, EPS, None, no_activation, c.threads)
    else:
        grads = np.empty_like(c.weight), np.empty_like(c.bias)
        args = (dy, x, dx, *shape, mean, var, c.weight, c.bias, EPS, *grads, True, None, None, no_activation, c.threads)
    kernel = getattr(kernels, operation)
    return lambda: kernel(*args)


# ---- the floor ----


@dataclass
class Floor:
    """What memory allows: the ways to move these bytes, of which the best counts."""

    calls: list[Call]
    bytes: int


def reads(case: Case, tensors: int) -> Floor:
    """To read x, or dy and x, and do nothing with them: what a first pass over memory must take."""
    limit = backends.load("cython").limit
    x, dy = (np.ravel(a, order="K") for a in (case.x, case.dy))
    other = None if tensors == 2 else dy
    return Floor([lambda: limit(x, other, None, False, case.threads)], (tensors - 1) * case.x.nbytes)


def in_turn(case: Case, operation: str, plain: Call, residual: np.ndarray) -> dict[str, Floor]:
    """The plain operation, and after it the residual's own tensors moved: what fusing them is held against.

    Forward reads the residual. Backward writes the residual's gradient; where an activation cut it, it reads y too.
    """
    limit = backends.load("cython").limit
    added, dy = (np.ravel(a, order="K") for a in (residual, case.dy))
    if operation != "backward":
        calls = [lambda: (plain(), limit(added, None, None, False, case.threads))]
        return {"residual in turn": Floor(calls, (TENSORS[operation] + 1) * residual.nbytes)}
    gradient = np.empty_like(added)

    def copies(*ways: tuple[np.ndarray, bool]) -> list[Call]:
        return [lambda x=x, past=past: (plain(), limit(x, None, gradient, past, case.threads)) for x, past in ways]

    return {  # nothing here only writes: it writes what is there again, or past the cache what plain has just read
        "residual in turn": Floor(copies((gradient, False), (dy, True)), 4 * residual.nbytes),
        "cut residual in turn": Floor(copies((added, False), (added, True)), 5 * residual.nbytes),
    }


def floor(case: Case, tensors: int, threads: int | None = None) -> Floor:
    """To copy x (2 tensors), or to add dy and x into a third (3). Skips without the compiled kernels that do it."""
    try:
        backends.load("cython")
    except ImportError as error:
        pytest.skip(f"the floor is compiled code: {error}")
    # Half types are moved two at a time: the floor is about bytes, and their sums would cost conversions.
    pair = np.float32 if case.x.itemsize == 2 else case.x.dtype
    where = case.y if tensors == 2 else case.dx
    x, dy, out = (np.ravel(a, order="K").view(pair) for a in (case.x, case.dy, where))
    calls = user_bench.floor(x, None if tensors == 2 else dy, out, threads or case.threads)
    return Floor(calls, tensors * case.x.nbytes)
