"""Arrays on a GPU: the same operations, where the arrays are.

`functional.py`, `statistics.py` and `layers.py` come here with anything that has a ``__cuda_array_interface__``:
Numba's device arrays, CuPy's, torch's CUDA tensors. Nothing of x's size goes to the host, results are arrays of x's
library (for others than CuPy and torch: Numba's), and the kernels (`_kernels/numba_cuda.py`) run on the stream on which
that library runs its own at the time of the call; no function waits for them, unless it says so. (Numba itself waits
for the device when it gives freed arrays back, ten and more at a time: `cuda.defer_cleanup()` puts that off.)

Every array is seen through its *shadow*: a NumPy array of the same address, shape and strides, whose elements must
never be touched, as they are not there. It is what the checks look at, so that bad input gets the same errors on either
side.

This module is imported when the first such array comes in. It is the only one that knows the libraries by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np

from . import checks
from .functional import Saved
from .layout import Layout, _layout, at_address
from .statistics import Moments

Array = np.ndarray[Any, np.dtype[Any]]


@lru_cache(maxsize=1)
def kernels() -> Any:
    """The kernels, compiled as they are used."""
    try:
        return import_module("fastbn._kernels.numba_cuda")
    except ImportError as error:
        raise ImportError(checks.needs("an array on a GPU", f"numba-cuda ({error})", "cuda")) from error


# ---- arrays ----


class View:
    """An array on a GPU: who owns it, and its shadow."""

    __slots__ = ("address", "owner", "shadow")

    def __init__(self, owner: Any, shadow: Array, address: int) -> None:
        self.owner, self.shadow, self.address = owner, shadow, address

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.shadow.shape)

    @property
    def strides(self) -> tuple[int, ...]:
        return self.shadow.strides

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.shadow.dtype

    @property
    def size(self) -> int:
        return self.shadow.size

    @property
    def compact(self) -> bool:
        """Whether it lies in C order, without gaps."""
        return self.shadow.flags.c_contiguous

    def transposed(self, order: tuple[int, ...] | None) -> View:
        return self if order is None else View(self.owner, self.shadow.transpose(order), self.address)


def view(name: str, array: Any) -> View:
    """Of an array on a GPU, of float16, float32 or float64."""
    interface = checks.device_interface(name, array)
    checks.no_mask(name, interface.get("mask"))
    dtype = checks.device_dtype(name, interface["typestr"])
    shape, strides = interface["shape"], interface.get("strides")
    address, read_only = interface["data"]
    if strides is not None:
        checks.whole_strides(name, strides, dtype)
    if 0 in shape:
        shadow = np.empty(shape, dtype)
    else:
        checks.aligned(name, address, dtype)
        shadow = at_address(address, shape, dtype, strides, read_only)
    return View(array, shadow, address)


def _maybe(name: str, array: Any) -> View | None:
    return None if array is None else view(name, array)


def _shadow(view_: View | None) -> Array | None:
    return None if view_ is None else view_.shadow


# ---- libraries: a device, a stream and new arrays of each ----


class Stream(NamedTuple):
    """Where kernels are queued: a key for it, Numba's object, and the device's number."""

    key: Any
    numba: Any
    device: int


def library(array: Any) -> str:
    """ "torch", "cupy", or "numba" for all others."""
    for kind in type(array).__mro__:
        name = kind.__module__.partition(".")[0]
        if name in ("torch", "cupy"):
            return name
    return "numba"


def device_of(array: Any) -> int | None:
    """The number of the array's device, if its library says it."""
    name = library(array)
    if name == "torch":
        return int(array.device.index)
    return int(array.device.id) if name == "cupy" else None


def _stream_of(name: str, array: Any) -> tuple[int, Any] | None:
    """The stream that the array's library runs on: its pointer, and Numba's object. None where nobody says."""
    kind, own = library(array), kernels().own_stream(array)
    if kind == "torch":
        pointer = import_module("torch").cuda.current_stream(array.device).cuda_stream
    elif kind == "cupy":
        pointer = import_module("cupy").cuda.get_current_stream().ptr
    elif own is not None:
        pointer = own
    else:
        pointer = checks.device_interface(name, array).get("stream")
        if pointer is None:
            return None
    pointer = int(pointer)
    if pointer == 1:  # as 0 is: the default one
        pointer = 0
    return pointer, kernels().stream(pointer) if own is None else own


