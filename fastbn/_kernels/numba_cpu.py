"""The kernels for the JIT: what runs where nothing could be compiled ahead of time.

    moments         s = Σ (x - p),  q = Σ (x - p)²;  mean = p + s/n,  m2 = q - s²/n      (p: a pivot near the mean)
    merge           Chan, Golub and LeVeque (1983): two (count, mean, m2) into one, in float64
    normalize       y = (x - hi)·a + b                  a = weight/σ,  hi + lo = mean,  b = bias - lo·a
    gradient sums   Σ dy,  Σ dy·(x - hi)
    input gradient  dx = ((dy - m) - (x - hi)·k)·a + c
    activation      act(z) = z ≤ 0 ? slope·z : z;  a gradient passes it as z ≤ 0 ? slope·dy : dy

`reference.py` says what each function computes and in what arguments; `README.md` derives the formulas. Design:

- *Vectors by name.* Numba has no vector type, so this file makes one: `Vector`, 64 bytes of float32 or float64, with
  + - *, loads and stores, lowered straight to LLVM's vector instructions. Sums then have a fixed number of lanes and a
  fixed order, with neither fast-math nor a loop vectorizer that may choose differently in two drivers: the serial
  and the parallel driver, and any number of threads, give the same bits. y may be x, which a vectorizer's overlap
  checks would slow down, and stores can go past the caches. Kernels see pointers: an array is counted at each call.
- *Half types.* Numba has neither float16 nor bfloat16 on a CPU, so they come in as uint16 and int16, which tells them
  apart. In memory they are two bytes, in a `Vector` float32: loads and stores convert, and nothing else knows.
- *Sums* are kept in the type computed in, about a pivot taken from the block itself, and leave the block as float64.
  One sweep is enough where the pivot was good. A block where it was not (m2 < q/4), or where a square overflowed or
  vanished, is done again in two sweeps of float64. The choice depends on the data alone.
- *Wide channels* are those for which float32 is not enough: x - hi may overflow, or a coefficient has lost digits to
  underflow. Kernels leave a task that has one unwritten, and NumPy does it (`_mend_forward`, `_mend_backward`).
- *mean = hi + lo*: subtracting hi is exact where it matters (x near the mean); lo's share is folded into b.
- *Two shapes of data.* RUNS: a channel's values lie contiguous, `inner` at a time (large planes). COLUMNS: rows of
  channels·inner values, a group of channels side by side (rows, where inner is 1, and small planes, a column a pixel,
  so that no plane pays for a horizontal sum).
- *A task* is a group of channels and a chunk of their values; the grid of tasks follows from the shape alone. Where one
  chunk holds all of a channel, both steps (sums, then apply, walking backwards) run in one task while the data
  is in cache; otherwise the chunks' sums are merged in the grid's order between two passes. Where only the second
  step is left to do (eval), tasks are stretches of memory in order.
- *Element-wise steps* are a formula each, for one vector, and one loop over memory for all of them (`_sweep`).
- *Activations* cost no memory traffic: a backward pass computes z again from x, by the same formula with the same
  bits. Where a residual was added, z's sign is y's; dz is then written by the first step, and is the second's dy.
- *What is absent is None*: the residual, the activation's slope, y and dz. None is a type to the JIT, so code for what
  is absent is dropped as it is compiled, and what was never asked for is never compiled. Four forms can be: plain,
  relu (the slope is the integer 0), leaky_relu (a float), and with a residual (a float; without an activation 1).
- *Compile time* counts: a function is compiled at its first call for each data type and form. So there are few task
  functions, a serial and a parallel driver of one line for each, and otherwise one signature: parameters and statistics
  come as float64, and all inputs as read-only arrays. FASTBN_NUMBA_CACHE=1 keeps the machine code on disk; it is not
  the default because Numba's cache does not see edits in the functions that a cached one calls.
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
from platform import machine
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np

# Of channels, not of elements, or of nothing but arguments: NumPy serves.
from .reference import (  # noqa: F401
    _quiet,
    forward_usual,
    normalize_usual,
    update_running_stats,
    usual,
    usual_statistics,
)

# Imported by name so that they are Any to the type checker, whether or not they are installed.
numba: Any = import_module("numba")
extending: Any = import_module("numba.extending")
cgutils: Any = import_module("numba.core.cgutils")
ir: Any = import_module("llvmlite.ir")
binding: Any = import_module("llvmlite.binding")
types = numba.types

# A fork waits until no thread compiles: the child would inherit a lock that nobody opens.
if hasattr(os, "register_at_fork"):
    _compiling = import_module("numba.core.compiler_lock").global_compiler_lock
    os.register_at_fork(
        before=_compiling.acquire, after_in_parent=_compiling.release, after_in_child=_compiling.release
    )

Array = np.ndarray[Any, np.dtype[Any]]
Pointer = Any  # to elements in memory; unlike an array it is not counted, and an index cannot be negative
Data = Any  # an array that may be absent: None then, which is a type of its own to the JIT
Slope = Any  # the activation's: None, the integer 0 (relu) or a float; in loops a vector instead of the float
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
SMALLEST = float(np.finfo(np.float32).tiny)
MOST = 2.0**103  # half a unit of the largest float32: further from 0, a mean's difference from x may overflow
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


def _formula(function: Function) -> Function:
    """A function of vectors: it must vanish into the loop around it."""
    return cast(Function, numba.njit(nogil=True, error_model="numpy", forceinline=True)(function))


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


HALF, BRAIN = types.uint16, types.int16  # how float16 and bfloat16 are passed


def _computed(x: Any) -> Any:
    """The type that elements at the pointer x are computed in."""
    return types.float32 if x.dtype in (HALF, BRAIN) else x.dtype


def _vector(x: Any) -> Vector:
    """The type of a vector loaded from x."""
    return Vector(_computed(x))


def _intrinsic(function: Callable[..., Any]) -> Any:
    return extending.intrinsic(function)


def _bytes(x: Any) -> int:
    return x.dtype.bitwidth // 8  # type: ignore[no-any-return]


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


def _masked_load(builder: Any, at: Any, llvm: Any, size: int, mask: Any) -> Any:
    """A vector in memory, of elements of `size` bytes; 0 where the mask is off."""
    args = [at, ir.IntType(32)(size), mask, ir.Constant(llvm, None)]
    signature = ir.FunctionType(llvm, [value.type for value in args])
    name = f"llvm.masked.load.v{llvm.count}{'i' if size == 2 else 'f'}{8 * size}.p0"
    return builder.call(cgutils.get_or_insert_function(builder.module, signature, name), args)


# ---- half types: float32 in registers; rounded to nearest, ties to even; a NaN stays one, and becomes quiet ----


def _converts(context: Any) -> bool:
    """Whether the processor converts float16; elsewhere LLVM would call a library that the JIT does not link."""
    return "+f16c" in context.codegen()._tm_features or machine() in ("aarch64", "arm64")


class _Bits:
    """The arithmetic of 32-bit lanes: constants are Python's, and a comparison is all ones or 0."""

    def __init__(self, builder: Any, values: Any) -> None:
        self.builder, self.values = builder, values
        self.llvm = ir.VectorType(ir.IntType(32), values.type.count)

    def _other(self, other: Any) -> Any:
        if isinstance(other, _Bits):
            return other.values
        return self.llvm([other - (other >> 31 << 32)] * self.llvm.count)

    def _done(self, values: Any) -> _Bits:
        return _Bits(self.builder, values)

    def __add__(self, other: Any) -> _Bits:
        return self._done(self.builder.add(self.values, self._other(other)))

    def __sub__(self, other: Any) -> _Bits:
        return self._done(self.builder.sub(self.values, self._other(other)))

    def __and__(self, other: Any) -> _Bits:
        return self._done(self.builder.and_(self.values, self._other(other)))

    def __or__(self, other: Any) -> _Bits:
        return self._done(self.builder.or_(self.values, self._other(other)))

    def __lshift__(self, other: Any) -> _Bits:
        return self._done(self.builder.shl(self.values, self._other(other)))

    def __rshift__(self, other: Any) -> _Bits:
        return self._done(self.builder.lshr(self.values, self._other(other)))

    def __gt__(self, other: Any) -> _Bits:
        return self._done(
            self.builder.sext(self.builder.icmp_unsigned(">", self.values, self._other(other)), self.llvm)
        )

    def where(self, condition: _Bits, other: _Bits) -> _Bits:
        """Self where the condition holds, the other elsewhere."""
        chosen = self.builder.icmp_signed("!=", condition.values, self._other(0))
        return self._done(self.builder.select(chosen, self.values, other.values))

    def floats(self) -> Any:
        return self.builder.bitcast(self.values, ir.VectorType(ir.FloatType(), self.llvm.count))

    def float_op(self, instruction: str, constant: float) -> _Bits:
        values = self.floats()
        result = getattr(self.builder, instruction)(values, values.type([constant] * self.llvm.count))
        return self._done(self.builder.bitcast(result, self.llvm))


