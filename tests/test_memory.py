"""What is allocated: outputs, vectors of channels, and nothing else of a tensor's size; and what is kept of it."""

import ctypes
import os
import re
import resource
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from conftest import computed, parameters, run_python, sample

import fastbn
from fastbn import memory

SHAPES = {
    "rows": ((1900, 16), 1),
    "small planes": ((40, 16, 7, 7), 1),
    "planes": ((3, 16, 25, 24), 1),
    "NHWC": ((3, 25, 24, 16), -1),
}
KINDS = [("plain", False), ("plain", True), ("relu", False), ("relu", True), ("leaky_relu", True)]  # and a residual
SMALL = 10_000  # bytes: vectors of 16 channels, Python's own objects; a tensor is 57 kB and more


@pytest.fixture(params=[*product(SHAPES, KINDS)], ids=lambda p: f"{p[0]} {p[1][0]}{' added' * p[1][1]}")
def step(request, dtype):
    """Arrays, and what is fused."""
    name, (activation, added) = request.param
    shape, axis = SHAPES[name]
    x, dy, residual = (sample(shape, dtype, axis, seed=seed) for seed in (0, 2, 5))
    settings = {"axis": axis, "residual": residual if added else None}
    settings["activation"] = None if activation == "plain" else activation
    return x, dy, parameters(16, computed(dtype)), settings


def peak(call):
    """Most bytes in use beside what was there, in the second of two calls; the first may compile."""
    call()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        result = call()
        return tracemalloc.get_traced_memory()[1] - before, result
    finally:
        tracemalloc.stop()


def test_a_step_with_out(native, step):
    """Training, its backward pass and evaluation, all into arrays that are there."""
    x, dy, (weight, bias, mean, var), settings = step
    y, dx = np.empty_like(x), np.empty_like(x)
    to = {"out": dx} | ({} if settings["residual"] is None else {"out_residual": np.empty_like(x)})

    def train():
        _, saved = fastbn.batch_norm_forward(x, weight, bias, out=y, **settings)
        fastbn.batch_norm_backward(dy, saved, **to)

    def fixed():
        _, saved = fastbn.batch_norm_eval_forward(x, mean, var, weight, bias, out=y, **settings)
        fastbn.batch_norm_backward(dy, saved, **to)

    def normalize():
        fastbn.batch_norm(x, mean, var, weight, bias, out=y, **settings)
        fastbn.batch_norm(x, mean, var, weight, bias, training=True, out=y, **settings)
        fastbn.moments(x, axis=settings["axis"])

    for call in (train, fixed, normalize):
        assert peak(call)[0] < SMALL


def test_a_step_in_place(native, step):
    """The gradients over dy, y over the residual."""
    x, dy, (weight, bias, *_), settings = step
    residual, settings = settings["residual"], {k: v for k, v in settings.items() if k != "residual"}

    def train():
        _, saved = fastbn.batch_norm_forward(
            x, weight, bias, residual=residual, out=np.empty_like(x) if residual is None else residual, **settings
        )
        fastbn.batch_norm_backward(dy, saved, out=dy)

    assert peak(train)[0] < x.nbytes + SMALL


def test_a_step_without_out(native, step):
    """y and dx, and the residual's gradient: nothing more than what is returned, at any moment."""
    x, dy, (weight, bias, *_), settings = step

    def train():
        y, saved = fastbn.batch_norm_forward(x, weight, bias, **settings)
        return y, *fastbn.batch_norm_backward(dy, saved)

    most, results = peak(train)
    tensors = [r for r in results if r.ndim > 1]
    assert len(tensors) == (2 if settings["residual"] is None else 3)
    assert most < sum(r.nbytes for r in tensors) + SMALL


def test_a_layers_step(native, dtype):
    x, dy, residual = (sample((40, 16, 7, 7), dtype, seed=seed) for seed in (0, 2, 5))
    layer = fastbn.BatchNorm(16, dtype=computed(dtype), activation="relu")
    y, dx, dresidual = (np.empty_like(x) for _ in range(3))

    def train():
        layer(x, residual, out=y)
        layer.backward(dy, out=dx, out_residual=dresidual)

    assert peak(train)[0] < SMALL