@contextmanager
def _on(x: Any, **others: Any) -> Iterator[Stream]:
    """x's device and stream, for the time of a call.

    That stream waits for what the streams of other arrays still have to do; after the call those wait for it.
    """
    k = kernels()
    device = device_of(x)
    with k.on_device(device) as number:
        pointer, own = _stream_of("x", x) or (0, k.stream(0))
        beside = {}
        for name, array in others.items():
            if array is not None:
                checks.same_device(name, device_of(array), device)
                there = _stream_of(name, array)
                if there is not None and there[0] != pointer:
                    beside[there[0]] = there[1]
        for other in beside.values():
            k.wait_for(other, own)
        try:
            yield Stream((number, pointer), own, number)
        finally:
            for other in beside.values():
                k.wait_for(own, other)


def empty(like: Any, shape: tuple[int, ...], dtype: Any, stream: Stream, order: tuple[int, ...] | None = None) -> View:
    """A new array of `like`'s library, on its device. `order`: the axes from the slowest to the fastest in memory."""
    dtype, steps, step = np.dtype(dtype), [0] * len(shape), 1
    for axis in reversed(range(len(shape)) if order is None else order):
        steps[axis] = step
        step *= max(1, shape[axis])
    name = library(like)
    if name == "torch":
        torch = import_module("torch")
        array = torch.empty_strided(shape, steps, dtype=getattr(torch, dtype.name), device=like.device)
    elif name == "cupy":
        cupy = import_module("cupy")
        flat = cupy.empty(step if 0 not in shape else 0, dtype)
        array = cupy.ndarray(shape, dtype, flat.data, tuple(s * dtype.itemsize for s in steps))
    else:
        array = kernels().device_array(shape, tuple(s * dtype.itemsize for s in steps), dtype, stream)
    return view("a new array", array)


def to_host(array: Any) -> Array:
    """A copy in NumPy; waits for it."""
    with _on(array) as stream:
        return kernels().to_host(view("array", array), stream)  # type: ignore[no-any-return]


def from_host(values: Array, array: Any) -> None:
    """Write NumPy's values into an array on a GPU; waits for it."""
    with _on(array) as stream:
        kernels().from_host(np.ascontiguousarray(values), view("array", array), stream)


def moved(values: Array, like: Any = None) -> Any:
    """NumPy's values as an array on a GPU, of `like`'s library and device (None: Numba's)."""
    k = kernels()
    if like is None:
        with k.on_device(None) as number:
            new = empty(None, values.shape, values.dtype, Stream((number, 0), k.stream(0), number))
    else:
        with _on(like) as stream:
            new = empty(like, values.shape, values.dtype, stream)
    from_host(values, new.owner)
    return new.owner


# ---- layout: as in layout.py, with copies on the device ----


def _layout_of(x: View, axis: int) -> Layout | None:
    return _layout(x.shape, None if x.compact else x.strides, x.dtype.itemsize, axis)


def canonical(name: str, x: Any, axis: int, stream: Stream) -> tuple[View, Layout]:
    """x in memory order, compact, and its layout."""
    given = view(name, x)
    axis = checks.integer("axis", axis)
    layout = _layout_of(given, axis)
    if layout is None:
        given = _compact(given, stream)
        layout = _layout_of(given, axis)
        assert layout is not None
    return given.transposed(layout.order), layout


def _compact(x: View, stream: Stream) -> View:
    """A copy in C order."""
    new = empty(x.owner, x.shape, x.dtype, stream)
    kernels().copy(x, new, stream)
    return new


def _fits(memory: View, layout: Layout, leading: tuple[View, ...]) -> bool:
    """Whether kernels can have it as it is: compact, and aligned as well as those that their vectors follow from."""
    if not memory.compact:
        return False
    return not leading or kernels().fits(memory, layout.channels, layout.inner, leading)