def _widened(context: Any, builder: Any, x: Any, values: Any) -> Any:
    """A vector of x's memory in the type that it is computed in."""
    if x.dtype not in (HALF, BRAIN):
        return values
    count = values.type.count
    if x.dtype == HALF and _converts(context):
        half = builder.bitcast(values, ir.VectorType(ir.HalfType(), count))
        return builder.fpext(half, ir.VectorType(ir.FloatType(), count))
    h = _Bits(builder, builder.zext(values, ir.VectorType(ir.IntType(32), count)))
    if x.dtype == BRAIN:
        return (h << 16).floats()
    low = (h & 0x7FFF) << 13
    special, nan = low > 0x0F7FFFFF, low > 0x0F800000
    f = low.float_op("fmul", 2.0**112)  # moves the exponent; denormals become normal
    return (f | (special & 0x7F800000) | (nan & 0x400000) | ((h & 0x8000) << 16)).floats()


def _narrowed(context: Any, builder: Any, y: Any, values: Any) -> Any:
    """The inverse."""
    if y.dtype not in (HALF, BRAIN):
        return values
    count = values.type.count
    short, word = (ir.VectorType(ir.IntType(bits), count) for bits in (16, 32))
    if y.dtype == HALF and _converts(context):
        half = builder.fptrunc(values, ir.VectorType(ir.HalfType(), count))
        return builder.bitcast(half, short)
    f = _Bits(builder, builder.bitcast(values, word))
    nan = _Bits(builder, builder.sext(builder.fcmp_unordered("uno", values, values), word))
    size = f & 0x7FFFFFFF
    if y.dtype == BRAIN:
        h = (f | 0x400000).where(nan, f + 0x7FFF + ((f >> 16) & 1)) >> 16
    else:
        normal = (size - 0x38000000 + 0xFFF + ((size >> 13) & 1)) >> 13
        denormal = size.float_op("fadd", 0.5) - 0x3F000000  # the addition rounds
        special = (nan & (((size >> 13) & 0x3FF) | 0x200)) | 0x7C00
        h = special.where(size > 0x477FFFFF, normal.where(size > 0x387FFFFF, denormal))
        h = h | ((f & 0x80000000) >> 16)
    return builder.trunc(h.values, short)


def _in_memory(context: Any, x: Any, lanes: int) -> Any:
    return ir.VectorType(context.get_data_type(x.dtype), lanes)


# ---- what kernels are written in ----


def _halves(builder: Any, vector: Any, half: int) -> Any:
    llvm = ir.VectorType(ir.IntType(32), half)
    low, high = llvm(list(range(half))), llvm(list(range(half, 2 * half)))
    return builder.shuffle_vector(vector, vector, low), builder.shuffle_vector(vector, vector, high)


