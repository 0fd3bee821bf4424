"""What fastbn is held against, in one place: torch, oneDNN, jax, plain NumPy.

A peer gives a callable for each operation on the same arrays, or a reason why it cannot. All compute float32 with
weight and bias. A peer comes as users call it, allocating its output, and ("out") with its output in place where it
has such a form; oneDNN has no other.
"""

from __future__ import annotations

import ctypes
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from cases import EPS, Call, Case

from fastbn import backends
from fastbn import bench as user_bench


class Missing(Exception):
    """Why a peer cannot run."""


class NumPy:
    """The lines that one writes without a library."""

    def __init__(self, case: Case) -> None:
        c, axes = case, case.reduced
        mean, var, weight, bias = (np.expand_dims(p, axes) for p in (c.mean, c.var, c.weight, c.bias))
        self.forward: Call = lambda: user_bench.numpy_forward(c.x, weight, bias, axes)
        self.normalize: Call = lambda: user_bench.numpy_eval(c.x, mean, var, weight, bias)
        self.backward: Call = lambda: user_bench.numpy_backward(c.dy, c.x, mean, var, weight, axes)


class NumPyRelu:
    """Plain NumPy's batch norm, then the residual, then relu, each in place."""

    def __init__(self, case: Case, residual: np.ndarray | None) -> None:
        plain = NumPy(case)

        def forward() -> np.ndarray:
            y = plain.forward()
            if residual is not None:
                y += residual
            return np.maximum(y, 0, out=y)

        c, axes = case, case.reduced
        mean, var, weight = (np.expand_dims(p, axes) for p in (c.mean, c.var, c.weight))
        y = forward()
        self.forward: Call = forward
        self.backward: Call = lambda: user_bench.numpy_backward(c.dy * (y > 0), c.x, mean, var, weight, axes)


def import_torch() -> Any:
    try:
        return importlib.import_module("torch")
    except ImportError:
        raise Missing("torch is not installed: make peers") from None


class Torch:
    """torch.native_batch_norm."""

    def __init__(self, case: Case, *, out: bool = False) -> None:
        import_torch()
        c = case
        calls = user_bench.torch_calls(
            c.x, c.dy, c.weight, c.bias, c.mean, c.var, c.threads, (c.y, c.dx) if out else None
        )
        self.forward, self.normalize, self.backward = calls["forward"], calls["eval"], calls["backward"]


class TorchOut(Torch):
    """torch's .out variants."""

    def __init__(self, case: Case) -> None:
        super().__init__(case, out=True)


class TorchRelu:
    """torch's batch norm, then the residual, then relu, in its fastest forms: in place, but for the backward pass.

    (torch computes the .out variant of that one aside, and copies.)
    """

    def __init__(self, case: Case, residual: np.ndarray | None) -> None:
        torch = import_torch()
        plain = TorchOut(case)
        y, dy = torch.from_numpy(case.y), torch.from_numpy(case.dy)
        added = None if residual is None else torch.from_numpy(residual)

        def forward() -> Any:
            plain.forward()
            if added is not None:
                y.add_(added)
            return y.relu_()

        result, dz = forward().clone(), torch.empty_like(dy)
        c = case
        rest = user_bench.torch_calls(c.x, dz.numpy(), c.weight, c.bias, c.mean, c.var, c.threads)["backward"]

        def backward() -> Any:
            torch.ops.aten.threshold_backward.grad_input(dy, result, 0, grad_input=dz)
            return rest()

        self.forward: Call = forward
        self.backward: Call = backward


