"""10,000 calls leave no memory behind: none of the process's, none of Python's, and no threads.

Each test is a process of its own, so that nothing else allocates beside it. The kernels' own memory is freed before a
call returns; what could grow is scratch on a way out by an exception, references to arrays, tables of layouts and
compiled forms, and the OpenMP teams of threads that have ended.
"""

import ctypes
import os
import sys

import pytest
from conftest import load_kernels, run_python, runnable_sets

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads resident memory and threads from /proc"),
    pytest.mark.skipif(
        any(checker in os.environ.get("LD_PRELOAD", "") for checker in ("libasan", "vgpreload")),
        reason="a memory checker keeps freed memory for a while, to see who uses it still",
    ),
]

CALLS = """
import contextlib, ctypes, gc, os, resource, sys, threading, tracemalloc
import numpy as np, fastbn

rng = np.random.default_rng(0)
x, dy, residual = rng.standard_normal((3, 8, 5, 7)).astype(np.float32)
gaps, small = np.repeat(x, 2, axis=2)[..., ::2], x[:1, :, :1]
weight, bias, mean, var = rng.uniform(1, 2, (4, 5)).astype(np.float32)
out, other = np.empty_like(x), np.empty_like(x)
layer = fastbn.BatchNorm(5, activation="relu")
others = [(fastbn.MaskedBatchNorm(5), (x[:, 0] > 0,)), (fastbn.GhostBatchNorm(5, virtual_batch_size=3), ())]
still = fastbn.InplaceBatchNorm(5)

def refused(call, *arguments, **settings):
    with contextlib.suppress(TypeError, ValueError):
        call(*arguments, **settings)
        raise AssertionError(call)

def plain():
    y, saved = fastbn.batch_norm_forward(x, weight, bias)
    fastbn.batch_norm_backward(dy, saved)

def relu():
    y, saved = fastbn.batch_norm_forward(x, weight, bias, activation="relu", out=out)
    fastbn.batch_norm_backward(dy, saved, out=other)

def added():
    y, saved = fastbn.batch_norm_forward(x, weight, bias, residual=residual, activation="relu")
    fastbn.batch_norm_backward(dy, saved, out=out, out_residual=other)

def of_a_layer():
    layer.train()(x)
    layer.backward(dy)
    layer.eval()(x, out=out)

def fixed():
    y, saved = fastbn.batch_norm_eval_forward(gaps, mean, var, weight, bias)
    fastbn.batch_norm_backward(dy, saved)

def running():
    fastbn.batch_norm(x, mean, var, weight, bias, training=True)
    fastbn.moments(gaps)

def other_layers():
    for bn, arguments in others:
        bn(x, *arguments)
        bn.backward(dy)
    still(x.copy())
    still.backward(dy)

def wrong():
    refused(fastbn.batch_norm, x, mean, var, weight[1:], bias, training=True)
    refused(fastbn.batch_norm, x, mean, var, out=x[1:])
    refused(fastbn.batch_norm_forward, small)
    y, saved = fastbn.batch_norm_forward(x)
    refused(fastbn.batch_norm_backward, dy, saved, out=x)
    refused(fastbn.batch_norm_backward, dy[1:], saved)
    refused(layer, x.astype(int))

FORMS = [plain, relu, added, of_a_layer, fixed, running, other_layers, wrong]
"""

MEASURES = """
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

class Mallinfo2(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in
                "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]

def in_use():  # bytes that malloc has given out, where glibc says it (2.33 and later)
    function = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if function is None:
        return 0
    function.restype = Mallinfo2
    found = function()
    return found.uordblks + found.hblkhd

def clear():  # with the names that Python's cache of attributes holds, 4096 at most
    gc.collect()
    getattr(sys, "_clear_type_cache", lambda: None)()

def measure():
    clear()
    return {"resident": resident(), "in use": in_use(), "objects": len(gc.get_objects())}

def go(calls):
    for i in range(calls):
        FORMS[i % len(FORMS)]()
"""

TEST = """
go(2000)
before = measure()
go(10_000)
after = measure()
allowed = {"resident": 1 << 20, "in use": 20_000, "objects": 20}  # no object is as small as 2 bytes a call
grown = {name: after[name] - before[name] for name in before if after[name] - before[name] > allowed[name]}
assert not grown, grown

tracemalloc.start()
go(1400)
clear()
before = tracemalloc.get_traced_memory()[0]
go(1400)
clear()
grown = tracemalloc.get_traced_memory()[0] - before
assert grown < 2_800, grown
"""


def run(code, **env):
    """Python's objects by malloc, too: its own allocator takes a MiB at a time."""
    return run_python(code, PYTHONMALLOC="malloc", **env)


@pytest.mark.parametrize("name", ["cython", "reference", "numba"])
def test_forward_and_backward(name):
    load_kernels(name if name != "cython" else f"cython {(runnable_sets() or ['x86-64'])[0]}")
    forms = "FORMS = [plain, running, wrong]\n" if name == "numba" else ""  # each other one would be compiled
    run(CALLS + forms + MEASURES + TEST, FASTBN_BACKEND=name)


def test_a_leak_would_be_seen():
    """Of 8 bytes a call by malloc, of an array, of an object in a list."""
    for leak, said in {
        "ctypes.CDLL(None).malloc(ctypes.c_size_t(8))": "in use",
        "kept.append(np.empty(128, np.float32))": "resident",
        "kept.append([])": "objects",
    }.items():
        if said == "in use" and not hasattr(ctypes.CDLL(None), "mallinfo2"):
            continue  # no glibc
        code = f"kept = []\ndef leak():\n    {leak}\nFORMS = [leak]\n"
        done = run(CALLS + code + MEASURES + TEST, check=False, FASTBN_BACKEND="reference")
        assert done.returncode and f"'{said}': " in done.stderr, done.stderr


def test_threads_that_end_leave_no_team():
    """Each Python thread that calls has an OpenMP team of its own, which goes when it does."""
    if not runnable_sets():
        pytest.skip("no compiled kernels here")
    code = """
large = rng.standard_normal((64, 32, 100)).astype(np.float32)
FORMS = [lambda: fastbn.batch_norm(large, training=True, num_threads=3)]

def threads():
    return len(os.listdir("/proc/self/task"))

def round():
    thread = threading.Thread(target=FORMS[0])
    thread.start()
    thread.join()

for _ in range(50):
    round()
before, many = in_use(), threads()
for _ in range(500):
    round()
assert threads() <= many + 3, (threads(), many)
assert in_use() - before < 50_000, in_use() - before
"""
    run(CALLS + MEASURES + code, FASTBN_BACKEND="cython")