@_intrinsic
def pointer(typing_context: Any, x: Any) -> Any:
    """x's memory. The caller keeps x. None's is None."""
    if x == types.none:
        return x(x), lambda context, builder, signature, args: args[0]

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
    """Room for a value a column, of the type that x is computed in, on the stack of the calling function.

    A vector may end past the last.
    """
    vector = _vector(x)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        memory = cgutils.alloca_once(builder, vector.llvm, MAX_COLUMNS // vector.lanes + APART)
        return builder.bitcast(memory, vector.llvm.element.as_pointer())

    return types.CPointer(vector.element)(x), generate


@_intrinsic
def lanes(typing_context: Any, x: Any) -> Any:
    """Elements of x that fill a vector."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return ir.IntType(64)(_vector(x).lanes)

    return types.int64(x), generate


@_intrinsic
def size(typing_context: Any, x: Any) -> Any:
    """The bytes of an element of x."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return ir.IntType(64)(_bytes(x))

    return types.int64(x), generate


@_intrinsic
def rounded(typing_context: Any, x: Any, value: Any) -> Any:
    """The float64 value in the type that x is computed in."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return context.cast(builder, args[1], types.float64, _computed(x))

    return _computed(x)(x, types.float64), generate


@_intrinsic
def representable(typing_context: Any, x: Any, value: Any) -> Any:
    """A vector, or a float64, rounded to what x itself can hold."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if isinstance(value, Vector):
            return _widened(context, builder, x, _narrowed(context, builder, x, args[1]))
        zero, given = ir.IntType(32)(0), _computed(x)
        one = context.cast(builder, args[1], types.float64, given)
        vector = builder.insert_element(ir.Constant(ir.VectorType(one.type, 1), ir.Undefined), one, zero)
        one = builder.extract_element(_widened(context, builder, x, _narrowed(context, builder, x, vector)), zero)
        return context.cast(builder, one, given, types.float64)

    return value(x, value), generate


@_intrinsic
def splat(typing_context: Any, x: Any, value: Any) -> Any:
    """A vector as loaded from x, every lane the float64 value. Slopes of other types (None, 0) are left as they are."""
    vector = _vector(x)
    if isinstance(value, (types.NoneType, types.Integer)):
        return value(x, value), lambda context, builder, signature, args: args[1]

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _all(builder, vector.llvm, context.cast(builder, args[1], types.float64, vector.element))

    return vector(x, types.float64), generate


@_intrinsic
def wide(typing_context: Any, value: Any) -> Any:
    """A vector of float64, every lane the value."""
    vector = Vector(types.float64)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _all(builder, vector.llvm, args[0])

    return vector(types.float64), generate


@_intrinsic
def element(typing_context: Any, x: Any, i: Any) -> Any:
    """x[i] in the type that it is computed in."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        at = _address(builder, args[0], args[1], _in_memory(context, x, 1))
        one = _widened(context, builder, x, builder.load(at, align=_bytes(x)))
        return builder.extract_element(one, ir.IntType(32)(0))

    return _computed(x)(x, types.int64), generate


@_intrinsic
def load(typing_context: Any, x: Any, i: Any) -> Any:
    """x[i], x[i + 1], …"""
    vector = _vector(x)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        at = _address(builder, args[0], args[1], _in_memory(context, x, vector.lanes))
        return _widened(context, builder, x, builder.load(at, align=_bytes(x)))

    return vector(x, types.int64), generate


@_intrinsic
def load_part(typing_context: Any, x: Any, i: Any, count: Any, otherwise: Any) -> Any:
    """The same, where only `count` elements are there; the other lanes are `otherwise`'s. A count of None is all."""
    vector = _vector(x)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        llvm = _in_memory(context, x, vector.lanes)
        at = _address(builder, args[0], args[1], llvm)
        if count == types.none:
            return _widened(context, builder, x, builder.load(at, align=_bytes(x)))
        mask = _mask(builder, vector.lanes, args[2])
        values = _widened(context, builder, x, _masked_load(builder, at, llvm, _bytes(x), mask))
        return builder.select(mask, values, args[3])

    return vector(x, types.int64, count, vector), generate


@_intrinsic
def load_wide(typing_context: Any, x: Any, i: Any, count: Any, otherwise: Any) -> Any:
    """At most eight elements as float64."""
    wide = Vector(types.float64)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        llvm = _in_memory(context, x, wide.lanes)
        mask = _mask(builder, wide.lanes, args[2])
        at = _address(builder, args[0], args[1], llvm)
        values = _widened(context, builder, x, _masked_load(builder, at, llvm, _bytes(x), mask))
        if x.dtype != types.float64:
            values = builder.fpext(values, wide.llvm)
        return builder.select(mask, values, args[3])

    return wide(x, types.int64, types.int64, wide), generate


@_intrinsic
def at(typing_context: Any, values: Any, k: Any) -> Any:
    """The vector at column k of `values`; a vector is its own, for every k."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if isinstance(values, Vector):
            return args[0]
        return builder.load(_address(builder, args[0], args[1], _vector(values).llvm), align=_bytes(values))

    return (values if isinstance(values, Vector) else _vector(values))(values, types.int64), generate


@_intrinsic
def passed(typing_context: Any, values: Any, z: Any, slope: Any) -> Any:
    """The values where z > 0 (or is not a number), slope·values elsewhere, which for slope 0 is exactly 0.

    Without a slope, the values.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if slope == types.none:
            return args[0]
        cut = zero = ir.Constant(values.llvm, None)
        if isinstance(slope, Vector):
            none_passes = builder.fcmp_ordered("==", args[2], zero)
            cut = builder.select(none_passes, zero, builder.fmul(args[0], args[2]))
        return builder.select(builder.fcmp_ordered("<=", args[1], zero), cut, args[0])

    return values(values, values, slope), generate


@_intrinsic
def store(typing_context: Any, y: Any, i: Any, values: Any) -> Any:
    """y[i], y[i + 1], … = values"""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        narrow = _narrowed(context, builder, y, args[2])
        builder.store(narrow, _address(builder, args[0], args[1], narrow.type), align=_bytes(y))
        return context.get_dummy_value()

    return types.none(y, types.int64, values), generate


@_intrinsic
def store_part(typing_context: Any, y: Any, i: Any, count: Any, values: Any) -> Any:
    """The same for the first `count` values, fewer than a vector: half of them or not, a quarter or not, …

    A masked store is many times as slow on some processors, among them Zen 4. A count of None is all.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        index, there, rest, half = args[1], args[2], _narrowed(context, builder, y, args[3]), values.lanes
        if count == types.none:
            builder.store(rest, _address(builder, args[0], index, rest.type), align=_bytes(y))
            half = 1
        while half > 1:
            half //= 2
            low, high = _halves(builder, rest, half)
            taken = builder.icmp_signed("!=", builder.and_(there, there.type(half)), there.type(0))
            with builder.if_then(taken):
                builder.store(low, _address(builder, args[0], index, low.type), align=_bytes(y))
            rest = builder.select(taken, high, low)
            index = builder.add(index, builder.select(taken, index.type(half), index.type(0)))
        return context.get_dummy_value()

    return types.none(y, types.int64, count, values), generate


@_intrinsic
def stream(typing_context: Any, y: Any, i: Any, values: Any) -> Any:
    """The same past the caches, for an address that is a multiple of ROW_ALIGNMENT."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pieces, half = [_narrowed(context, builder, y, args[2])], values.lanes
        if _bytes(y) == 2:  # LLVM would cut a narrowed vector by way of the stack
            while half * 2 > ROW_ALIGNMENT:
                half //= 2
                pieces = [part for piece in pieces for part in _halves(builder, piece, half)]
        for index, piece in enumerate(pieces):
            place = builder.add(args[1], args[1].type(index * half))
            instruction = builder.store(piece, _address(builder, args[0], place, piece.type), align=ROW_ALIGNMENT)
            instruction.set_metadata("nontemporal", builder.module.add_metadata([ir.IntType(32)(1)]))
        return context.get_dummy_value()

    return types.none(y, types.int64, values), generate


@_intrinsic
def either(typing_context: Any, a: Any, b: Any) -> Any:
    """a, or b where a is None."""
    which = 1 if a == types.none else 0
    return (a, b)[which](a, b), lambda context, builder, signature, args: args[which]


@_intrinsic
def unless(typing_context: Any, a: Any, b: Any) -> Any:
    """b where a is None, else None."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return args[1] if a == types.none else context.get_dummy_value()

    return (b if a == types.none else types.none)(a, b), generate


@_intrinsic
def prefetch(typing_context: Any, x: Any, i: Any, ahead: Any) -> Any:
    """Ask for x[i + ahead]'s cache line: the hardware does not foresee where the next run starts.

    Nothing, where one of them is None.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if types.none not in (x, ahead):
            at, integer = builder.gep(args[0], [builder.add(args[1], args[2])]), ir.IntType(32)
            llvm = ir.FunctionType(ir.VoidType(), [at.type, integer, integer, integer])
            function = cgutils.get_or_insert_function(builder.module, llvm, "llvm.prefetch.p0")
            builder.call(function, [at, integer(0), integer(3), integer(1)])
        return context.get_dummy_value()

    return types.none(x, types.int64, ahead), generate


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
    m2 = total(q)
    if m2 - m2 == 0:  # beyond float64 it is infinite, and no ∞ - ∞
        m2 -= total(s) * shift
    return mean + shift, 0.0 if m2 < 0.0 else m2


@_jit
def _gradient_sums_wide(
    dy: Pointer, x: Pointer, y: Data, dz: Data, start: int, runs: int, stride: int, length: int,
    hi: float, a: float, b: float, slope: Slope,
) -> Any:  # fmt: skip
    """Gradient sums of a block in float64; z, with the bits it had, in the type of hi, a and b."""
    s = q = 0.0
    for r in range(runs):
        for i in range(start + r * stride, start + r * stride + length):
            if dz is not None:  # it is there, and dy may be no more
                g = np.float64(element(dz, i))
            else:
                g = np.float64(element(dy, i))
                if slope is not None and (element(x, i) - hi) * a + b <= 0:
                    g = np.float64(g * slope if slope != 0.0 else 0.0)
            s += g
            q += g * (np.float64(element(x, i)) - np.float64(hi))
    return s, q


@_jit
def _within(x: Pointer, scale: float) -> float:
    """The scale, or the largest that x's type can hold: a constant channel's x - hi is 0, and must stay so."""
    largest = LARGEST[lanes(x) // 16]
    return largest if scale > largest else -largest if scale < -largest else scale


@_jit
def _enough(coefficient: float) -> bool:
    """Does float32 hold the coefficient, with all its digits? (NaN is as good there as elsewhere.)"""
    size = abs(coefficient)
    return not (size >= LARGEST[1]) and (coefficient == 0.0 or not (size < SMALLEST))


@_jit
def _is_wide(x: Pointer, hi: float, a: float) -> bool:
    """Is float32 not enough to normalize the channel by? Of `_coefficients`' results."""
    return lanes(x) == 16 and (abs(hi) >= MOST or not _enough(a))


@_jit
def _has_wide_slopes(x: Pointer, var: float, eps: float, sum_dy: float, sum_dy_xmu: float, count: int) -> bool:
    """Is it not enough for the channel's input gradient?"""
    return lanes(x) == 16 and (abs(sum_dy / count) >= MOST or not _enough(sum_dy_xmu / count / (var + eps)))


@_jit
def _scale(x: Pointer, var: float, weight: float, eps: float) -> float:
    """a of y = (x - hi)·a + b."""
    return _within(x, weight / np.sqrt(var + eps))


@_jit
def _coefficients(x: Pointer, mean: float, var: float, weight: float, bias: float, eps: float) -> Any:
    """hi, a and b of y = (x - hi)·a + b."""
    a = _scale(x, var, weight, eps)
    hi = np.float64(rounded(x, mean))
    return hi, a, bias - (mean - hi) * a


@_jit
def _slopes(
    x: Pointer, mean: float, var: float, a: float, eps: float, sum_dy: float, sum_dy_xmu: float, count: int
) -> Any:
    """m, k and c of dx = ((dy - m) - (x - hi)·k)·a + c."""
    k = sum_dy_xmu / count / (var + eps)
    m = np.float64(rounded(x, sum_dy / count))
    hi = np.float64(rounded(x, mean))
    return m, k, a * ((mean - hi) * k - (sum_dy / count - m))


@_jit
def _head(y: Pointer, start: int, length: int, alignment: int) -> Any:
    """Elements from `start` to the first address that is aligned."""
    return min(length, (-address(y, start) & (alignment - 1)) // size(y))  # % would be a division a row


# ---- the element-wise steps: a formula of the vector at i, whose column is k ----
#
# n: how many of its elements are there, or None: all. ahead: how far on from i the next run is, or None. Coefficients
# are a vector (runs), or a pointer to a value a column.


@_formula
def _normalized(
    i: int, k: int, n: Any, ahead: Any, x: Pointer, added: Data, hi: Any, a: Any, b: Any, slope: Slope
) -> Any:
    """y = act((x - hi)·a + b + added)"""
    prefetch(x, i, ahead)
    prefetch(added, i, ahead)
    h = at(hi, k)
    z = (load_part(x, i, n, h) - h) * at(a, k) + at(b, k)
    if added is not None:
        z = z + load_part(added, i, n, h)
    return passed(z, z, slope)


@_formula
def _gradient(i: int, n: Any, dy: Pointer, y: Data, dz: Data, d: Any, a: Any, b: Any, slope: Slope, zero: Any) -> Any:
    """dz: dy, as far as the activation passed it. d is x - hi. Writes dz, if it is kept."""
    g = load_part(dy, i, n, zero)
    if y is None:
        return passed(g, d * a + b, slope)
    g = passed(g, load_part(y, i, n, zero), slope)
    store_part(dz, i, n, g)
    return g


@_formula
def _input_gradient(
    i: int, k: int, n: Any, ahead: Any, dy: Pointer, x: Pointer, hi: Any, a: Any, b: Any, m: Any, c: Any, e: Any,
    slope: Slope,
) -> Any:  # fmt: skip
    """dx = ((dz - m) - (x - hi)·c)·a + e"""
    prefetch(x, i, ahead)
    prefetch(dy, i, ahead)
    h = at(hi, k)
    d = load_part(x, i, n, h) - h
    g = _gradient(i, n, dy, None, None, d, at(a, k), at(b, k), slope, h)
    return ((g - at(m, k)) - d * at(c, k)) * at(a, k) + at(e, k)


@_formula
def _scaled_gradient(
    i: int, k: int, n: Any, ahead: Any, dy: Pointer, x: Pointer, hi: Any, a: Any, b: Any, slope: Slope
) -> Any:
    """dx = dz·a, where the statistics are constants."""
    prefetch(x, i, ahead)
    prefetch(dy, i, ahead)
    h = at(hi, k)
    d = load_part(x, i, n, h) - h
    return _gradient(i, n, dy, None, None, d, at(a, k), at(b, k), slope, h) * at(a, k)


def _sweep(formula: Callable[..., Any]) -> Callable[..., None]:
    """The formula over `rows` runs (or rows of columns) of `length` elements, the first at `start`, `stride` apart."""

    def sweep(
        out: Pointer, start: int, rows: int, stride: int, length: int, ahead: Any, streaming: int, *args: Any
    ) -> None:
        for r in range(rows):
            i, k = start + r * stride, 0
            if streaming > 0:
                head = _head(out, i, length, streaming)
                k = head % lanes(out)
                if k > 0:
                    store_part(out, i, k, formula(i, 0, k, ahead, *args))
                if k < head:  # a vector of a half type is half a line
                    store(out, i + k, formula(i + k, k, None, ahead, *args))
                    k = head
                whole = length - ((length - head) & (max(lanes(out), streaming // size(out)) - 1))
                while k < whole:
                    stream(out, i + k, formula(i + k, k, None, ahead, *args))
                    k += lanes(out)
            while k + lanes(out) <= length:
                store(out, i + k, formula(i + k, k, None, ahead, *args))
                k += lanes(out)
            if k < length:
                store_part(out, i + k, length - k, formula(i + k, k, length - k, ahead, *args))

    return _jit(sweep)


_normalize = _sweep(_normalized)
_give_input_gradient = _sweep(_input_gradient)
_scale_gradient = _sweep(_scaled_gradient)


# ---- runs ----


@_jit
def _moments_runs(x: Pointer, start: int, runs: int, stride: int, length: int) -> Any:
    """Mean and m2 of a block of `runs` runs of `length` values, the first at `start`, `stride` apart."""
    # The pivot: the mean of the first values. To pick them from all over the block cost as much as the sums. It is a
    # number that x can hold, so that x - pivot has few digits where x has. Were they all odd multiples of a small step,
    # so would their squares be, and sums would round them the same way every time.
    origin = np.float64(element(x, start))  # a constant block's pivot is exactly its value
    few = 16  # or fewer, a power of two: the mean of values of few digits then has few digits
    while few > length:
        few //= 2
    shift = 0.0
    for i in range(1, few):
        shift += np.float64(element(x, start + i)) - origin
    pivot = representable(x, origin + shift / few)

    p = splat(x, pivot)
    s0 = s1 = q0 = q1 = splat(x, 0.0)
    following = stride if runs > 1 else 0
    for r in range(runs):
        i = start + r * stride
        end = i + length
        # Four terms are added to each other before they are added to a sum: a quarter of the roundings, and none that
        # goes one way time after time, as those of squares (which are 0 or 1 modulo 4) and of equal terms do.
        while i + 8 * lanes(x) <= end:
            for j in range(2):
                at_ = i + j * lanes(x)
                prefetch(x, at_, following)
                prefetch(x, at_ + 2 * lanes(x), following)
                prefetch(x, at_ + 4 * lanes(x), following)
                prefetch(x, at_ + 6 * lanes(x), following)
                d0, d1 = load(x, at_) - p, load(x, at_ + 2 * lanes(x)) - p
                d2, d3 = load(x, at_ + 4 * lanes(x)) - p, load(x, at_ + 6 * lanes(x)) - p
                if j == 0:
                    s0 = s0 + ((d0 + d1) + (d2 + d3))
                    q0 = q0 + ((d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3))
                else:
                    s1 = s1 + ((d0 + d1) + (d2 + d3))
                    q1 = q1 + ((d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3))
            i += 8 * lanes(x)
        while i + 2 * lanes(x) <= end:
            prefetch(x, i, following)
            prefetch(x, i + lanes(x), following)
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
def _gradient_sums_runs(
    dy: Pointer, x: Pointer, y: Data, dz: Data, start: int, runs: int, stride: int, length: int,
    hi: float, a: float, b: float, slope: Slope,
) -> Any:  # fmt: skip
    """Σ dz and Σ dz·(x - hi) of a block. Writes dz, if it is kept."""
    h, va, vb, vs, zero = splat(x, hi), splat(x, a), splat(x, b), splat(x, slope), splat(x, 0.0)
    s0 = s1 = q0 = q1 = zero
    following = stride if runs > 1 else 0
    for r in range(runs):
        i = start + r * stride
        end = i + length
        while i + 8 * lanes(x) <= end:
            for j in range(2):
                i0 = i + j * lanes(x)
                i1, i2, i3 = i0 + 2 * lanes(x), i0 + 4 * lanes(x), i0 + 6 * lanes(x)
                for at_ in (i0, i1, i2, i3):
                    prefetch(x, at_, following)
                    prefetch(dy, at_, following)
                    prefetch(y, at_, following)
                d0, d1, d2, d3 = load(x, i0) - h, load(x, i1) - h, load(x, i2) - h, load(x, i3) - h
                g0 = _gradient(i0, None, dy, y, dz, d0, va, vb, vs, zero)
                g1 = _gradient(i1, None, dy, y, dz, d1, va, vb, vs, zero)
                g2 = _gradient(i2, None, dy, y, dz, d2, va, vb, vs, zero)
                g3 = _gradient(i3, None, dy, y, dz, d3, va, vb, vs, zero)
                if j == 0:
                    s0 = s0 + ((g0 + g1) + (g2 + g3))
                    q0 = q0 + ((g0 * d0 + g1 * d1) + (g2 * d2 + g3 * d3))
                else:
                    s1 = s1 + ((g0 + g1) + (g2 + g3))
                    q1 = q1 + ((g0 * d0 + g1 * d1) + (g2 * d2 + g3 * d3))
            i += 8 * lanes(x)
        while i + 2 * lanes(x) <= end:
            j = i + lanes(x)
            for at_ in (i, j):
                prefetch(x, at_, following)
                prefetch(dy, at_, following)
                prefetch(y, at_, following)
            d0, d1 = load(x, i) - h, load(x, j) - h
            g0 = _gradient(i, None, dy, y, dz, d0, va, vb, vs, zero)
            g1 = _gradient(j, None, dy, y, dz, d1, va, vb, vs, zero)
            s0 = s0 + g0
            s1 = s1 + g1
            q0 = q0 + g0 * d0
            q1 = q1 + g1 * d1
            i += 2 * lanes(x)
        if i + lanes(x) <= end:
            d0 = load(x, i) - h
            g0 = _gradient(i, None, dy, y, dz, d0, va, vb, vs, zero)
            s0 = s0 + g0
            q0 = q0 + g0 * d0
            i += lanes(x)
        if i < end:
            d0 = load_part(x, i, end - i, h) - h
            g0 = _gradient(i, end - i, dy, y, dz, d0, va, vb, vs, zero)
            s0 = s0 + g0
            q0 = q0 + g0 * d0
    s, q = total(s0) + total(s1), total(q0) + total(q1)
    if (s + q) - (s + q) != 0.0:
        return _gradient_sums_wide(
            dy, x, y, dz, start, runs, stride, length, rounded(x, hi), rounded(x, a), rounded(x, b), slope
        )
    return s, q


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
    task: int, x_: Array, y_: Array, added_: Data, apply: bool, outer: int, channels: int, inner: int,
    group: int, extent: int, chunk: int, chunks: int, mean: Array, m2: Array, weight: Array,
    bias: Array, eps: float, slope: Slope, streaming: int, left: Array,
) -> None:  # fmt: skip
    x, y, added = pointer(x_), pointer(y_), pointer(added_)
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
        if _is_wide(x, hi, a):
            left[0] = True
            return
        v = splat(x, hi), splat(x, a), splat(x, b), splat(x, slope)
        for block in range(last - 1, first - 1, -1):
            start, runs, length = _block(block, outer, channels, inner)
            _normalize(y, origin + start, runs, stride, length, None, streaming, x, added, v[0], v[1], v[2], v[3])
        fence()


@_jit
def _backward_runs(
    task: int, dy_: Array, x_: Array, dx_: Array, y_: Data, dz_: Data, steps: int,
    outer: int, channels: int, inner: int, group: int, extent: int, chunk: int, chunks: int,
    mean: Array, var: Array, sum_dy: Array, sum_dy_xmu: Array, weight: Array, bias: Array, eps: float, slope: Slope,
    streaming: int, left: Array,
) -> None:  # fmt: skip
    dy, x, dx, y, dz = pointer(dy_), pointer(x_), pointer(dx_), pointer(y_), pointer(dz_)
    channel, part = task // chunks, task % chunks
    first, last = part * chunk, min(part * chunk + chunk, extent)
    stride, origin = channels * inner, channel * inner
    hi, a, b = _coefficients(x, mean[channel], var[channel], weight[channel], bias[channel], eps)
    wide = _is_wide(x, hi, a)
    if wide:
        left[0] = True
    if steps & SUM:
        s = q = 0.0
        for block in range(first, last):
            start, runs, length = _block(block, outer, channels, inner)
            sums = _gradient_sums_runs(dy, x, y, dz, origin + start, runs, stride, length, hi, a, b, slope)
            s += sums[0]
            q += sums[1]
        sum_dy[part, channel], sum_dy_xmu[part, channel] = s, q - (mean[channel] - hi) * s
    if steps & APPLY:
        s, q = sum_dy[0, channel], sum_dy_xmu[0, channel]
        if wide or _has_wide_slopes(x, var[channel], eps, s, q, outer * inner):
            left[0] = True
            return
        m, k, c = _slopes(x, mean[channel], var[channel], a, eps, s, q, outer * inner)
        g, vs = either(dz, dy), unless(dz, splat(x, slope))  # dz is there already, or yet to be made
        v = splat(x, hi), splat(x, a), splat(x, b), splat(x, m), splat(x, k), splat(x, c)
        for block in range(last - 1, first - 1, -1):
            start, runs, length = _block(block, outer, channels, inner)
            _give_input_gradient(
                dx, origin + start, runs, stride, length, None, streaming,
                g, x, v[0], v[1], v[2], v[3], v[4], v[5], vs,
            )  # fmt: skip
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
    """The mean of the first eight rows, or of the first row's first values of the channel."""
    if inner == 1:
        zero, eighth = splat(x, 0.0), splat(x, 0.125)
        for k in range(0, width, lanes(x)):
            origin = load_part(x, start + k, width - k, zero)  # a constant channel's pivot is exactly its value
            s = zero
            for i in range(1, 8):
                s = s + (load_part(x, start + min(i, rows - 1) * stride + k, width - k, zero) - origin)
            store(pivot, k, representable(x, origin + s * eighth))
    else:
        few = 16  # as for runs
        while few > inner:
            few //= 2
        for c in range(width):
            at = start + c * inner
            first = np.float64(element(x, at))
            origin, s = splat(x, first), splat(x, 0.0)
            for j in range(0, few, lanes(x)):
                s = s + (load_part(x, at + j, few - j, origin) - origin)
            _fill(pivot, c * inner, inner, representable(x, first + total(s) / few))


@_jit
def _ahead(x: Pointer, stride: int, columns: int) -> Any:
    """Where to prefetch while four rows are summed: how far on from there, and how to step while k goes along a row.

    Memory likes to be read in order: where the columns are the whole row, four later rows are one run, and the four
    vectors from 4k on are asked for at column k; else column k of each of four rows.
    """
    row = stride * size(x)
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
            for j in range(4):
                prefetch(x, i + k * (across - 1) + j * down, later)
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
        s, q, rest = splat(x, 0.0), splat(x, 0.0), columns - whole
        for r in range(0, grouped, 4):
            i = start + r * stride + whole
            d0, d1 = load_part(x, i, rest, p) - p, load_part(x, i + stride, rest, p) - p
            d2, d3 = load_part(x, i + 2 * stride, rest, p) - p, load_part(x, i + 3 * stride, rest, p) - p
            s = s + ((d0 + d1) + (d2 + d3))
            q = q + ((d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3))
        for r in range(grouped, rows):
            d = load_part(x, start + r * stride + whole, rest, p) - p
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
    dy: Pointer, x: Pointer, y: Data, dz: Data, start: int, rows: int, stride: int, width: int, inner: int,
    hi: Pointer, a: Pointer, b: Pointer, slope: Slope, sums: Pointer, products: Pointer,
    sum_dy: Pointer, sum_dy_x: Pointer, to: int,
) -> None:  # fmt: skip
    """Add a block's Σ dz and Σ dz·(x - hi) to sum_dy[to:] and sum_dy_x[to:]. Writes dz, if it is kept."""
    columns = width * inner
    whole = columns - columns % lanes(x)
    zero, vs = splat(x, 0.0), splat(x, slope)
    _fill(sums, 0, columns, 0.0)
    _fill(products, 0, columns, 0.0)
    grouped = rows - rows % 4
    later, across, down = _ahead(x, stride, columns)
    for r in range(0, grouped, 4):
        for k in range(0, whole, lanes(x)):
            i = start + r * stride + k
            for j in range(4):
                ask = i + k * (across - 1) + j * down
                prefetch(x, ask, later)
                prefetch(dy, ask, later)
                prefetch(y, ask, later)
            h, va, vb = at(hi, k), at(a, k), at(b, k)
            d0, d1 = load(x, i) - h, load(x, i + stride) - h
            d2, d3 = load(x, i + 2 * stride) - h, load(x, i + 3 * stride) - h
            g0 = _gradient(i, None, dy, y, dz, d0, va, vb, vs, zero)
            g1 = _gradient(i + stride, None, dy, y, dz, d1, va, vb, vs, zero)
            g2 = _gradient(i + 2 * stride, None, dy, y, dz, d2, va, vb, vs, zero)
            g3 = _gradient(i + 3 * stride, None, dy, y, dz, d3, va, vb, vs, zero)
            store(sums, k, load(sums, k) + ((g0 + g1) + (g2 + g3)))
            store(products, k, load(products, k) + ((g0 * d0 + g1 * d1) + (g2 * d2 + g3 * d3)))
    for r in range(grouped, rows):
        for k in range(0, whole, lanes(x)):
            i = start + r * stride + k
            d0 = load(x, i) - at(hi, k)
            g0 = _gradient(i, None, dy, y, dz, d0, at(a, k), at(b, k), vs, zero)
            store(sums, k, load(sums, k) + g0)
            store(products, k, load(products, k) + g0 * d0)
    if whole < columns:
        h, va, vb, s, q, n = at(hi, whole), at(a, whole), at(b, whole), zero, zero, columns - whole
        for r in range(0, grouped, 4):
            i = start + r * stride + whole
            d0, d1 = load_part(x, i, n, h) - h, load_part(x, i + stride, n, h) - h
            d2, d3 = load_part(x, i + 2 * stride, n, h) - h, load_part(x, i + 3 * stride, n, h) - h
            g0 = _gradient(i, n, dy, y, dz, d0, va, vb, vs, zero)
            g1 = _gradient(i + stride, n, dy, y, dz, d1, va, vb, vs, zero)
            g2 = _gradient(i + 2 * stride, n, dy, y, dz, d2, va, vb, vs, zero)
            g3 = _gradient(i + 3 * stride, n, dy, y, dz, d3, va, vb, vs, zero)
            s = s + ((g0 + g1) + (g2 + g3))
            q = q + ((g0 * d0 + g1 * d1) + (g2 * d2 + g3 * d3))
        for r in range(grouped, rows):
            i = start + r * stride + whole
            d0 = load_part(x, i, n, h) - h
            g0 = _gradient(i, n, dy, y, dz, d0, va, vb, vs, zero)
            s = s + g0
            q = q + g0 * d0
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
                k, i = c * inner, start + c * inner
                s_[c], q_[c] = _gradient_sums_wide(
                    dy, x, y, dz, i, rows, stride, inner, hi[k], a[k], b[k], slope
                )  # fmt: skip
    for c in range(width):
        sum_dy[to + c] += s_[c]
        sum_dy_x[to + c] += q_[c]


@_jit
def _forward_columns(
    task: int, x_: Array, y_: Array, added_: Data, apply: bool, outer: int, channels: int, inner: int,
    group: int, extent: int, chunk: int, chunks: int, mean: Array, m2: Array, weight: Array,
    bias: Array, eps: float, slope: Slope, streaming: int, left: Array,
) -> None:  # fmt: skip
    x, y, added = pointer(x_), pointer(y_), pointer(added_)
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
            v = _coefficients(x, mean[0, c], m2[0, c] / (outer * inner), weight[c], bias[c], eps)
            if _is_wide(x, v[0], v[1]):
                left[0] = True
                return
            _fill(hi, i * inner, inner, v[0])
            _fill(a, i * inner, inner, v[1])
            _fill(b, i * inner, inner, v[2])
        vs = splat(x, slope)
        for end in range(last, first, -BLOCK_ROWS):
            row = max(end - BLOCK_ROWS, first)
            start = origin + row * stride
            _normalize(y, start, end - row, stride, width * inner, stride, streaming, x, added, hi, a, b, vs)
        fence()


@_jit
def _backward_columns(
    task: int, dy_: Array, x_: Array, dx_: Array, y_: Data, dz_: Data, steps: int,
    outer: int, channels: int, inner: int, group: int, extent: int, chunk: int, chunks: int,
    mean: Array, var: Array, sum_dy: Array, sum_dy_xmu: Array, weight: Array, bias: Array, eps: float, slope: Slope,
    streaming: int, left: Array,
) -> None:  # fmt: skip
    dy, x, dx, y, dz = pointer(dy_), pointer(x_), pointer(dx_), pointer(y_), pointer(dz_)
    channel, part = task // chunks * group, task % chunks
    first, last = part * chunk, min(part * chunk + chunk, extent)
    width, stride, origin = min(group, channels - channel), channels * inner, channel * inner
    hi, a, b, m, k, c = scratch(x), scratch(x), scratch(x), scratch(x), scratch(x), scratch(x)
    wide = False
    for i in range(width):
        ch = channel + i
        v = _coefficients(x, mean[ch], var[ch], weight[ch], bias[ch], eps)
        wide = wide or _is_wide(x, v[0], v[1])
        _fill(hi, i * inner, inner, v[0])
        _fill(a, i * inner, inner, v[1])
        _fill(b, i * inner, inner, v[2])
    if steps & SUM:
        sum_dy[part, channel : channel + width] = 0.0
        sum_dy_xmu[part, channel : channel + width] = 0.0
        for row in range(first, last, BLOCK_ROWS):
            _gradient_sums_columns(
                dy, x, y, dz, origin + row * stride, min(BLOCK_ROWS, last - row), stride, width, inner, hi, a, b, slope,
                m, k, pointer(sum_dy), pointer(sum_dy_xmu), part * channels + channel,
            )  # fmt: skip
        for ch in range(channel, channel + width):
            low = mean[ch] - np.float64(rounded(x, mean[ch]))
            sum_dy_xmu[part, ch] -= low * sum_dy[part, ch]
    if wide:
        left[0] = True
    if steps & APPLY:
        for i in range(width):
            ch = channel + i
            wide = wide or _has_wide_slopes(x, var[ch], eps, sum_dy[0, ch], sum_dy_xmu[0, ch], outer * inner)
            scale = _scale(x, var[ch], weight[ch], eps)
            u = _slopes(x, mean[ch], var[ch], scale, eps, sum_dy[0, ch], sum_dy_xmu[0, ch], outer * inner)
            _fill(m, i * inner, inner, u[0])
            _fill(k, i * inner, inner, u[1])
            _fill(c, i * inner, inner, u[2])
        if wide:
            left[0] = True
            return
        g, vs = either(dz, dy), unless(dz, splat(x, slope))  # dz is there already, or yet to be made
        for end in range(last, first, -BLOCK_ROWS):
            row = max(end - BLOCK_ROWS, first)
            _give_input_gradient(
                dx, origin + row * stride, end - row, stride, width * inner, stride, streaming,
                g, x, hi, a, b, m, k, c, vs,
            )  # fmt: skip
        fence()


# ---- eval: memory in order ----


def _stretch(sweep: Callable[..., None]) -> Callable[..., None]:
    """About STRETCH values with given coefficients.

    `last`: the array's last task, where tasks go backwards, or -1. `second` is the sweep's other input, or None.
    """

    def stretch(
        task: int, first_: Array, second_: Data, out_: Array, outer: int, channels: int, inner: int, last: int,
        coefficients: Array, slope: Slope, streaming: int,
    ) -> None:  # fmt: skip
        first, second, out = pointer(first_), pointer(second_), pointer(out_)
        if last >= 0:
            task = last - task
        hi, a, b, vs = coefficients[0], coefficients[1], coefficients[2], splat(first, slope)
        if inner == 1:
            n = max(STRETCH // channels, 1)
            row = task * n
            sweep(
                out, row * channels, min(n, outer - row), channels, channels, channels, streaming,
                first, second, pointer(hi), pointer(a), pointer(b), vs,
            )  # fmt: skip
        else:
            n, pieces = max(STRETCH // inner, 1), (inner + STRETCH - 1) // STRETCH
            start = task % pieces * STRETCH
            length = min(STRETCH, inner - start)
            plane = task // pieces * n
            for p in range(plane, min(plane + n, outer * channels)):
                c = p % channels
                v = splat(first, np.float64(hi[c])), splat(first, np.float64(a[c])), splat(first, np.float64(b[c]))
                sweep(out, p * inner + start, 1, 0, length, None, streaming, first, second, v[0], v[1], v[2], vs)
        fence()

    return _jit(stretch)


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
            function(np.int64(task), *args)  # prange's own index is unsigned: the function would be compiled again

    return Drivers(_jit(serial), _parallel(parallel))


NORMALIZE, SCALE_GRADIENT = _drivers(_stretch(_normalize)), _drivers(_stretch(_scale_gradient))
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

    They pay where the last-level cache does not hold input and output, a fifth of it left to others; a call that comes
    back to its input wants the cache for that.
    """
    most = _last_level_cache() // 4 if passes > 1 else _last_level_cache() * 2 // 5
    if y.nbytes <= most or not y.flags.aligned:
        return 0
    if inner > 1:
        return LINE_ALIGNMENT
    return 0 if channels * y.itemsize % ROW_ALIGNMENT or y.ctypes.data % ROW_ALIGNMENT else ROW_ALIGNMENT


def _flat(x: Array) -> Array:
    """A flat view, of a type that the JIT knows: see HALF."""
    if x.itemsize == 2:
        x = x.view(np.uint16 if x.dtype == np.float16 else np.int16)
    return x.reshape(-1)


def _input(x: Array) -> Array:
    """A flat read-only view: one type for the JIT, whatever the caller's array allows."""
    flat = _flat(x)
    flat.flags.writeable = False
    return flat


def _given(x: Array | None) -> Data:
    return None if x is None else _input(x)


@lru_cache(maxsize=64)
def _default(channels: int, value: float) -> Array:
    return _input(np.full(channels, value))


def _parameter(values: Array | None, channels: int, otherwise: float) -> Array:
    """float64, in the form of `_input`."""
    return _default(channels, otherwise) if values is None else _input(np.asarray(values, np.float64))


def _slope(slope: float, beside: Array | None) -> Slope:
    """The slope in the JIT's types: see the design. `beside`: a residual, or the y that tells what became of it."""
    if beside is not None:
        return float(slope)
    return None if slope == 1 else 0 if slope == 0 else float(slope)


def _coefficients_of_all(
    x: Array, channels: int, mean: Array, var: Array, weight: Array | None, bias: Array | None, eps: float
) -> Array:
    """`_coefficients` in the type that x is computed in, with the same bits, and room for the last vector."""
    a = (1.0 if weight is None else weight) / np.sqrt(np.asarray(var, np.float64) + eps)
    if x.itemsize < 8:
        np.clip(a, -LARGEST[1], LARGEST[1], out=a)  # see _within
    coefficients = np.zeros((3, channels + 2 * VECTOR_BYTES), np.float64 if x.itemsize == 8 else np.float32)
    hi = coefficients[0, :channels]
    hi[...] = mean
    coefficients[1, :channels] = a
    a *= hi - mean
    coefficients[2, :channels] = a if bias is None else a + bias
    return coefficients


# ---- wide channels, and those of the same task: in NumPy ----


def _held(coefficients: Array) -> Array:
    """`_enough`, of an array."""
    size = np.abs(coefficients)
    return ~(size >= LARGEST[1]) & ((size == 0) | ~(size < SMALLEST))  # type: ignore[no-any-return]


class Vectors(NamedTuple):
    """What channels are normalized by, (channels, 1), float64; and which are wide (`_is_wide`)."""

    mean: Array
    scale: Array
    bias: Array
    wide: Array


def _vectors(mean: Array, var: Array, weight: Array | None, bias: Array | None, eps: float) -> Vectors:
    mean, var = np.asarray(mean, np.float64), np.asarray(var, np.float64)
    scale = (1.0 if weight is None else np.asarray(weight, np.float64)) / np.sqrt(var + eps)
    shift = np.zeros_like(mean) if bias is None else np.asarray(bias, np.float64)
    wide = (np.abs(mean.astype(np.float32)) >= MOST) | ~_held(scale)
    return Vectors(*(values[:, np.newaxis] for values in (mean, scale, shift, wide)))


def _unwritten(wide: Array, group: int) -> Array:
    """The channels whose task has a wide one: kernels have left them."""
    return np.flatnonzero(np.repeat(np.logical_or.reduceat(wide, np.arange(0, wide.size, group)), group)[: wide.size])


def _z(x: Array, v: Vectors) -> Array:
    """(outer, channels, inner) float32: as kernels round it, or, of wide channels, once."""
    hi, a = v.mean.astype(np.float32), v.scale.astype(np.float32)
    b = (v.bias - (v.mean - hi) * v.scale).astype(np.float32)
    return np.where(v.wide, ((x - v.mean) * v.scale + v.bias).astype(np.float32), (x - hi) * a + b)


def _passed(values: Array, z: Array, slope: float) -> Array:
    return np.where(z <= 0, values * np.float32(slope) if slope else np.float32(0), values)


def _mend_forward(
    which: Array, x: Array, y: Array, outer: int, channels: int, inner: int,
    mean: Array, var: Array, weight: Array | None, bias: Array | None, eps: float,
    residual: Array | None, slope: float,
) -> None:  # fmt: skip
    """`normalize`, of the channels `which`."""
    shape = outer, channels, inner
    v = Vectors(*(values[which] for values in _vectors(mean, var, weight, bias, eps)))
    z = _z(x.reshape(shape)[:, which].astype(np.float32), v)
    if residual is not None:
        z += residual.reshape(shape)[:, which].astype(np.float32)
    y.reshape(shape)[:, which] = _passed(z, z, slope)


def _mend_backward(
    which: Array, dy: Array, x: Array, dx: Array | None, outer: int, channels: int, inner: int,
    mean: Array, var: Array, weight: Array | None, bias: Array | None, eps: float, batch: bool,
    sums: Array, dresidual: Array | None, slope: float,
) -> None:  # fmt: skip
    """dx of the channels `which`; or, without dx, their sums (all are wide ones then)."""
    shape = outer, channels, inner
    v = Vectors(*(values[which] for values in _vectors(mean, var, weight, bias, eps)))
    x = x.reshape(shape)[:, which].astype(np.float32)
    if dresidual is not None:
        dz = dresidual.reshape(shape)[:, which].astype(np.float32)
    else:
        dz = dy.reshape(shape)[:, which].astype(np.float32)
        if slope != 1:
            dz = _passed(dz, _z(x, v), slope)
    if dx is None:
        sums[0, which] = dz.sum(axis=(0, 2), dtype=np.float64)
        sums[1, which] = (dz * (x - v.mean)).sum(axis=(0, 2))
        return
    if not batch:
        dx.reshape(shape)[:, which] = np.where(
            v.wide, (dz * v.scale).astype(np.float32), dz * v.scale.astype(np.float32)
        )
        return
    m = sums[0, which, np.newaxis] / (outer * inner)
    k = sums[1, which, np.newaxis] / (outer * inner) / (np.asarray(var, np.float64)[which, np.newaxis] + eps)
    wide = v.wide | (np.abs(m) >= MOST) | ~_held(k)
    hi, a, near = v.mean.astype(np.float32), v.scale.astype(np.float32), m.astype(np.float32)
    rest = (v.scale * ((v.mean - hi) * k - (m - near))).astype(np.float32)
    normal = ((dz - near) - (x - hi) * k.astype(np.float32)) * a + rest
    exact = (((dz - m) - (x - v.mean) * k) * v.scale).astype(np.float32)
    dx.reshape(shape)[:, which] = np.where(wide, exact, normal)


# ---- the interface ----


def _forward(
    grid: Grid, apply: bool, x: Array, y: Array, outer: int, channels: int, inner: int, mean: Array, m2: Array,
    weight: Array | None, bias: Array | None, eps: float, added: Data, slope: Slope, threads: int,
) -> bool:  # fmt: skip
    """Whether a task with a wide channel left y unwritten."""
    left = np.zeros(1, np.bool_)
    _run(
        FORWARD[grid.kind], grid.groups * grid.chunks, threads, _input(x), _flat(y), added, apply,
        outer, channels, inner, grid.group, grid.extent, grid.chunk, grid.chunks, mean, m2,
        _parameter(weight, channels, 1.0), _parameter(bias, channels, 0.0), eps, slope,
        _streaming(y, 2, channels, inner), left,
    )  # fmt: skip
    return bool(left[0])


def _moments(
    grid: Grid, x: Array, outer: int, channels: int, inner: int, mean: Array, m2: Array, added: Data, slope: Slope,
    threads: int,
) -> None:  # fmt: skip
    """`added` and `slope` do nothing but choose the forward pass's compiled code, which is there or will be needed."""
    if grid.chunks == 1:
        parts: Any = (mean.reshape(1, -1), m2.reshape(1, -1))
    else:
        parts = np.empty((2, grid.chunks, channels))
    nowhere = np.empty(0, x.dtype)
    _forward(
        grid, False, x, nowhere, outer, channels, inner, parts[0], parts[1], None, None, 0.0, added, slope, threads
    )
    if grid.chunks > 1:
        _merge_chunks(grid.counts, parts[0], parts[1], mean, m2)


def moments(x: Array, outer: int, channels: int, inner: int, mean: Array, m2: Array, threads: int) -> None:
    """mean = Σx / n,  m2 = Σ(x - mean)². Writes mean and m2."""
    grid = _grid(outer, channels, inner, x.itemsize)
    _moments(grid, x, outer, channels, inner, mean, m2, None, None, threads)


def _over_memory(
    drivers: Drivers, first: Array, second: Array | None, out: Array, outer: int, channels: int, inner: int,
    coefficients: Array, slope: Slope, backwards: bool, threads: int,
) -> None:  # fmt: skip
    streaming = _streaming(out, 2 if backwards else 1, channels, inner)
    if inner == 1:
        tasks = _up(outer, max(STRETCH // channels, 1))
    else:
        if inner < SMALL_PLANE:
            streaming = 0  # too few whole lines
        tasks = _up(outer * channels, max(STRETCH // inner, 1)) * _up(inner, STRETCH)
    _run(
        drivers, tasks, threads, _input(first), _given(second), _flat(out), outer, channels, inner,
        tasks - 1 if backwards else -1, coefficients, slope, streaming,
    )  # fmt: skip


@_quiet
def normalize(
    x: Array, y: Array, outer: int, channels: int, inner: int,
    mean: Array, var: Array, weight: Array | None, bias: Array | None, eps: float,
    residual: Array | None, slope: float, threads: int, backwards: bool = False,
) -> None:  # fmt: skip
    """y = act((x - mean) / sqrt(var + eps) · weight + bias + residual). Writes y, which may be x or residual."""
    if x.itemsize < 8 and _vectors(mean, var, weight, None, eps).wide.any():
        everything = np.arange(channels)
        _mend_forward(everything, x, y, outer, channels, inner, mean, var, weight, bias, eps, residual, slope)
        return
    coefficients = _coefficients_of_all(x, channels, mean, var, weight, bias, eps)
    act = _slope(slope, residual)
    _over_memory(NORMALIZE, x, residual, y, outer, channels, inner, coefficients, act, backwards, threads)


@_quiet
def forward(
    x: Array, y: Array, outer: int, channels: int, inner: int,
    weight: Array | None, bias: Array | None, eps: float, mean: Array, var: Array,
    residual: Array | None, slope: float, threads: int,
) -> None:  # fmt: skip
    """moments, then normalize with them. Writes y, mean and var."""
    grid = _grid(outer, channels, inner, x.itemsize)
    added, act = _given(residual), _slope(slope, residual)
    if grid.chunks == 1:
        parts: Any = mean.reshape(1, -1), var.reshape(1, -1)
        left = _forward(
            grid, True, x, y, outer, channels, inner, parts[0], parts[1], weight, bias, eps, added, act, threads
        )  # fmt: skip
        var /= outer * inner
        if left:
            which = _unwritten(_vectors(mean, var, weight, None, eps).wide[:, 0], grid.group)
            _mend_forward(which, x, y, outer, channels, inner, mean, var, weight, bias, eps, residual, slope)
    else:
        _moments(grid, x, outer, channels, inner, mean, var, added, act, threads)
        var /= outer * inner
        normalize(
            x, y, outer, channels, inner, mean, var, weight, bias, eps, residual, slope, threads, backwards=True
        )  # fmt: skip


def _backward(
    grid: Grid, steps: int, dy: Array, x: Array, dx: Array, outer: int, channels: int, inner: int,
    mean: Array, var: Array | None, sum_dy: Array, sum_dy_xmu: Array, weight: Array | None, bias: Array | None,
    eps: float, y: Data, dz: Data, slope: Slope, threads: int,
) -> bool:  # fmt: skip
    """Whether there was a wide channel: its sums are wrong, and dx of its task was left unwritten."""
    left = np.zeros(1, np.bool_)
    _run(
        BACKWARD[grid.kind], grid.groups * grid.chunks, threads,
        _input(dy), _input(x), _flat(dx), y, dz, steps, outer, channels, inner,
        grid.group, grid.extent, grid.chunk, grid.chunks, _parameter(mean, channels, 0.0),
        _parameter(var, channels, 1.0), sum_dy, sum_dy_xmu,
        _parameter(weight, channels, 1.0), _parameter(bias, channels, 0.0), eps, slope,
        _streaming(dx, 2, channels, inner), left,
    )  # fmt: skip
    return bool(left[0])


def gradient_moments(
    dy: Array, x: Array, outer: int, channels: int, inner: int,
    mean: Array, sum_dy: Array, sum_dy_xmu: Array, threads: int,
) -> None:  # fmt: skip
    """sum_dy = Σdy,  sum_dy_xmu = Σ dy·(x - mean). Writes both."""
    grid = _grid(outer, channels, inner, x.itemsize)
    nowhere = np.empty(0, x.dtype)
    parts: Any = np.empty((2, grid.chunks, channels))
    _backward(
        grid, SUM, dy, x, nowhere, outer, channels, inner, mean, None, parts[0], parts[1], None, None, 0.0,
        None, None, None, threads,
    )  # fmt: skip
    sum_dy[...], sum_dy_xmu[...] = parts.sum(axis=1)


@_quiet
def input_gradient(
    dy: Array, x: Array, dx: Array, outer: int, channels: int, inner: int,
    mean: Array, var: Array, weight: Array | None, eps: float, sum_dy: Array, sum_dy_xmu: Array, threads: int,
) -> None:  # fmt: skip
    """dx = weight/σ · (dy - Σdy/n - x̂ · Σ(dy·x̂)/n),  x̂ = (x - mean)/σ. Writes dx."""
    grid = _grid(outer, channels, inner, x.itemsize)
    parts: Any = np.array((sum_dy, sum_dy_xmu), np.float64).reshape(2, 1, -1)
    if _backward(
        grid, APPLY, dy, x, dx, outer, channels, inner, mean, var, parts[0], parts[1], weight, None, eps,
        None, None, None, threads,
    ):  # fmt: skip
        _mend(grid, dy, x, dx, outer, channels, inner, mean, var, weight, None, eps, parts[:, 0], None, 1.0)


def _mend(
    grid: Grid, dy: Array, x: Array, dx: Array, outer: int, channels: int, inner: int,
    mean: Array, var: Array, weight: Array | None, bias: Array | None, eps: float, sums: Array,
    dresidual: Array | None, slope: float,
) -> None:  # fmt: skip
    """Where kernels left dx unwritten, write it."""
    count = outer * inner
    wide = _vectors(mean, var, weight, None, eps).wide[:, 0] | (np.abs(sums[0] / count) >= MOST)
    wide |= ~_held(sums[1] / count / (np.asarray(var, np.float64) + eps))
    _mend_backward(
        _unwritten(wide, grid.group), dy, x, dx, outer, channels, inner, mean, var, weight, bias, eps, True,
        sums, dresidual, slope,
    )  # fmt: skip


@_quiet
def backward(
    dy: Array, x: Array, dx: Array, outer: int, channels: int, inner: int,
    mean: Array, var: Array, weight: Array | None, bias: Array | None, eps: float,
    grad_weight: Array, grad_bias: Array, batch: bool,
    y: Array | None, dresidual: Array | None, slope: float, threads: int,
) -> None:  # fmt: skip
    """dz = dy · act'(z), then gradient_moments and input_gradient of dz.

    Writes dx, grad_weight = Σ dz·x̂ and grad_bias = Σ dz. `batch`: the statistics were the batch's own, and the gradient
    flows through them. Otherwise they are constants, and dx = dz · weight/σ. `dresidual`: where a residual was added,
    where dz goes, which may be dy; `y`: if an activation followed, the forward pass's result. dx may be dy, too.
    """
    grid = _grid(outer, channels, inner, x.itemsize)
    if dresidual is None:
        y = None
    elif y is None:
        y = dy  # any array: no activation, nothing is cut
    z, dz, act = _given(y), None if dresidual is None else _flat(dresidual), _slope(slope, y)

    def step(steps: int, sums: Any) -> bool:
        z_bias = None if act is None else bias  # the plain form has no z
        return _backward(
            grid, steps, dy, x, dx, outer, channels, inner, mean, var, sums[0], sums[1], weight, z_bias, eps,
            z, dz, act, threads,
        )  # fmt: skip

    def mend_sums(sums: Array) -> None:
        """Of wide channels: by their own z."""
        wide = np.flatnonzero(_vectors(mean, var, weight, None, eps).wide)
        _mend_backward(
            wide, dy, x, None, outer, channels, inner, mean, var, weight, bias, eps, batch, sums, dresidual, slope
        )

    if batch and grid.chunks == 1:
        sums: Any = np.empty((2, 1, channels))
        left = step(SUM | APPLY, sums)
        sums = sums[:, 0]
        if left:
            mend_sums(sums)
    else:
        parts: Any = np.empty((2, grid.chunks, channels))
        left = step(SUM, parts)
        sums = parts.sum(axis=1)
        if left:
            mend_sums(sums)
        if batch:
            left = step(APPLY, sums[:, np.newaxis])
        elif act is None or dresidual is not None:  # (dz - 0)·weight/σ + 0
            given, zeros = dy if dresidual is None else dresidual, np.zeros(channels)
            normalize(given, dx, outer, channels, inner, zeros, var, weight, None, eps, None, 1.0, threads)
        elif left:
            everything = np.arange(channels)
            _mend_backward(
                everything, dy, x, dx, outer, channels, inner, mean, var, weight, bias, eps, False, sums, None, slope
            )
        else:
            coefficients = _coefficients_of_all(x, channels, mean, var, weight, bias, eps)
            _over_memory(SCALE_GRADIENT, dy, x, dx, outer, channels, inner, coefficients, act, False, threads)
    if batch and left:
        _mend(grid, dy, x, dx, outer, channels, inner, mean, var, weight, bias, eps, sums, dresidual, slope)
    grad_bias[...] = sums[0]
    grad_weight[...] = sums[1] / np.sqrt(np.asarray(var, np.float64) + eps)