def like(name: str, array: Any, x: View, layout: Layout, stream: Stream, leading: tuple[View, ...] = ()) -> View:
    """`array`, which must have x's shape and dtype, in memory order; aligned as `leading` arrays are."""
    given = view(name, array)
    checks.same(name, given.shadow, layout.from_memory(x.shadow))
    memory = given.transposed(layout.order)
    return memory if _fits(memory, layout, leading) else _compact(memory, stream)


def output(
    name: str, out: Any, x: View, layout: Layout, stream: Stream, leading: tuple[View, ...] = ()
) -> tuple[View, View]:
    """Where a kernel writes, and what the caller gets: the same memory unless `out` lies in another order than x.

    Nor where it is aligned worse than `leading` arrays.
    """
    if out is None:
        memory = empty(x.owner, layout.from_memory(x.shadow).shape, x.dtype, stream, layout.order)
        return memory.transposed(layout.order), memory
    result = view(name, out)
    checks.output(name, result.shadow, layout.from_memory(x.shadow))
    memory = result.transposed(layout.order)
    return (memory if _fits(memory, layout, leading) else empty(x.owner, memory.shape, x.dtype, stream)), result


def _finish(memory: View, result: View, layout: Layout, stream: Stream) -> Any:
    """The result, as its owner knows it."""
    target = result.transposed(layout.order)
    if memory.address != target.address:
        kernels().copy(memory, target, stream)
    return result.owner


# ---- the operations: as in functional.py ----


class DeviceSaved(Saved):
    """`Saved` on a GPU: mean and var are arrays there."""


def _side(x: Any, **others: Any) -> None:
    checks.one_side("x", x, others)


def _parameter(name: str, p: Any, channels: int) -> View | None:
    given = _maybe(name, p)
    if given is not None:
        checks.vector(name, given.shadow, channels)
    return given


def _running(mean: Any, var: Any, channels: int, *, update: bool) -> tuple[View | None, View | None]:
    views = _maybe("running_mean", mean), _maybe("running_var", var)
    checks.running(_shadow(views[0]), _shadow(views[1]), channels, update=update)
    return views


def moments(x: Any, *, axis: int = 1) -> Moments:
    """As `fastbn.moments`; the result, two numbers a channel, comes to the host, and is waited for."""
    with _on(x) as stream:
        source, layout = canonical("x", x, axis, stream)
        outer, channels, inner = layout[:3]
        if not source.size:
            return Moments(layout.values, np.zeros(channels), np.zeros(channels))
        both = empty(None, (2, channels), np.float64, stream)
        rows = [View(both.owner, both.shadow[i], both.address + i * channels * 8) for i in range(2)]
        kernels().moments(source, outer, channels, inner, *rows, stream)
        mean, m2 = kernels().to_host(both, stream)
    return Moments(layout.values, mean, m2)


def batch_norm(
    x: Any, running_mean: Any, running_var: Any, weight: Any, bias: Any, *, training: bool, momentum: float,
    unbiased: bool, nan_policy: str, eps: float, axis: int, activation: str | None, negative_slope: float,
    residual: Any, out: Any,
) -> Any:  # fmt: skip
    """As `fastbn.batch_norm`."""
    if checks.flag("training", training):
        return train_forward(
            x, running_mean, running_var, weight, bias,
            momentum=momentum, unbiased=unbiased, nan_policy=nan_policy, eps=eps, axis=axis, activation=activation,
            negative_slope=negative_slope, residual=residual, out=out, keep=False,
        )[0]  # fmt: skip
    checks.momentum(momentum)
    checks.flag("unbiased", unbiased)
    checks.nan_policy(nan_policy)
    return batch_norm_eval_forward(
        x, running_mean, running_var, weight, bias, eps=eps, axis=axis, activation=activation,
        negative_slope=negative_slope, residual=residual, out=out, keep=False,
    )[0]  # fmt: skip