class Jax:
    """jax.jit of each operation, on jax's arrays of the same layout, to the end of its work.

    The variance is E[x²] - mean², as Flax has it: what is fastest, and loses all digits where the mean is large.
    """

    def __init__(self, case: Case, *, donate: bool = False) -> None:
        try:
            jax: Any = importlib.import_module("jax")
        except ImportError:
            raise Missing("jax is not installed: make peers") from None
        processors = backends._available_cpus()[0]
        if case.threads != processors:
            raise Missing(f"jax runs on all {processors} processors, and the others on {case.threads} threads")
        jax.config.update("jax_platforms", "cpu")

        def array(a: np.ndarray) -> Any:  # in the order of memory, where the channels may come last
            return jax.numpy.asarray(a.transpose(0, 2, 3, 1) if case.layout == "NHWC" else a)

        axes = (0, 1, 2) if case.layout == "NHWC" else case.reduced
        x, dy = array(case.x), array(case.dy)
        weight, bias, mean, var = (np.expand_dims(p, axes) for p in (case.weight, case.bias, case.mean, case.var))
        count = case.x.size // len(case.weight)

        def normalize(x: Any, mean: Any, var: Any, weight: Any, bias: Any) -> Any:
            return (x - mean) * (jax.lax.rsqrt(var + EPS) * weight) + bias

        def forward(x: Any, weight: Any, bias: Any) -> Any:
            mean = x.mean(axes, keepdims=True)
            var = (x * x).mean(axes, keepdims=True) - mean * mean
            return normalize(x, mean, var, weight, bias), mean, var

        def backward(dy: Any, x: Any, mean: Any, var: Any, weight: Any) -> Any:
            inverse = jax.lax.rsqrt(var + EPS)
            xhat = (x - mean) * inverse
            dbias, dweight = dy.sum(axes, keepdims=True), (dy * xhat).sum(axes, keepdims=True)
            return weight * inverse * (dy - dbias / count - xhat * (dweight / count)), dweight, dbias

        compiled = into_the_last if donate else into_new
        self.forward: Call = compiled(jax, forward, x, weight, bias)
        self.normalize: Call = compiled(jax, normalize, x, mean, var, weight, bias)
        self.backward: Call = compiled(jax, backward, dy, x, mean, var, weight)


def into_new(jax: Any, function: Callable[..., Any], *arrays: Any) -> Call:
    arrays = tuple(map(jax.numpy.asarray, arrays))
    jitted = jax.jit(function)
    return lambda: jax.block_until_ready(jitted(*arrays))


def into_the_last(jax: Any, function: Callable[..., Any], *arrays: Any) -> Call:
    """Each call donates what the one before returned, and jax writes into that memory."""
    arrays = tuple(map(jax.numpy.asarray, arrays))
    jitted = jax.jit(lambda last, *arrays: function(*arrays), donate_argnums=0, keep_unused=True)
    last: Any = None

    def call() -> Any:
        nonlocal last
        if last is None:
            shapes = jax.eval_shape(function, *arrays)
            last = jax.tree.map(lambda a: jax.numpy.array(np.zeros(a.shape, a.dtype)), shapes)
        last = jax.block_until_ready(jitted(last, *arrays))
        return last

    return call


class JaxOut(Jax):
    """jax with donated outputs."""

    def __init__(self, case: Case) -> None:
        super().__init__(case, donate=True)


