"""The same bits: fused or not, on any number of threads, from every instruction set, wherever the data lies."""

import json
from contextlib import nullcontext

import numpy as np
import pytest
from conftest import (
    BF16,
    COPIES,
    DTYPES,
    F16,
    F32,
    F64,
    INSTRUCTION_SETS,
    cache_sizes,
    close_gradients,
    close_y,
    load_kernels,
    oracle_backward,
    oracle_forward,
    oracle_normalize,
    parameters,
    run_python,
    runnable_sets,
    same_bits,
    sample,
)

import fastbn
from fastbn import backends

# (outer, channels, inner), all large enough for a team of threads: the plans that a kernel may choose.
GRIDS = {
    "planes, fused or split by threads": (7, 9, 1601),
    "planes in pieces, few channels": (3, 2, 17003),
    "many channels of planes": (2, 67, 523),
    "small planes as columns, in cache": (61, 33, 49),
    "small planes as columns, fused out of cache": (61, 33, 49),
    "small planes, many images": (1031, 5, 17),
    "middling planes, summed as columns, gone over one by one": (263, 3, 171),
    "rows, fused": (301, 131, 1),
    "rows, split": (5003, 67, 1),
    "rows in chunks, joined": (40009, 3, 1),
    "rows, joined and ragged": (2003, 15, 1),
    "rows, more channels than a tile": (67, 2053, 1),
}


@pytest.fixture(params=GRIDS)
def grid(request):
    # A second level that holds any tile, and a last level that holds nothing.
    with cache_sizes(1 << 40, 1) if "out of cache" in request.param else nullcontext():
        yield GRIDS[request.param]


def make(grid, dtype):
    outer, channels, inner = grid
    x, dy = sample(grid, dtype), sample(grid, dtype, seed=2)
    if inner == 1:
        x, dy = x.reshape(outer, channels), dy.reshape(outer, channels)
    return x, dy, *parameters(channels, np.float32)


# What is fused: the kernels' five ways to take a z.
ACTIVATIONS = {
    "plain": {},
    "relu": {"activation": "relu"},
    "leaky": {"activation": "leaky_relu"},
    "added": {"residual": True},
    "added relu": {"residual": True, "activation": "relu"},
    "added leaky": {"residual": True, "activation": "leaky_relu"},
}


def everything(x, dy, weight, bias, mean, var, *, fused={}, **settings):  # noqa: B006 - is not changed
    """Every operation's every result, as bytes. A residual is x backwards."""
    fused = fused | ({"residual": np.flip(x).copy()} if "residual" in fused else {})
    y, saved = fastbn.batch_norm_forward(x, weight, bias, **fused, **settings)
    e, fixed = fastbn.batch_norm_eval_forward(x, mean, var, weight, bias, **fused, **settings)
    m = fastbn.moments(x, **settings)
    backward, fixed_backward = (fastbn.batch_norm_backward(dy, s, **settings) for s in (saved, fixed))
    results = [y, saved.mean, saved.var, e, m.mean, m.m2, *backward, *fixed_backward]
    return [np.ascontiguousarray(result).tobytes() for result in results]


@pytest.mark.parametrize(
    ("dtype", "fused"),
    [(d, a) for d in DTYPES for a in ACTIVATIONS if d in (F32, F16) or a in ("plain", "added leaky")],
    ids=str,
)
def test_threads_and_instruction_sets(monkeypatch, dtype, grid, fused):
    data, plain, fused = make(grid, dtype), fused == "plain", ACTIVATIONS[fused]
    want = None
    for isa in runnable_sets():
        monkeypatch.setattr(backends, "_backend", backends._load_instruction_set(isa))
        for threads in (1, 2, 3, 8) if plain else (1, 3):
            got = everything(*data, num_threads=threads, fused=fused)
            want = want or got
            assert got == want, f"{isa}, {threads} threads"
    if want is None:
        pytest.skip("no compiled kernels here")