def train_forward(
    x: Any, running_mean: Any, running_var: Any, weight: Any, bias: Any, *,
    momentum: float, unbiased: bool, nan_policy: str, eps: float, axis: int, activation: str | None,
    negative_slope: float, residual: Any, out: Any, keep: bool = True,
) -> tuple[Any, Saved, bool]:  # fmt: skip
    """As `functional.train_forward`. With another `nan_policy` than "propagate" it waits for the batch's statistics."""
    arrays = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    _side(x, **arrays, residual=residual, out=out)
    rate = checks.momentum(momentum)
    checks.flag("unbiased", unbiased)
    slope = checks.activation(activation, negative_slope)
    checks.nan_policy(nan_policy)
    with _on(x, **arrays, residual=residual, out=out) as stream:
        source, layout = canonical("x", x, axis, stream)
        running = _running(running_mean, running_var, layout.channels, update=True)
        checks.not_a_parameter(running_mean, running_var, weight, bias)
        if nan_policy == "raise" and source.size:
            batch = moments(x, axis=axis)
            dtype = batch.mean.dtype if running[1] is None else running[1].dtype
            checks.finite_statistics(batch.mean, batch.var(), dtype)
        y, saved = _forward(x, source, layout, weight, bias, eps, slope, residual, out, stream, keep, running)
        counts = source.size > 0
        if nan_policy == "skip_update" and counts and running[1] is not None:
            mean, var = (kernels().to_host(view("", statistic), stream) for statistic in (saved.mean, saved.var))
            counts = checks.representable(mean, var, running[1].dtype)
        if running[0] is not None and counts:
            correction = layout.values / (layout.values - 1) if unbiased else 1.0
            statistics = view("", saved.mean), view("", saved.var)
            kernels().update_running_stats(*running, *statistics, rate, correction, stream)
    return y, saved, counts


def batch_norm_forward(
    x: Any, weight: Any, bias: Any, *, eps: float, axis: int, activation: str | None, negative_slope: float,
    residual: Any, out: Any,
) -> tuple[Any, Saved]:  # fmt: skip
    """As `fastbn.batch_norm_forward`."""
    _side(x, weight=weight, bias=bias, residual=residual, out=out)
    slope = checks.activation(activation, negative_slope)
    with _on(x, weight=weight, bias=bias, residual=residual, out=out) as stream:
        source, layout = canonical("x", x, axis, stream)
        return _forward(x, source, layout, weight, bias, eps, slope, residual, out, stream, True, ())


def _arrays(
    x: Any, source: View, layout: Layout, weight: Any, bias: Any, residual: Any, out: Any, stream: Stream, keep: bool,
    running: tuple[View | None, ...], leading: tuple[View, ...] = (),
) -> tuple[View | None, View | None, View | None, View, View]:  # fmt: skip
    """weight, bias, residual; where to write, and the result."""
    weight, bias = _parameter("weight", weight, layout.channels), _parameter("bias", bias, layout.channels)
    added = None if residual is None else like("residual", residual, source, layout, stream, leading)
    memory, result = output("out", out, source, layout, stream, leading)
    if out is not None:
        others = {"x": view("x", x), "residual": _maybe("residual", residual), "weight": weight, "bias": bias}
        others |= dict(zip(("running_mean", "running_var"), running, strict=False))
        shadows = {name: _shadow(other) for name, other in others.items()}
        checks.overlap("out", result.shadow, shadows, same_as=("residual",) if keep else ("x", "residual"))
    return weight, bias, added, memory, result


def _forward(
    x: Any, source: View, layout: Layout, weight: Any, bias: Any, eps: float, slope: float, residual: Any, out: Any,
    stream: Stream, keep: bool, running: tuple[View | None, ...],
) -> tuple[Any, Saved]:  # fmt: skip
    outer, channels, inner = layout[:3]
    if outer * inner == 1 and channels:
        checks.enough_values(1, layout.from_memory(source.shadow).shape)
    eps = checks.eps(eps)
    weight, bias, added, memory, y = _arrays(
        x, source, layout, weight, bias, residual, out, stream, keep, running, (source,)
    )  # fmt: skip
    mean, var = (empty(x, (channels,), np.float64, stream) for _ in range(2))
    if source.size:
        kernels().forward(source, memory, outer, channels, inner, weight, bias, eps, mean, var, added, slope, stream)
    else:
        for statistic in (mean, var):
            kernels().from_host(np.zeros(channels), statistic, stream)
    return _done(source, layout, mean, var, weight, bias, eps, True, slope, added, memory, y, stream)