# ---- what is kept ----

LARGE = (64, 32, 32, 64)  # 16 MiB of float32
NBYTES = 1 << 24

compiled = pytest.mark.skipif(memory._compiled() is None, reason="fastbn was installed without a compiler")
SMAPS = Path("/proc/self/smaps_rollup")


@pytest.fixture
def keep():
    """`set_kept_memory`, with nothing kept before the test, and the settings afterwards as they were."""
    most = memory.kept()[1]
    fastbn.set_kept_memory(0)
    yield fastbn.set_kept_memory
    fastbn.set_kept_memory(0)
    fastbn.set_kept_memory(most)


def address(array):
    return array.__array_interface__["data"][0]


@compiled
def test_freed_results_are_kept(native, keep):
    keep(1 << 28)
    x = np.ones(LARGE, np.float32)
    y, saved = fastbn.batch_norm_forward(x, axis=-1)
    at = address(y)
    assert y.flags.owndata and y.base is None and memory.kept() == (0, 1 << 28)
    del y
    assert memory.kept()[0] == NBYTES
    other = fastbn.batch_norm_forward(x[1:], axis=-1)[0]  # of another size
    assert memory.kept()[0] == NBYTES
    dx = fastbn.batch_norm_backward(x, saved)[0]
    assert address(dx) == at and memory.kept()[0] == 0
    view = dx[1:]
    del dx
    assert memory.kept()[0] == 0  # the view has it still
    del view, other
    assert memory.kept()[0] == 2 * NBYTES - NBYTES // 64
    keep(0)
    assert memory.kept() == (0, 0)


@compiled
@pytest.mark.parametrize(
    "call", ["eval", "eval forward", "ghost", "channels last", "copy", "training", "residual", "masked", "in place"]
)
def test_every_large_result(keep, call):
    """Of each kind of call, results and what is made for an `out` that lies in memory in another order."""
    keep(1 << 28)
    x, mean, var = np.ones(LARGE, np.float32), np.zeros(32), np.ones(32)
    channels_last = x.transpose(0, 3, 1, 2)
    if call == "ghost":
        results = [fastbn.GhostBatchNorm(32, virtual_batch_size=16)(x)]
    elif call == "eval":
        results = [fastbn.batch_norm(x, mean, var)]
    elif call == "eval forward":
        results = [fastbn.batch_norm_eval_forward(x, mean, var)[0]]
    elif call == "channels last":
        results = [fastbn.batch_norm(channels_last, np.zeros(64), np.ones(64))]
    elif call == "copy":
        results = [fastbn.batch_norm(x[:, :, ::-1], mean, var)]
    elif call == "training":
        results = [fastbn.batch_norm(x, training=True)]
    elif call == "residual":
        y, saved = fastbn.batch_norm_forward(x, residual=x, activation="relu")
        dx, *_, dresidual = fastbn.batch_norm_backward(x, saved)
        results = [y, dx, dresidual]
        del y, dx, dresidual, saved
    elif call == "masked":
        y, saved = fastbn.masked_batch_norm_forward(x, np.ones((64, 32, 64), bool))
        results = [y, fastbn.masked_batch_norm_backward(x, saved)[0]]
        del y, saved
    else:
        results = [fastbn.batch_norm(x, mean, var, out=channels_last.copy().transpose(0, 2, 3, 1))]
        assert memory.kept()[0] == NBYTES  # what was copied from
        return
    expected = len(results) * NBYTES
    before = memory.kept()[0]
    del results
    assert memory.kept()[0] - before == expected


@compiled
def test_the_oldest_go_first(keep):
    keep(3 * NBYTES)
    x = np.ones(LARGE, np.float32)
    results = [memory.output_like(x) for _ in range(5)]
    addresses = [address(y) for y in results]
    while results:
        del results[0]
    assert memory.kept() == (3 * NBYTES, 3 * NBYTES)
    again = [memory.output_like(x) for _ in range(3)]
    assert [address(y) for y in again] == addresses[:1:-1]  # the newest are taken first
    keep(NBYTES - 1)
    del again
    assert memory.kept()[0] == 0