@pytest.mark.parametrize("fused", ["plain", "relu", "added leaky"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_numba_threads(monkeypatch, grid, dtype, fused):
    monkeypatch.setattr(backends, "_backend", load_kernels("numba"))
    data, fused = make(grid, dtype), ACTIVATIONS[fused]
    want = everything(*data, num_threads=1, fused=fused)
    for threads in (2, 3, 8):
        assert everything(*data, num_threads=threads, fused=fused) == want, f"{threads} threads"


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_fused_is_unfused(compiled, dtype, grid, threads):
    """The kernels' own interface: the two steps of a pass, and the pass."""
    outer, channels, inner = grid
    x, dy, weight, bias, *_ = make(grid, dtype)
    mean, m2, sum_dy, sum_dy_xmu = np.empty((4, channels))
    y, dx = np.empty_like(x), np.empty_like(x)
    compiled.moments(x, *grid, mean, m2, threads)
    var = m2 / (outer * inner)
    compiled.normalize(x, y, *grid, mean, var, weight, bias, 1e-5, None, 1.0, threads)
    compiled.gradient_moments(dy, x, *grid, mean, sum_dy, sum_dy_xmu, threads)
    compiled.input_gradient(dy, x, dx, *grid, mean, var, weight, 1e-5, sum_dy, sum_dy_xmu, threads)

    fused, fused_mean, fused_var = np.empty_like(x), np.empty(channels), np.empty(channels)
    compiled.forward(x, fused, *grid, weight, bias, 1e-5, fused_mean, fused_var, None, 1.0, threads)
    same_bits(fused_mean, mean)
    same_bits(fused_var, var)
    same_bits(fused, y)
    grad_weight, grad_bias = np.empty(channels), np.empty(channels)
    compiled.backward(
        dy, x, fused, *grid, mean, var, weight, bias, 1e-5, grad_weight, grad_bias, True, None, None, 1.0, threads
    )  # fmt: skip
    same_bits(fused, dx)
    same_bits(grad_bias, sum_dy)
    same_bits(grad_weight, sum_dy_xmu * (1 / np.sqrt(var + 1e-5)))


def test_repeated_calls(kernels, dtype, grid):
    data, fused = make(grid, dtype), ACTIVATIONS["added leaky"]
    assert everything(*data) == everything(*data)
    assert everything(*data, fused=fused) == everything(*data, fused=fused)


@pytest.mark.parametrize("memory", COPIES)
def test_where_the_data_lies(compiled, dtype, memory):
    """In a view, at an odd element or an odd byte: as in a compact copy. (test_layout: small arrays, every backend.)"""
    for grid in ((3, 9, 1601), (61, 33, 49), (301, 131, 1)):
        x, dy, *given = make(grid, dtype)
        assert everything(memory(x), memory(dy), *given) == everything(x, dy, *given)


def test_out_or_not(compiled, dtype, grid):
    """`out`, misaligned, and in place."""
    x, dy, weight, bias, *_ = make(grid, dtype)
    y, saved = fastbn.batch_norm_forward(x, weight, bias)
    dx = fastbn.batch_norm_backward(dy, saved)[0]
    out = np.empty(x.size + 1, dtype)[1:].reshape(x.shape)
    same_bits(fastbn.batch_norm_forward(x, weight, bias, out=out)[0], y)
    same_bits(fastbn.batch_norm_backward(dy, saved, out=out)[0], dx)
    same_bits(fastbn.batch_norm_backward(dy, saved, out=dy)[0], dx)
    same_bits(fastbn.batch_norm(x, None, None, weight, bias, training=True, out=x), y)


@pytest.mark.parametrize("shape", [(9, 512, 1), (40, 1024, 1), (9, 128, 16), (9, 16, 256), (2, 3, 1024)], ids=str)
def test_alignment(native, dtype, shape):
    """Rows, planes and tiles that all begin at one alignment, whichever it is: right, and nothing beside is touched."""
    x, dy, weight, bias, mean, var = make(shape, dtype)
    want, fixed = oracle_forward(x, weight, bias, 1), oracle_normalize(x, mean, var, weight, bias, 1)
    _, saved = fastbn.batch_norm_forward(x, weight, bias)
    want_dx = oracle_backward(dy, x, *want[1:], weight, 1, True)
    seen = {}
    for shift in (0, 1, 2, 3, 4, 5, 8, 15, 16, 31):  # elements after a cache line's beginning
        memory = np.full(x.size + 256, 7, dtype)
        begin = -memory.ctypes.data % 64 // memory.itemsize + shift + 32
        out = memory[begin : begin + x.size].reshape(x.shape)
        for name, call in (
            ("forward", lambda out=out: fastbn.batch_norm_forward(x, weight, bias, out=out)),
            ("eval", lambda out=out: fastbn.batch_norm(x, mean, var, weight, bias, out=out)),
            ("backward", lambda out=out: fastbn.batch_norm_backward(dy, saved, out=out)),
        ):
            out.fill(np.nan)
            call()
            same_bits(out, seen.setdefault(name, out.copy()))
            if shift == 0 and name == "backward":
                close_gradients((out, None, None), want_dx, dy, x, *want[1:], weight, 1, True)
            elif shift == 0:
                close_y(out, want[0] if name == "forward" else fixed, weight, bias, 1)
        assert (memory[:begin] == 7).all() and (memory[begin + x.size :] == 7).all()


HASHES = """
import hashlib, json, os
import ml_dtypes, numpy as np, fastbn
from fastbn import backends
rng = np.random.default_rng(1)
found = {}
for dtype in (np.float32, np.float64, np.float16, ml_dtypes.bfloat16):
    x, dy = rng.standard_normal((2, 4, 24, 40, 41)).astype(dtype)
    weight, bias = rng.standard_normal((2, 24)).astype(np.float32)
    mean, var = rng.uniform(0.5, 2, (2, 24))
    for axis in (1, -1):
        view = lambda a: np.ascontiguousarray(np.moveaxis(a, 1, axis))
        y, saved = fastbn.batch_norm_forward(view(x), weight, bias, axis=axis)
        results = [y, *fastbn.batch_norm_backward(view(dy), saved)]
        y, saved = fastbn.batch_norm_eval_forward(view(x), mean, var, weight, bias, axis=axis)
        results += [y, *fastbn.batch_norm_backward(view(dy), saved)]
        y, saved = fastbn.batch_norm_forward(
            view(x), weight, bias, axis=axis, residual=view(dy), activation="leaky_relu"
        )
        results += [y, *fastbn.batch_norm_backward(view(dy), saved)]
        found[f"{axis} {np.dtype(dtype)}"] = [hashlib.sha256(r.tobytes()).hexdigest() for r in results]
print(json.dumps([backends.config()["instruction set"], backends.num_threads(), found]))
"""


def test_environment():
    """What the environment chooses takes effect, and changes no bit."""
    sets = [isa for isa in INSTRUCTION_SETS if isa in runnable_sets()]
    if not sets:
        pytest.skip("no compiled kernels here, or for one instruction set alone")
    hashes = []
    for isa in sets:
        for threads in (1, 2):
            done = run_python(HASHES, FASTBN_ISA=isa, FASTBN_NUM_THREADS=str(threads))
            in_use, team, found = json.loads(done.stdout)
            assert (in_use, team) == (isa, threads)
            hashes.append(found)
    assert all(found == hashes[0] for found in hashes)


def past_a_line(array, elements):
    """A copy that begins so far on from a line of the cache."""
    room = np.empty(array.nbytes + 128, np.uint8)
    at = (elements * array.itemsize - room.ctypes.data) % 64
    copy = room[at : at + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


@pytest.mark.parametrize("caches", [(1, 1), (1, 1 << 40), (1 << 40, 1), (1 << 16, 1 << 40)], ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        *[(700, 96, 1), (601, 65, 1), (4003, 15, 1), (267, 272, 1), (259, 1024, 1)],
        *[(70, 5, 49), (41, 5, 171), (9, 3, 1201), (2, 2, 20011)],
    ],
    ids=str,
)
@pytest.mark.parametrize("fused", ["plain", "relu", "leaky", "added", "added leaky"])
@pytest.mark.parametrize("dtype", [F32, F64, F16], ids=str)
def test_caches(compiled, dtype, caches, shape, fused):
    """Fused or split, streamed or not, in tiles of any width, from any alignment: the same bits."""
    samples = [sample(shape, dtype, seed=seed) for seed in (0, 1, 2)]
    weight, bias, _, _ = parameters(shape[1], np.float32)
    fused = ACTIVATIONS[fused]

    def results(of_inputs, of_outputs, of_cut):
        x, dy, residual = (past_a_line(array, of_inputs) for array in samples)
        out, kept, cut = (past_a_line(x, elements) for elements in (of_outputs, of_outputs, of_cut))
        to, options = {"out": out}, fused
        if "residual" in fused:
            to, options = to | {"out_residual": cut}, fused | {"residual": residual}
        y, saved = fastbn.batch_norm_forward(x, weight, bias, out=kept, **options)
        gradients = [g.copy() for g in fastbn.batch_norm_backward(dy, saved, **to)]
        e, fixed = fastbn.batch_norm_eval_forward(x, saved.mean, saved.var, weight, bias, **options)
        gradients += [g.copy() for g in fastbn.batch_norm_backward(dy, fixed, **to)]
        if "residual" in fused:
            cut[...] = dy
            gradients += [g.copy() for g in fastbn.batch_norm_backward(cut, saved, out=out, out_residual=cut)]
            out[...] = dy
            gradients += fastbn.batch_norm_backward(out, saved, out=out, out_residual=cut)
        return [y, saved.mean, saved.var, e, *gradients]

    want = results(0, 0, 0)
    with cache_sizes(*caches):
        for begins in (0, 0, 0), (4, 4, 4), (4, 4, 0), (0, 0, 4), (0, 1, 1), (4, 7, 4):
            for got, expected in zip(results(*begins), want, strict=True):
                same_bits(got, expected)