def batch_norm_eval_forward(
    x: Any, running_mean: Any, running_var: Any, weight: Any, bias: Any, *, eps: float, axis: int,
    activation: str | None, negative_slope: float, residual: Any, out: Any, keep: bool = True,
) -> tuple[Any, Saved]:  # fmt: skip
    """As `fastbn.batch_norm_eval_forward`."""
    arrays = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    _side(x, **arrays, residual=residual, out=out)
    with _on(x, **arrays, residual=residual, out=out) as stream:
        source, layout = canonical("x", x, axis, stream)
        outer, channels, inner = layout[:3]
        mean, var = running = _running(running_mean, running_var, channels, update=False)
        assert mean is not None and var is not None
        slope, eps = checks.activation(activation, negative_slope), checks.eps(eps)
        weight, bias, added, memory, y = _arrays(
            x, source, layout, weight, bias, residual, out, stream, keep, running
        )  # fmt: skip
        if source.size:
            kernels().normalize(
                source, memory, outer, channels, inner, mean, var, weight, bias, eps, added, slope, stream
            )  # fmt: skip
        if keep:  # a training step may update the running statistics before the backward pass
            mean, var = _compact(mean, stream), _compact(var, stream)
        return _done(source, layout, mean, var, weight, bias, eps, False, slope, added, memory, y, stream)


def _done(
    x: View, layout: Layout, mean: View, var: View, weight: View | None, bias: View | None, eps: float, batch: bool,
    slope: float, residual: View | None, memory: View, y: View, stream: Stream,
) -> tuple[Any, Saved]:  # fmt: skip
    kept: Any = memory if residual is not None and slope != 1 else None
    held: Any = x, weight, bias
    saved = DeviceSaved(
        held[0], layout, mean.owner, var.owner, held[1], held[2], eps, batch, slope, residual is not None, kept
    )  # fmt: skip
    return _finish(memory, y, layout, stream), saved


def batch_norm_backward(dy: Any, saved: Saved, *, out: Any, out_residual: Any) -> tuple[Any, ...]:
    """As `fastbn.batch_norm_backward`."""
    if not isinstance(saved, DeviceSaved):
        checks.one_side("x", saved.x, {"dy": dy})
    x, layout, weight, bias = (getattr(saved, name) for name in ("x", "layout", "weight", "bias"))
    _side(x.owner, dy=dy, out=out, out_residual=out_residual)
    channels = layout.channels
    owners = {name: p.owner for name, p in (("weight", weight), ("bias", bias)) if p is not None}
    with _on(x.owner, dy=dy, out=out, out_residual=out_residual, **owners) as stream:
        gradient = like("dy", dy, x, layout, stream)
        leading = x, gradient
        memory, dx = output("out", out, x, layout, stream, leading)
        y: Any = saved.y
        reads = {"dy": view("dy", dy), "x": x, "weight": weight, "bias": bias, "y": y}
        shadows = {name: _shadow(array) for name, array in reads.items()}
        if out is not None:
            checks.overlap("out", dx.shadow, shadows, same_as=("dy",))
        residual_memory = dresidual = None
        if saved.residual:
            residual_memory, dresidual = output("out_residual", out_residual, x, layout, stream, leading)
            if out_residual is not None:
                checks.overlap("out_residual", dresidual.shadow, {**shadows, "out": dx.shadow}, same_as=("dy",))
        else:
            checks.no_residual(out_residual)
        dweight, dbias = (None if p is None else empty(x.owner, (channels,), p.dtype, stream) for p in (weight, bias))
        if x.size:
            if y is not None and not _fits(y, layout, leading):
                y = _compact(y, stream)
            kernels().backward(
                gradient, x, memory, layout.outer, channels, layout.inner, view("", saved.mean), view("", saved.var),
                weight, bias, saved.eps, dweight, dbias, saved.batch, y, residual_memory, saved.slope, stream,
            )  # fmt: skip
        else:
            for p in (dweight, dbias):
                if p is not None:
                    kernels().from_host(np.zeros(channels, p.dtype), p, stream)
        gradients = (
            _finish(memory, dx, layout, stream),
            None if dweight is None else dweight.owner,
            None if dbias is None else dbias.owner,
        )
        if residual_memory is None or dresidual is None:
            return gradients
        return *gradients, _finish(residual_memory, dresidual, layout, stream)
