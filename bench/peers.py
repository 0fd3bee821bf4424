"""What fastbn is held against, in one place: torch, oneDNN, plain NumPy.

A peer gives a callable for each operation on the same arrays, or a reason why it cannot. All compute float32 with
weight and bias. An array comes in the shape (N, C, …); channels-last arrays come as the transposed view of their
memory.
"""

from __future__ import annotations

import ctypes
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastbn import bench as user_bench

EPS = 1e-5
Call = Callable[[], Any]


@dataclass
class Case:
    """The arrays of one case: x, dy and the outputs of one shape and layout, parameters and statistics a channel."""

    x: np.ndarray
    dy: np.ndarray
    y: np.ndarray
    dx: np.ndarray
    weight: np.ndarray
    bias: np.ndarray
    mean: np.ndarray
    var: np.ndarray
    threads: int


class Missing(Exception):
    """Why a peer cannot run."""


class NumPy:
    """The lines that one writes without a library."""

    def __init__(self, case: Case) -> None:
        c = case
        axes = tuple(d for d in range(c.x.ndim) if d != 1)
        mean, var, weight, bias = (np.expand_dims(p, axes) for p in (c.mean, c.var, c.weight, c.bias))
        self.forward: Call = lambda: user_bench.numpy_forward(c.x, weight, bias, axes)
        self.normalize: Call = lambda: user_bench.numpy_eval(c.x, mean, var, weight, bias)
        self.backward: Call = lambda: user_bench.numpy_backward(c.dy, c.x, mean, var, weight, axes)


class Torch:
    """torch.native_batch_norm: as called, each call allocating its output, and with outputs in place (`out`)."""

    def __init__(self, case: Case, *, out: bool = False) -> None:
        try:
            torch: Any = importlib.import_module("torch")
        except ImportError:
            raise Missing("torch is not installed: make peers") from None
        torch.set_num_threads(case.threads)
        x, dy, y, dx = (torch.from_numpy(a) for a in (case.x, case.dy, case.y, case.dx))
        weight, bias, mean, var = (torch.from_numpy(a) for a in (case.weight, case.bias, case.mean, case.var))
        running = torch.zeros_like(mean), torch.ones_like(var)
        _, save_mean, save_invstd = torch.native_batch_norm(x, weight, bias, *running, True, 0.1, EPS)
        both = dict(out=(y, torch.empty_like(mean), torch.empty_like(mean))) if out else {}
        grads = dict(out0=dx, out1=torch.empty_like(mean), out2=torch.empty_like(mean)) if out else {}
        gradient = torch.ops.aten.native_batch_norm_backward
        gradient = gradient.out if out else gradient.default
        rest = (weight, *running, save_mean, save_invstd, True, EPS, [True, True, True])
        self.forward: Call = lambda: torch.native_batch_norm(x, weight, bias, *running, True, 0.1, EPS, **both)
        self.normalize: Call = lambda: torch.native_batch_norm(x, weight, bias, mean, var, False, 0.1, EPS, **both)
        self.backward: Call = lambda: gradient(dy, x, *rest, **grads)


class TorchOut(Torch):
    """torch with its outputs in place."""

    def __init__(self, case: Case) -> None:
        super().__init__(case, out=True)


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
        self.keep: list[Any] = []
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
        self.keep.append((args, arrays))
        execute, wait = self.lib.dnnl_primitive_execute, self.lib.dnnl_stream_wait

        def run() -> None:
            execute(primitive, self.stream, len(args), args)
            wait(self.stream)

        return run


PEERS: dict[str, Callable[[Case], Any]] = {"torch": Torch, "torch out": TorchOut, "oneDNN": OneDNN, "NumPy": NumPy}
