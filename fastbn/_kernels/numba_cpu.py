"""The kernels for the JIT: what runs where nothing could be compiled ahead of time.

    moments         s = Σ (x - p),  q = Σ (x - p)²;  mean = p + s/n,  m2 = q - s²/n      (p: a pivot near the mean)
    merge           Chan, Golub and LeVeque (1983): two (count, mean, m2) into one, in float64
    normalize       y = (x - hi)·a + b                  a = weight/σ,  hi + lo = mean,  b = bias - lo·a
    gradient sums   Σ dy,  Σ dy·(x - hi)
    input gradient  dx = ((dy - m) - (x - hi)·k)·a + c

`reference.py` says what each function computes and in what arguments; `README.md` derives the formulas. Design:

- *Vectors by name.* Numba has no vector type, so this file makes one: `Vector`, 64 bytes of float32 or float64, with
  + - *, loads and stores, lowered straight to LLVM's vector instructions. Sums then have a fixed number of lanes and a
  fixed order, with neither fast-math nor a loop vectorizer that may choose differently in two drivers: the serial
  and the parallel driver, and any number of threads, give the same bits. y may be x, which a vectorizer's overlap
  checks would slow down, and stores can go past the caches. Kernels see pointers: an array is counted at each call.
- *Sums* are kept in the data's own type about a pivot taken from the block itself, and leave the block as float64. One
  sweep is enough where the pivot was good. A block where it was not (m2 < q/4), or where a square overflowed or
  vanished, is done again in two sweeps of float64. The choice depends on the data alone.
- *mean = hi + lo*: subtracting hi is exact where it matters (x near the mean); lo's share is folded into b.
- *Two shapes of data.* RUNS: a channel's values lie contiguous, `inner` at a time (large planes). COLUMNS: rows of
  channels·inner values, a group of channels side by side (rows, where inner is 1, and small planes, a column a pixel,
  so that no plane pays for a horizontal sum).
- *A task* is a group of channels and a chunk of their values; the grid of tasks follows from the shape alone. Where one
  chunk holds all of a channel, both steps (sums, then apply, walking backwards) run in one task while the data
  is in cache; otherwise the chunks' sums are merged in the grid's order between two passes. Where only the second
  step is left to do (eval), tasks are stretches of memory in order.
- *Compile time* counts: a function is compiled at its first call for each data type. So there are few task functions,
  a serial and a parallel driver of one line for each, and one signature: parameters and statistics come as
  float64, and all inputs as read-only arrays. FASTBN_NUMBA_CACHE=1 keeps the machine code on disk; it is not the
  default because Numba's cache does not see edits in the functions that a cached one calls.
- *Threads.* A forked child must not enter a threading layer that its parent has used, and the workqueue layer aborts
  when two threads enter it at once: see `_run`.
"""

from __future__ import annotations

import operator
import os
import threading
from collections.abc import Callable
from contextlib import nullcontext
from functools import lru_cache
from glob import glob
from importlib import import_module
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np

from .reference import update_running_stats  # noqa: F401  (of channels, not of elements: NumPy serves)

# Imported by name so that they are Any to the type checker, whether or not they are installed.
numba: Any = import_module("numba")
extending: Any = import_module("numba.extending")
cgutils: Any = import_module("numba.core.cgutils")
ir: Any = import_module("llvmlite.ir")
binding: Any = import_module("llvmlite.binding")
types = numba.types

Array = np.ndarray[Any, np.dtype[Any]]
Pointer = Any  # to elements of float32 or float64; unlike an array it is not counted, and an index cannot be negative
Function = TypeVar("Function", bound=Callable[..., Any])

NAME = "numba"
INSTRUCTION_SET = f"the host's ({numba.config.CPU_NAME or binding.get_host_cpu_name()})"

SUM, APPLY = 1, 2  # steps
VECTOR_BYTES = 64
# What is streamed starts at a cache line, lest a line be written half past the caches and half through them. Rows
# without a gap between them need only be aligned to the least vector that can be streamed, as NumPy's arrays are.
LINE_ALIGNMENT, ROW_ALIGNMENT = 64, 16
BLOCK = 8192  # values a block of runs sums before it merges
BLOCK_ROWS = 256  # rows a block of columns sums before it merges
STRETCH = 1 << 16  # values of a task that goes over the memory once, in order
AHEAD = 8192  # bytes: how far before their use columns are asked for
LARGEST = (float(np.finfo(np.float64).max), float(np.finfo(np.float32).max))
TINY = (1e-290, 1e-30)  # mean squares under this have lost digits: in float64, in float32
MAX_COLUMNS = 1024  # columns of a task: their sums stay in L1
APART = 13  # vectors between two scratch arrays: at 4 KiB from each other, a store to one would seem to hit the other
SMALL_PLANE = 512  # planes under this many values are taken as columns, if there are SMALL_PLANE_ROWS of them
SMALL_PLANE_ROWS = 8
CHUNKED_CHANNELS = 16  # runs of fewer channels than this are cut into chunks,
CHUNKED_FROM = 1 << 18  # of so many values or more
CHUNKS = 64  # about as many tasks as a grid of chunks has
FUSED_BYTES = 1 << 19  # a task of columns up to this size runs both steps,
FEWEST_COLUMNS = 64  # unless it would be narrower than this
PARALLEL_FROM = 1 << 15  # fewer values run on the caller's thread


def _jit(function: Function) -> Function:
    cache = os.environ.get("FASTBN_NUMBA_CACHE") == "1"
    return cast(Function, numba.njit(nogil=True, error_model="numpy", cache=cache)(function))


def _parallel(function: Function) -> Function:
    cache = os.environ.get("FASTBN_NUMBA_CACHE") == "1"
    return cast(Function, numba.njit(nogil=True, error_model="numpy", parallel=True, cache=cache)(function))


# ---- vectors ----


class Vector(types.Type):  # type: ignore[misc, name-defined]
    """VECTOR_BYTES of float32 or float64."""

    def __init__(self, element: Any) -> None:
        self.element = element
        self.lanes = VECTOR_BYTES * 8 // element.bitwidth
        self.llvm = ir.VectorType(ir.FloatType() if element == types.float32 else ir.DoubleType(), self.lanes)
        super().__init__(name=f"Vector({element})")


def _model(manager: Any, vector: Any) -> Any:
    return extending.models.PrimitiveModel(manager, vector, vector.llvm)


extending.register_model(Vector)(_model)


def _operator(function: Any, instruction: str) -> None:
    def typed(context: Any) -> Any:
        return lambda a, b: a if isinstance(a, Vector) and a == b else None

    def lowered(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return getattr(builder, instruction)(*args)

    extending.type_callable(function)(typed)
    extending.lower_builtin(function, Vector, Vector)(lowered)


_operator(operator.add, "fadd")
_operator(operator.sub, "fsub")
_operator(operator.mul, "fmul")


def _intrinsic(function: Callable[..., Any]) -> Any:
    return extending.intrinsic(function)


def _address(builder: Any, pointer: Any, index: Any, llvm: Any) -> Any:
    return builder.bitcast(builder.gep(pointer, [index], inbounds=True), llvm.as_pointer())


def _mask(builder: Any, lanes: int, count: Any) -> Any:
    """Lanes 0 to count - 1."""
    integer = ir.IntType(32)
    llvm = ir.VectorType(integer, lanes)
    most = builder.select(builder.icmp_signed("<", count, count.type(lanes)), count, count.type(lanes))
    return builder.icmp_signed("<", llvm(list(range(lanes))), _all(builder, llvm, builder.trunc(most, integer)))


def _all(builder: Any, llvm: Any, value: Any) -> Any:
    zero = ir.IntType(32)(0)
    one = builder.insert_element(ir.Constant(llvm, ir.Undefined), value, zero)
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(ir.IntType(32), llvm.count), [0] * llvm.count))


