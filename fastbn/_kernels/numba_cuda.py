"""The kernels for a GPU, through numba.cuda.

    moments         s = Σ (x - p),  q = Σ (x - p)²;  mean = p + s/n,  m2 = q - s²/n      (p: a pivot near the mean)
    merge           Chan, Golub and LeVeque (1983): two (count, mean, m2) into one, in float64
    deviation       d = 2ᵉ·x - 2ᵉ·hi                    hi + lo = mean,  2ᵉ: near 1/σ, so that d is about x̂
    normalize       y = d·a + b                         a = weight/σ/2ᵉ,  b = bias - lo·weight/σ
    gradient sums   Σ dy,  Σ dy·d
    input gradient  dx = ((dy - m) - d·k)·a·2ᵉ          k = Σ dy·(x - mean)/n/σ²/2ᵉ,  m = Σ dy/n - lo·k·2ᵉ
    activation      act(z) = z ≤ 0 ? slope·z : z;  a gradient passes it as z ≤ 0 ? slope·dy : dy

`reference.py` says what each function computes; arrays are here objects with an address, a size and a dtype
(`fastbn.gpu.View`), and a stream stands in the place of the number of threads. Nothing is copied to the host, and
no launch is waited for. Design:

- *A block's share.* The first step gives every block a channel (planes) or a tile of channels (rows) and a part of
  their values. Threads sum them with a common pivot; their sums are added in shared memory (or, on hardware, by warp
  shuffles first), in a fixed order; a block leaves one (mean, m2) or one pair of sums a channel in scratch memory. A
  second kernel merges the parts of a channel, again in a fixed order. No atomics: a repeated call gives the same bits.
  How the sums are cut up follows from the shape, the number of multiprocessors, and how far x's (and dy's) address is
  aligned; from no other array, as `fits` has the others copied that are aligned worse.
- *Sums* are kept in the type computed in for sixteen elements or so, and then added to float64: few enough
  conversions for GPUs that have few units for them. A part where the pivot was not near the mean, where a square
  overflowed or lost its digits, is summed again in two sweeps of float64. The choice depends on the data alone.
- *A power of two* 2ᵉ near 1/σ goes into the difference as the factor of a fused multiply-add, exactly and for
  nothing. With it d is of x̂'s size, and no coefficient leaves float32's range, however large or small the data are:
  what the CPU's kernels do in float64 for "wide" channels needs no case of its own. (Except for gradients, or given
  means, at the very end of float32: of 10³⁷ and more.)
- *fma by name*, in every kernel alike, so that the sign of z comes out the same in the forward and the backward pass.
- *The second step* is element-wise, over memory in order (planes: whatever planes a block meets; rows: a thread keeps
  its channels' coefficients in registers). It walks backwards, from what the cache of the device still holds.
- *Fused*: where a channel (or tile) is small enough that a block reads it again out of the cache, one kernel does both
  steps, and the launch is all that is left of small tensors.
- *128 bits a thread*: a `Vector` of 4 float32, 2 float64 or 8 float16, loaded and stored in one instruction, where
  the planes (or rows) and the addresses are multiples of that; else of fewer elements, down to one. Four vectors are
  loaded before the first is used. A vector is LLVM's own type: + - * and fma on it become a register's instruction a
  lane, and no array is ever indexed, so that nothing spills to local memory.
- *Addresses, not arrays.* Kernels get integers, which cost a launch a tenth of what Numba's array arguments do, and
  the loads say themselves that they are of global memory.
- *The simulator* (NUMBA_ENABLE_CUDASIM=1) runs the same kernels in Python, a thread for each thread: for the tests.
  There a "vector" is a small NumPy array, an address the array itself, and blocks and tiles are a few threads
  small. All that differs stands under "what kernels are written in".
- *What is absent* has the address 0 and is asked for at run time, once a vector; a slope of 1 is no activation. So
  there is one compiled kernel for each data type, width and step, and no more.

The constants under "sizes" are reasoned, not measured: no GPU was at hand. `bench/cuda.py` measures them.
"""

from __future__ import annotations

import math
import operator
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, lru_cache, wraps
from importlib import import_module
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
from numba import float64

from ..layout import at_address

cuda: Any = import_module("numba.cuda")

NAME = "cuda"
SIMULATED = bool(import_module("numba").config.ENABLE_CUDASIM)

# ---- sizes ----

SHUFFLES = not SIMULATED  # add within a warp by shuffles; else all of it in shared memory
THREADS = 8 if SIMULATED else 256  # of a block
WIDTH = 4 if SIMULATED else 32  # most threads side by side in kernels of rows, and of channels
VECTOR_BYTES = 16
PIVOTS = 4  # values whose mean is a pivot
LEAST_PART = 2 if SIMULATED else 16  # vectors that a thread has to sum, at least, where a channel is cut into parts
WAVES = 2 if SIMULATED else 32  # blocks for each multiprocessor, where there is enough to do
FUSED_BYTES = 512 if SIMULATED else 128 << 10  # most of a channel, or tile, that one block reads twice
TINY = {8: 1e-290, 4: 1e-30}  # mean squares under this have lost digits
PAIRS, FOURS, SIXES = 2 * THREADS, 4 * THREADS, 6 * THREADS  # float64 of shared memory
MOST_EXPONENT = 120  # of 2ᵉ and of 2ᵉ·hi: float32 holds them with room to spare


# ---- what kernels are written in ----
#
# `tools(dtype, lanes)`: load, store, … of `lanes` elements of data of `dtype`; a Vector has that many of the type
# computed in. An index counts elements. float64 values a channel have tools of their own: get, put; parameters:
# parameter, put_parameter, of a "kind": bytes of an element, or 0: absent.

if SIMULATED:

    def _device(function: Callable[..., Any]) -> Any:
        return function

    class _Shared:
        """Shared arrays, one for each place in this file. The simulator's own may give two threads two of them."""

        rooms: ClassVar[dict[Any, Any]] = {}

        @classmethod
        def array(cls, shape: Any, dtype: Any) -> Any:
            return cls.rooms.setdefault((sys._getframe(1).f_lineno, shape), np.full(shape, np.nan))

    def _kernel(function: Callable[..., Any]) -> Any:
        @wraps(function)
        def quiet(*arguments: Any) -> None:
            cuda._shared = _Shared  # `cuda` is the simulator's module now
            with np.errstate(all="ignore"):  # each simulated thread begins with NumPy's defaults
                function(*arguments)

        return cuda.jit(quiet)

    def get(p: Any, i: int) -> Any:
        """p[i], of float64."""
        return np.float64(p[i])

    def put(p: Any, i: int, value: Any) -> None:
        p[i] = value

    def parameter(p: Any, i: int, kind: int, otherwise: float) -> Any:
        """p[i] as float64, or `otherwise` if it is absent."""
        return np.float64(p[i]) if kind else np.float64(otherwise)

    def put_parameter(p: Any, i: int, kind: int, value: Any) -> None:
        """p[i] = value, unless it is absent."""
        if kind:
            p[i] = value

    def root(x: Any) -> Any:
        return np.sqrt(x)

    def tools(dtype: str, lanes: int) -> SimpleNamespace:
        computed = np.dtype(np.float64 if dtype == "float64" else np.float32).type

        def load(p: Any, i: int) -> Any:
            return p[i : i + lanes].astype(computed)

        def store(p: Any, i: int, v: Any) -> None:
            p[i : i + lanes] = v

        def coefficients(p: Any, i: int) -> Any:
            return p[i : i + lanes].copy()

        def cut(z: Any, v: Any, slope: Any) -> Any:
            return np.where(z <= 0, v * slope if slope[0] else np.zeros_like(v), v)

        def spread(room: Any, i: int, v: Any) -> None:
            room[i : i + lanes] = v

        return SimpleNamespace(
            load=load,
            store=store,
            element=lambda p, i: np.float64(p[i]),
            coefficients=coefficients,
            coefficient=lambda p, i: np.full(lanes, p[i], computed),
            put_coefficient=put,
            splat=lambda value: np.full(lanes, value, computed),
            splat_wide=lambda value: np.full(lanes, value, np.float64),
            rounded=lambda value: np.float64(computed(value)),
            fma=lambda a, b, c: a * b + c,
            cut=cut,
            total=lambda v: np.float64(v.sum(dtype=computed)),
            widen=lambda v: v.astype(np.float64),
            narrow=lambda v: v.astype(computed),
            spread=spread,
            gather=lambda room, i: room[i : i + lanes].astype(computed),
            gather_wide=lambda room, i: room[i : i + lanes].copy(),
        )