@compiled
def test_small_results_are_not_kept(keep):
    keep(1 << 28)
    y = fastbn.batch_norm(np.ones((1023, 1024), np.float32), np.zeros(1024), np.ones(1024))
    del y
    assert memory.kept()[0] == 0


@compiled
def test_no_more_than_so_many(keep):
    keep(sys.maxsize)
    x = np.ones((1024, 1024), np.float32)
    results = [memory.output_like(x) for _ in range(300)]  # not written to: no memory is behind them
    first, last = address(results[0]), address(results[-1])
    while results:
        del results[0]
    assert memory.kept()[0] == 256 * x.nbytes
    keep(sys.maxsize)
    assert memory.kept()[0] == 256 * x.nbytes
    again = [memory.output_like(x) for _ in range(256)]
    assert address(again[0]) == last and first not in map(address, again)


@compiled
def test_freed_while_an_exception_passes(keep):
    """What is on the stack when it is raised is freed on its way, and the oldest make room."""
    keep(2 * NBYTES)
    x = np.ones(LARGE, np.float32)

    def fails():
        raise KeyError("on purpose")

    with pytest.raises(KeyError, match="on purpose"):
        [*(memory.output_like(x) for _ in range(3)), fails()]
    with pytest.raises(KeyError, match="on purpose"):
        [memory.output_like(x), memory.output_like(x), memory.output_like(x), fails()]
    assert memory.kept()[0] == 2 * NBYTES
    y = memory.output_like(x)
    y[...] = 1


@compiled
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS is not kept everywhere")
def test_kept_memory_is_given_back_where_there_is_no_other():
    """Under a limit on the address space that holds two results, those kept make room for one of another size."""
    done = run_python("""
import resource
import numpy as np
from fastbn import memory
x = np.empty((1 << 26,), np.uint8)
assert memory.output_like(x[:4]).size == 4  # loaded
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (5 << 25), resource.getrlimit(resource.RLIMIT_AS)[1]))
memory.set_kept_memory(1 << 40)
a, b = memory.output_like(x), memory.output_like(x)
del a, b
assert memory.kept()[0] == 1 << 27
y = memory.output_like(x[1:])
assert memory.kept()[0] == 1 << 26
try:
    np.empty(1 << 50, np.uint8)
except MemoryError:
    print("as it should be")
""")
    assert done.stdout == "as it should be\n"


@compiled
def test_many_threads(keep):
    keep(4 * NBYTES)
    xs = [np.full(LARGE, i, np.float32) for i in range(4)]

    def several(i):
        for k in range(6):
            y = fastbn.batch_norm(xs[i], np.zeros(32), np.full(32, 1 - 1e-5), num_threads=1 + k % 2)
            assert np.allclose(y, i)

    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(several, i) for i in range(4)]:
            future.result()
    assert memory.kept()[0] <= 4 * NBYTES


@compiled
@pytest.mark.skipif(not SMAPS.exists() or "LazyFree" not in SMAPS.read_text(), reason="this system does not say it")
def test_what_is_old_is_free_to_take(keep):
    """Of four blocks kept, the newest fits an eighth of what may be; the system may take the others."""

    def lazily_free():
        lines = SMAPS.read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("LazyFree"))

    keep(64 * NBYTES)
    x = np.ones(LARGE, np.float32)
    blocks = [memory.output_like(x) for _ in range(4)]
    for block in blocks:
        block[...] = 1
    before = lazily_free()  # what earlier tests left to malloc
    del block, blocks
    assert lazily_free() <= before
    keep(8 * NBYTES)
    huge = 1 << 21  # pages of which only a part is a block's are left alone
    assert 3 * (NBYTES - 2 * huge) <= lazily_free() - before <= 3 * NBYTES
    y = memory.output_like(x)
    y[...] = 2
    assert (y == 2).all()


@compiled
def test_a_kept_result_can_be_resized(keep):
    keep(1 << 28)
    y = memory.output_like(np.ones(LARGE, np.float32))
    y[...] = 3
    y.resize((128, 32, 32, 64), refcheck=False)
    assert (y[:64] == 3).all() and (y[64:] == 0).all()
    del y
    assert memory.kept()[0] == 2 * NBYTES