def _masked(builder: Any, operation: str, llvm: Any, result: Any, args: list[Any]) -> Any:
    letter = "f32" if isinstance(llvm.element, ir.FloatType) else "f64"
    signature = ir.FunctionType(result, [value.type for value in args])
    name = f"llvm.masked.{operation}.v{llvm.count}{letter}.p0"
    return builder.call(cgutils.get_or_insert_function(builder.module, signature, name), args)


def _halves(builder: Any, vector: Any, half: int) -> Any:
    llvm = ir.VectorType(ir.IntType(32), half)
    low, high = llvm(list(range(half))), llvm(list(range(half, 2 * half)))
    return builder.shuffle_vector(vector, vector, low), builder.shuffle_vector(vector, vector, high)


@_intrinsic
def pointer(typing_context: Any, x: Any) -> Any:
    """x's memory. The caller keeps x."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return context.make_array(x)(context, builder, args[0]).data

    return types.CPointer(x.dtype)(x), generate


@_intrinsic
def address(typing_context: Any, x: Any, i: Any) -> Any:
    """x[i]'s address."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ptrtoint(builder.gep(args[0], [args[1]]), ir.IntType(64))

    return types.int64(x, types.int64), generate


@_intrinsic
def scratch(typing_context: Any, x: Any) -> Any:
    """Room for a value of x's type a column, on the stack of the calling function; a vector may end past the last."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = Vector(x.dtype)
        memory = cgutils.alloca_once(builder, vector.llvm, MAX_COLUMNS // vector.lanes + APART)
        return builder.bitcast(memory, vector.llvm.element.as_pointer())

    return x(x), generate


@_intrinsic
def lanes(typing_context: Any, x: Any) -> Any:
    """Elements of x that fill a vector."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return ir.IntType(64)(Vector(x.dtype).lanes)

    return types.int64(x), generate


@_intrinsic
def rounded(typing_context: Any, x: Any, value: Any) -> Any:
    """The float64 value in x's type."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return context.cast(builder, args[1], types.float64, x.dtype)

    return x.dtype(x, types.float64), generate


@_intrinsic
def splat(typing_context: Any, x: Any, value: Any) -> Any:
    """A vector of x's type, every lane the float64 value."""
    vector = Vector(x.dtype)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _all(builder, vector.llvm, context.cast(builder, args[1], types.float64, x.dtype))

    return vector(x, types.float64), generate


@_intrinsic
def wide(typing_context: Any, value: Any) -> Any:
    """A vector of float64, every lane the value."""
    vector = Vector(types.float64)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _all(builder, vector.llvm, args[0])

    return vector(types.float64), generate