else:
    ir: Any = import_module("llvmlite.ir")

    import_module("numba_cuda")  # what Numba itself has of CUDA is older
    models: Any = import_module("numba.cuda.models")
    types: Any = import_module("numba.cuda.types")
    extending: Any = import_module("numba.cuda.extending")

    def intrinsic(function: Callable[..., Any]) -> Any:
        return extending.intrinsic(function)

    _i64 = ir.IntType(64)

    def _device(function: Callable[..., Any]) -> Any:
        return cuda.jit(device=True, forceinline=True)(function)

    def _kernel(function: Callable[..., Any]) -> Any:
        return cuda.jit(function)

    class Vector(types.Type):  # type: ignore[misc]
        """So many float32 or float64, in registers."""

        def __init__(self, element: Any, lanes: int) -> None:
            self.element, self.lanes = element, lanes
            self.llvm = ir.VectorType(_llvm(element), lanes)
            super().__init__(name=f"Vector({element}, {lanes})")

    def _llvm(element: Any) -> Any:
        return ir.FloatType() if element == types.float32 else ir.DoubleType()

    class VectorModel(models.PrimitiveModel):  # type: ignore[misc]
        """To LLVM it is its own vector."""

        def __init__(self, manager: Any, vector: Any) -> None:
            super().__init__(manager, vector, vector.llvm)

    extending.register_model(Vector)(VectorModel)

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

    def _at(builder: Any, address: Any, index: Any, size: int, llvm: Any) -> Any:
        """A pointer to global memory."""
        return builder.inttoptr(builder.add(address, builder.mul(index, _i64(size))), llvm.as_pointer(addrspace=1))

    def _lane(builder: Any, vector: Any, lane: int) -> Any:
        return builder.extract_element(vector, ir.IntType(32)(lane))

    def _of_lanes(builder: Any, llvm: Any, values: list[Any]) -> Any:
        vector = ir.Constant(llvm, ir.Undefined)
        for lane, value in enumerate(values):
            vector = builder.insert_element(vector, value, ir.IntType(32)(lane))
        return vector

    def _scalar_access(element: Any) -> tuple[Any, Any]:
        """Read and write a value at an address, as float64."""
        llvm, size = _llvm(element), element.bitwidth // 8

        @intrinsic
        def read(typing_context: Any, p: Any, i: Any) -> Any:
            def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
                value = builder.load(_at(builder, args[0], args[1], size, llvm), align=size)
                return context.cast(builder, value, element, types.float64)

            return types.float64(types.int64, types.int64), generate

        @intrinsic
        def write(typing_context: Any, p: Any, i: Any, value: Any) -> Any:
            def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
                value = context.cast(builder, args[2], types.float64, element)
                builder.store(value, _at(builder, args[0], args[1], size, llvm), align=size)
                return context.get_dummy_value()

            return types.void(types.int64, types.int64, types.float64), generate

        return read, write

    get, put = _scalar_access(types.float64)
    _get32, _put32 = _scalar_access(types.float32)

    @_device
    def parameter(p: int, i: int, kind: int, otherwise: float) -> Any:
        """p[i] as float64, or `otherwise` if it is absent."""
        if kind == 8:
            return get(p, i)
        if kind == 4:
            return _get32(p, i)
        return otherwise

    @_device
    def put_parameter(p: int, i: int, kind: int, value: float) -> None:
        """p[i] = value, unless it is absent."""
        if kind == 8:
            put(p, i, value)
        elif kind == 4:
            _put32(p, i, value)

    @_device
    def root(x: float) -> float:
        return math.sqrt(x)

    def tools(dtype: str, lanes: int) -> SimpleNamespace:
        computed = types.float64 if dtype == "float64" else types.float32
        size = {"float64": 8, "float32": 4, "float16": 2}[dtype]
        scalar, vector, wide = _llvm(computed), Vector(computed, lanes), Vector(types.float64, lanes)
        aligned, index = lanes * size, types.int64
        # Half types come as words of 32 bits, and are taken apart here: of vectors of them NVVM makes wrong code.
        words = ir.IntType(16) if lanes == 1 else ir.VectorType(ir.IntType(32), lanes // 2)
        half, bits = ir.HalfType(), ir.IntType(16)

        def halves(builder: Any, value: Any) -> list[Any]:
            if lanes == 1:
                return [value]
            found = []
            for i in range(lanes // 2):
                word = _lane(builder, value, i)
                found += [builder.trunc(word, bits), builder.trunc(builder.lshr(word, ir.IntType(32)(16)), bits)]
            return found

        def whole(builder: Any, parts: list[Any]) -> Any:
            if lanes == 1:
                return parts[0]
            wide_parts = [builder.zext(part, ir.IntType(32)) for part in parts]
            pairs = [
                builder.or_(low, builder.shl(high, ir.IntType(32)(16)))
                for low, high in zip(wide_parts[::2], wide_parts[1::2], strict=True)
            ]
            return _of_lanes(builder, words, pairs)

        def read(builder: Any, args: Any) -> Any:
            if size > 2:
                return builder.load(_at(builder, args[0], args[1], size, vector.llvm), align=aligned)
            value = builder.load(_at(builder, args[0], args[1], size, words), align=aligned)
            parts = [builder.fpext(builder.bitcast(part, half), scalar) for part in halves(builder, value)]
            return _of_lanes(builder, vector.llvm, parts)

        @intrinsic
        def load(typing_context: Any, p: Any, i: Any) -> Any:
            return vector(index, index), lambda context, builder, signature, args: read(builder, args)

        @intrinsic
        def store(typing_context: Any, p: Any, i: Any, v: Any) -> Any:
            def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
                if size > 2:
                    builder.store(args[2], _at(builder, args[0], args[1], size, vector.llvm), align=aligned)
                else:
                    lanes_ = [builder.fptrunc(_lane(builder, args[2], i), half) for i in range(lanes)]
                    value = whole(builder, [builder.bitcast(lane, bits) for lane in lanes_])
                    builder.store(value, _at(builder, args[0], args[1], size, words), align=aligned)
                return context.get_dummy_value()

            return types.void(index, index, vector), generate

        @intrinsic
        def element(typing_context: Any, p: Any, i: Any) -> Any:
            """One element, as float64."""

            def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
                llvm = scalar if size > 2 else half
                value = builder.load(_at(builder, args[0], args[1], size, llvm if size > 2 else bits), align=size)
                if size == 2:
                    value = builder.fpext(builder.bitcast(value, half), scalar)
                return context.cast(builder, value, computed, types.float64)

            return types.float64(index, index), generate

        @intrinsic
        def coefficients(typing_context: Any, p: Any, i: Any) -> Any:
            """A coefficient a lane, of the type computed in."""

            def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
                bytes_ = computed.bitwidth // 8
                at = _at(builder, args[0], args[1], bytes_, vector.llvm)
                return builder.load(at, align=min(16, lanes * bytes_))

            return vector(index, index), generate

        def all_of(builder: Any, llvm: Any, value: Any) -> Any:
            return _of_lanes(builder, llvm, [value] * lanes)

        @intrinsic
        def coefficient(typing_context: Any, p: Any, i: Any) -> Any:
            """One coefficient, in every lane."""

            def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
                bytes_ = computed.bitwidth // 8
                return all_of(
                    builder, vector.llvm, builder.load(_at(builder, args[0], args[1], bytes_, scalar), align=bytes_)
                )

            return vector(index, index), generate

        @intrinsic
        def splat(typing_context: Any, value: Any) -> Any:
            def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
                return all_of(builder, vector.llvm, context.cast(builder, args[0], types.float64, computed))

            return vector(types.float64), generate

        @intrinsic
        def splat_wide(typing_context: Any, value: Any) -> Any:
            return wide(types.float64), lambda context, builder, signature, args: all_of(builder, wide.llvm, args[0])

        @intrinsic
        def rounded(typing_context: Any, value: Any) -> Any:
            def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
                value = context.cast(builder, args[0], types.float64, computed)
                return context.cast(builder, value, computed, types.float64)

            return types.float64(types.float64), generate

        @intrinsic
        def fma(typing_context: Any, a: Any, b: Any, c: Any) -> Any:
            def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
                found = [builder.fma(*(_lane(builder, arg, i) for arg in args)) for i in range(lanes)]
                return _of_lanes(builder, vector.llvm, found)

            return vector(vector, vector, vector), generate

        @intrinsic
        def cut(typing_context: Any, z: Any, v: Any, slope: Any) -> Any:
            """slope·v (0 where that is 0) in the lanes where z ≤ 0, v elsewhere."""

            def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
                zero, found = ir.Constant(scalar, 0.0), []
                for i in range(lanes):
                    z_, v_, slope_ = (_lane(builder, arg, i) for arg in args)
                    none = builder.fcmp_ordered("==", slope_, zero)
                    under = builder.select(none, zero, builder.fmul(v_, slope_))
                    found.append(builder.select(builder.fcmp_ordered("<=", z_, zero), under, v_))
                return _of_lanes(builder, vector.llvm, found)

            return vector(vector, vector, vector), generate

        @intrinsic
        def total(typing_context: Any, v: Any) -> Any:
            """The sum of the lanes, in pairs, as float64."""

            def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
                values = [_lane(builder, args[0], i) for i in range(lanes)]
                while len(values) > 1:
                    values = [builder.fadd(a, b) for a, b in zip(values[::2], values[1::2], strict=True)]
                return context.cast(builder, values[0], computed, types.float64)

            return types.float64(vector), generate

        @intrinsic
        def widen(typing_context: Any, v: Any) -> Any:
            def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
                return args[0] if vector == wide else builder.fpext(args[0], wide.llvm)

            return wide(vector), generate

        @intrinsic
        def narrow(typing_context: Any, v: Any) -> Any:
            def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
                return args[0] if vector == wide else builder.fptrunc(args[0], vector.llvm)

            return vector(wide), generate

        def places(context: Any, builder: Any, room: Any, args: Any) -> list[Any]:
            """Where so many float64 of a shared array lie."""
            data = context.make_array(room)(context, builder, args[0]).data
            return [builder.gep(data, [builder.add(args[1], _i64(i))], inbounds=True) for i in range(lanes)]

        @intrinsic
        def spread(typing_context: Any, room: Any, i: Any, v: Any) -> Any:
            """room[i + lane] = v's lane, of float64."""

            def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
                for lane, place in enumerate(places(context, builder, room, args)):
                    builder.store(_lane(builder, args[2], lane), place)
                return context.get_dummy_value()

            return types.void(room, index, wide), generate

        @intrinsic
        def gather_wide(typing_context: Any, room: Any, i: Any) -> Any:
            """The inverse."""

            def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
                values = [builder.load(place) for place in places(context, builder, room, args)]
                return _of_lanes(builder, wide.llvm, values)

            return wide(room, index), generate

        @_device
        def gather(room: Any, i: int) -> Any:
            return narrow(gather_wide(room, i))

        return SimpleNamespace(
            load=load,
            store=store,
            element=element,
            coefficients=coefficients,
            coefficient=coefficient,
            put_coefficient=put if computed == types.float64 else _put32,
            splat=splat,
            splat_wide=splat_wide,
            rounded=rounded,
            fma=fma,
            cut=cut,
            total=total,
            widen=widen,
            narrow=narrow,
            spread=spread,
            gather=gather,
            gather_wide=gather_wide,
        )


# ---- shared by all kernels ----


@_device
def quotient(n: int, divisor: int, magic: int, shift: int) -> int:
    """n // divisor; by a multiplication where `_magic` found a factor."""
    if magic == 0:
        return n // divisor
    return (n * magic) >> shift


@_device
def merged(n_a: float, mean_a: float, m2_a: float, n_b: float, mean_b: float, m2_b: float) -> Any:
    """Two sets' moments into their union's: Chan, Golub and LeVeque (1983), eq. 2.1."""
    if n_b == 0.0:
        return n_a, mean_a, m2_a
    if n_a == 0.0:
        return n_b, mean_b, m2_b
    n = n_a + n_b
    share = n_b / n
    delta = mean_b - mean_a
    return n, mean_a + delta * share, m2_a + m2_b + delta * delta * (n_a * share)


@_device
def total_of_block(s: float, q: float, room: Any) -> Any:
    """The sums of all threads' s and of their q, for every thread. `room`: 2·THREADS float64 of shared memory."""
    t = cuda.threadIdx.x
    if SHUFFLES:
        step = 16
        while step > 0:
            s += cuda.shfl_down_sync(0xFFFFFFFF, s, step)
            q += cuda.shfl_down_sync(0xFFFFFFFF, q, step)
            step >>= 1
        if t % 32 == 0:
            room[t // 32] = s
            room[THREADS + t // 32] = q
        cuda.syncthreads()
        s, q = room[0], room[THREADS]
        for warp in range(1, THREADS // 32):
            s += room[warp]
            q += room[THREADS + warp]
    else:
        room[t] = s
        room[THREADS + t] = q
        cuda.syncthreads()
        step = THREADS // 2
        while step > 0:
            if t < step:
                room[t] += room[t + step]
                room[THREADS + t] += room[THREADS + t + step]
            cuda.syncthreads()
            step //= 2
        s, q = room[0], room[THREADS]
    cuda.syncthreads()  # before room is used again
    return s, q


@_device
def second_moment(s: float, q: float, n: float) -> float:
    """q - s²/n: beyond float64 it is infinite, and no ∞ - ∞; never below 0."""
    if q - q == 0.0:
        q -= s * (s / n)
        if q < 0.0:
            q = 0.0
    return q


# ---- the kernels, for data of one type in vectors of one width ----
#
# Arguments come as tuples: arrays (addresses), sizes (integers), vectors (weight, bias, mean and var, each as address,
# stride and kind). The scratch table has a row a coefficient, `pitch` long: 2ᵉ, h = -2ᵉ·hi, a, b, m, k.

POWER, ORIGIN, SLOPE, SHIFT, GRADIENT, CURVE = range(6)
ROWS_OF_TABLE = 6
WEIGHT, BIAS, MEAN, VAR = 0, 3, 6, 9  # where each begins in `vectors`
NO_CUT, BY_X, BY_Y = 0, 1, 2  # how a gradient's activation is known: there is none; from z of x; from y


@cache
def compiled(dtype: str, lanes: int) -> SimpleNamespace:
    """The kernels; each is compiled when it is first launched."""
    k = tools(dtype, lanes)
    load, store, element, coefficient, coefficients = k.load, k.store, k.element, k.coefficient, k.coefficients
    put_coefficient, splat, splat_wide, rounded, fma, cut = (
        k.put_coefficient, k.splat, k.splat_wide, k.rounded, k.fma, k.cut,
    )  # fmt: skip
    total, widen, narrow, spread, gather, gather_wide = k.total, k.widen, k.narrow, k.spread, k.gather, k.gather_wide
    bytes_ = 8 if dtype == "float64" else 4
    tiny, largest = TINY[bytes_], float(np.finfo(np.float64 if bytes_ == 8 else np.float32).max)
    room_size = 2 * THREADS * lanes

    # -- a channel's coefficients, in float64, rounded where the type computed in will hold them --

    @_device
    def scales_of(mean: float, var: float, weight: float, bias: float, eps: float) -> Any:
        """2ᵉ, h, a, b; lo, σ."""
        sigma = root(var + eps)
        hi = rounded(mean)
        power = 1.0
        if 0.0 < sigma < 1e300:  # not NaN, nor infinite
            exponent = -math.frexp(sigma)[1]
            exponent = max(-MOST_EXPONENT, min(MOST_EXPONENT, exponent))
            if 0.0 < abs(hi) < 1e300:
                exponent = min(exponent, MOST_EXPONENT - math.frexp(hi)[1])
            power = math.ldexp(1.0, exponent)
        scale = weight / sigma
        lo = mean - hi
        a = scale / power
        if largest < abs(a) <= 1.7e308:  # no infinity, which 0 would turn into NaN
            a = math.copysign(largest, a)
        return power, -hi * power, rounded(a), rounded(bias - lo * scale), lo, sigma

    @_device
    def scales(vectors: Any, c: int, eps: float) -> Any:
        mean = parameter(vectors[MEAN], c * vectors[MEAN + 1], vectors[MEAN + 2], 0.0)
        var = parameter(vectors[VAR], c * vectors[VAR + 1], vectors[VAR + 2], 1.0)
        weight = parameter(vectors[WEIGHT], c * vectors[WEIGHT + 1], vectors[WEIGHT + 2], 1.0)
        bias = parameter(vectors[BIAS], c * vectors[BIAS + 1], vectors[BIAS + 2], 0.0)
        return scales_of(mean, var, weight, bias, eps)

    @_device
    def slopes_of(power: float, lo: float, sigma: float, sum_dy: float, sum_dy_d: float, n: float) -> Any:
        """m and k of the input gradient; Σ dy·(x - mean)/σ."""
        about_mean = sum_dy_d / power - lo * sum_dy
        curve = about_mean / n / (sigma * sigma)
        return rounded(sum_dy / n - lo * curve), rounded(curve / power), about_mean / sigma

    @_device
    def tabulate(table: int, c: int, pitch: int, power: float, origin: float, a: float, b: float) -> None:
        put_coefficient(table, POWER * pitch + c, power)
        put_coefficient(table, ORIGIN * pitch + c, origin)
        put_coefficient(table, SLOPE * pitch + c, a)
        put_coefficient(table, SHIFT * pitch + c, b)

    # -- one vector --

    @_device
    def passed(at: int, d: Any, dy: Any, y: int, a: Any, b: Any, slope: Any, how: int) -> Any:
        """dz: dy as the activation passes it."""
        if how == BY_X:
            return cut(fma(d, a, b), dy, slope)
        if how == BY_Y:
            return cut(load(y, at), dy, slope)
        return dy

    @_device
    def differential(g: Any, d: Any, m: Any, curve: Any, a: Any, p: Any) -> Any:
        """dx of dz and the difference."""
        return (((g - m) - d * curve) * a) * p

    @_device
    def finished(y: int, at: int, z: Any, added: int, has: int, slope: Any) -> None:
        if has != 0:
            z = z + load(added, at)
        store(y, at, cut(z, z, slope))

    # -- planes: sums over vectors `start` to `end` of a channel --

    @_device
    def place(j: int, c: int, plane: int, magic: int, shift: int, channels: int) -> Any:
        """Where vector j of channel c lies; a plane has so many vectors."""
        o = quotient(j, plane, magic, shift)
        return ((o * channels + c) * plane + (j - o * plane)) * lanes

    @_device
    def sum_plane(
        x: int, c: int, start: int, end: int, plane: int, magic: int, shift: int, channels: int, pivot: float
    ) -> Any:
        p = splat(pivot)
        s = q = np.float64(0.0)
        j = start + cuda.threadIdx.x
        while j + 3 * THREADS < end:
            x0 = load(x, place(j, c, plane, magic, shift, channels))
            x1 = load(x, place(j + THREADS, c, plane, magic, shift, channels))
            x2 = load(x, place(j + 2 * THREADS, c, plane, magic, shift, channels))
            x3 = load(x, place(j + 3 * THREADS, c, plane, magic, shift, channels))
            d0, d1, d2, d3 = x0 - p, x1 - p, x2 - p, x3 - p
            s += total((d0 + d1) + (d2 + d3))
            q += total((d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3))
            j += 4 * THREADS
        while j < end:
            d0 = load(x, place(j, c, plane, magic, shift, channels)) - p
            s += total(d0)
            q += total(d0 * d0)
            j += THREADS
        return s, q

    @_device
    def sum_plane_wide(
        x: int, c: int, start: int, end: int, plane: int, magic: int, shift: int, channels: int, pivot: float
    ) -> Any:
        s = q = np.float64(0.0)
        j = start + cuda.threadIdx.x
        while j < end:
            at = place(j, c, plane, magic, shift, channels)
            for lane in range(lanes):
                d = element(x, at + lane) - pivot
                s += d
                q += d * d
            j += THREADS
        return s, q

    @_device
    def stands(s: float, q: float, m2: float, n: float) -> bool:
        """May sums in the type computed in stand? Not where the pivot was far off, nor where squares were not held."""
        near = m2 >= 0.25 * q or (n >= 256.0 and m2 >= 0.0625 * q)
        return q - q == 0.0 and near and (q > tiny * n or (q == 0.0 and s == 0.0))

    @_device
    def moments_of_plane(
        x: int, c: int, start: int, end: int, plane: int, magic: int, shift: int, channels: int, room: Any
    ) -> Any:
        """Mean and m2, for every thread of the block."""
        n = np.float64((end - start) * lanes)
        first = element(x, place(start, c, plane, magic, shift, channels))
        others = np.float64(0.0)
        for i in range(1, PIVOTS):
            others += element(x, place(start + (end - start) * i // PIVOTS, c, plane, magic, shift, channels)) - first
        mean = rounded(first + others / PIVOTS)
        s, q = sum_plane(x, c, start, end, plane, magic, shift, channels, mean)
        s, q = total_of_block(s, q, room)
        m2 = second_moment(s, q, n)
        if stands(s, q, m2, n):
            return mean + s / n, m2
        for _ in range(2):
            s, q = sum_plane_wide(x, c, start, end, plane, magic, shift, channels, mean)
            s, q = total_of_block(s, q, room)
            mean += s / n
        return mean, second_moment(s, q, n)

    @_kernel
    def moments_planes(arrays: Any, sizes: Any) -> None:
        x, means, m2s = arrays
        units, part, plane, magic, shift, channels, pitch = sizes
        room = cuda.shared.array(PAIRS, float64)
        c, which = cuda.blockIdx.x % channels, cuda.blockIdx.x // channels
        start = which * part
        end = min(start + part, units)
        mean, m2 = moments_of_plane(x, c, start, end, plane, magic, shift, channels, room)
        if cuda.threadIdx.x == 0:
            put(means, which * pitch + c, mean)
            put(m2s, which * pitch + c, m2)

    @_device
    def gradients_of_plane(
        arrays: Any, c: int, start: int, end: int, plane: int, magic: int, shift: int, channels: int, how: int,
        fixed: int, has: int, power: float, origin: float, a_: float, b_: float, slope_: float, room: Any,
    ) -> Any:  # fmt: skip
        """Σ dz and Σ dz·d, for every thread of the block. With fixed statistics: writes dx and dz, too."""
        dy, x, y, dx, dz = arrays[0], arrays[1], arrays[2], arrays[3], arrays[4]
        p, h, a, b, slope = splat(power), splat(origin), splat(a_), splat(b_), splat(slope_)
        s = q = np.float64(0.0)
        j = start + cuda.threadIdx.x
        while fixed == 0 and j + 3 * THREADS < end:
            at0 = place(j, c, plane, magic, shift, channels)
            at1 = place(j + THREADS, c, plane, magic, shift, channels)
            at2 = place(j + 2 * THREADS, c, plane, magic, shift, channels)
            at3 = place(j + 3 * THREADS, c, plane, magic, shift, channels)
            x0, x1, x2, x3 = load(x, at0), load(x, at1), load(x, at2), load(x, at3)
            g0, g1, g2, g3 = load(dy, at0), load(dy, at1), load(dy, at2), load(dy, at3)
            d0, d1, d2, d3 = fma(x0, p, h), fma(x1, p, h), fma(x2, p, h), fma(x3, p, h)
            g0, g1 = passed(at0, d0, g0, y, a, b, slope, how), passed(at1, d1, g1, y, a, b, slope, how)
            g2, g3 = passed(at2, d2, g2, y, a, b, slope, how), passed(at3, d3, g3, y, a, b, slope, how)
            s += total((g0 + g1) + (g2 + g3))
            q += total((g0 * d0 + g1 * d1) + (g2 * d2 + g3 * d3))
            j += 4 * THREADS
        while j < end:
            at0 = place(j, c, plane, magic, shift, channels)
            d0 = fma(load(x, at0), p, h)
            g0 = passed(at0, d0, load(dy, at0), y, a, b, slope, how)
            s += total(g0)
            q += total(g0 * d0)
            if fixed != 0:
                store(dx, at0, (g0 * a) * p)
                if has != 0:
                    store(dz, at0, g0)
            j += THREADS
        return total_of_block(s, q, room)

    @_kernel
    def gradients_planes(arrays: Any, sizes: Any, vectors: Any, eps: float, slope: float) -> None:
        units, part, plane, magic, shift, channels, pitch, how, fixed, has = sizes
        room = cuda.shared.array(PAIRS, float64)
        c, which = cuda.blockIdx.x % channels, cuda.blockIdx.x // channels
        start = which * part
        end = min(start + part, units)
        power, origin, a, b, _, _ = scales(vectors, c, eps)
        s, q = gradients_of_plane(
            arrays, c, start, end, plane, magic, shift, channels, how, fixed, has, power, origin, a, b, slope, room
        )
        if cuda.threadIdx.x == 0:
            put(arrays[5], which * pitch + c, s)
            put(arrays[6], which * pitch + c, q)

    # -- rows: a block has `width` threads side by side, each with a vector of channels, and so many rows at a time --

    @_device
    def over_rows(s: Any, q: Any, width: int, room: Any) -> None:
        """Adds the vectors of the threads that have the same channels: the first row of `room` is the result."""
        t = cuda.threadIdx.x
        spread(room, t * lanes, s)
        spread(room, (THREADS + t) * lanes, q)
        cuda.syncthreads()
        step = THREADS // width // 2
        while step > 0:
            if t < step * width:
                for lane in range(lanes):
                    to, of = t * lanes + lane, (t + step * width) * lanes + lane
                    room[to] += room[of]
                    room[THREADS * lanes + to] += room[THREADS * lanes + of]
            cuda.syncthreads()
            step //= 2

    @_device
    def sum_rows(x: int, c: int, start: int, end: int, step: int, channels: int, p: Any) -> Any:
        s = q = splat_wide(0.0)
        r = start
        while r + 3 * step < end:
            x0, x1 = load(x, r * channels + c), load(x, (r + step) * channels + c)
            x2, x3 = load(x, (r + 2 * step) * channels + c), load(x, (r + 3 * step) * channels + c)
            d0, d1, d2, d3 = x0 - p, x1 - p, x2 - p, x3 - p
            s = s + widen((d0 + d1) + (d2 + d3))
            q = q + widen((d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3))
            r += 4 * step
        while r < end:
            d0 = load(x, r * channels + c) - p
            s = s + widen(d0)
            q = q + widen(d0 * d0)
            r += step
        return s, q

    @_device
    def sum_rows_wide(x: int, c: int, start: int, end: int, step: int, channels: int, p: Any) -> Any:
        s = q = splat_wide(0.0)
        r = start
        while r < end:
            d = widen(load(x, r * channels + c)) - p
            s = s + d
            q = q + d * d
            r += step
        return s, q

    @_device
    def moments_of_rows(
        x: int, tile: int, start: int, end: int, width: int, channels: int, room: Any, middle: Any
    ) -> Any:
        """Mean and m2 of channel t of the tile, for thread t."""
        t = cuda.threadIdx.x
        across, down, step = t % width, t // width, THREADS // width
        c = (tile * width + across) * lanes
        n = np.float64(end - start)
        s = q = splat_wide(0.0)
        if c < channels:
            first = widen(load(x, start * channels + c))
            others = splat_wide(0.0)
            for i in range(1, PIVOTS):
                others = others + (widen(load(x, (start + (end - start) * i // PIVOTS) * channels + c)) - first)
            p = narrow(first + others * splat_wide(1.0 / PIVOTS))
            if down == 0:
                spread(middle, across * lanes, widen(p))
            s, q = sum_rows(x, c, start + down, end, step, channels, p)
        over_rows(s, q, width, room)
        mean = m2 = np.float64(0.0)
        bad = 0
        if t < width * lanes and tile * width * lanes + t < channels:
            s_, q_ = room[t], room[THREADS * lanes + t]
            m2 = second_moment(s_, q_, n)
            mean = middle[t] + s_ / n
            if not stands(s_, q_, m2, n):
                bad = 1
        if cuda.syncthreads_or(bad) != 0:
            for _ in range(2):
                s = q = splat_wide(0.0)
                if c < channels:
                    s, q = sum_rows_wide(x, c, start + down, end, step, channels, gather_wide(middle, across * lanes))
                over_rows(s, q, width, room)
                if t < width * lanes and tile * width * lanes + t < channels:
                    middle[t] += room[t] / n
                    if bad != 0:  # others' sums stand, whatever their neighbours are
                        mean = middle[t]
                        m2 = second_moment(room[t], room[THREADS * lanes + t], n)
                cuda.syncthreads()
        cuda.syncthreads()  # before room is used again
        return mean, m2

    @_kernel
    def moments_rows(arrays: Any, sizes: Any) -> None:
        x, means, m2s = arrays
        units, part, width, tiles, channels, pitch = sizes
        room = cuda.shared.array(room_size, float64)
        middle = cuda.shared.array(THREADS, float64)
        tile, which = cuda.blockIdx.x % tiles, cuda.blockIdx.x // tiles
        start = which * part
        end = min(start + part, units)
        mean, m2 = moments_of_rows(x, tile, start, end, width, channels, room, middle)
        c = tile * width * lanes + cuda.threadIdx.x
        if cuda.threadIdx.x < width * lanes and c < channels:
            put(means, which * pitch + c, mean)
            put(m2s, which * pitch + c, m2)

    @_device
    def gradients_of_rows(
        arrays: Any, tile: int, start: int, end: int, width: int, channels: int, how: int, fixed: int, has: int,
        table: Any, slope_: float, room: Any,
    ) -> None:  # fmt: skip
        """Σ dz and Σ dz·d of the tile's channels, into room. With fixed statistics: writes dx and dz, too."""
        dy, x, y, dx, dz = arrays[0], arrays[1], arrays[2], arrays[3], arrays[4]
        t = cuda.threadIdx.x
        across, down, step = t % width, t // width, THREADS // width
        c = (tile * width + across) * lanes
        s = q = splat_wide(0.0)
        if c < channels:
            p, h = gather(table, across * lanes), gather(table, THREADS + across * lanes)
            a, b = gather(table, 2 * THREADS + across * lanes), gather(table, 3 * THREADS + across * lanes)
            slope = splat(slope_)
            r = start + down
            while fixed == 0 and r + 3 * step < end:
                at0, at1 = r * channels + c, (r + step) * channels + c
                at2, at3 = (r + 2 * step) * channels + c, (r + 3 * step) * channels + c
                x0, x1, x2, x3 = load(x, at0), load(x, at1), load(x, at2), load(x, at3)
                g0, g1, g2, g3 = load(dy, at0), load(dy, at1), load(dy, at2), load(dy, at3)
                d0, d1, d2, d3 = fma(x0, p, h), fma(x1, p, h), fma(x2, p, h), fma(x3, p, h)
                g0, g1 = passed(at0, d0, g0, y, a, b, slope, how), passed(at1, d1, g1, y, a, b, slope, how)
                g2, g3 = passed(at2, d2, g2, y, a, b, slope, how), passed(at3, d3, g3, y, a, b, slope, how)
                s = s + widen((g0 + g1) + (g2 + g3))
                q = q + widen((g0 * d0 + g1 * d1) + (g2 * d2 + g3 * d3))
                r += 4 * step
            while r < end:
                at0 = r * channels + c
                d0 = fma(load(x, at0), p, h)
                g0 = passed(at0, d0, load(dy, at0), y, a, b, slope, how)
                s = s + widen(g0)
                q = q + widen(g0 * d0)
                if fixed != 0:
                    store(dx, at0, (g0 * a) * p)
                    if has != 0:
                        store(dz, at0, g0)
                r += step
        over_rows(s, q, width, room)

    @_kernel
    def gradients_rows(arrays: Any, sizes: Any, vectors: Any, eps: float, slope: float) -> None:
        units, part, width, tiles, channels, pitch, how, fixed, has = sizes
        room = cuda.shared.array(room_size, float64)
        table = cuda.shared.array(FOURS, float64)
        t = cuda.threadIdx.x
        tile, which = cuda.blockIdx.x % tiles, cuda.blockIdx.x // tiles
        start = which * part
        end = min(start + part, units)
        c = tile * width * lanes + t
        mine = t < width * lanes and c < channels
        if mine:
            table[t], table[THREADS + t], table[2 * THREADS + t], table[3 * THREADS + t], _, _ = scales(vectors, c, eps)
        cuda.syncthreads()
        gradients_of_rows(arrays, tile, start, end, width, channels, how, fixed, has, table, slope, room)
        if mine:
            put(arrays[5], which * pitch + c, room[t])
            put(arrays[6], which * pitch + c, room[THREADS * lanes + t])

    # -- between the steps: a channel's parts into one, and its coefficients; WIDTH channels a block --

    @_kernel
    def finish_moments(arrays: Any, sizes: Any, vectors: Any, divisor: float, eps: float) -> None:
        """mean, and m2 / divisor; the table, if there is one."""
        means, m2s, mean_to, var_to, table = arrays
        parts, part, units, values, channels, pitch, table_pitch = sizes  # a unit has so many values
        room = cuda.shared.array((3, THREADS), float64)
        t = cuda.threadIdx.x
        across, down, height = t % WIDTH, t // WIDTH, THREADS // WIDTH
        c = cuda.blockIdx.x * WIDTH + across
        n = mean = m2 = np.float64(0.0)
        if c < channels:
            for which in range(down, parts, height):
                size = np.float64((min((which + 1) * part, units) - which * part) * values)
                n, mean, m2 = merged(n, mean, m2, size, get(means, which * pitch + c), get(m2s, which * pitch + c))
        room[0, t], room[1, t], room[2, t] = n, mean, m2
        cuda.syncthreads()
        step = height // 2
        while step > 0:
            if down < step:
                o = t + step * WIDTH
                n, mean, m2 = merged(
                    room[0, t], room[1, t], room[2, t], room[0, o], room[1, o], room[2, o]
                )  # fmt: skip
                room[0, t], room[1, t], room[2, t] = n, mean, m2
            cuda.syncthreads()
            step //= 2
        if down == 0 and c < channels:
            var = m2 / divisor
            put(mean_to, c, mean)
            put(var_to, c, var)
            if table_pitch > 0:
                weight = parameter(vectors[WEIGHT], c * vectors[WEIGHT + 1], vectors[WEIGHT + 2], 1.0)
                bias = parameter(vectors[BIAS], c * vectors[BIAS + 1], vectors[BIAS + 2], 0.0)
                power, origin, a, b, _, _ = scales_of(mean, var, weight, bias, eps)
                tabulate(table, c, table_pitch, power, origin, a, b)

    @_kernel
    def finish_gradients(arrays: Any, sizes: Any, vectors: Any, n: float, eps: float) -> None:
        """The gradients of weight and bias; the table."""
        sums, sums_d, dweight, dbias, table = arrays
        parts, channels, pitch, table_pitch, dweight_kind, dbias_kind = sizes
        room = cuda.shared.array((2, THREADS), float64)
        t = cuda.threadIdx.x
        across, down, height = t % WIDTH, t // WIDTH, THREADS // WIDTH
        c = cuda.blockIdx.x * WIDTH + across
        s = q = np.float64(0.0)
        if c < channels:
            for which in range(down, parts, height):
                s += get(sums, which * pitch + c)
                q += get(sums_d, which * pitch + c)
        room[0, t], room[1, t] = s, q
        cuda.syncthreads()
        step = height // 2
        while step > 0:
            if down < step:
                room[0, t] += room[0, t + step * WIDTH]
                room[1, t] += room[1, t + step * WIDTH]
            cuda.syncthreads()
            step //= 2
        if down == 0 and c < channels:
            s, q = room[0, t], room[1, t]
            power, origin, a, b, lo, sigma = scales(vectors, c, eps)
            m, curve, of_weight = slopes_of(power, lo, sigma, s, q, n)
            put_parameter(dweight, c, dweight_kind, of_weight)
            put_parameter(dbias, c, dbias_kind, s)
            tabulate(table, c, table_pitch, power, origin, a, b)
            put_coefficient(table, GRADIENT * table_pitch + c, m)
            put_coefficient(table, CURVE * table_pitch + c, curve)

    @_kernel
    def prepare(arrays: Any, sizes: Any, vectors: Any, eps: float) -> None:
        """The table, from given statistics."""
        channels, table_pitch = sizes
        c = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
        if c < channels:
            power, origin, a, b, _, _ = scales(vectors, c, eps)
            tabulate(arrays[0], c, table_pitch, power, origin, a, b)

    # -- the second step, planes: four vectors of memory a thread, THREADS apart, whatever channels they are of --

    @_device
    def channel_of(n: int, plane: int, magic: int, shift: int, channels: int, magic_c: int, shift_c: int) -> Any:
        which = quotient(n, plane, magic, shift)
        return which - quotient(which, channels, magic_c, shift_c) * channels

    @_device
    def normalized(x: Any, c: int, table: int, pitch: int) -> Any:
        d = fma(x, coefficient(table, POWER * pitch + c), coefficient(table, ORIGIN * pitch + c))
        return fma(d, coefficient(table, SLOPE * pitch + c), coefficient(table, SHIFT * pitch + c))

    @_kernel
    def normalize_planes(arrays: Any, sizes: Any, slope_: float) -> None:
        x, y, added, table = arrays
        units, plane, magic, shift, channels, magic_c, shift_c, pitch, has, backwards = sizes
        slope = splat(slope_)
        block = cuda.blockIdx.x
        if backwards != 0:
            block = cuda.gridDim.x - 1 - block
        n = block * (4 * THREADS) + cuda.threadIdx.x
        if n + 3 * THREADS < units:
            n1, n2, n3 = n + THREADS, n + 2 * THREADS, n + 3 * THREADS
            x0, x1, x2, x3 = load(x, n * lanes), load(x, n1 * lanes), load(x, n2 * lanes), load(x, n3 * lanes)
            z0 = normalized(x0, channel_of(n, plane, magic, shift, channels, magic_c, shift_c), table, pitch)
            z1 = normalized(x1, channel_of(n1, plane, magic, shift, channels, magic_c, shift_c), table, pitch)
            z2 = normalized(x2, channel_of(n2, plane, magic, shift, channels, magic_c, shift_c), table, pitch)
            z3 = normalized(x3, channel_of(n3, plane, magic, shift, channels, magic_c, shift_c), table, pitch)
            finished(y, n * lanes, z0, added, has, slope)
            finished(y, n1 * lanes, z1, added, has, slope)
            finished(y, n2 * lanes, z2, added, has, slope)
            finished(y, n3 * lanes, z3, added, has, slope)
        else:
            while n < units:
                c = channel_of(n, plane, magic, shift, channels, magic_c, shift_c)
                finished(y, n * lanes, normalized(load(x, n * lanes), c, table, pitch), added, has, slope)
                n += THREADS

    @_device
    def differentiated(
        at: int, c: int, dy: Any, x: Any, arrays: Any, table: int, pitch: int, how: int, has: int, slope: Any
    ) -> None:
        p, a = coefficient(table, POWER * pitch + c), coefficient(table, SLOPE * pitch + c)
        d = fma(x, p, coefficient(table, ORIGIN * pitch + c))
        g = passed(at, d, dy, arrays[2], a, coefficient(table, SHIFT * pitch + c), slope, how)
        m, curve = coefficient(table, GRADIENT * pitch + c), coefficient(table, CURVE * pitch + c)
        store(arrays[3], at, differential(g, d, m, curve, a, p))
        if has != 0:
            store(arrays[4], at, g)

    @_kernel
    def input_gradient_planes(arrays: Any, sizes: Any, slope_: float) -> None:
        dy, x, _, _, _, table = arrays
        units, plane, magic, shift, channels, magic_c, shift_c, pitch, how, has = sizes
        slope = splat(slope_)
        n = (cuda.gridDim.x - 1 - cuda.blockIdx.x) * (4 * THREADS) + cuda.threadIdx.x
        if n + 3 * THREADS < units:
            n1, n2, n3 = n + THREADS, n + 2 * THREADS, n + 3 * THREADS
            x0, x1, x2, x3 = load(x, n * lanes), load(x, n1 * lanes), load(x, n2 * lanes), load(x, n3 * lanes)
            g0, g1, g2, g3 = load(dy, n * lanes), load(dy, n1 * lanes), load(dy, n2 * lanes), load(dy, n3 * lanes)
            c0 = channel_of(n, plane, magic, shift, channels, magic_c, shift_c)
            c1 = channel_of(n1, plane, magic, shift, channels, magic_c, shift_c)
            c2 = channel_of(n2, plane, magic, shift, channels, magic_c, shift_c)
            c3 = channel_of(n3, plane, magic, shift, channels, magic_c, shift_c)
            differentiated(n * lanes, c0, g0, x0, arrays, table, pitch, how, has, slope)
            differentiated(n1 * lanes, c1, g1, x1, arrays, table, pitch, how, has, slope)
            differentiated(n2 * lanes, c2, g2, x2, arrays, table, pitch, how, has, slope)
            differentiated(n3 * lanes, c3, g3, x3, arrays, table, pitch, how, has, slope)
        else:
            while n < units:
                c = channel_of(n, plane, magic, shift, channels, magic_c, shift_c)
                g0, x0 = load(dy, n * lanes), load(x, n * lanes)
                differentiated(n * lanes, c, g0, x0, arrays, table, pitch, how, has, slope)
                n += THREADS

    # -- the second step, rows: from the last row of a part to its first --

    @_device
    def normalize_tile(
        arrays: Any, c: int, first: int, last: int, step: int, channels: int, has: int,
        p: Any, h: Any, a: Any, b: Any, slope: Any,
    ) -> None:  # fmt: skip
        x, y, added = arrays[0], arrays[1], arrays[2]
        r = last
        while r - 3 * step >= first:
            at0, at1 = r * channels + c, (r - step) * channels + c
            at2, at3 = (r - 2 * step) * channels + c, (r - 3 * step) * channels + c
            x0, x1, x2, x3 = load(x, at0), load(x, at1), load(x, at2), load(x, at3)
            finished(y, at0, fma(fma(x0, p, h), a, b), added, has, slope)
            finished(y, at1, fma(fma(x1, p, h), a, b), added, has, slope)
            finished(y, at2, fma(fma(x2, p, h), a, b), added, has, slope)
            finished(y, at3, fma(fma(x3, p, h), a, b), added, has, slope)
            r -= 4 * step
        while r >= first:
            at0 = r * channels + c
            finished(y, at0, fma(fma(load(x, at0), p, h), a, b), added, has, slope)
            r -= step

    @_kernel
    def normalize_rows(arrays: Any, sizes: Any, slope: float) -> None:
        units, part, width, tiles, channels, pitch, has, backwards = sizes
        t = cuda.threadIdx.x
        across, down, step = t % width, t // width, THREADS // width
        block = cuda.blockIdx.x
        if backwards != 0:
            block = cuda.gridDim.x - 1 - block
        tile, which = block % tiles, block // tiles
        c = (tile * width + across) * lanes
        if c < channels:
            table = arrays[3]
            p, h = coefficients(table, POWER * pitch + c), coefficients(table, ORIGIN * pitch + c)
            a, b = coefficients(table, SLOPE * pitch + c), coefficients(table, SHIFT * pitch + c)
            first = which * part
            last = min(first + part, units) - 1 - down
            normalize_tile(arrays, c, first, last, step, channels, has, p, h, a, b, splat(slope))

    @_device
    def differentiate_tile(
        arrays: Any, c: int, first: int, last: int, step: int, channels: int, how: int, has: int,
        p: Any, h: Any, a: Any, b: Any, m: Any, curve: Any, slope: Any,
    ) -> None:  # fmt: skip
        dy, x, y, dx, dz = arrays[0], arrays[1], arrays[2], arrays[3], arrays[4]
        r = last
        while r - step >= first:
            at0, at1 = r * channels + c, (r - step) * channels + c
            x0, x1, g0, g1 = load(x, at0), load(x, at1), load(dy, at0), load(dy, at1)
            d0, d1 = fma(x0, p, h), fma(x1, p, h)
            g0, g1 = passed(at0, d0, g0, y, a, b, slope, how), passed(at1, d1, g1, y, a, b, slope, how)
            store(dx, at0, differential(g0, d0, m, curve, a, p))
            store(dx, at1, differential(g1, d1, m, curve, a, p))
            if has != 0:
                store(dz, at0, g0)
                store(dz, at1, g1)
            r -= 2 * step
        if r >= first:
            at0 = r * channels + c
            d0 = fma(load(x, at0), p, h)
            g0 = passed(at0, d0, load(dy, at0), y, a, b, slope, how)
            store(dx, at0, differential(g0, d0, m, curve, a, p))
            if has != 0:
                store(dz, at0, g0)

    @_kernel
    def input_gradient_rows(arrays: Any, sizes: Any, slope: float) -> None:
        units, part, width, tiles, channels, pitch, how, has = sizes
        t = cuda.threadIdx.x
        across, down, step = t % width, t // width, THREADS // width
        block = cuda.gridDim.x - 1 - cuda.blockIdx.x
        tile, which = block % tiles, block // tiles
        c = (tile * width + across) * lanes
        if c < channels:
            table = arrays[5]
            p, h = coefficients(table, POWER * pitch + c), coefficients(table, ORIGIN * pitch + c)
            a, b = coefficients(table, SLOPE * pitch + c), coefficients(table, SHIFT * pitch + c)
            m, curve = coefficients(table, GRADIENT * pitch + c), coefficients(table, CURVE * pitch + c)
            first = which * part
            last = min(first + part, units) - 1 - down
            differentiate_tile(
                arrays, c, first, last, step, channels, how, has, p, h, a, b, m, curve, splat(slope)
            )  # fmt: skip

    # -- fused: a block does a channel, or a tile, both steps --

    @_kernel
    def forward_planes(arrays: Any, sizes: Any, vectors: Any, eps: float, slope_: float) -> None:
        x, y, added, mean_to, var_to = arrays
        units, plane, magic, shift, channels, has = sizes
        room = cuda.shared.array(PAIRS, float64)
        c = cuda.blockIdx.x
        mean, var = moments_of_plane(x, c, 0, units, plane, magic, shift, channels, room)
        var /= np.float64(units * lanes)
        if cuda.threadIdx.x == 0:
            put(mean_to, c, mean)
            put(var_to, c, var)
        weight = parameter(vectors[WEIGHT], c * vectors[WEIGHT + 1], vectors[WEIGHT + 2], 1.0)
        bias = parameter(vectors[BIAS], c * vectors[BIAS + 1], vectors[BIAS + 2], 0.0)
        power, origin, a_, b_, _, _ = scales_of(mean, var, weight, bias, eps)
        p, h, a, b, slope = splat(power), splat(origin), splat(a_), splat(b_), splat(slope_)
        j = units - 1 - cuda.threadIdx.x
        while j >= 3 * THREADS:
            at0 = place(j, c, plane, magic, shift, channels)
            at1 = place(j - THREADS, c, plane, magic, shift, channels)
            at2 = place(j - 2 * THREADS, c, plane, magic, shift, channels)
            at3 = place(j - 3 * THREADS, c, plane, magic, shift, channels)
            x0, x1, x2, x3 = load(x, at0), load(x, at1), load(x, at2), load(x, at3)
            finished(y, at0, fma(fma(x0, p, h), a, b), added, has, slope)
            finished(y, at1, fma(fma(x1, p, h), a, b), added, has, slope)
            finished(y, at2, fma(fma(x2, p, h), a, b), added, has, slope)
            finished(y, at3, fma(fma(x3, p, h), a, b), added, has, slope)
            j -= 4 * THREADS
        while j >= 0:
            at0 = place(j, c, plane, magic, shift, channels)
            finished(y, at0, fma(fma(load(x, at0), p, h), a, b), added, has, slope)
            j -= THREADS

    @_kernel
    def forward_rows(arrays: Any, sizes: Any, vectors: Any, eps: float, slope: float) -> None:
        x, _, _, mean_to, var_to = arrays
        units, width, channels, has = sizes
        room = cuda.shared.array(room_size, float64)
        middle = cuda.shared.array(THREADS, float64)
        table = cuda.shared.array(FOURS, float64)
        t = cuda.threadIdx.x
        tile = cuda.blockIdx.x
        mean, var = moments_of_rows(x, tile, 0, units, width, channels, room, middle)
        c = tile * width * lanes + t
        if t < width * lanes and c < channels:
            var /= np.float64(units)
            put(mean_to, c, mean)
            put(var_to, c, var)
            weight = parameter(vectors[WEIGHT], c * vectors[WEIGHT + 1], vectors[WEIGHT + 2], 1.0)
            bias = parameter(vectors[BIAS], c * vectors[BIAS + 1], vectors[BIAS + 2], 0.0)
            table[t], table[THREADS + t], table[2 * THREADS + t], table[3 * THREADS + t], _, _ = scales_of(
                mean, var, weight, bias, eps
            )
        cuda.syncthreads()
        across, down, step = t % width, t // width, THREADS // width
        c = (tile * width + across) * lanes
        if c < channels:
            p, h = gather(table, across * lanes), gather(table, THREADS + across * lanes)
            a, b = gather(table, 2 * THREADS + across * lanes), gather(table, 3 * THREADS + across * lanes)
            normalize_tile(arrays, c, 0, units - 1 - down, step, channels, has, p, h, a, b, splat(slope))

    @_kernel
    def backward_planes(arrays: Any, sizes: Any, vectors: Any, eps: float, slope_: float) -> None:
        dy, x, y, dx, dz, dweight, dbias = arrays
        units, plane, magic, shift, channels, how, has, dweight_kind, dbias_kind = sizes
        room = cuda.shared.array(PAIRS, float64)
        c = cuda.blockIdx.x
        power, origin, a_, b_, lo, sigma = scales(vectors, c, eps)
        s, q = gradients_of_plane(
            arrays, c, 0, units, plane, magic, shift, channels, how, 0, has, power, origin, a_, b_, slope_, room
        )
        m_, curve_, of_weight = slopes_of(power, lo, sigma, s, q, np.float64(units * lanes))
        if cuda.threadIdx.x == 0:
            put_parameter(dweight, c, dweight_kind, of_weight)
            put_parameter(dbias, c, dbias_kind, s)
        p, h, a, b, slope = splat(power), splat(origin), splat(a_), splat(b_), splat(slope_)
        m, curve = splat(m_), splat(curve_)
        j = units - 1 - cuda.threadIdx.x
        while j >= THREADS:
            at0 = place(j, c, plane, magic, shift, channels)
            at1 = place(j - THREADS, c, plane, magic, shift, channels)
            x0, x1, g0, g1 = load(x, at0), load(x, at1), load(dy, at0), load(dy, at1)
            d0, d1 = fma(x0, p, h), fma(x1, p, h)
            g0, g1 = passed(at0, d0, g0, y, a, b, slope, how), passed(at1, d1, g1, y, a, b, slope, how)
            store(dx, at0, differential(g0, d0, m, curve, a, p))
            store(dx, at1, differential(g1, d1, m, curve, a, p))
            if has != 0:
                store(dz, at0, g0)
                store(dz, at1, g1)
            j -= 2 * THREADS
        if j >= 0:
            at0 = place(j, c, plane, magic, shift, channels)
            d0 = fma(load(x, at0), p, h)
            g0 = passed(at0, d0, load(dy, at0), y, a, b, slope, how)
            store(dx, at0, differential(g0, d0, m, curve, a, p))
            if has != 0:
                store(dz, at0, g0)

    @_kernel
    def backward_rows(arrays: Any, sizes: Any, vectors: Any, eps: float, slope: float) -> None:
        units, width, channels, how, has, dweight_kind, dbias_kind = sizes
        room = cuda.shared.array(room_size, float64)
        table = cuda.shared.array(SIXES, float64)
        t = cuda.threadIdx.x
        tile = cuda.blockIdx.x
        k_ = tile * width * lanes + t
        mine = t < width * lanes and k_ < channels
        power, lo, sigma = 1.0, 0.0, 1.0
        if mine:
            power, table[THREADS + t], table[2 * THREADS + t], table[3 * THREADS + t], lo, sigma = scales(
                vectors, k_, eps
            )
            table[t] = power
        cuda.syncthreads()
        gradients_of_rows(arrays, tile, 0, units, width, channels, how, 0, has, table, slope, room)
        if mine:
            s, q = room[t], room[THREADS * lanes + t]
            m_, curve_, of_weight = slopes_of(power, lo, sigma, s, q, np.float64(units))
            table[4 * THREADS + t], table[5 * THREADS + t] = m_, curve_
            put_parameter(arrays[5], k_, dweight_kind, of_weight)
            put_parameter(arrays[6], k_, dbias_kind, s)
        cuda.syncthreads()
        across, down, step = t % width, t // width, THREADS // width
        c = (tile * width + across) * lanes
        if c < channels:
            i = across * lanes
            p, h = gather(table, i), gather(table, THREADS + i)
            a, b = gather(table, 2 * THREADS + i), gather(table, 3 * THREADS + i)
            m, curve = gather(table, 4 * THREADS + i), gather(table, 5 * THREADS + i)
            differentiate_tile(
                arrays, c, 0, units - 1 - down, step, channels, how, has, p, h, a, b, m, curve, splat(slope)
            )  # fmt: skip

    # -- others --

    @_kernel
    def copy(arrays: Any, sizes: Any) -> None:
        """An array of any strides into another: five axes, from the slowest, and each one's strides here and there."""
        source, to = arrays
        count, n1, n2, n3, n4, s0, s1, s2, s3, s4, t0, t1, t2, t3, t4, source_origin, to_origin = sizes
        i = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
        if i < count:
            rest, i4 = i // n4, i % n4
            rest, i3 = rest // n3, rest % n3
            rest, i2 = rest // n2, rest % n2
            i0, i1 = rest // n1, rest % n1
            there = to_origin + i0 * t0 + i1 * t1 + i2 * t2 + i3 * t3 + i4 * t4
            store(to, there, load(source, source_origin + i0 * s0 + i1 * s1 + i2 * s2 + i3 * s3 + i4 * s4))

    kernels = (
        moments_planes, moments_rows, gradients_planes, gradients_rows, finish_moments, finish_gradients, prepare,
        normalize_planes, normalize_rows, input_gradient_planes, input_gradient_rows,
        forward_planes, forward_rows, backward_planes, backward_rows, copy,
    )  # fmt: skip
    return SimpleNamespace(**{kernel.__name__: kernel for kernel in kernels})


@_kernel
def _update(vectors: Any, sizes: Any, momentum: float, correction: float) -> None:
    """running += momentum · (batch - running). vectors: running mean and var, the batch's mean and var."""
    c = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
    if c < sizes[0]:
        mean = parameter(vectors[0], c * vectors[1], vectors[2], 0.0)
        var = parameter(vectors[3], c * vectors[4], vectors[5], 0.0)
        new_mean = parameter(vectors[6], c * vectors[7], vectors[8], 0.0)
        new_var = parameter(vectors[9], c * vectors[10], vectors[11], 0.0) * correction
        put_parameter(vectors[0], c * vectors[1], vectors[2], (1.0 - momentum) * mean + momentum * new_mean)
        put_parameter(vectors[3], c * vectors[4], vectors[5], (1.0 - momentum) * var + momentum * new_var)


# ---- memory, as kernels get it ----


def _memory(view: Any) -> Any:
    """A compact array; 0 for None."""
    if view is None:
        return 0
    if SIMULATED:
        return at_address(view.address, (view.size,), view.dtype)  # simulated devices share the host's
    return view.address


def _vector(view: Any) -> tuple[Any, int, int]:
    """A value a channel, as address, stride and kind."""
    if view is None:
        return 0, 0, 0
    stride, kind = view.strides[0] // view.dtype.itemsize, view.dtype.itemsize
    if not SIMULATED:
        return view.address, stride, kind
    memory, first = _spanned(view)
    return memory[first:] if stride >= 0 else memory[first::-1], abs(stride), kind


def _spanned(view: Any) -> tuple[Any, int]:
    """All memory from a view's lowest element to its highest, and how many elements its first is from the lowest."""
    size = view.dtype.itemsize
    reaches = [step // size * (n - 1) for n, step in zip(view.shape, view.strides, strict=True)]
    below = -sum(r for r in reaches if r < 0)
    if not SIMULATED:
        return view.address - below * size, below
    above = sum(r for r in reaches if r > 0)
    return at_address(view.address - below * size, (below + above + 1,), view.dtype), below


class _Scratch(threading.local):
    """Memory between the kernels of a call, for each stream of each thread; it grows, and is used again.

    It holds its stream, so that no other gets that one's pointer, and with it the memory, while kernels still run.
    """

    STREAMS = 16  # the latest; freeing memory waits for the device

    def __init__(self) -> None:
        self.held: dict[Any, Any] = {}

    def get(self, bytes_: int, stream: Any) -> int:
        key = stream.key
        held = self.held.get(key)
        if held is None or held.nbytes < bytes_:
            if held is None and len(self.held) >= self.STREAMS:
                del self.held[next(iter(self.held))]
            held = self.held[key] = cuda.device_array(max(bytes_, 1 << 20), np.uint8, stream=stream.numba)
        return held.device_ctypes_pointer.value  # type: ignore[no-any-return]


_scratch = _Scratch()
ALIGNMENT = 256


def _work(stream: Any, *parts: tuple[int, Any]) -> list[Any]:
    """Scratch memory: so many elements of a dtype each."""
    if SIMULATED:
        return [np.full(size, np.nan, dtype) for size, dtype in parts]
    sizes = [-(-size * np.dtype(dtype).itemsize // ALIGNMENT) * ALIGNMENT for size, dtype in parts]
    start = _scratch.get(sum(sizes), stream)
    return [start + sum(sizes[:i]) for i in range(len(sizes))]


# ---- how a call is cut up ----


@cache
def _multiprocessors(device: int) -> int:
    if SIMULATED:
        return 2
    return int(cuda.gpus[device].MULTIPROCESSOR_COUNT)


@lru_cache(maxsize=1024)
def _magic(divisor: int, most: int) -> tuple[int, int]:
    """(factor, shift) by which n // divisor = n·factor >> shift for all n up to `most`; (0, 0) where that is 2³¹.

    Granlund and Montgomery (1994), "Division by invariant integers using multiplication", section 4.
    """
    if most >= 2**31:
        return 0, 0
    bits = (divisor - 1).bit_length()
    return (1 << (31 + bits)) // divisor + 1, 31 + bits


def _lanes(dtype: Any, channels: int, inner: int, views: tuple[Any, ...]) -> int:
    """Elements of a vector: 16 bytes of them, or as many as divide a plane (or row) and the addresses."""
    lanes = VECTOR_BYTES // int(dtype.itemsize)
    everything = (inner if inner > 1 else channels) * dtype.itemsize
    for view in views:
        if view is not None:
            everything |= view.address
    while lanes > 1 and everything % (lanes * dtype.itemsize):
        lanes //= 2
    return lanes


def fits(view: Any, channels: int, inner: int, leading: tuple[Any, ...]) -> bool:
    """Whether a view is aligned as the vectors are that `leading` views of the same shape are read in."""
    return bool(view.address % (_lanes(view.dtype, channels, inner, leading) * view.dtype.itemsize) == 0)


def _up(n: int, divisor: int) -> int:
    return -(-n // divisor)


def _parts(units: int, least: int, groups: int, stream: Any) -> tuple[int, int]:
    """How many parts the units of each of `groups` blocks are cut into, and the units of a part."""
    wanted = _up(_multiprocessors(stream.device) * WAVES, groups)
    part = _up(units, max(1, min(units // least, wanted)))
    return _up(units, part), part


class _Cut:
    """How an array of (outer, channels, inner) elements is cut into vectors, blocks and parts."""

    def __init__(self, dtype: Any, outer: int, channels: int, inner: int, views: tuple[Any, ...], stream: Any) -> None:
        self.channels, self.values, self.planes = channels, outer * inner, inner > 1
        self.lanes = lanes = _lanes(dtype, channels, inner, views)
        self.kernels = compiled(dtype.name, lanes)
        self.pitch = _up(channels, 8) * 8  # of tables: vectors of coefficients are aligned
        self.computed = np.dtype(np.float64 if dtype.itemsize == 8 else np.float32)
        self.stream = stream
        if self.planes:
            self.plane = inner // lanes
            self.units, self.unit = outer * self.plane, lanes  # vectors of a channel, and the values of one
            self.groups = channels
            self.parts, self.part = _parts(self.units, LEAST_PART * THREADS, channels, stream)
            self.magic = _magic(self.plane, self.units)
            one, enough = self.values * dtype.itemsize, channels
        else:
            vectors = channels // lanes
            self.width = min(1 << (vectors - 1).bit_length(), WIDTH, THREADS // lanes)
            self.units, self.unit = outer, 1
            self.groups = self.tiles = _up(vectors, self.width)
            self.parts, self.part = _parts(outer, LEAST_PART * THREADS // self.width, self.tiles, stream)
            one, enough = outer * self.width * lanes * dtype.itemsize, self.tiles
        # A block that does both steps must not keep the others waiting: either all are busy, or there is little to do.
        most = FUSED_BYTES if 2 * enough >= _multiprocessors(stream.device) else FUSED_BYTES // 4
        self.fused = one <= most

    def sums(self, *more: int) -> tuple[int, ...]:
        """The sizes of the first step."""
        if self.planes:
            return (self.units, self.part, self.plane, *self.magic, self.channels, self.pitch, *more)
        return (self.units, self.part, self.width, self.tiles, self.channels, self.pitch, *more)

    def steps(self, *more: int) -> tuple[int, tuple[int, ...]]:
        """The blocks and the sizes of the second step."""
        if not self.planes:
            return self.parts * self.tiles, self.sums(*more)
        units = self.units * self.channels
        sizes = (units, self.plane, *_magic(self.plane, units), self.channels, *_magic(self.channels, units))
        return _up(units, 4 * THREADS), (*sizes, self.pitch, *more)

    def whole(self, *more: int) -> tuple[int, ...]:
        """The sizes of a fused step."""
        if self.planes:
            return (self.units, self.plane, *self.magic, self.channels, *more)
        return (self.units, self.width, self.channels, *more)

    def run(self, name: str, blocks: int, *arguments: Any) -> None:
        """Launch a kernel; `_planes` or `_rows` of it where there are both."""
        kernel = getattr(self.kernels, name, None)
        if kernel is None:
            kernel = getattr(self.kernels, f"{name}_{'planes' if self.planes else 'rows'}")
        _launch(kernel, blocks, self.stream, *arguments)


def _launch(kernel: Any, blocks: int, stream: Any, *arguments: Any) -> None:
    _configured(kernel, blocks, stream.numba)(*arguments)


_configuring = threading.Lock()  # warnings are caught for all threads at once


def _configured(kernel: Any, blocks: int, stream: Any) -> Any:
    with _configuring, warnings.catch_warnings():  # Numba's, of few blocks: small arrays have few
        warnings.simplefilter("ignore")
        return kernel[blocks, THREADS, stream]


if not SIMULATED:  # where it would be the kernel itself
    _configured = lru_cache(maxsize=4096)(_configured)


NOTHING = (0, 0, 0)


# ---- the interface: as in reference.py, with a stream in the place of `threads` ----


def moments(x: Any, outer: int, channels: int, inner: int, mean: Any, m2: Any, stream: Any) -> None:
    """mean = Σx / n,  m2 = Σ(x - mean)². Writes mean and m2."""
    cut = _Cut(x.dtype, outer, channels, inner, (x,), stream)
    _moments(cut, x, mean, m2, 1.0, None, NOTHING * 4, 1.0, *_work(stream, *_sums_of(cut)))


def _sums_of(cut: _Cut) -> tuple[tuple[int, Any], ...]:
    size = cut.parts * cut.pitch, np.float64
    return size, size


def _moments(
    cut: _Cut, x: Any, mean: Any, var: Any, divisor: float, table: Any, vectors: Any, eps: float, means: Any, m2s: Any
) -> None:
    cut.run("moments", cut.parts * cut.groups, (_memory(x), means, m2s), cut.sums())
    table_pitch = 0 if table is None else cut.pitch
    sizes = cut.parts, cut.part, cut.units, cut.unit, cut.channels, cut.pitch, table_pitch
    arrays = means, m2s, _memory(mean), _memory(var), 0 if table is None else table
    cut.run("finish_moments", _up(cut.channels, WIDTH), arrays, sizes, vectors, divisor, eps)


def _apply(cut: _Cut, x: Any, y: Any, residual: Any, table: Any, slope: float, backwards: int) -> None:
    blocks, sizes = cut.steps(0 if residual is None else 1, backwards)
    cut.run("normalize", blocks, (_memory(x), _memory(y), _memory(residual), table), sizes, slope)


def normalize(
    x: Any, y: Any, outer: int, channels: int, inner: int, mean: Any, var: Any, weight: Any, bias: Any, eps: float,
    residual: Any, slope: float, stream: Any,
) -> None:  # fmt: skip
    """y = act((x - mean) · weight/σ + bias + residual), σ = sqrt(var + eps). Writes y, which may be x or residual."""
    cut = _Cut(x.dtype, outer, channels, inner, (x, y, residual), stream)
    (table,) = _work(stream, (4 * cut.pitch, cut.computed))
    vectors = _vector(weight) + _vector(bias) + _vector(mean) + _vector(var)
    cut.run("prepare", _up(channels, THREADS), (table,), (channels, cut.pitch), vectors, eps)
    _apply(cut, x, y, residual, table, slope, 0)


def forward(
    x: Any, y: Any, outer: int, channels: int, inner: int, weight: Any, bias: Any, eps: float, mean: Any, var: Any,
    residual: Any, slope: float, stream: Any,
) -> None:  # fmt: skip
    """moments, then normalize with them. Writes y, mean and var. y and residual must fit x."""
    cut = _Cut(x.dtype, outer, channels, inner, (x,), stream)
    vectors = _vector(weight) + _vector(bias) + NOTHING * 2
    if cut.fused:
        arrays = _memory(x), _memory(y), _memory(residual), _memory(mean), _memory(var)
        cut.run("forward", cut.groups, arrays, cut.whole(0 if residual is None else 1), vectors, eps, slope)
        return
    means, m2s, table = _work(stream, *_sums_of(cut), (4 * cut.pitch, cut.computed))
    _moments(cut, x, mean, var, float(cut.values), table, vectors, eps, means, m2s)
    _apply(cut, x, y, residual, table, slope, 1)


def backward(
    dy: Any, x: Any, dx: Any, outer: int, channels: int, inner: int, mean: Any, var: Any, weight: Any, bias: Any,
    eps: float, grad_weight: Any, grad_bias: Any, batch: bool, y: Any, dresidual: Any, slope: float, stream: Any,
) -> None:  # fmt: skip
    """dz = dy · act'(z), then gradient_moments and input_gradient of dz. Writes dx, Σ dz·x̂ and Σ dz (the gradients).

    `batch`, `y`, `dresidual`: as in `reference.py`; grad_weight and grad_bias may be None. dx may be dy, and so may
    dresidual. dx, y and dresidual must fit dy and x.
    """
    cut = _Cut(x.dtype, outer, channels, inner, (dy, x), stream)
    vectors = _vector(weight) + _vector(bias) + _vector(mean) + _vector(var)
    how = NO_CUT if slope == 1 else BY_X if y is None else BY_Y
    has = 0 if dresidual is None else 1
    arrays = tuple(_memory(view) for view in (dy, x, y, dx, dresidual))
    of_weight, of_bias = _vector(grad_weight), _vector(grad_bias)
    kinds = of_weight[2], of_bias[2]
    if batch and cut.fused:
        arrays += of_weight[0], of_bias[0]
        cut.run("backward", cut.groups, arrays, cut.whole(how, has, *kinds), vectors, eps, slope)
        return
    sums, sums_d, table = _work(stream, *_sums_of(cut), (ROWS_OF_TABLE * cut.pitch, cut.computed))
    sizes = cut.sums(how, 0 if batch else 1, has)
    cut.run("gradients", cut.parts * cut.groups, (*arrays, sums, sums_d), sizes, vectors, eps, slope)
    sizes = cut.parts, channels, cut.pitch, cut.pitch, *kinds
    finish = sums, sums_d, of_weight[0], of_bias[0], table
    cut.run("finish_gradients", _up(channels, WIDTH), finish, sizes, vectors, float(cut.values), eps)
    if batch:
        blocks, sizes = cut.steps(how, has)
        cut.run("input_gradient", blocks, (*arrays, table), sizes, slope)


def update_running_stats(
    running_mean: Any, running_var: Any, mean: Any, var: Any, momentum: float, correction: float, stream: Any
) -> None:
    """running += momentum · (batch - running). Writes both running statistics."""
    channels = mean.size
    vectors = _vector(running_mean) + _vector(running_var) + _vector(mean) + _vector(var)
    _launch(_update, _up(channels, THREADS), stream, vectors, (channels,), momentum, correction)


def copy(source: Any, to: Any, stream: Any) -> None:
    """`source`'s elements into `to`, of the same shape and dtype, whatever the strides of either."""
    size = source.dtype.itemsize
    if not source.size:
        return
    shape = (1,) * (5 - len(source.shape)) + tuple(source.shape)
    steps = [(0,) * (5 - len(shape_.shape)) + tuple(s // size for s in shape_.strides) for shape_ in (source, to)]
    (memory, origin), (to_memory, to_origin) = _spanned(source), _spanned(to)
    sizes = (source.size, *shape[1:], *steps[0], *steps[1], origin, to_origin)
    kernel = compiled(source.dtype.name, 1).copy
    _launch(kernel, _up(source.size, THREADS), stream, (memory, to_memory), sizes)


# ---- devices, streams and Numba's own arrays, for fastbn.gpu ----

if SIMULATED:

    class DeviceArray:
        """What Numba's device arrays are on hardware; the simulator's have no __cuda_array_interface__."""

        def __init__(self, array: Any) -> None:
            self.array, self.stream = array, 0
            self.shape, self.strides, self.dtype = array.shape, array.strides, array.dtype
            self.__cuda_array_interface__ = {**array.__array_interface__, "stream": None, "version": 3}

        def copy_to_host(self) -> Any:
            return self.array.copy()

    @contextmanager
    def on_device(number: int | None) -> Iterator[int]:
        yield number or 0

    def stream(pointer: int) -> Any:
        return 0

    def own_stream(array: Any) -> Any:
        return array.stream if isinstance(array, DeviceArray) else None

    def wait_for(first: Any, then: Any) -> None:
        pass

    def device_array(shape: Any, strides: Any, dtype: Any, stream_: Any) -> Any:
        size = int(np.prod(shape))
        return DeviceArray(np.lib.stride_tricks.as_strided(np.full(size, np.nan, dtype), shape, strides))

    def to_host(view: Any, stream_: Any) -> Any:
        return view.shadow.copy()

    def from_host(values: Any, view: Any, stream_: Any) -> None:
        view.shadow[...] = values

else:
    devicearray: Any = import_module("numba.cuda.cudadrv.devicearray")

    @contextmanager
    def on_device(number: int | None) -> Iterator[int]:
        """That device (None: the current one) is current; its number."""
        current = cuda.get_current_device().id
        if number is None or number == current:
            yield current
        else:
            with cuda.gpus[number]:
                yield number

    @lru_cache(maxsize=64)
    def stream(pointer: int) -> Any:
        return cuda.external_stream(pointer) if pointer > 2 else cuda.per_thread_default_stream() if pointer == 2 else 0

    def own_stream(array: Any) -> Any:
        """Numba's object, which keeps the stream alive, for Numba's own arrays; None for others."""
        return array.stream if isinstance(array, devicearray.DeviceNDArrayBase) else None

    def wait_for(first: Any, then: Any) -> None:
        """What is queued on one stream by now is done before anything more on another. Both are Numba's objects."""
        event = cuda.event(timing=False)
        event.record(first)
        event.wait(then)

    def device_array(shape: Any, strides: Any, dtype: Any, stream_: Any) -> Any:
        return devicearray.DeviceNDArray(shape, strides, dtype, stream=stream_.numba)

    def to_host(view: Any, stream_: Any) -> Any:
        values = cuda.as_cuda_array(view.owner, sync=False).copy_to_host(stream=stream_.numba)
        _synchronize(stream_)
        return values

    def from_host(values: Any, view: Any, stream_: Any) -> None:
        cuda.as_cuda_array(view.owner, sync=False).copy_to_device(values, stream=stream_.numba)
        _synchronize(stream_)

    def _synchronize(stream_: Any) -> None:
        (stream_.numba or cuda.default_stream()).synchronize()