@compiled
def test_another_handler_is_left_alone(keep):
    """NumPy's C interface alone sets one: here a copy of NumPy's own under another name."""
    from numpy._core import _multiarray_umath, multiarray

    keep(1 << 28)
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    capsule = ctypes.pythonapi.PyCapsule_New
    capsule.restype, capsule.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    api = ctypes.cast(pointer(_multiarray_umath._ARRAY_API, None), ctypes.POINTER(ctypes.c_void_p))
    set_handler = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.py_object)(api[304])  # PyDataMem_SetHandler
    default = ctypes.cast(api[306], ctypes.POINTER(ctypes.py_object))[0]  # PyDataMem_DefaultHandler
    handler = ctypes.create_string_buffer(ctypes.string_at(pointer(default, b"mem_handler"), 168), 168)
    handler[:5] = b"other"
    x = np.ones(LARGE, np.float32)
    set_handler(capsule(ctypes.addressof(handler), b"mem_handler", None))
    try:
        y = fastbn.batch_norm(x, np.zeros(32), np.ones(32))
        assert multiarray.get_handler_name(y).startswith("other")
        y = memory.output_like(x)
        assert multiarray.get_handler_name(y).startswith("other")
    finally:
        set_handler(default)
    del y
    assert memory.kept()[0] == 0
    assert multiarray.get_handler_name(fastbn.batch_norm(x, np.zeros(32), np.ones(32))) == "fastbn_results"
    assert multiarray.get_handler_name() == "default_allocator"


def test_without_the_compiled_part(monkeypatch):
    monkeypatch.setattr(memory, "_compiled", lambda: None)
    monkeypatch.setattr(memory, "_maker", memory._maker.__wrapped__)
    fastbn.set_kept_memory(5)
    assert memory.kept() == (0, 0)
    y = memory.output_like(np.ones(LARGE, np.float32).transpose(3, 0, 1, 2))
    assert y.shape == (64, 64, 32, 32) and y.transpose(1, 2, 3, 0).flags.c_contiguous


@pytest.mark.parametrize(
    "wrong, error, message",
    [
        (-1, ValueError, "most is -1, and must be at least 0"),
        (1.5, TypeError, "most is 1.5, and must be an integer"),
        ("1 GB", TypeError, "most is '1 GB', and must be an integer"),
    ],
)
def test_wrong_amounts(keep, wrong, error, message):
    with pytest.raises(error, match=re.escape(message)):
        fastbn.set_kept_memory(wrong)
    keep(1 << 100)  # more than there is
    assert memory.kept()[1] in (0, sys.maxsize)


@compiled
@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's control groups")
def test_an_eighth_of_what_may_be_used(monkeypatch):
    usable = memory._compiled().usable
    for limit in ("RLIMIT_AS", "RLIMIT_DATA"):
        code = f"import resource as r; r.setrlimit(r.{limit}, (1 << 33, r.getrlimit(r.{limit})[1])); "
        done = run_python(code + "from fastbn import memory; print(memory.kept()[1])")
        assert done.stdout == f"{min(usable(), 1 << 33) // 8}\n"
    monkeypatch.setattr(resource, "getrlimit", lambda which: (resource.RLIM_INFINITY,) * 2)
    page, pages = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_PHYS_PAGES")
    groups = {}

    def read(path):
        if path.name not in groups:
            raise FileNotFoundError(path)
        return groups[path.name]

    monkeypatch.setattr(Path, "read_text", read)
    assert usable() == page * pages
    groups["memory.max"] = "max\n"
    assert usable() == page * pages
    groups["memory.max"] = "65536\n"
    assert usable() == 65536
    del groups["memory.max"]
    groups["memory.limit_in_bytes"] = "4096\n"
    assert usable() == 4096
    monkeypatch.setattr(os, "sysconf", lambda name: -1 if name == "SC_PHYS_PAGES" else page)  # it cannot tell
    assert usable() == 0
    monkeypatch.delattr(os, "sysconf")
    assert usable() == 0