class OneDNN:
    """oneDNN's primitive on the plain layout of the arrays, through its C API."""

    FORWARD_TRAINING, FORWARD_INFERENCE, BACKWARD = 64, 96, 128
    GLOBAL_STATS, SCALE, SHIFT = 1, 2, 4
    F32 = 3
    SRC, DST, MEAN, VARIANCE, SCALE_ARG, SHIFT_ARG = 1, 17, 49, 50, 51, 52
    DIFF_SRC, DIFF_DST, DIFF_SCALE, DIFF_SHIFT = 129, 145, 255, 256

    class Arg(ctypes.Structure):
        _fields_ = [("arg", ctypes.c_int), ("memory", ctypes.c_void_p)]

    def __init__(self, case: Case) -> None:
        library = next(iter(Path(sys.prefix, "lib").glob("libdnnl.so*")), None)
        if library is None:
            raise Missing("onednn-cpu-gomp is not installed: make peers")
        self.lib = ctypes.CDLL(str(library))
        self.engine = self.make("dnnl_engine_create", ctypes.c_int(1), ctypes.c_size_t(0))
        self.stream = self.make("dnnl_stream_create", self.engine, ctypes.c_uint(1))
        c = case
        data, stat = self.describe(c.x), self.describe(c.mean)
        scratch = [np.empty_like(c.mean) for _ in range(4)]
        eps, flags = ctypes.c_float(EPS), self.SCALE | self.SHIFT
        create = "dnnl_batch_normalization_{}_primitive_desc_create"

        def forward(kind: int, flags: int) -> ctypes.c_void_p:
            return self.make(create.format("forward"), self.engine, ctypes.c_int(kind), data, data, eps,
                             ctypes.c_uint(flags), None)  # fmt: skip

        training = forward(self.FORWARD_TRAINING, flags)
        inference = forward(self.FORWARD_INFERENCE, flags | self.GLOBAL_STATS)
        backward = self.make(create.format("backward"), self.engine, ctypes.c_int(self.BACKWARD), data, data, data,
                             eps, ctypes.c_uint(flags), training, None)  # fmt: skip
        x, y, dy, dx = ((data, a) for a in (c.x, c.y, c.dy, c.dx))
        weight, bias, mean, var = ((stat, a) for a in (c.weight, c.bias, c.mean, c.var))
        s = [(stat, a) for a in scratch]
        params = {self.SCALE_ARG: weight, self.SHIFT_ARG: bias}
        self.forward: Call = self.call(
            training, {self.SRC: x, self.DST: y, self.MEAN: s[0], self.VARIANCE: s[1], **params}
        )
        self.normalize: Call = self.call(
            inference, {self.SRC: x, self.DST: y, self.MEAN: mean, self.VARIANCE: var, **params}
        )
        self.backward: Call = self.call(
            backward,
            {self.SRC: x, self.DIFF_DST: dy, self.DIFF_SRC: dx, self.MEAN: mean, self.VARIANCE: var,
             self.SCALE_ARG: weight, self.DIFF_SCALE: s[2], self.DIFF_SHIFT: s[3]},
        )  # fmt: skip

    def check(self, name: str, *args: Any) -> None:
        status = getattr(self.lib, name)(*args)
        if status != 0:
            raise Missing(f"oneDNN's {name} returned status {status}")

    def make(self, name: str, *args: Any) -> ctypes.c_void_p:
        made = ctypes.c_void_p()
        self.check(name, ctypes.byref(made), *args)
        return made

    def describe(self, a: np.ndarray) -> ctypes.c_void_p:
        longs = ctypes.c_int64 * a.ndim
        strides = longs(*(s // a.itemsize for s in a.strides))
        return self.make("dnnl_memory_desc_create_with_strides", ctypes.c_int(a.ndim), longs(*a.shape),
                         ctypes.c_int(self.F32), strides)  # fmt: skip

    def call(self, description: ctypes.c_void_p, arrays: dict[int, tuple[ctypes.c_void_p, np.ndarray]]) -> Call:
        primitive = self.make("dnnl_primitive_create", description)
        args = (self.Arg * len(arrays))()
        for i, (name, (desc, array)) in enumerate(arrays.items()):
            memory = self.make("dnnl_memory_create", desc, self.engine, ctypes.c_void_p(array.ctypes.data))
            args[i] = self.Arg(name, memory.value)
        execute, wait, stream = self.lib.dnnl_primitive_execute, self.lib.dnnl_stream_wait, self.stream

        def run(keep: Any = arrays) -> None:  # not self: with it, call and peer would hold each other, and the arrays
            execute(primitive, stream, len(args), args)
            wait(stream)

        return run


PEERS: dict[str, Callable[[Case], Any]] = {
    "torch": Torch, "torch out": TorchOut, "oneDNN": OneDNN, "jax": Jax, "jax out": JaxOut, "NumPy": NumPy,
}  # fmt: skip

# The unfused sequences: constructed with the case and a residual or None, forward and backward.
UNFUSED: dict[str, Callable[..., Any]] = {"torch": TorchRelu, "NumPy": NumPyRelu}