@_intrinsic
def load(typing_context: Any, x: Any, i: Any) -> Any:
    """x[i], x[i + 1], …"""
    vector = Vector(x.dtype)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        at = _address(builder, args[0], args[1], vector.llvm)
        return builder.load(at, align=x.dtype.bitwidth // 8)

    return vector(x, types.int64), generate


@_intrinsic
def load_part(typing_context: Any, x: Any, i: Any, count: Any, otherwise: Any) -> Any:
    """The same, where only `count` elements are there; the other lanes are `otherwise`'s."""
    vector = Vector(x.dtype)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        at = _address(builder, args[0], args[1], vector.llvm)
        align = ir.IntType(32)(x.dtype.bitwidth // 8)
        mask = _mask(builder, vector.lanes, args[2])
        return _masked(builder, "load", vector.llvm, vector.llvm, [at, align, mask, args[3]])

    return vector(x, types.int64, types.int64, vector), generate


@_intrinsic
def load_wide(typing_context: Any, x: Any, i: Any, count: Any, otherwise: Any) -> Any:
    """At most eight elements as float64."""
    wide = Vector(types.float64)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        llvm = ir.VectorType(Vector(x.dtype).llvm.element, wide.lanes)
        at = _address(builder, args[0], args[1], llvm)
        align = ir.IntType(32)(x.dtype.bitwidth // 8)
        mask = _mask(builder, wide.lanes, args[2])
        narrow = _masked(builder, "load", llvm, llvm, [at, align, mask, ir.Constant(llvm, None)])
        values = narrow if x.dtype == types.float64 else builder.fpext(narrow, wide.llvm)
        return builder.select(mask, values, args[3])

    return wide(x, types.int64, types.int64, wide), generate


@_intrinsic
def store(typing_context: Any, y: Any, i: Any, values: Any) -> Any:
    """y[i], y[i + 1], … = values"""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        at = _address(builder, args[0], args[1], values.llvm)
        builder.store(args[2], at, align=y.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.none(y, types.int64, values), generate


@_intrinsic
def store_part(typing_context: Any, y: Any, i: Any, count: Any, values: Any) -> Any:
    """The same for the first `count` values, fewer than a vector: half of them or not, a quarter or not, …

    A masked store is many times as slow on some processors, among them Zen 4.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        index, count, rest, half = args[1], args[2], args[3], values.lanes
        while half > 1:
            half //= 2
            low, high = _halves(builder, rest, half)
            there = builder.icmp_signed("!=", builder.and_(count, count.type(half)), count.type(0))
            with builder.if_then(there):
                builder.store(low, _address(builder, args[0], index, low.type), align=y.dtype.bitwidth // 8)
            rest = builder.select(there, high, low)
            index = builder.add(index, builder.select(there, index.type(half), index.type(0)))
        return context.get_dummy_value()

    return types.none(y, types.int64, types.int64, values), generate


@_intrinsic
def stream(typing_context: Any, y: Any, i: Any, values: Any) -> Any:
    """The same past the caches, for an address that is a multiple of ROW_ALIGNMENT."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        at = _address(builder, args[0], args[1], values.llvm)
        instruction = builder.store(args[2], at, align=ROW_ALIGNMENT)
        instruction.set_metadata("nontemporal", builder.module.add_metadata([ir.IntType(32)(1)]))
        return context.get_dummy_value()

    return types.none(y, types.int64, values), generate


@_intrinsic
def prefetch(typing_context: Any, x: Any, i: Any) -> Any:
    """Ask for x[i]'s cache line: the hardware does not foresee where the next run starts."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        at, integer = builder.gep(args[0], [args[1]]), ir.IntType(32)
        llvm = ir.FunctionType(ir.VoidType(), [at.type, integer, integer, integer])
        function = cgutils.get_or_insert_function(builder.module, llvm, "llvm.prefetch.p0")
        builder.call(function, [at, integer(0), integer(2), integer(1)])
        return context.get_dummy_value()

    return types.none(x, types.int64), generate


@_intrinsic
def fence(typing_context: Any) -> Any:
    """Streamed stores are weakly ordered: finish them before another thread is told."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.none(), generate


@_intrinsic
def total(typing_context: Any, values: Any) -> Any:
    """The lanes' sum in float64, as a tree."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        tree, half = args[0], values.lanes
        if values.element == types.float32:
            tree = builder.fpext(tree, ir.VectorType(ir.DoubleType(), half))
        while half > 1:
            half //= 2
            tree = builder.fadd(*_halves(builder, tree, half))
        return builder.extract_element(tree, ir.IntType(32)(0))

    return types.float64(values), generate


# ---- what a task is made of ----


@_jit
def _shares(count_a: float, count_b: float) -> Any:
    """What _merge needs of the counts alone: n_b/n and n_a·n_b/n."""
    share = count_b / (count_a + count_b)
    return share, count_a * share


@_jit
def _merge(count_a: float, mean_a: float, m2_a: float, count_b: float, mean_b: float, m2_b: float) -> Any:
    """Chan, Golub and LeVeque (1983), section 2: the mean and m2 of two sets together."""
    if count_a == 0.0:
        return mean_b, m2_b
    share, cross = _shares(count_a, count_b)
    delta = mean_b - mean_a
    return mean_a + delta * share, m2_a + (m2_b + delta * delta * cross)


@_jit
def _stands(s: float, q: float, m2: float, count: float, tiny: float) -> bool:
    """May s and q, taken in the data's type about a pivot, stand for the block?

    Not where the pivot was far from the mean, nor where squares overflowed (or the data is not finite) or lost
    digits to underflow.
    """
    return (q - q == 0.0) & (m2 >= 0.25 * q) & ((q > tiny * count) | ((q == 0.0) & (s == 0.0)))


@_jit
def _moments_wide(x: Pointer, start: int, runs: int, stride: int, length: int) -> Any:
    """Moments of a block in two sweeps of float64: right for any data, at a fraction of the speed."""
    origin = np.float64(x[start])  # a constant block's mean is then exactly its value
    p, s = wide(origin), wide(0.0)
    for r in range(runs):
        for i in range(0, length, 8):
            s = s + (load_wide(x, start + r * stride + i, length - i, p) - p)
    mean = origin + total(s) / (runs * length)

    p, s, q = wide(mean), wide(0.0), wide(0.0)
    for r in range(runs):
        for i in range(0, length, 8):
            d = load_wide(x, start + r * stride + i, length - i, p) - p
            s = s + d
            q = q + d * d
    shift = total(s) / (runs * length)
    m2 = total(q) - total(s) * shift
    return mean + shift, 0.0 if m2 < 0.0 else m2


@_jit
def _gradient_sums_wide(dy: Pointer, x: Pointer, start: int, runs: int, stride: int, length: int, hi: float) -> Any:
    """Gradient sums of a block in float64."""
    h, zero = wide(hi), wide(0.0)
    s = q = zero
    for r in range(runs):
        for i in range(0, length, 8):
            at = start + r * stride + i
            g = load_wide(dy, at, length - i, zero)
            s = s + g
            q = q + g * (load_wide(x, at, length - i, h) - h)
    return total(s), total(q)


@_jit
def _within(x: Pointer, scale: float) -> float:
    """The scale, or the largest that x's type can hold: a constant channel's x - hi is 0, and must stay so."""
    largest = LARGEST[lanes(x) // 16]
    return largest if scale > largest else -largest if scale < -largest else scale


@_jit
def _coefficients(x: Pointer, mean: float, var: float, weight: float, bias: float, eps: float) -> Any:
    """hi, a and b of y = (x - hi)·a + b."""
    a = _within(x, weight / np.sqrt(var + eps))
    hi = np.float64(rounded(x, mean))
    return hi, a, bias - (mean - hi) * a


@_jit
def _slopes(
    x: Pointer, mean: float, var: float, weight: float, eps: float, sum_dy: float, sum_dy_xmu: float, count: int
) -> Any:
    """m, a, hi, k and c of dx = ((dy - m) - (x - hi)·k)·a + c."""
    a = _within(x, weight / np.sqrt(var + eps))
    k = sum_dy_xmu / count / (var + eps)
    m = np.float64(rounded(x, sum_dy / count))
    hi = np.float64(rounded(x, mean))
    return m, a, hi, k, a * ((mean - hi) * k - (sum_dy / count - m))


@_jit
def _head(y: Pointer, start: int, length: int, alignment: int) -> Any:
    """Elements from `start` to the first address that is aligned."""
    return min(length, -address(y, start) % alignment * lanes(y) // VECTOR_BYTES)


# ---- runs ----


@_jit
def _moments_runs(x: Pointer, start: int, runs: int, stride: int, length: int) -> Any:
    """Mean and m2 of a block of `runs` runs of `length` values, the first at `start`, `stride` apart."""
    # The pivot: the mean of the first 16 values. To pick them from all over the block cost as much as the sums.
    origin = np.float64(x[start])  # a constant block's pivot is exactly its value
    few = min(length, 16)
    shift = 0.0
    for i in range(1, few):
        shift += np.float64(x[start + i]) - origin
    pivot = np.float64(rounded(x, origin + shift / few))

    p = splat(x, pivot)
    s0 = s1 = q0 = q1 = splat(x, 0.0)
    following = stride if runs > 1 else 0
    for r in range(runs):
        i = start + r * stride
        end = i + length
        while i + 2 * lanes(x) <= end:
            prefetch(x, i + following)
            prefetch(x, i + following + lanes(x))
            d0 = load(x, i) - p
            d1 = load(x, i + lanes(x)) - p
            s0 = s0 + d0
            s1 = s1 + d1
            q0 = q0 + d0 * d0
            q1 = q1 + d1 * d1
            i += 2 * lanes(x)
        while i < end:
            d0 = load_part(x, i, end - i, p) - p
            s0 = s0 + d0
            q0 = q0 + d0 * d0
            i += lanes(x)
    count = np.float64(runs * length)
    s, q = total(s0) + total(s1), total(q0) + total(q1)
    m2 = q - s * (s / count)
    if not _stands(s, q, m2, count, TINY[lanes(x) // 16]):
        return _moments_wide(x, start, runs, stride, length)
    return pivot + s / count, m2


@_jit
def _gradient_sums_runs(dy: Pointer, x: Pointer, start: int, runs: int, stride: int, length: int, hi: float) -> Any:
    """Σ dy and Σ dy·(x - hi) of a block."""
    h, zero = splat(x, hi), splat(x, 0.0)
    s0 = s1 = q0 = q1 = zero
    following = stride if runs > 1 else 0
    for r in range(runs):
        i = start + r * stride
        end = i + length
        while i + 2 * lanes(x) <= end:
            prefetch(x, i + following)
            prefetch(dy, i + following)
            prefetch(x, i + following + lanes(x))
            prefetch(dy, i + following + lanes(x))
            g0 = load(dy, i)
            g1 = load(dy, i + lanes(x))
            s0 = s0 + g0
            s1 = s1 + g1
            q0 = q0 + g0 * (load(x, i) - h)
            q1 = q1 + g1 * (load(x, i + lanes(x)) - h)
            i += 2 * lanes(x)
        while i < end:
            g0 = load_part(dy, i, end - i, zero)
            s0 = s0 + g0
            q0 = q0 + g0 * (load_part(x, i, end - i, h) - h)
            i += lanes(x)
    s, q = total(s0) + total(s1), total(q0) + total(q1)
    if (s + q) - (s + q) != 0.0:
        return _gradient_sums_wide(dy, x, start, runs, stride, length, hi)
    return s, q


@_jit
def _normalize_runs(
    x: Pointer, y: Pointer, start: int, runs: int, stride: int, length: int, hi: float, a: float, b: float,
    streaming: int,
) -> None:  # fmt: skip
    h, va, vb = splat(x, hi), splat(x, a), splat(x, b)
    for r in range(runs):
        i = start + r * stride
        end = i + length
        if streaming > 0:
            n = _head(y, i, length, streaming)
            if n > 0:
                store_part(y, i, n, (load_part(x, i, n, h) - h) * va + vb)
                i += n
            while i + lanes(x) <= end:
                stream(y, i, (load(x, i) - h) * va + vb)
                i += lanes(x)
        while i + lanes(x) <= end:
            store(y, i, (load(x, i) - h) * va + vb)
            i += lanes(x)
        if i < end:
            store_part(y, i, end - i, (load_part(x, i, end - i, h) - h) * va + vb)


@_jit
def _input_gradient_runs(
    dy: Pointer, x: Pointer, dx: Pointer, start: int, runs: int, stride: int, length: int,
    m: float, a: float, hi: float, k: float, c: float, streaming: int,
) -> None:  # fmt: skip
    vm, va, vh, vk, vc = splat(x, m), splat(x, a), splat(x, hi), splat(x, k), splat(x, c)
    for r in range(runs):
        i = start + r * stride
        end = i + length
        if streaming > 0:
            n = _head(dx, i, length, streaming)
            if n > 0:
                g = load_part(dy, i, n, vm) - vm
                store_part(dx, i, n, (g - (load_part(x, i, n, vh) - vh) * vk) * va + vc)
                i += n
            while i + lanes(x) <= end:
                stream(dx, i, ((load(dy, i) - vm) - (load(x, i) - vh) * vk) * va + vc)
                i += lanes(x)
        while i + lanes(x) <= end:
            store(dx, i, ((load(dy, i) - vm) - (load(x, i) - vh) * vk) * va + vc)
            i += lanes(x)
        if i < end:
            n = end - i
            g = load_part(dy, i, n, vm) - vm
            store_part(dx, i, n, (g - (load_part(x, i, n, vh) - vh) * vk) * va + vc)


@_jit
def _block(block: int, outer: int, channels: int, inner: int) -> Any:
    """Where a channel's block of runs starts (from the channel's first value), its runs, and their length."""
    if inner > BLOCK:  # a piece of one plane
        pieces = (inner + BLOCK - 1) // BLOCK
        start = block % pieces * BLOCK
        return block // pieces * channels * inner + start, 1, min(BLOCK, inner - start)
    planes = BLOCK // inner  # or several planes
    first = block * planes
    return first * channels * inner, min(planes, outer - first), inner


@_jit
def _forward_runs(
    task: int, x_: Array, y_: Array, apply: bool, outer: int, channels: int, inner: int,
    group: int, extent: int, chunk: int, chunks: int, mean: Array, m2: Array, weight: Array,
    bias: Array, eps: float, streaming: int,
) -> None:  # fmt: skip
    x, y = pointer(x_), pointer(y_)
    channel, part = task // chunks, task % chunks
    first, last = part * chunk, min(part * chunk + chunk, extent)
    stride, origin = channels * inner, channel * inner
    count = centre = second = 0.0
    for block in range(first, last):
        start, runs, length = _block(block, outer, channels, inner)
        block_mean, block_m2 = _moments_runs(x, origin + start, runs, stride, length)
        centre, second = _merge(count, centre, second, runs * length, block_mean, block_m2)
        count += runs * length
    mean[part, channel], m2[part, channel] = centre, second
    if apply:
        hi, a, b = _coefficients(x, centre, second / count, weight[channel], bias[channel], eps)
        for block in range(last - 1, first - 1, -1):
            start, runs, length = _block(block, outer, channels, inner)
            _normalize_runs(x, y, origin + start, runs, stride, length, hi, a, b, streaming)
        fence()


@_jit
def _backward_runs(
    task: int, dy_: Array, x_: Array, dx_: Array, steps: int, outer: int, channels: int, inner: int,
    group: int, extent: int, chunk: int, chunks: int, mean: Array, var: Array, sum_dy: Array, sum_dy_xmu: Array,
    weight: Array, eps: float, streaming: int,
) -> None:  # fmt: skip
    dy, x, dx = pointer(dy_), pointer(x_), pointer(dx_)
    channel, part = task // chunks, task % chunks
    first, last = part * chunk, min(part * chunk + chunk, extent)
    stride, origin = channels * inner, channel * inner
    if steps & SUM:
        hi = np.float64(rounded(x, mean[channel]))
        s = q = 0.0
        for block in range(first, last):
            start, runs, length = _block(block, outer, channels, inner)
            block_s, block_q = _gradient_sums_runs(dy, x, origin + start, runs, stride, length, hi)
            s += block_s
            q += block_q
        sum_dy[part, channel], sum_dy_xmu[part, channel] = s, q - (mean[channel] - hi) * s
    if steps & APPLY:
        s, q = sum_dy[0, channel], sum_dy_xmu[0, channel]
        m, a, hi, k, c = _slopes(x, mean[channel], var[channel], weight[channel], eps, s, q, outer * inner)
        for block in range(last - 1, first - 1, -1):
            start, runs, length = _block(block, outer, channels, inner)
            _input_gradient_runs(dy, x, dx, origin + start, runs, stride, length, m, a, hi, k, c, streaming)
        fence()


# ---- columns ----


@_jit
def _fill(values: Pointer, start: int, count: int, value: float) -> None:
    """The value in `count` places, and in those after them up to a vector's end."""
    v = splat(values, value)
    for i in range(start, start + count, lanes(values)):
        store(values, i, v)


@_jit
def _fold(values: Pointer, width: int, inner: int, folded: Pointer) -> None:
    """Sums of columns to sums of channels, in float64."""
    if inner == 1:
        for c in range(width):
            folded[c] = np.float64(values[c])
        return
    zero = splat(values, 0.0)
    for c in range(width):
        s = zero
        for j in range(0, inner, lanes(values)):
            s = s + load_part(values, c * inner + j, inner - j, zero)
        folded[c] = total(s)


@_jit
def _pivots(x: Pointer, start: int, rows: int, stride: int, width: int, inner: int, pivot: Pointer) -> None:
    """The mean of the first eight rows, or of the first row's values of the channel."""
    if inner == 1:
        zero, eighth = splat(x, 0.0), splat(x, 0.125)
        for k in range(0, width, lanes(x)):
            origin = load_part(x, start + k, width - k, zero)  # a constant channel's pivot is exactly its value
            s = zero
            for i in range(1, 8):
                s = s + (load_part(x, start + min(i, rows - 1) * stride + k, width - k, zero) - origin)
            store(pivot, k, origin + s * eighth)
    else:
        for c in range(width):
            at = start + c * inner
            origin, s = splat(x, np.float64(x[at])), splat(x, 0.0)
            for j in range(0, inner, lanes(x)):
                s = s + (load_part(x, at + j, inner - j, origin) - origin)
            _fill(pivot, c * inner, inner, np.float64(x[at]) + total(s) / inner)


@_jit
def _ahead(x: Pointer, stride: int, columns: int) -> Any:
    """Where to prefetch while four rows are summed: how far on from there, and how to step while k goes along a row.

    Memory likes to be read in order: where the columns are the whole row, four later rows are one run, and the four
    vectors from 4k on are asked for at column k; else column k of each of four rows.
    """
    row = stride * VECTOR_BYTES // lanes(x)
    rows = 4 if row >= AHEAD // 4 else 4 * ((AHEAD + 4 * row - 1) // (4 * row))
    if columns == stride:
        return rows * stride, 4, lanes(x)
    return rows * stride, 1, stride


@_jit
def _moments_columns(
    x: Pointer, start: int, rows: int, stride: int, width: int, inner: int,
    pivot: Pointer, sums: Pointer, squares: Pointer, before: float, mean: Pointer, m2: Pointer, at: int,
) -> None:  # fmt: skip
    """Merge the moments of a block of `rows` rows into those of `before` values a channel, mean[at:] and m2[at:]."""
    columns = width * inner
    whole = columns - columns % lanes(x)
    _pivots(x, start, rows, stride, width, inner, pivot)
    _fill(sums, 0, columns, 0.0)
    _fill(squares, 0, columns, 0.0)
    # Four rows at a time, so that a column's sums are loaded and stored but once for them; then the rows that are
    # left; then the columns that do not fill a vector.
    grouped = rows - rows % 4
    later, across, down = _ahead(x, stride, columns)
    for r in range(0, grouped, 4):
        for k in range(0, whole, lanes(x)):
            i = start + r * stride + k
            ask = i + later + k * (across - 1)
            for j in range(4):
                prefetch(x, ask + j * down)
            p = load(pivot, k)
            d0, d1 = load(x, i) - p, load(x, i + stride) - p
            d2, d3 = load(x, i + 2 * stride) - p, load(x, i + 3 * stride) - p
            store(sums, k, load(sums, k) + ((d0 + d1) + (d2 + d3)))
            store(squares, k, load(squares, k) + ((d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3)))
    for r in range(grouped, rows):
        for k in range(0, whole, lanes(x)):
            d = load(x, start + r * stride + k) - load(pivot, k)
            store(sums, k, load(sums, k) + d)
            store(squares, k, load(squares, k) + d * d)
    if whole < columns:
        p = load(pivot, whole)
        s, q = splat(x, 0.0), splat(x, 0.0)
        for r in range(rows):
            d = load_part(x, start + r * stride + whole, columns - whole, p) - p
            s = s + d
            q = q + d * d
        store(sums, whole, s)
        store(squares, whole, q)

    # Loops over channels that the compiler can vectorize: no call, no branch, no division that does not depend on c.
    block_mean, block_m2 = scratch(mean), scratch(mean)
    _fold(sums, width, inner, block_mean)
    _fold(squares, width, inner, block_m2)
    count = np.float64(rows * inner)
    inverse, tiny, doubtful = 1.0 / count, TINY[lanes(x) // 16], 0
    for c in range(width):
        s, q = block_mean[c], block_m2[c]
        m = q - s * (s * inverse)
        doubtful += not _stands(s, q, m, count, tiny)
        block_mean[c], block_m2[c] = np.float64(pivot[c * inner]) + s * inverse, m
    if doubtful > 0:
        s_, q_ = scratch(mean), scratch(mean)
        _fold(sums, width, inner, s_)
        _fold(squares, width, inner, q_)
        for c in range(width):
            if not _stands(s_[c], q_[c], block_m2[c], count, tiny):
                block_mean[c], block_m2[c] = _moments_wide(x, start + c * inner, rows, stride, inner)

    if before == 0.0:
        for c in range(width):
            mean[at + c], m2[at + c] = block_mean[c], block_m2[c]
    else:
        share, cross = _shares(before, count)
        for c in range(width):
            delta = block_mean[c] - mean[at + c]
            mean[at + c] += delta * share
            m2[at + c] += block_m2[c] + delta * delta * cross


@_jit
def _gradient_sums_columns(
    dy: Pointer, x: Pointer, start: int, rows: int, stride: int, width: int, inner: int,
    hi: Pointer, sums: Pointer, products: Pointer, sum_dy: Pointer, sum_dy_x: Pointer, at: int,
) -> None:  # fmt: skip
    """Add a block's Σ dy and Σ dy·(x - hi) to sum_dy[at:] and sum_dy_x[at:]."""
    columns = width * inner
    whole = columns - columns % lanes(x)
    zero = splat(x, 0.0)
    _fill(sums, 0, columns, 0.0)
    _fill(products, 0, columns, 0.0)
    grouped = rows - rows % 4
    later, across, down = _ahead(x, stride, columns)
    for r in range(0, grouped, 4):
        for k in range(0, whole, lanes(x)):
            i = start + r * stride + k
            ask = i + later + k * (across - 1)
            for j in range(4):
                prefetch(x, ask + j * down)
                prefetch(dy, ask + j * down)
            h = load(hi, k)
            g0, g1 = load(dy, i), load(dy, i + stride)
            g2, g3 = load(dy, i + 2 * stride), load(dy, i + 3 * stride)
            store(sums, k, load(sums, k) + ((g0 + g1) + (g2 + g3)))
            q0 = g0 * (load(x, i) - h) + g1 * (load(x, i + stride) - h)
            q1 = g2 * (load(x, i + 2 * stride) - h) + g3 * (load(x, i + 3 * stride) - h)
            store(products, k, load(products, k) + (q0 + q1))
    for r in range(grouped, rows):
        for k in range(0, whole, lanes(x)):
            i = start + r * stride + k
            g = load(dy, i)
            store(sums, k, load(sums, k) + g)
            store(products, k, load(products, k) + g * (load(x, i) - load(hi, k)))
    if whole < columns:
        h, s, q = load(hi, whole), zero, zero
        for r in range(rows):
            i = start + r * stride + whole
            g = load_part(dy, i, columns - whole, zero)
            s = s + g
            q = q + g * (load_part(x, i, columns - whole, h) - h)
        store(sums, whole, s)
        store(products, whole, q)

    s_, q_ = scratch(sum_dy), scratch(sum_dy)
    _fold(sums, width, inner, s_)
    _fold(products, width, inner, q_)
    infinite = 0
    for c in range(width):
        probe = s_[c] + q_[c]
        infinite += probe - probe != 0.0
    if infinite > 0:
        for c in range(width):
            if (s_[c] + q_[c]) - (s_[c] + q_[c]) != 0.0:
                h_ = np.float64(hi[c * inner])
                s_[c], q_[c] = _gradient_sums_wide(dy, x, start + c * inner, rows, stride, inner, h_)
    for c in range(width):
        sum_dy[at + c] += s_[c]
        sum_dy_x[at + c] += q_[c]


@_jit
def _normalize_columns(
    x: Pointer, y: Pointer, start: int, rows: int, stride: int, columns: int, hi: Pointer, a: Pointer, b: Pointer,
    streaming: int,
) -> None:  # fmt: skip
    for r in range(rows):
        i, k = start + r * stride, 0
        if streaming > 0:
            k = _head(y, i, columns, streaming)
            if k > 0:
                store_part(y, i, k, (load_part(x, i, k, load(hi, 0)) - load(hi, 0)) * load(a, 0) + load(b, 0))
            while k + lanes(x) <= columns:
                prefetch(x, i + k + stride)
                stream(y, i + k, (load(x, i + k) - load(hi, k)) * load(a, k) + load(b, k))
                k += lanes(x)
        while k + lanes(x) <= columns:
            prefetch(x, i + k + stride)
            store(y, i + k, (load(x, i + k) - load(hi, k)) * load(a, k) + load(b, k))
            k += lanes(x)
        if k < columns:
            n, h = columns - k, load(hi, k)
            store_part(y, i + k, n, (load_part(x, i + k, n, h) - h) * load(a, k) + load(b, k))


@_jit
def _input_gradient_columns(
    dy: Pointer, x: Pointer, dx: Pointer, start: int, rows: int, stride: int, columns: int,
    m: Pointer, a: Pointer, hi: Pointer, k: Pointer, c: Pointer, streaming: int,
) -> None:  # fmt: skip
    for r in range(rows):
        at, i = start + r * stride, 0
        if streaming > 0:
            i = _head(dx, at, columns, streaming)
            if i > 0:
                g = load_part(dy, at, i, load(m, 0)) - load(m, 0)
                store_part(
                    dx,
                    at,
                    i,
                    (g - (load_part(x, at, i, load(hi, 0)) - load(hi, 0)) * load(k, 0)) * load(a, 0) + load(c, 0),
                )
            while i + lanes(x) <= columns:
                prefetch(x, at + i + stride)
                prefetch(dy, at + i + stride)
                g = load(dy, at + i) - load(m, i)
                stream(dx, at + i, (g - (load(x, at + i) - load(hi, i)) * load(k, i)) * load(a, i) + load(c, i))
                i += lanes(x)
        while i + lanes(x) <= columns:
            prefetch(x, at + i + stride)
            prefetch(dy, at + i + stride)
            g = load(dy, at + i) - load(m, i)
            store(dx, at + i, (g - (load(x, at + i) - load(hi, i)) * load(k, i)) * load(a, i) + load(c, i))
            i += lanes(x)
        if i < columns:
            n = columns - i
            g = load_part(dy, at + i, n, load(m, i)) - load(m, i)
            store_part(
                dx,
                at + i,
                n,
                (g - (load_part(x, at + i, n, load(hi, i)) - load(hi, i)) * load(k, i)) * load(a, i) + load(c, i),
            )


@_jit
def _forward_columns(
    task: int, x_: Array, y_: Array, apply: bool, outer: int, channels: int, inner: int,
    group: int, extent: int, chunk: int, chunks: int, mean: Array, m2: Array, weight: Array,
    bias: Array, eps: float, streaming: int,
) -> None:  # fmt: skip
    x, y = pointer(x_), pointer(y_)
    channel, part = task // chunks * group, task % chunks
    first, last = part * chunk, min(part * chunk + chunk, extent)
    width, stride, origin = min(group, channels - channel), channels * inner, channel * inner
    hi, a, b = scratch(x), scratch(x), scratch(x)
    for row in range(first, last, BLOCK_ROWS):
        _moments_columns(
            x, origin + row * stride, min(BLOCK_ROWS, last - row), stride, width, inner, hi, a, b,
            (row - first) * inner, pointer(mean), pointer(m2), part * channels + channel,
        )  # fmt: skip
    if apply:
        for i in range(width):
            c = channel + i
            k = _coefficients(x, mean[0, c], m2[0, c] / (outer * inner), weight[c], bias[c], eps)
            _fill(hi, i * inner, inner, k[0])
            _fill(a, i * inner, inner, k[1])
            _fill(b, i * inner, inner, k[2])
        for end in range(last, first, -BLOCK_ROWS):
            row = max(end - BLOCK_ROWS, first)
            _normalize_columns(x, y, origin + row * stride, end - row, stride, width * inner, hi, a, b, streaming)
        fence()


@_jit
def _backward_columns(
    task: int, dy_: Array, x_: Array, dx_: Array, steps: int, outer: int, channels: int, inner: int,
    group: int, extent: int, chunk: int, chunks: int, mean: Array, var: Array, sum_dy: Array, sum_dy_xmu: Array,
    weight: Array, eps: float, streaming: int,
) -> None:  # fmt: skip
    dy, x, dx = pointer(dy_), pointer(x_), pointer(dx_)
    channel, part = task // chunks * group, task % chunks
    first, last = part * chunk, min(part * chunk + chunk, extent)
    width, stride, origin = min(group, channels - channel), channels * inner, channel * inner
    m, a, hi, k, c = scratch(x), scratch(x), scratch(x), scratch(x), scratch(x)
    for i in range(width):
        _fill(hi, i * inner, inner, mean[channel + i])
    if steps & SUM:
        sum_dy[part, channel : channel + width] = 0.0
        sum_dy_xmu[part, channel : channel + width] = 0.0
        for row in range(first, last, BLOCK_ROWS):
            _gradient_sums_columns(
                dy, x, origin + row * stride, min(BLOCK_ROWS, last - row), stride, width, inner, hi, a, c,
                pointer(sum_dy), pointer(sum_dy_xmu), part * channels + channel,
            )  # fmt: skip
        for ch in range(channel, channel + width):
            low = mean[ch] - np.float64(rounded(x, mean[ch]))
            sum_dy_xmu[part, ch] -= low * sum_dy[part, ch]
    if steps & APPLY:
        for i in range(width):
            ch = channel + i
            slope = _slopes(x, mean[ch], var[ch], weight[ch], eps, sum_dy[0, ch], sum_dy_xmu[0, ch], outer * inner)
            _fill(m, i * inner, inner, slope[0])
            _fill(a, i * inner, inner, slope[1])
            _fill(k, i * inner, inner, slope[3])
            _fill(c, i * inner, inner, slope[4])
        for end in range(last, first, -BLOCK_ROWS):
            row = max(end - BLOCK_ROWS, first)
            start = origin + row * stride
            _input_gradient_columns(dy, x, dx, start, end - row, stride, width * inner, m, a, hi, k, c, streaming)
        fence()


# ---- eval: memory in order ----


@_jit
def _normalize_stretch(
    task: int, x_: Array, y_: Array, outer: int, channels: int, inner: int, last: int, coefficients: Array,
    streaming: int,
) -> None:  # fmt: skip
    """About STRETCH values with given coefficients. `last`: the array's last task, where tasks go backwards, or -1."""
    x, y = pointer(x_), pointer(y_)
    if last >= 0:
        task = last - task
    hi, a, b = coefficients[0], coefficients[1], coefficients[2]
    if inner == 1:
        n = max(STRETCH // channels, 1)
        first = task * n
        n = min(n, outer - first)
        k = pointer(hi), pointer(a), pointer(b)
        _normalize_columns(x, y, first * channels, n, channels, channels, k[0], k[1], k[2], streaming)
    else:
        n, pieces = max(STRETCH // inner, 1), (inner + STRETCH - 1) // STRETCH
        start = task % pieces * STRETCH
        length = min(STRETCH, inner - start)
        first = task // pieces * n
        for plane in range(first, min(first + n, outer * channels)):
            c = plane % channels
            v = np.float64(hi[c]), np.float64(a[c]), np.float64(b[c])
            _normalize_runs(x, y, plane * inner + start, 1, 0, length, v[0], v[1], v[2], streaming)
    fence()


# ---- drivers ----


class Drivers(NamedTuple):
    """A task function over a grid, on one thread and on many."""

    serial: Callable[..., None]
    parallel: Callable[..., None]


def _drivers(function: Callable[..., None]) -> Drivers:
    def serial(tasks: int, *args: Any) -> None:
        for task in range(tasks):
            function(task, *args)

    def parallel(tasks: int, *args: Any) -> None:
        for task in numba.prange(tasks):
            function(task, *args)

    return Drivers(_jit(serial), _parallel(parallel))


NORMALIZE = _drivers(_normalize_stretch)
FORWARD = {"runs": _drivers(_forward_runs), "columns": _drivers(_forward_columns)}
BACKWARD = {"runs": _drivers(_backward_runs), "columns": _drivers(_backward_columns)}


class Grid(NamedTuple):
    """How the work is cut into tasks: `groups` groups of `group` channels × `chunks` chunks.

    A chunk is `chunk` of `extent` blocks (runs) or rows (columns), and has counts[chunk] values a channel.
    """

    kind: str
    groups: int
    group: int
    extent: int
    chunk: int
    chunks: int
    counts: Array


def _up(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


@lru_cache(maxsize=1024)
def _grid(outer: int, channels: int, inner: int, itemsize: int) -> Grid:
    if inner == 1 or (inner < SMALL_PLANE and outer >= SMALL_PLANE_ROWS):
        fits = FUSED_BYTES // (outer * itemsize)  # columns of a task whose values stay in cache
        fused = fits >= min(FEWEST_COLUMNS, channels * inner)
        if inner == 1 and outer > BLOCK_ROWS and channels > FEWEST_COLUMNS:
            fused = False  # so tall a group of a row's columns falls into few sets of the cache
        columns = MAX_COLUMNS
        if fused:
            columns = min(columns, fits, max(FEWEST_COLUMNS, channels * inner // 8))  # enough tasks to share out
        group = min(max(1, columns // inner), channels)
        if inner == 1 and group > 16:
            group -= group % 16
        chunk = outer if fused else _up(_up(outer, CHUNKS), BLOCK_ROWS) * BLOCK_ROWS
        chunks = _up(outer, chunk)
        rows = np.minimum(chunk, outer - chunk * np.arange(chunks))
        return Grid("columns", _up(channels, group), group, outer, chunk, chunks, rows * float(inner))

    pieces, planes = _up(inner, BLOCK), max(1, BLOCK // inner)
    blocks = outer * pieces if pieces > 1 else _up(outer, planes)
    whole = channels >= CHUNKED_CHANNELS or outer * channels * inner < CHUNKED_FROM
    chunk = blocks if whole else _up(blocks, _up(CHUNKS, channels))
    chunks = _up(blocks, chunk)
    bounds = np.minimum(chunk * np.arange(chunks + 1), blocks)
    if pieces > 1:
        before = bounds // pieces * inner + bounds % pieces * BLOCK
    else:
        before = np.minimum(bounds * planes, outer) * inner
    return Grid("runs", channels, 1, blocks, chunk, chunks, np.diff(before).astype(np.float64))


@_jit
def _merge_chunks(counts: Array, means: Array, m2s: Array, mean: Array, m2: Array) -> None:
    """IN means, m2s: (chunks, channels). OUT mean, m2: (channels,)."""
    for c in range(mean.size):
        count = mean[c] = m2[c] = 0.0
        for i in range(counts.size):
            mean[c], m2[c] = _merge(count, mean[c], m2[c], counts[i], means[i, c], m2s[i, c])
            count += counts[i]


_forked = False
_lock = threading.Lock()
_layer: str | None = None


def _after_fork() -> None:
    global _forked, _lock
    _forked = True
    _lock = threading.Lock()  # the parent's may have been held


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _run(drivers: Drivers, tasks: int, threads: int, x: Array, *args: Any) -> None:
    global _layer
    threads = min(threads, numba.config.NUMBA_NUM_THREADS, tasks)
    if threads < 2 or x.size < PARALLEL_FROM or _forked:
        drivers.serial(tasks, x, *args)
        return
    # omp and tbb may be entered by several threads at once; workqueue aborts. Which it is shows at the first call.
    with nullcontext() if _layer in ("omp", "tbb") else _lock:
        before = numba.get_num_threads()
        numba.set_num_threads(threads)  # for this Python thread alone
        try:
            drivers.parallel(tasks, x, *args)
        finally:
            numba.set_num_threads(before)
        if _layer is None:
            _layer = numba.threading_layer()


def has_threads() -> bool:
    """Whether the kernels can use more than one thread."""
    return True


def openmp() -> str:
    """The threading layer in use."""
    return f"Numba's {_layer or 'default'} threading layer"


@lru_cache(maxsize=1)
def _last_level_cache() -> int:
    """Its bytes."""
    sizes = [1 << 25]
    for path in glob("/sys/devices/system/cpu/cpu0/cache/index*/size"):
        with open(path) as file:
            text = file.read().strip()
        sizes.append(int(text.rstrip("KMG")) << {"K": 10, "M": 20, "G": 30}.get(text[-1], 0))
    return max(sizes[1:], default=sizes[0])


def _streaming(y: Array, passes: int, channels: int, inner: int) -> int:
    """The alignment that streamed stores shall have; 0: no streaming.

    They pay where the output does not fit the last-level cache; a call that comes back to its input wants the
    cache for that.
    """
    if y.nbytes <= _last_level_cache() // (4 if passes > 1 else 1) or not y.flags.aligned:
        return 0
    if inner > 1:
        return LINE_ALIGNMENT
    return 0 if channels * y.itemsize % ROW_ALIGNMENT or y.ctypes.data % ROW_ALIGNMENT else ROW_ALIGNMENT


def _input(x: Array) -> Array:
    """A flat read-only view: one type for the JIT, whatever the caller's array allows."""
    flat = x.reshape(-1)
    flat.flags.writeable = False
    return flat


@lru_cache(maxsize=64)
def _default(channels: int, value: float) -> Array:
    return _input(np.full(channels, value))


def _parameter(values: Array | None, channels: int, otherwise: float) -> Array:
    """float64, in the form of `_input`."""
    return _default(channels, otherwise) if values is None else _input(np.asarray(values, np.float64))


# ---- the interface ----


def _forward(
    grid: Grid, apply: bool, x: Array, y: Array, outer: int, channels: int, inner: int, mean: Array, m2: Array,
    weight: Array | None, bias: Array | None, eps: float, threads: int,
) -> None:  # fmt: skip
    _run(
        FORWARD[grid.kind], grid.groups * grid.chunks, threads, _input(x), y.reshape(-1), apply, outer, channels, inner,
        grid.group, grid.extent, grid.chunk, grid.chunks, mean, m2,
        _parameter(weight, channels, 1.0), _parameter(bias, channels, 0.0), eps, _streaming(y, 2, channels, inner),
    )  # fmt: skip


def moments(x: Array, outer: int, channels: int, inner: int, mean: Array, m2: Array, threads: int) -> None:
    """mean = Σx / n,  m2 = Σ(x - mean)². Writes mean and m2."""
    grid = _grid(outer, channels, inner, x.itemsize)
    nowhere = np.empty(0, x.dtype)
    if grid.chunks == 1:
        parts: Any = (mean.reshape(1, -1), m2.reshape(1, -1))
    else:
        parts = np.empty((2, grid.chunks, channels))
    _forward(grid, False, x, nowhere, outer, channels, inner, parts[0], parts[1], None, None, 0.0, threads)
    if grid.chunks > 1:
        _merge_chunks(grid.counts, parts[0], parts[1], mean, m2)


def normalize(
    x: Array, y: Array, outer: int, channels: int, inner: int,
    mean: Array, var: Array, weight: Array | None, bias: Array | None, eps: float, threads: int,
    backwards: bool = False,
) -> None:  # fmt: skip
    """y = (x - mean) / sqrt(var + eps) · weight + bias. Writes y."""
    a = 1.0 / np.sqrt(np.asarray(var, np.float64) + eps)
    if weight is not None:
        a *= weight
    if x.itemsize == 4:
        np.clip(a, -LARGEST[1], LARGEST[1], out=a)  # see _within
    coefficients = np.zeros((3, channels + 2 * VECTOR_BYTES), x.dtype)  # room for the last vector
    hi = coefficients[0, :channels]
    hi[...] = mean
    coefficients[1, :channels] = a
    a *= hi - mean
    coefficients[2, :channels] = a if bias is None else a + bias
    streaming = _streaming(y, 2 if backwards else 1, channels, inner)
    if inner == 1:
        tasks = _up(outer, max(STRETCH // channels, 1))
    else:
        if inner < SMALL_PLANE:
            streaming = 0  # too few whole lines
        tasks = _up(outer * channels, max(STRETCH // inner, 1)) * _up(inner, STRETCH)
    _run(
        NORMALIZE, tasks, threads, _input(x), y.reshape(-1), outer, channels, inner,
        tasks - 1 if backwards else -1, coefficients, streaming,
    )  # fmt: skip


def forward(
    x: Array, y: Array, outer: int, channels: int, inner: int,
    weight: Array | None, bias: Array | None, eps: float, mean: Array, var: Array, threads: int,
) -> None:  # fmt: skip
    """moments, then normalize with them. Writes y, mean and var."""
    grid = _grid(outer, channels, inner, x.itemsize)
    if grid.chunks == 1:
        parts: Any = mean.reshape(1, -1), var.reshape(1, -1)
        _forward(grid, True, x, y, outer, channels, inner, parts[0], parts[1], weight, bias, eps, threads)
        var /= outer * inner
    else:
        moments(x, outer, channels, inner, mean, var, threads)
        var /= outer * inner
        normalize(x, y, outer, channels, inner, mean, var, weight, bias, eps, threads, backwards=True)


def _backward(
    grid: Grid, steps: int, dy: Array, x: Array, dx: Array, outer: int, channels: int, inner: int,
    mean: Array, var: Array | None, sum_dy: Array, sum_dy_xmu: Array, weight: Array | None, eps: float, threads: int,
) -> None:  # fmt: skip
    _run(
        BACKWARD[grid.kind], grid.groups * grid.chunks, threads,
        _input(dy), _input(x), dx.reshape(-1), steps, outer, channels, inner,
        grid.group, grid.extent, grid.chunk, grid.chunks, _parameter(mean, channels, 0.0),
        _parameter(var, channels, 1.0), sum_dy, sum_dy_xmu,
        _parameter(weight, channels, 1.0), eps, _streaming(dx, 2, channels, inner),
    )  # fmt: skip


def gradient_moments(
    dy: Array, x: Array, outer: int, channels: int, inner: int,
    mean: Array, sum_dy: Array, sum_dy_xmu: Array, threads: int,
) -> None:  # fmt: skip
    """sum_dy = Σdy,  sum_dy_xmu = Σ dy·(x - mean). Writes both."""
    grid = _grid(outer, channels, inner, x.itemsize)
    nowhere = np.empty(0, x.dtype)
    parts: Any = np.empty((2, grid.chunks, channels))
    _backward(grid, SUM, dy, x, nowhere, outer, channels, inner, mean, None, parts[0], parts[1], None, 0.0, threads)
    sum_dy[...], sum_dy_xmu[...] = parts.sum(axis=1)


def input_gradient(
    dy: Array, x: Array, dx: Array, outer: int, channels: int, inner: int,
    mean: Array, var: Array, weight: Array | None, eps: float, sum_dy: Array, sum_dy_xmu: Array, threads: int,
) -> None:  # fmt: skip
    """dx = weight/σ · (dy - Σdy/n - x̂ · Σ(dy·x̂)/n),  x̂ = (x - mean)/σ. Writes dx."""
    grid = _grid(outer, channels, inner, x.itemsize)
    parts: Any = np.array((sum_dy, sum_dy_xmu), np.float64).reshape(2, 1, -1)
    _backward(grid, APPLY, dy, x, dx, outer, channels, inner, mean, var, parts[0], parts[1], weight, eps, threads)


def backward(
    dy: Array, x: Array, dx: Array, outer: int, channels: int, inner: int,
    mean: Array, var: Array, weight: Array | None, eps: float,
    grad_weight: Array, grad_bias: Array, batch: bool, threads: int,
) -> None:  # fmt: skip
    """gradient_moments, then input_gradient with them. Writes dx, grad_weight = Σ dy·x̂ and grad_bias = Σ dy.

    `batch`: the statistics were the batch's own, and the gradient flows through them. Otherwise they are constants, and
    dx = dy · weight/σ.
    """
    grid = _grid(outer, channels, inner, x.itemsize)
    sums: Any = np.empty((2, channels))
    if batch and grid.chunks == 1:
        parts = sums[:, np.newaxis]
        _backward(
            grid, SUM | APPLY, dy, x, dx, outer, channels, inner, mean, var, parts[0], parts[1], weight, eps, threads
        )
    else:
        gradient_moments(dy, x, outer, channels, inner, mean, sums[0], sums[1], threads)
        if batch:
            input_gradient(dy, x, dx, outer, channels, inner, mean, var, weight, eps, sums[0], sums[1], threads)
        else:  # (dy - 0)·weight/σ + 0
            normalize(dy, dx, outer, channels, inner, np.zeros(channels), var, weight, None, eps, threads)
    grad_bias[...] = sums[0]
    grad_weight[...] = sums[1] / np.sqrt(np.asarray(var, np.float64) + eps)
