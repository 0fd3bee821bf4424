"""The GPU path: the kernels in numba.cuda's simulator, against the reference; and compiled, where the toolchain is.

The simulator must be chosen before Numba is imported, so `test_simulated` runs this file again, in a process of its own
with NUMBA_ENABLE_CUDASIM=1; the tests marked `simulated` run only there. Where numba-cuda is installed, compiled
kernels are looked at, and run by the interpreter in `ptx.py`. What real hardware computes is checked by
``bench/cuda.py --check``.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import ptx
import pytest
from conftest import (
    F16,
    F32,
    F64,
    batch_inside,
    channels_last,
    close,
    close_gradients,
    close_statistics,
    close_y,
    column,
    computed,
    fortran,
    gaps,
    misaligned,
    negative,
    oracle_backward,
    oracle_forward,
    oracle_normalize,
    padded,
    parameters,
    run_python,
    same_bits,
    sample,
    unit,
)

import fastbn
from fastbn import backends

SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"


def simulated(test):
    """A test for `test_simulated`'s process; in others there is none."""
    return test if SIMULATED else None


DTYPES = [F16, F32, F64]
CUDA = importlib.util.find_spec("numba_cuda") is not None

if SIMULATED:
    sys.setswitchinterval(5e-5)  # the simulator's threads take turns, each waiting for the next
    kernels = pytest.importorskip("fastbn._kernels.numba_cuda")


@pytest.mark.skipif(SIMULATED, reason="would run itself")
def test_simulated():
    pytest.importorskip("numba")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    env = {k: v for k, v in os.environ.items() if not k.startswith("FASTBN_")} | {"NUMBA_ENABLE_CUDASIM": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 100


# ---- arrays on the simulated GPU ----


def device(array):
    """The array, in the memory order it has."""
    return None if array is None else kernels.DeviceArray(array)


def host(array):
    return None if array is None else array.copy_to_host()


@pytest.fixture(params=["fused", "split"])
def steps(request, monkeypatch):
    """One kernel for both steps, or one for each."""
    most = 1 << 30 if request.param == "fused" else 0
    monkeypatch.setattr(kernels, "FUSED_BYTES", most)
    return request.param


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    return request.param


# Each: what of the kernels it reaches. A block has 8 threads there, a tile of rows up to 4 vectors.
CASES = {
    "rows, vectors": ((13, 8), 1),
    "rows, one by one, more than a tile": ((11, 13), 1),
    "rows, several parts": ((101, 2), 1),
    "two rows": ((2, 3), 1),
    "channels last": ((2, 5, 3, 16), -1),
    "planes, vectors": ((3, 2, 4, 6), 1),
    "planes, one by one": ((2, 3, 7), 1),
    "planes, several parts, loops": ((3, 1, 3, 72), 1),
    "many channels": ((2, 9, 2), 1),
    "channels first": ((3, 17), 0),
}


@pytest.fixture(
    params=[(*case, F32) for case in CASES.values()]
    + [(*list(CASES.values())[i], d) for d in (F16, F64) for i in (0, 1, 5, 6)],
    ids=[*CASES, *(f"{list(CASES)[i]}, {d}" for d in (F16, F64) for i in (0, 1, 5, 6))],
)
def case(request):
    """Shape, axis and dtype."""
    return request.param


# ---- against the reference ----


@simulated
def test_forward(case, steps):
    shape, axis, dtype = case
    x = sample(shape, dtype, axis)
    weight, bias, *_ = parameters(shape[axis], F32)
    y, saved = fastbn.batch_norm_forward(device(x), device(weight), device(bias), axis=axis)
    want, mean, var = oracle_forward(x, weight, bias, axis)
    assert host(y).dtype == dtype and y.shape == shape
    close_statistics(host(saved.mean), host(saved.var), mean, var, dtype)
    close_y(host(y), want, weight, bias, axis)


@simulated
def test_eval(case):
    shape, axis, dtype = case
    x = sample(shape, dtype, axis)
    weight, bias, mean, var = parameters(shape[axis], F64)
    y = fastbn.batch_norm(device(x), *map(device, (mean, var, weight, bias)), axis=axis)
    close(
        "y", host(y), oracle_normalize(x, mean, var, weight, bias, axis), eval_scale(x, mean, var, weight, axis), dtype
    )


def eval_scale(x, mean, var, weight, axis):
    """What is rounded on the way: x and mean by weight/σ, and bias, of parameters of size 1."""
    column = [1] * x.ndim
    column[axis] = -1
    mean, scale = mean.reshape(column), (np.abs(weight) / np.sqrt(var + 1e-5)).reshape(column)
    return (np.abs(x.astype(F64) - mean) + np.abs(mean)) * scale + 3


@simulated
def test_backward(case, steps):
    shape, axis, dtype = case
    x, dy = sample(shape, dtype, axis), sample(shape, dtype, axis, seed=2)
    weight, bias, *_ = parameters(shape[axis], F32)
    _, saved = fastbn.batch_norm_forward(device(x), device(weight), device(bias), axis=axis)
    _, mean, var = oracle_forward(x, weight, bias, axis)
    got = tuple(map(host, fastbn.batch_norm_backward(device(dy), saved)))
    assert got[0].dtype == dtype and got[1].dtype == got[2].dtype == F32
    want = oracle_backward(dy, x, mean, var, weight, axis, True)
    close_gradients(got, want, dy, x, mean, var, weight, axis, True)


@simulated
def test_backward_with_fixed_statistics(case):
    shape, axis, dtype = case
    x, dy = sample(shape, dtype, axis), sample(shape, dtype, axis, seed=2)
    weight, bias, mean, var = parameters(shape[axis], F32)
    _, saved = fastbn.batch_norm_eval_forward(device(x), *map(device, (mean, var, weight, bias)), axis=axis)
    got = tuple(map(host, fastbn.batch_norm_backward(device(dy), saved)))
    assert got[0].dtype == dtype and got[1].dtype == got[2].dtype == F32
    want = oracle_backward(dy, x, mean, var, weight, axis, False)
    close_gradients(got, want, dy, x, mean, var, weight, axis, False)


@simulated
@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu"])
@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize(
    ("shape", "dtype"), [((5, 3, 8), F32), ((3, 2, 7), F16), ((23, 8), F16), ((19, 3), F32), ((7, 2), F64)], ids=str
)
def test_activation(steps, activation, with_residual, shape, dtype):
    """Forward and backward; what is cut is what the forward pass cut."""
    axis = 1
    slope = {None: 1.0, "relu": 0.0, "leaky_relu": 0.125}[activation]
    x, dy = sample(shape, dtype, axis), sample(shape, dtype, axis, seed=2)
    residual = sample(shape, dtype, axis, seed=3) if with_residual else None
    weight, bias, *_ = parameters(shape[axis], F32)
    y, saved = fastbn.batch_norm_forward(
        device(x), device(weight), device(bias), activation=activation, negative_slope=0.125, residual=device(residual)
    )
    want, mean, var = oracle_forward(x, weight, bias, axis, residual=residual, slope=slope)
    z, *_ = oracle_forward(x, weight, bias, axis)
    terms = np.abs(z) + np.abs(bias).max() + np.abs(weight).max() + (0 if residual is None else np.abs(residual))
    close("y", host(y), want, terms.astype(F64), dtype)
    got = list(map(host, fastbn.batch_norm_backward(device(dy), saved)))
    want_gradients = oracle_backward(dy, x, mean, var, weight, axis, True, y=host(y), slope=slope)
    close_gradients(got, want_gradients, dy, x, mean, var, weight, axis, True, cut=slope != 1)
    assert len(got) == 3 + with_residual
    if with_residual:
        np.testing.assert_array_equal(got[3], want_gradients[3].astype(dtype))


@simulated
@pytest.mark.parametrize("shape", [(7, 3, 8), (29, 4)], ids=str)
def test_fixed_statistics_with_activation_and_residual(steps, shape):
    x, dy, residual = (sample(shape, F32, seed=i) for i in range(3))
    weight, bias, mean, var = parameters(shape[1], F32)
    y, saved = fastbn.batch_norm_eval_forward(
        *map(device, (x, mean, var, weight, bias)), activation="relu", residual=device(residual)
    )
    got = list(map(host, fastbn.batch_norm_backward(device(dy), saved)))
    want = oracle_backward(dy, x, mean, var, weight, 1, False, y=host(y), slope=0.0)
    close_gradients(got, want, dy, x, mean, var, weight, 1, False, cut=True)
    np.testing.assert_array_equal(got[3], want[3])


@simulated
@pytest.mark.parametrize("weight_dtype", [None, F32, F64], ids=str)
@pytest.mark.parametrize("bias_dtype", [None, F32, F64], ids=str)
def test_parameters(weight_dtype, bias_dtype):
    x, dy = sample((6, 4, 4), F32), sample((6, 4, 4), F32, seed=2)
    weight, bias, *_ = parameters(4, F64)
    weight = None if weight_dtype is None else weight.astype(weight_dtype)
    bias = None if bias_dtype is None else bias.astype(bias_dtype)
    y, saved = fastbn.batch_norm_forward(device(x), device(weight), device(bias))
    want, mean, var = oracle_forward(x, weight, bias, 1)
    close_y(host(y), want, weight, bias, 1)
    got = tuple(map(host, fastbn.batch_norm_backward(device(dy), saved)))
    assert [None if g is None else g.dtype for g in got[1:]] == [weight_dtype, bias_dtype]
    want = oracle_backward(dy, x, mean, var, weight, 1, True)
    close_gradients(got, want, dy, x, mean, var, weight, 1, True)


@simulated
def test_parameters_with_gaps():
    x = sample((6, 5, 4), F32)
    weight, bias, *_ = parameters(5, F64)
    table = np.full((5, 3), np.nan)
    table[:, 1] = weight
    y, _ = fastbn.batch_norm_forward(device(x), device(table[:, 1]), device(bias[::-1]))
    same_bits(host(y), host(fastbn.batch_norm_forward(device(x), device(weight), device(bias[::-1].copy()))[0]))


@simulated
@pytest.mark.parametrize("shape", [(9, 5, 6), (57, 3)], ids=str)
def test_moments(dtype, shape):
    """The result is on the host, and merges with others'."""
    x = sample(shape, dtype)
    got, want = fastbn.moments(device(x)), fastbn.moments(x.astype(F64))
    assert type(got.mean) is np.ndarray and got.count == want.count
    close_statistics(got.mean, got.var(), want.mean, want.var(), dtype)
    both = fastbn.moments(device(x)) + fastbn.moments(x)
    assert both.count == 2 * want.count
    total = fastbn.Moments.none(shape[1]).update(device(x)).update(device(x))
    np.testing.assert_allclose(total.mean, got.mean)


# ---- accuracy ----


@simulated
@pytest.mark.parametrize("shape", [(4, 3, 8, 9), (97, 4)], ids=str)
@pytest.mark.parametrize("ratio", [1e6])
def test_mean_far_from_zero(shape, ratio, steps):
    """A mean of 10⁶ deviations costs nothing: within 2e-6, as everywhere."""
    x = (np.random.default_rng(3).standard_normal(shape) + ratio).astype(F32)
    y, saved = fastbn.batch_norm_forward(device(x))
    want, mean, var = oracle_forward(x, None, None, 1)
    assert np.abs(host(y) - want).max() < 2e-6
    close_statistics(host(saved.mean), host(saved.var), mean, var, F32)
    dy = sample(shape, F32, seed=2)
    got = tuple(map(host, fastbn.batch_norm_backward(device(dy), saved)))
    gradients = oracle_backward(dy, x, mean, var, None, 1, True)
    close_gradients((got[0], None, None), gradients, dy, x, mean, var, None, 1, True)


@simulated
@pytest.mark.parametrize(
    ("dtype", "value"),
    [(F32, 0.1), (F32, -3e4), (F32, 1e-30), (F32, 3e38), (F32, 1e-42), (F16, 0.1), (F16, 65504.0), (F64, 0.1)],
    ids=str,
)
@pytest.mark.parametrize("shape", [(5, 2, 8), (37, 3)], ids=str)
def test_constant_channel_is_exactly_bias(dtype, value, shape, steps):
    x = np.full(shape, value, dtype)
    bias = parameters(shape[1], F32)[1]
    y, saved = fastbn.batch_norm_forward(device(x), None, device(bias), eps=1e-90)
    assert (host(saved.var) == 0).all() and (host(saved.mean) == x.flat[0].astype(F64)).all()
    column = (1, -1) + (1,) * (len(shape) - 2)
    np.testing.assert_array_equal(host(y), np.broadcast_to(bias.reshape(column), shape).astype(dtype))


@simulated
@pytest.mark.parametrize(("scale", "dy_scale"), [(1e-30, 1e-15), (1e-20, 1), (1e18, 1), (1e37, 1e3)])
@pytest.mark.parametrize("shape", [(7, 3, 8), (33, 4)], ids=str)
def test_any_size_of_data(scale, dy_scale, shape, steps):
    """float32 data whose squares, or products with dy, float32 cannot hold; eps in proportion."""
    x = (sample(shape, F64) * scale).astype(F32)
    dy = (sample(shape, F64, seed=2) * dy_scale).astype(F32)
    weight, bias, *_ = parameters(shape[1], F32)
    eps = max(scale * scale * 1e-5, 1e-75)
    y, saved = fastbn.batch_norm_forward(device(x), device(weight), device(bias), eps=eps)
    want, mean, var = oracle_forward(x, weight, bias, 1, eps)
    close_y(host(y), want, weight, bias, 1)
    close("var", host(saved.var), var, var, F32)
    got = tuple(map(host, fastbn.batch_norm_backward(device(dy), saved)))
    gradients = oracle_backward(dy, x, mean, var, weight, 1, True, eps)
    close_gradients(got, gradients, dy, x, mean, var, weight, 1, True, eps)


@simulated
@pytest.mark.parametrize("shape", [(8, 2, 16), (80, 4)], ids=str)
def test_pivot_far_from_the_mean(dtype, shape, steps):
    """The values that a pivot is taken from are not like the others: the block is summed again."""
    x = sample(shape, dtype)
    n = shape[0] * int(np.prod(shape[2:], dtype=int))
    for place in {n * i // kernels.PIVOTS for i in range(kernels.PIVOTS)}:
        x[(place, slice(None)) if len(shape) == 2 else (place // 16, slice(None), place % 16)] = 60
    for place in {n // 4 * i // kernels.PIVOTS for i in range(1, kernels.PIVOTS)} if len(shape) == 3 else ():
        x[(place * 4) // 16, :, (place * 4) % 16] = 60
    x[0, 0] += 4000
    y, saved = fastbn.batch_norm_forward(device(x))
    want, mean, var = oracle_forward(x, None, None, 1)
    close_statistics(host(saved.mean), host(saved.var), mean, var, dtype)
    close_y(host(y), want, None, None, 1)


@simulated
@pytest.mark.parametrize("bad", [np.nan, -np.inf])
@pytest.mark.parametrize("shape", [(5, 3, 8), (21, 4)], ids=str)
def test_nonfinite_stays_in_its_channel(bad, shape, steps):
    x, dy = sample(shape, F32), sample(shape, F32, seed=2)
    clean, kept = fastbn.batch_norm_forward(device(x), activation="relu")
    x[(2, 1, *(0,) * (len(shape) - 2))] = bad
    y, saved = fastbn.batch_norm_forward(device(x), activation="relu")
    assert np.isnan(host(y)[:, 1]).all() and np.isnan(host(saved.var)[1])
    others = [c for c in range(shape[1]) if c != 1]
    same_bits(host(y)[:, others], host(clean)[:, others])
    dx, clean_dx = (host(fastbn.batch_norm_backward(device(dy), s)[0]) for s in (saved, kept))
    same_bits(dx[:, others], clean_dx[:, others])


@simulated
@pytest.mark.parametrize(("shape", "dtype"), [((7, 3, 8), F32), ((61, 4), F32), ((7, 3, 5), F16)], ids=str)
def test_same_bits_again(dtype, shape, steps):
    x, dy = device(sample(shape, dtype)), device(sample(shape, dtype, seed=2))
    results = []
    for _ in range(2):
        y, saved = fastbn.batch_norm_forward(x, activation="leaky_relu")
        results.append([host(v) for v in (y, saved.mean, saved.var, fastbn.batch_norm_backward(dy, saved)[0])])
    for first, second in zip(*results, strict=True):
        same_bits(first, second)


@simulated
@pytest.mark.parametrize(("shape", "dtype"), [((7, 3, 8), F32), ((61, 4), F32), ((5, 3, 16), F16)], ids=str)
def test_same_bits_wherever_the_others_are(dtype, shape, steps):
    """How far out, residual and what is kept for backward are aligned changes nothing."""
    x, dy, residual = (device(sample(shape, dtype, seed=i)) for i in range(3))
    weight, bias, mean, var = map(device, parameters(shape[1], F32))
    results = []
    for order in (np.copy, misaligned):
        y, z, dx, dz = (device(order(np.full(shape, np.nan, dtype))) for _ in range(4))
        added, options = device(order(host(residual))), {"activation": "relu"}
        _, saved = fastbn.batch_norm_forward(x, weight, bias, residual=added, out=y, **options)
        _, fixed = fastbn.batch_norm_eval_forward(x, mean, var, weight, bias, residual=added, out=z, **options)
        assert fastbn.batch_norm_backward(dy, saved, out=dx, out_residual=dz)[0] is dx
        gradients = *fastbn.batch_norm_backward(dy, saved)[1:3], *fastbn.batch_norm_backward(dy, fixed)
        results.append([host(v) for v in (y, z, dx, dz, saved.mean, saved.var, *gradients)])
    for first, second in zip(*results, strict=True):
        same_bits(first, second)


@simulated
def test_division_by_multiplication():
    """Exact for every n below 2³¹; above, there is no factor."""
    rng = np.random.default_rng(0)
    for divisor in [1, 2, 3, 7, 49, 641, 3136, 2**20 + 1, 2**30 - 1, 2**31 - 1, *map(int, rng.integers(1, 2**31, 50))]:
        factor, shift = kernels._magic(divisor, 2**31 - 1)
        assert factor * (2**31 - 1) < 2**63
        near = [k * divisor + d for k in (0, 1, 2, (2**31 - 1) // divisor) for d in (-1, 0, 1)]
        for n in [*near, 2**31 - 1, *map(int, rng.integers(0, 2**31, 50))]:
            if 0 <= n < 2**31:
                assert (n * factor) >> shift == n // divisor
    assert kernels._magic(7, 2**31) == (0, 0)


@simulated
@pytest.mark.parametrize("shape", [(5, 3, 8), (5, 3, 7)], ids=str)
def test_more_elements_than_2_to_the_31(shape, monkeypatch):
    """There the kernels divide: the same bits."""
    x, dy = sample(shape, F32), sample(shape, F32, seed=2)
    monkeypatch.setattr(kernels, "FUSED_BYTES", 0)

    def both():
        y, saved = fastbn.batch_norm_forward(device(x))
        return host(y), host(fastbn.batch_norm_backward(device(dy), saved)[0])

    usual = both()
    monkeypatch.setattr(kernels, "_magic", lambda divisor, most: (0, 0))
    for a, b in zip(usual, both(), strict=True):
        same_bits(a, b)


# ---- layouts, outputs ----


@simulated
@pytest.mark.parametrize("order", [fortran, channels_last, gaps, negative, misaligned])
def test_memory(order):
    """Any strides; the result has x's memory order, or that of its values where there were gaps."""
    x, dy, residual = (sample((4, 8, 3, 4), F32, seed=i) for i in range(3))
    weight, bias, *_ = parameters(8, F32)
    options = {"activation": "relu"}
    y, saved = fastbn.batch_norm_forward(
        device(order(x)), device(weight), device(bias), residual=device(fortran(residual)), **options
    )
    want, mean, var = oracle_forward(x, weight, bias, 1, residual=residual, slope=0.0)
    close("y", host(y), want, np.abs(want) + 4, F32)
    cpu = fastbn.batch_norm_forward(order(x), weight, bias, residual=residual, **options)[0]
    assert order is negative or y.strides == cpu.strides
    got = tuple(map(host, fastbn.batch_norm_backward(device(order(dy)), saved)))
    gradients = oracle_backward(dy, x, mean, var, weight, 1, True, y=host(y), slope=0.0)
    close_gradients(got, gradients, dy, x, mean, var, weight, 1, True, cut=True)
    np.testing.assert_array_equal(got[3], gradients[3].astype(F32))


@simulated
def test_out(steps):
    x, dy = sample((4, 3, 8), F32), sample((4, 3, 8), F32, seed=2)
    want, saved = fastbn.batch_norm_forward(device(x))
    for memory in (np.full_like(x, np.nan), fortran(np.full_like(x, np.nan)), gaps(np.full_like(x, np.nan))):
        out = device(memory)
        y, _ = fastbn.batch_norm_forward(device(x), out=out)
        assert y is out
        same_bits(memory.copy(order="C"), host(want))
        assert fastbn.batch_norm_backward(device(dy), saved, out=out)[0] is out
        same_bits(memory.copy(order="C"), host(fastbn.batch_norm_backward(device(dy), saved)[0]))


@simulated
def test_in_place(steps):
    x, dy = sample((4, 3, 8), F32), sample((4, 3, 8), F32, seed=2)
    want, saved = fastbn.batch_norm_forward(device(x), residual=device(dy))
    gradient = device(dy.copy())
    dx, *_, dresidual = fastbn.batch_norm_backward(gradient, saved, out_residual=gradient)
    assert dresidual is gradient
    other = device(dy.copy())
    assert fastbn.batch_norm_backward(other, saved, out=other)[0] is other
    same_bits(host(other), host(dx))
    mine = device(x.copy())
    assert fastbn.batch_norm(mine, training=True, residual=device(dy), out=mine) is mine
    same_bits(host(mine), host(want))


@simulated
def test_bad_outputs():
    x = sample((4, 3, 8), F32)
    with pytest.raises(ValueError, match="out overlaps x in memory, and must not"):
        d = device(x)
        fastbn.batch_norm_forward(d, out=d)
    locked = x.copy()
    locked.flags.writeable = False
    with pytest.raises(ValueError, match="out is read-only, and must be writeable"):
        fastbn.batch_norm_forward(device(x), out=device(locked))
    with pytest.raises(ValueError, match=r"out has shape \(3,\), and must have x's shape \(4, 3, 8\)"):
        fastbn.batch_norm_forward(device(x), out=device(np.ones(3, F32)))
    _, saved = fastbn.batch_norm_forward(device(x))
    with pytest.raises(ValueError, match="out_residual is given, and must be None"):
        fastbn.batch_norm_backward(device(x.copy()), saved, out_residual=device(x.copy()))


@simulated
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 5), (4, 3, 0)], ids=str)
def test_empty_batch(dtype, shape):
    x, mean, var = np.empty(shape, dtype), np.full(3, 5.0), np.full(3, 7.0)
    y = fastbn.batch_norm(device(x), device(mean), device(var), training=True)
    assert y.shape == shape and (mean == 5).all() and (var == 7).all()
    _, saved = fastbn.batch_norm_forward(device(x), device(np.ones(3)), device(np.zeros(3)))
    dx, dweight, dbias = fastbn.batch_norm_backward(y, saved)
    assert dx.shape == shape and (host(dweight) == 0).all() and (host(dbias) == 0).all()
    assert fastbn.batch_norm(device(x), device(mean), device(var)).shape == shape
    assert fastbn.moments(device(x)).count == 0


@simulated
def test_one_value_a_channel():
    x, ones = sample((1, 3), F32), device(np.ones(3, F32))
    with pytest.raises(ValueError, match=r"x has shape \(1, 3\): one value a channel"):
        fastbn.batch_norm_forward(device(x))
    np.testing.assert_allclose(host(fastbn.batch_norm(device(x), ones, ones, eps=1e-12)), x - 1, rtol=1e-6)
    np.testing.assert_allclose(host(fastbn.batch_norm(device(x[:, :1]), device(x[0, :1]), device(x[0, :1] ** 2))), 0)


# ---- running statistics, the layer ----


@simulated
@pytest.mark.parametrize("stats_dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("unbiased", [True, False])
def test_running_statistics(stats_dtype, unbiased):
    x = sample((5, 3, 7), F32)
    weight, bias, mean, var = parameters(3, stats_dtype)
    table = np.full((2, 6), 9, stats_dtype)  # as views of something larger
    table[0, ::2], table[1, ::2] = mean, var
    y = fastbn.batch_norm(
        device(x), device(table[0, ::2]), device(table[1, ::2]), device(weight), device(bias), training=True,
        momentum=0.25, unbiased=unbiased,
    )  # fmt: skip
    fastbn.batch_norm(x, mean, var, weight, bias, training=True, momentum=0.25, unbiased=unbiased)
    np.testing.assert_allclose(table[:, ::2], [mean, var], rtol=1e-6)
    assert (table[:, 1::2] == 9).all()
    same_bits(host(y), host(fastbn.batch_norm_forward(device(x), device(weight), device(bias))[0]))


@simulated
def test_nan_policies():
    x = sample((5, 3, 7), F32)
    x[1, 1, 1] = np.nan
    mean, var = np.zeros(3, F32), np.ones(3, F32)
    with pytest.raises(ValueError, match=r"x has NaN, infinite or too large values \(in 1 channels, the first is 1\)"):
        fastbn.batch_norm(device(x), device(mean), device(var), training=True, nan_policy="raise")
    y = fastbn.batch_norm(device(x), device(mean), device(var), training=True, nan_policy="skip_update")
    assert np.isnan(host(y)[:, 1]).all() and (mean == 0).all() and (var == 1).all()
    fastbn.batch_norm(device(x), device(mean), device(var), training=True)
    assert np.isnan(mean[1]) and not np.isnan(mean[[0, 2]]).any()


@simulated
@pytest.mark.parametrize("options", [{}, {"momentum": None, "unbiased": False}, {"affine": "bias"}], ids=str)
def test_layer(options):
    """A layer moved to the GPU does what it does on the CPU, and comes back."""
    mine, theirs = (fastbn.BatchNorm(5, activation="relu", **options) for _ in range(2))
    assert theirs.cuda() is theirs
    for seed in range(3):
        x, dy = sample((6, 5, 8), F32, seed=seed), sample((6, 5, 8), F32, seed=seed + 9)
        np.testing.assert_allclose(host(theirs(device(x), device(dy))), mine(x, dy), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(host(theirs.backward(device(dy))), mine.backward(dy), rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(host(theirs.grad_residual), mine.grad_residual)
        np.testing.assert_allclose(host(theirs.grad_bias), mine.grad_bias, rtol=1e-5)
    for name, value in mine.state_dict().items():
        np.testing.assert_allclose(theirs.state_dict()[name], value, rtol=1e-5)
    assert theirs.num_batches_tracked == 3
    np.testing.assert_allclose(host(theirs.eval()(device(x))), mine.eval()(x), rtol=1e-5, atol=1e-6)
    theirs.reset_running_stats()
    assert (host(theirs.running_var) == 1).all() and theirs.num_batches_tracked == 0
    theirs.load_state_dict(mine.state_dict())
    assert theirs.cpu() is theirs and type(theirs.running_mean) is np.ndarray
    for name, value in mine.state_dict().items():
        np.testing.assert_array_equal(theirs.state_dict()[name], value)
    same_bits(theirs(x), mine(x))


@simulated
def test_frozen_layer():
    x, dy = sample((6, 5, 8), F32), sample((6, 5, 8), F32, seed=2)
    mine, theirs = fastbn.BatchNorm(5, trainable=False), fastbn.BatchNorm(5, trainable=False).cuda()
    np.testing.assert_allclose(host(theirs(device(x))), mine(x), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(host(theirs.backward(device(dy))), mine.backward(dy), rtol=1e-5, atol=1e-6)
    assert (host(theirs.running_var) == 1).all()


@simulated
def test_statistics_updated_before_backward():
    x, dy = sample((9, 5, 7), F32), sample((9, 5, 7), F32, seed=2)
    weight, bias, mean, var = parameters(5, F32)
    arguments = [device(v) for v in (x, mean, var, weight, bias)]
    want = host(fastbn.batch_norm_backward(device(dy), fastbn.batch_norm_eval_forward(*arguments)[1])[0])
    _, saved = fastbn.batch_norm_eval_forward(*arguments)
    mean += 1
    var *= 2
    same_bits(host(fastbn.batch_norm_backward(device(dy), saved)[0]), want)


# ---- what is refused ----


@simulated
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, d: fastbn.batch_norm_forward(d, x[0, :, 0].copy()),
         "weight is a numpy.ndarray on the CPU and x a fastbn.DeviceArray on a GPU, and both must be on the same side"),
        (lambda x, d: fastbn.batch_norm_forward(x, device(x[0, :, 0].copy())),
         "weight is a fastbn.DeviceArray on a GPU and x a numpy.ndarray on the CPU"),
        (lambda x, d: fastbn.batch_norm_forward(x, residual=d), "residual is a fastbn.DeviceArray on a GPU and x a"),
        (lambda x, d: fastbn.batch_norm_forward(x, out=d), "out is a fastbn.DeviceArray on a GPU and x a numpy.nd"),
        (lambda x, d: fastbn.batch_norm_forward(d, out=x), "out is a numpy.ndarray on the CPU and x a fastbn.Dev"),
        (lambda x, d: fastbn.batch_norm(d, x[0, :, 0], x[0, :, 0]), "running_mean is a numpy.ndarray on the CPU and x"),
        (lambda x, d: fastbn.batch_norm(x, *[device(x[0, :, 0])] * 2), "running_mean is a fastbn.DeviceArray on a GPU"),
        (lambda x, d: fastbn.batch_norm_backward(x, fastbn.batch_norm_forward(d)[1]),
         "dy is a numpy.ndarray on the CPU and x a fastbn.DeviceArray on a GPU"),
        (lambda x, d: fastbn.batch_norm_backward(d, fastbn.batch_norm_forward(x)[1]),
         "dy is a fastbn.DeviceArray on a GPU and x a numpy.ndarray on the CPU"),
        (lambda x, d: fastbn.batch_norm_backward(x.copy(), fastbn.batch_norm_forward(x)[1], out=d),
         "out is a fastbn.DeviceArray on a GPU and x a numpy.ndarray"),
        (lambda x, d: fastbn.BatchNorm(3)(d), "(a layer moves by its cuda(like=x) and cpu())"),
        (lambda x, d: fastbn.BatchNorm(3).cuda()(x), "running_mean is a fastbn.DeviceArray on a GPU and x a numpy"),
        (lambda x, d: fastbn.BatchNorm(3).cuda(x), "like is a numpy.ndarray, and must be None or an array on a GPU"),
        (lambda x, d: fastbn.masked_batch_norm_forward(d, x[:, 0] > 0), "x is a fastbn.DeviceArray on a GPU, and must "
         "be an array on the CPU: what serves arrays on a GPU is batch_norm, batch_norm_forward, batch_norm_eval"),
        (lambda x, d: fastbn.MaskedBatchNorm(3)(d, x[:, 0] > 0), "what serves arrays on a GPU is"),
        (lambda x, d: fastbn.GhostBatchNorm(3, virtual_batch_size=2)(d), "what serves arrays on a GPU is"),
        (lambda x, d: fastbn.InplaceBatchNorm(3)(d), "what serves arrays on a GPU is"),
        (lambda x, d: fastbn.fold(x, None, fastbn.BatchNorm(4).cuda()), "bn.running_mean is a fastbn.DeviceArray on a"),
        (lambda x, d: fastbn.batch_norm_double_backward(x, None, None, x, fastbn.batch_norm_forward(d)[1]),
         "saved is of a forward pass on a GPU, and must be of one on the CPU"),
    ],
    ids=range(19),
)  # fmt: skip
def test_refused(call, message):
    x = sample((4, 3, 8), F32)
    with pytest.raises(TypeError, match=re.escape(message)):
        call(x, device(x.copy()))


@simulated
@pytest.mark.parametrize("bad", [np.int32, np.complex64, ">f4", np.bool_], ids=str)
def test_bad_dtype(bad):
    with pytest.raises(TypeError, match=r"x has dtype .*, and must be float16, float32 or float64 on a GPU"):
        fastbn.batch_norm_forward(device(np.ones((4, 3), bad)))


@simulated
def test_bad_arrays():
    x = device(np.ones((4, 3), F32))
    x.__cuda_array_interface__["mask"] = x
    with pytest.raises(TypeError, match="x is a masked array, whose mask would be ignored, and must have none"):
        fastbn.batch_norm_forward(x)
    packed = np.zeros((4, 3), [("a", np.int16), ("b", F32)])["b"]
    with pytest.raises(ValueError, match=r"x has strides \(18, 6\), and must have multiples of its itemsize 4"):
        fastbn.batch_norm_forward(device(packed))
    odd = np.zeros(52, np.uint8)[1:49].view(F32).reshape(4, 3)
    message = r"begins at the address 0x[0-9a-f]+, and must begin at a multiple of its itemsize 4"
    with pytest.raises(ValueError, match=f"x {message}"):
        fastbn.moments(device(odd))
    good = device(sample((4, 3), F32))
    with pytest.raises(ValueError, match=f"out {message}"):
        fastbn.batch_norm_forward(good, out=device(odd))
    assert fastbn.moments(device(odd[:0])).count == 0
    with pytest.raises(ValueError, match=r"weight has shape \(2,\), and must have shape \(3,\)"):
        fastbn.batch_norm_forward(good, device(np.ones(2)))
    with pytest.raises(TypeError, match="weight has dtype float16, and must be float32 or float64"):
        fastbn.batch_norm_forward(good, device(np.ones(3, F16)))
    with pytest.raises(ValueError, match="num_threads is 0, and must be at least 1"):
        fastbn.batch_norm_forward(good, num_threads=0)
    with pytest.raises(ValueError, match="num_threads is 0, and must be at least 1"):
        fastbn.moments(good, num_threads=0)
    with pytest.raises(ValueError, match=r"x has shape \(4, 3\), and must have 5 channels"):
        fastbn.BatchNorm(5).cuda()(good)


class Bare:
    """An array of which only the interface is known."""

    def __init__(self, array, **changes):
        self.array = array
        self.__cuda_array_interface__ = {**device(array).__cuda_array_interface__, **changes}


@simulated
def test_an_interface_is_enough():
    x, bn, seen = sample((4, 3), F32), fastbn.BatchNorm(3), fastbn.BatchNorm(3).cuda()
    y = seen(Bare(x))
    assert type(y) is kernels.DeviceArray
    np.testing.assert_allclose(host(y), bn(x), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"x has shape \(4, 3\), and must have 5 channels"):
        fastbn.BatchNorm(5).cuda()(Bare(x))


@simulated
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": [4, 3]}, r"weight.__cuda_array_interface__ has shape \[4, 3\], and must have a tuple of integers"),
        ({"shape": (-4, 3)}, r"weight.* has shape \(-4, 3\), and must have a tuple of integers of at least 0"),
        ({"typestr": "nonsense"}, "weight has dtype nonsense, and must be float16, float32 or float64 on a GPU"),
        ({"typestr": None}, "weight.* has typestr None, and must have a string"),
        ({"data": None}, "weight.* has data None, and must have a tuple of an address and a bool"),
        ({"data": (None, False)}, r"weight.* has data \(None, False\), and must have a tuple of an address"),
        ({"strides": (4,)}, r"weight.* has strides \(4,\), and must have None or a tuple of integers, one an axis"),
    ],
    ids=str,
)
def test_bad_interface(changes, message):
    x, weight = device(sample((4, 3), F32)), Bare(np.ones((4, 3), F32), **changes)
    with pytest.raises(TypeError, match=message):
        fastbn.batch_norm_forward(x, weight)


@simulated
def test_no_interface():
    x = Bare(sample((4, 3), F32))
    x.__cuda_array_interface__ = {}
    with pytest.raises(TypeError, match=r"x\.__cuda_array_interface__ has shape None, and must have a tuple"):
        fastbn.moments(x)
    x.__cuda_array_interface__ = 7
    with pytest.raises(TypeError, match=r"x\.__cuda_array_interface__ is 7, and must be a dict"):
        fastbn.BatchNorm(3).cuda()(x)
    x.__cuda_array_interface__ = None
    for nothing in (x, kernels.DeviceArray, type("Property", (), {"__cuda_array_interface__": property(id)})):
        with pytest.raises(TypeError, match=r"^x "):
            fastbn.moments(nothing)


# ---- libraries ----


@pytest.fixture
def cupy(monkeypatch):
    """As much of CuPy as is asked of it, on the host."""

    class ndarray:
        __module__ = "cupy"

        def __init__(self, shape, dtype, memory=None, strides=None):
            size = int(np.prod(shape))
            self.data = np.full(size, np.nan, dtype) if memory is None else memory
            self.array = np.lib.stride_tricks.as_strided(self.data, shape, strides)
            self.shape, self.strides, self.dtype, self.device = shape, self.array.strides, dtype, SimpleNamespace(id=0)

        @property
        def __cuda_array_interface__(self):
            return {**self.array.__array_interface__, "stream": module.cuda.current.ptr, "version": 3}

    module = ModuleType("cupy")
    module.ndarray, module.empty = ndarray, lambda size, dtype: ndarray((size,), dtype)
    module.cuda = SimpleNamespace(current=SimpleNamespace(ptr=77), get_current_stream=lambda: module.cuda.current)
    monkeypatch.setitem(sys.modules, "cupy", module)
    return module


@pytest.fixture
def torch(monkeypatch):
    """As much of torch."""

    class Tensor:
        __module__ = "torch"

        def __init__(self, array):
            self.array, self.device = array, SimpleNamespace(index=0)
            self.shape = array.shape

        @property
        def __cuda_array_interface__(self):
            return {**self.array.__array_interface__, "version": 2}

    def empty_strided(shape, strides, dtype, device):
        assert device.index == 0
        memory = np.full(int(np.prod(shape)), np.nan, dtype)
        return Tensor(np.lib.stride_tricks.as_strided(memory, shape, [s * memory.itemsize for s in strides]))

    module = ModuleType("torch")
    module.Tensor, module.empty_strided = Tensor, empty_strided
    module.float16, module.float32, module.float64 = F16, F32, F64
    module.cuda = SimpleNamespace(current_stream=lambda device: SimpleNamespace(cuda_stream=99))
    monkeypatch.setitem(sys.modules, "torch", module)
    return module


def of(library, array):
    if library.__name__ == "torch":
        return library.Tensor(array)
    return library.ndarray(array.shape, array.dtype, array, array.strides)


@simulated
@pytest.mark.parametrize("name", ["cupy", "torch"])
def test_libraries(name, request, monkeypatch):
    """Results are arrays of x's library, in x's memory order, and kernels run on its stream."""
    library = request.getfixturevalue(name)
    streams = set()
    launch = kernels._launch
    monkeypatch.setattr(
        kernels, "_launch", lambda k, b, stream, *a: (streams.add(stream.key), launch(k, b, stream, *a))
    )
    x, dy = channels_last(sample((4, 8, 3, 2), F32)), sample((4, 8, 3, 2), F32, seed=2)
    weight, bias, *_ = parameters(8, F32)
    given = [of(library, a) for a in (x, weight, bias)]
    y, saved = fastbn.batch_norm_forward(*given)
    gradients = fastbn.batch_norm_backward(of(library, dy), saved)
    kind = library.ndarray if name == "cupy" else library.Tensor
    for result in (y, saved.mean, *gradients):
        assert type(result) is kind
    want, kept = fastbn.batch_norm_forward(x, weight, bias)
    assert y.array.strides == want.strides
    np.testing.assert_allclose(y.array, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradients[0].array, fastbn.batch_norm_backward(dy, kept)[0], rtol=1e-5, atol=1e-6)
    assert streams == {(0, 77 if name == "cupy" else 99)}
    bn = fastbn.BatchNorm(8).cuda(like=given[0])
    assert type(bn.running_mean) is kind and type(bn(given[0])) is kind
    np.testing.assert_allclose(bn.running_mean.array, 0.1 * kept.mean, rtol=1e-5)
    assert type(bn.cpu().weight) is np.ndarray


@simulated
def test_another_stream_is_waited_for(cupy, torch, monkeypatch):
    """And waits, in turn, for what the kernels do to its arrays."""
    waited = []
    launched = kernels._launch
    monkeypatch.setattr(kernels, "stream", lambda pointer: pointer)
    monkeypatch.setattr(kernels, "wait_for", lambda first, then: waited.append((first, then)))
    monkeypatch.setattr(kernels, "_launch", lambda *a: (waited.append("launched"), launched(*a)))
    monkeypatch.setattr(kernels, "FUSED_BYTES", 1 << 30)
    x, weight, bias = device(sample((4, 3), F32)), of(cupy, np.ones(3, F32)), of(cupy, np.zeros(3, F32))
    _, saved = fastbn.batch_norm_forward(x, weight, bias)
    assert waited == [(77, 0), "launched", (0, 77)]
    fastbn.batch_norm_backward(device(sample((4, 3), F32)), saved)  # weight and bias are on it still
    assert waited[3:] == [(77, 0), "launched", (0, 77)]
    del waited[:]
    fastbn.batch_norm_forward(x, of(torch, np.ones(3, F32)))  # whose interface does not say it
    assert waited == [(99, 0), "launched", (0, 99)]
    del waited[:]
    fastbn.batch_norm_forward(x, device(np.ones(3, F32)))
    assert waited == ["launched"]


@simulated
def test_a_stream_of_numbas_own(monkeypatch):
    """Kernels, and the results, have the array's own stream object: it lives as long as they do."""

    class Owned:
        def __int__(self):
            return 55

    streams, made, launched, new = [], [], kernels._launch, kernels.device_array
    monkeypatch.setattr(kernels, "_launch", lambda k, n, s, *a: (streams.append(s.numba), launched(k, n, s, *a)))
    monkeypatch.setattr(kernels, "_configured", lambda kernel, blocks, stream: kernel[blocks, kernels.THREADS])
    monkeypatch.setattr(kernels, "device_array", lambda *a: (made.append(a[3].numba), new(*a))[1])
    x = device(sample((4, 3), F32))
    x.stream = Owned()
    fastbn.batch_norm_forward(x)
    assert streams and made and all(stream is x.stream for stream in [*streams, *made])


@simulated
def test_scratch_memory_of_many_streams(monkeypatch):
    """One for each stream, used again; those of the latest few are kept."""

    def device_array(size, dtype, stream):
        return SimpleNamespace(nbytes=size, device_ctypes_pointer=SimpleNamespace(value=stream), held=stream)

    monkeypatch.setattr(kernels, "cuda", SimpleNamespace(device_array=device_array))
    scratch = kernels._Scratch()
    for i in range(40):
        for size in (10, 20, 2 << 20, 10):
            assert scratch.get(size, SimpleNamespace(key=(0, i), numba=i)) == i
        assert scratch.held[0, i].nbytes == 2 << 20
    assert [held.held for held in scratch.held.values()] == list(range(40 - scratch.STREAMS, 40))


@simulated
def test_a_tensor_that_requires_a_gradient(torch):
    """It has an interface, and refuses it; so does one of a type that the interface does not know."""

    class Refusing(torch.Tensor):
        __module__ = "torch"

        @property
        def __cuda_array_interface__(self):
            raise RuntimeError("Can't get __cuda_array_interface__ on Variable that requires grad.")

        def detach(self):
            return of(torch, self.array)

    x, weight = of(torch, sample((4, 3), F32)), Refusing(np.ones(3, F32))
    message = r"weight is a torch.Refusing that must say where it lies, and does not \(Can't get .*detach\(\) if it"
    with pytest.raises(TypeError, match=message):
        fastbn.batch_norm_forward(x, weight)
    fastbn.batch_norm_forward(x, weight.detach())


@simulated
def test_another_device(cupy):
    x, weight = of(cupy, sample((4, 3), F32)), of(cupy, np.ones(3, F32))
    weight.device = SimpleNamespace(id=1)
    with pytest.raises(ValueError, match="weight is on GPU 1, and must be on x's, GPU 0"):
        fastbn.batch_norm_forward(x, weight)


# ---- without a GPU ----


@pytest.mark.skipif(SIMULATED, reason="of the machine itself")
def test_config_says_why_not():
    """What show_config prints of the GPU, and that nothing else needs one."""
    said = backends.config()["gpu"]
    assert "numba-cuda" in said or "river" in said or "multiprocessors" in said
    assert run_python("import fastbn, sys; fastbn.show_config(); assert 'fastbn.gpu' not in sys.modules").stdout


@pytest.mark.skipif(SIMULATED, reason="of the machine itself")
def test_config_of_a_driver_in_order(monkeypatch):
    """The first GPU's name, without a context on it; or that the toolkit is what is missing."""

    def said(available):
        gpus = [SimpleNamespace(name=b"Some GPU", MULTIPROCESSOR_COUNT=132)]
        cuda = SimpleNamespace(is_available=lambda: available, cuda_error=lambda: None, gpus=gpus)
        monkeypatch.setitem(sys.modules, "numba_cuda", cuda)
        monkeypatch.setitem(sys.modules, "numba.cuda", cuda)
        return backends.config()["gpu"]

    assert said(True) == "Some GPU, 132 multiprocessors, for arrays that lie on it"
    assert said(False) == "none: the CUDA toolkit's libNVVM is not there: pip install 'fastbn[cuda]'"


@pytest.mark.skipif(SIMULATED, reason="of the machine itself")
def test_not_installed():
    """An array on a GPU without numba-cuda: the error names the extra."""
    code = """
import sys, numpy as np
sys.modules["numba"] = None
import fastbn
class Somewhere:
    __cuda_array_interface__ = {"shape": (4, 3), "typestr": "<f4", "data": (4096, False), "version": 3}
try:
    fastbn.batch_norm_forward(Somewhere())
except ImportError as error:
    print(error)
"""
    done = run_python(code)
    assert "an array on a GPU needs numba-cuda" in done.stdout and "pip install 'fastbn[cuda]'" in done.stdout


# Each kernel's arguments: how many arrays and sizes there are, whether there are vectors, and how many floats follow.
SIGNATURES = {
    "moments_planes": (3, 7, False, 0), "moments_rows": (3, 6, False, 0),
    "gradients_planes": (7, 10, True, 2), "gradients_rows": (7, 9, True, 2),
    "finish_moments": (5, 7, True, 2), "finish_gradients": (5, 6, True, 2), "prepare": (1, 2, True, 1),
    "normalize_planes": (4, 10, False, 1), "normalize_rows": (4, 8, False, 1),
    "input_gradient_planes": (6, 10, False, 1), "input_gradient_rows": (6, 8, False, 1),
    "forward_planes": (5, 6, True, 2), "forward_rows": (5, 4, True, 2),
    "backward_planes": (7, 9, True, 2), "backward_rows": (7, 7, True, 2), "copy": (2, 17, False, 0),
}  # fmt: skip


@pytest.fixture
def compiler(monkeypatch):
    """The kernels and a compiler of them to PTX for compute capability 9.0, without a GPU."""
    skip = pytest.fail if os.environ.get("FASTBN_TEST_PTX") == "1" else pytest.skip  # make ptx: they are there
    if SIMULATED or not CUDA:
        skip("compiling needs numba-cuda: pip install 'fastbn[cuda]'")
    from numba import cuda
    from numba.cuda import dispatcher, types

    from fastbn._kernels import numba_cuda

    # Device functions are compiled for "the current device", which there need not be.
    monkeypatch.setattr(dispatcher, "get_current_device", lambda: SimpleNamespace(compute_capability=(9, 0)))

    def compile_(kernel, *lengths, floats):
        """A kernel of tuples of so many integers, then of so many floats, as PTX."""
        signature = (*(types.UniTuple(types.int64, n) for n in lengths), *[types.float64] * floats)
        return cuda.compile(kernel.py_func, signature, device=False, abi="numba", cc=(9, 0))[0]

    try:
        compile_(numba_cuda.compiled("float32", 1).copy, 2, 17, floats=0)
    except Exception as error:
        if "nvvm" in str(error).lower():
            skip(f"no toolkit: {error}")
        raise
    return SimpleNamespace(kernels=numba_cuda, compile=compile_)


@pytest.mark.parametrize(("of_dtype", "lanes"), [("float32", 4), ("float16", 8)])
def test_compiles_to_ptx(compiler, of_dtype, lanes):
    """Wide loads and stores, no local memory, no calls."""
    found = compiler.kernels.compiled(of_dtype, lanes)
    assert set(vars(found)) == set(SIGNATURES)
    for name, (arrays, sizes, vectors, floats) in SIGNATURES.items():
        text = compiler.compile(getattr(found, name), arrays, sizes, *([12] if vectors else []), floats=floats)
        assert ".local" not in text and "call" not in re.findall(r"^\s+(\w+)", text, re.M), name
        wide = {"float32": "global.v4.f32", "float16": "global.v4.u32"}[of_dtype]
        if name.endswith(("_planes", "_rows")):
            assert f"ld.{wide}" in text, name
            assert f"st.{wide}" in text or name.startswith("moments"), name


class Interpreted:
    """The compiled kernels, and arrays that they can be given: every launch is interpreted."""

    def __init__(self, compiler, monkeypatch):
        self.kernels, self.memory, self.launched = compiler.kernels, ptx.Memory(1 << 40), set()
        self.stream = SimpleNamespace(device=0, numba=0, key=0)
        texts = {}

        def launch(kernel, blocks, stream, *arguments):
            if kernel not in texts:
                floats = sum(type(a) is float for a in arguments)
                texts[kernel] = ptx.Kernel(
                    compiler.compile(kernel, *(len(a) for a in arguments if type(a) is tuple), floats=floats)
                )
            flat = [x for a in arguments for x in (a if type(a) is tuple else (np.float64(a),))]
            self.launched.add(kernel.py_func.__name__)
            texts[kernel].launch(self.memory, blocks, self.kernels.THREADS, flat)

        monkeypatch.setattr(self.kernels, "_launch", launch)
        monkeypatch.setattr(self.kernels, "_multiprocessors", lambda device: 2)
        scratch = SimpleNamespace(get=lambda size, stream: self.memory.allocate(np.full(size, 255, np.uint8)))
        monkeypatch.setattr(self.kernels, "_scratch", scratch)

    def view(self, array, offset=0):
        if array is None:
            return None
        address = self.memory.allocate(array, offset)
        about = {"size": array.size, "dtype": array.dtype, "strides": array.strides, "shape": array.shape}
        return SimpleNamespace(address=address, **about)

    def new(self, shape, dtype, offset=0):
        return self.view(np.full(shape, np.nan, dtype), offset)

    def back(self, view):
        return self.memory.array(view.address, view.dtype, view.shape)


@pytest.mark.parametrize(
    ("of_dtype", "shape", "fused", "slope", "offset"),
    [
        (F32, (3, 2, 8), False, 1.0, 0),  # planes of whole vectors
        (F32, (5, 3, 7), True, 0.0, 0),  # and of none
        (F32, (5, 3, 8), False, 0.125, 4),  # misaligned
        (F32, (21, 8, 1), False, 0.0, 0),  # rows
        (F32, (300, 3, 1), True, 0.125, 0),
        (F16, (5, 2, 16), True, 0.0, 0),
        (F16, (13, 16, 1), False, 0.125, 0),
        (F64, (9, 4, 1), True, 0.0, 0),
        (F64, (4, 3, 6), False, 1.0, 0),
    ],
    ids=str,
)
def test_compiled_kernels_interpreted(compiler, monkeypatch, of_dtype, shape, fused, slope, offset):
    """What hardware would be given: vectors, half types, shuffles and barriers, without an access out of bounds."""
    gpu = Interpreted(compiler, monkeypatch)
    k, channels = gpu.kernels, shape[1]
    monkeypatch.setattr(k, "FUSED_BYTES", 1 << 40 if fused else 0)
    x, dy, residual = (sample(shape, of_dtype, seed=i) for i in range(3))
    weight, bias, *_ = parameters(channels, F32)
    here = [gpu.view(a, offset) for a in (x, dy, residual)]
    y, dx, dz = (gpu.new(shape, of_dtype, offset) for _ in range(3))
    mean, var, dbias = (gpu.new(channels, F64) for _ in range(3))
    dweight, w, b = gpu.new(channels, F32), gpu.view(weight), gpu.view(bias)
    k.forward(here[0], y, *shape, w, b, 1e-5, mean, var, here[2], slope, gpu.stream)
    want, want_mean, want_var = oracle_forward(x, weight, bias, 1, residual=residual, slope=slope)
    close_statistics(gpu.back(mean), gpu.back(var), want_mean, want_var, of_dtype)
    close("y", gpu.back(y), want, np.abs(want) + np.abs(residual.astype(F64)) + 6, of_dtype)
    cut = None if slope == 1 else y
    k.backward(
        here[1], here[0], dx, *shape, mean, var, w, b, 1e-5, dweight, dbias, True, cut, dz, slope, gpu.stream
    )  # fmt: skip
    got = tuple(map(gpu.back, (dx, dweight, dbias, dz)))
    want = oracle_backward(dy, x, want_mean, want_var, weight, 1, True, y=gpu.back(y), slope=slope)
    close_gradients(got, want, dy, x, want_mean, want_var, weight, 1, True, cut=slope != 1)
    np.testing.assert_array_equal(got[3], want[3].astype(of_dtype))
    assert len(gpu.launched) == (2 if fused else 6)


@pytest.mark.parametrize("shape", [(64, 2, 16), (300, 3, 1)], ids=str)
def test_compiled_kernels_sum_again(compiler, monkeypatch, shape):
    """Where a pivot is far from the mean, and where a channel is NaN: in float64, that channel alone."""
    gpu = Interpreted(compiler, monkeypatch)
    outer, channels, inner = shape
    x = sample(shape, F32)
    cut = gpu.kernels._Cut(F32, *shape, (), gpu.stream)
    flat = np.moveaxis(x, 1, 0).reshape(channels, -1)
    for part in range(cut.parts):
        start, end = part * cut.part, min(part * cut.part + cut.part, cut.units)
        for i in range(gpu.kernels.PIVOTS):
            at = (start + (end - start) * i // gpu.kernels.PIVOTS) * cut.unit
            flat[1:, at : at + cut.unit] = 90
    x = np.moveaxis(flat.reshape(channels, outer, inner), 0, 1).copy()
    x[-1, 1, -1] = np.nan if channels > 2 else 0
    mean, m2 = gpu.new(channels, F64), gpu.new(channels, F64)
    gpu.kernels.moments(gpu.view(x), *shape, mean, m2, gpu.stream)
    want = x.astype(F64).mean((0, 2)), x.astype(F64).var((0, 2))
    fine = ~np.isnan(want[0])
    assert (np.isnan(gpu.back(mean)) == ~fine).all() and (np.isnan(gpu.back(m2)) == ~fine).all()
    got = gpu.back(mean)[fine], gpu.back(m2)[fine] / (outer * inner)
    close_statistics(*got, want[0][fine], want[1][fine], F32)


def test_compiled_copy_and_update(compiler, monkeypatch):
    gpu = Interpreted(compiler, monkeypatch)
    x = sample((3, 4, 5, 6), F32)
    base, turned = gpu.view(x), x.transpose(2, 0, 3, 1)[::-1]
    start = base.address + turned.ctypes.data - x.ctypes.data
    source = SimpleNamespace(
        address=start, size=x.size, dtype=F32, strides=turned.strides, shape=turned.shape
    )  # fmt: skip
    to = gpu.new(turned.shape, F32)
    gpu.kernels.copy(source, to, gpu.stream)
    np.testing.assert_array_equal(gpu.back(to), turned)
    running = gpu.view(np.arange(5, dtype=F32)), gpu.view(np.arange(1.0, 6.0))
    batch = gpu.view(np.ones(5)), gpu.view(np.full(5, 3.0))
    gpu.kernels.update_running_stats(*running, *batch, 0.25, 1.5, gpu.stream)
    np.testing.assert_allclose(gpu.back(running[0]), np.arange(5) * 0.75 + 0.25, rtol=1e-6)
    np.testing.assert_allclose(gpu.back(running[1]), np.arange(1, 6) * 0.75 + 0.25 * 4.5)


# ---- anything that is drawn ----

SLOPES = {None: 1.0, "relu": 0.0, "leaky_relu": 0.125}


@simulated
@pytest.mark.parametrize("seed", range(60))
def test_drawn(seed, monkeypatch):
    """Any good call: sizes of 0 and 1, every axis, memory and dtype of each array; as in test_hypothesis.py."""
    rng = np.random.default_rng([20150211, seed])

    def one_of(values):
        return values[rng.integers(len(values))]

    shape = tuple(int(n) for n in rng.integers(1, 8, one_of([2, 3, 3, 4, 4, 5])))
    if one_of([True, False, False, False, False]):
        place = rng.integers(len(shape))
        shape = (*shape[:place], 0, *shape[place + 1 :])
    axis, dtype = int(rng.integers(-len(shape), len(shape))), one_of(DTYPES)
    channels, eps = shape[axis], 0.1  # a few values may be nearly equal; then x̂ is what rounding makes it
    monkeypatch.setattr(kernels, "FUSED_BYTES", one_of([0, 512, 1 << 30]))
    memories = [np.copy, np.copy, fortran, channels_last, batch_inside, gaps, padded, negative, misaligned]
    plain = [sample(shape, dtype, axis, seed=i) for i in range(3)]
    x, dy, residual = (one_of(memories)(a) for a in plain)
    residual = one_of([residual, None])
    weight, bias, mean, var = parameters(channels, F64)
    weight, bias = (one_of([None, p.astype(F32), p]) for p in (weight, bias))
    kind = one_of([F32, F64])
    mean, var = mean.astype(kind), var.astype(kind)
    activation, training = one_of([*SLOPES]), one_of([True, True, False])
    slope, options = SLOPES[activation], {"axis": axis, "eps": eps, "activation": activation, "negative_slope": 0.125}
    given = [device(weight), device(bias)]

    def output():
        memory = one_of([None, *memories])
        return None if memory is None else device(memory(np.full(shape, np.nan, dtype)))

    values = x.size // max(channels, 1)
    more = {"residual": device(residual), "out": output()}
    if training and values == 1:
        with pytest.raises(ValueError, match="one value a channel, and training must have at least 2"):
            fastbn.batch_norm_forward(device(x), *given, **options, **more)
        return
    if training:
        y, saved = fastbn.batch_norm_forward(device(x), *given, **options, **more)
    else:
        y, saved = fastbn.batch_norm_eval_forward(device(x), device(mean), device(var), *given, **options, **more)
    assert y.shape == shape and y.dtype == dtype and (more["out"] is None or y is more["out"])
    outputs = {"out": output()} | ({} if residual is None else {"out_residual": output()})
    gradients = fastbn.batch_norm_backward(device(dy), saved, **outputs)
    assert len(gradients) == (3 if residual is None else 4)
    got = [host(g) for g in gradients]
    assert [None if g is None else g.dtype for g in got[1:3]] == [
        None if p is None else p.dtype for p in (weight, bias)
    ]
    if not x.size:
        assert all(not g.any() for g in got if g is not None)
        return
    if training:
        _, mean, var = oracle_forward(x, weight, bias, axis, eps)
        step = unit(computed(dtype)) * np.abs(x).max()  # few values may lie close together, far from 0
        np.testing.assert_allclose(host(saved.mean), mean, rtol=0, atol=4 * step)
        np.testing.assert_allclose(
            host(saved.var), var, rtol=8 * unit(computed(dtype)), atol=8 * step * np.sqrt(var.max())
        )
    normal = oracle_normalize(x, mean, var, weight, bias, axis, eps)
    want = oracle_normalize(x, mean, var, weight, bias, axis, eps, residual=residual, slope=slope)
    w, b = (column(d if p is None else p, x.ndim, axis) for p, d in ((weight, 1), (bias, 0)))
    beside = 0 if residual is None else np.abs(residual.astype(F64))
    far = 0 if training else np.abs(w) * np.abs(column(mean, x.ndim, axis)) / np.sqrt(column(var, x.ndim, axis) + eps)
    close("y", host(y), want, np.abs(normal - b) + np.abs(w) + np.abs(b) + beside + far, dtype)
    want = oracle_backward(dy, x, mean, var, weight, axis, training, eps, y=host(y), slope=slope)
    passed = np.where(host(y) <= 0, slope, 1) * dy.astype(F64)
    close_gradients(got, want, passed, x, mean, var, weight, axis, training, eps, cut=slope != 1)
    if residual is not None:
        np.testing.assert_array_equal(got[3], want[3].astype(dtype))


# ---- more of the compiled kernels ----


def test_compiled_kernels_of_several_parts(compiler, monkeypatch):
    """What merges a channel's parts has more than one of them to merge."""
    monkeypatch.setattr(compiler.kernels, "LEAST_PART", 1)
    shape = (300, 3, 1)
    assert compiler.kernels._Cut(F32, *shape, (), Interpreted(compiler, monkeypatch).stream).parts >= 4
    test_compiled_kernels_interpreted(compiler, monkeypatch, F32, shape, False, 0.125, 0)


@pytest.mark.parametrize(("of_dtype", "shape"), [(F32, (5, 3, 7)), (F16, (21, 8, 1))], ids=str)
def test_compiled_kernels_with_given_statistics(compiler, monkeypatch, of_dtype, shape):
    gpu = Interpreted(compiler, monkeypatch)
    channels = shape[1]
    x, dy = (sample(shape, of_dtype, seed=i) for i in range(2))
    weight, bias, mean, var = parameters(channels, F32)
    here, gradient, *vectors = map(gpu.view, (x, dy, mean, var, weight, bias))
    y, dx = gpu.new(shape, of_dtype), gpu.new(shape, of_dtype)
    dweight, dbias = gpu.new(channels, F32), gpu.new(channels, F32)
    gpu.kernels.normalize(here, y, *shape, *vectors, 1e-5, None, 1.0, gpu.stream)
    want = oracle_normalize(x, mean, var, weight, bias, 1)
    close("y", gpu.back(y), want, eval_scale(x, mean, var, weight, 1), of_dtype)
    gpu.kernels.backward(
        gradient, here, dx, *shape, *vectors, 1e-5, dweight, dbias, False, None, None, 1.0, gpu.stream
    )  # fmt: skip
    want = oracle_backward(dy, x, mean, var, weight, 1, False)
    close_gradients(tuple(map(gpu.back, (dx, dweight, dbias))), want, dy, x, mean, var, weight, 1, False)
    assert {name.rsplit("_", 1)[0] for name in gpu.launched} >= {"normalize", "gradients", "finish"}


# ---- the benchmark's own checks ----


@pytest.fixture
def bench():
    path = Path(__file__).parent.parent / "bench" / "cuda.py"
    if not path.exists():
        pytest.skip("the benchmarks are not part of this copy")
    spec = importlib.util.spec_from_file_location("bench_cuda", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@simulated
def test_bench_checks(bench, monkeypatch, capsys):
    """bench/cuda.py, which is for real hardware, finds a small case right, and says so where one is not."""
    monkeypatch.setattr(bench, "TINY", [((3, 2, 4), 1)])
    monkeypatch.setattr(bench, "FORMS", [("relu", True)])
    monkeypatch.setattr(sys, "argv", ["cuda.py", "--check", "--seed", "5"])
    bench.main()
    assert "checking, seed 5" in capsys.readouterr().out
    monkeypatch.setitem(bench.LIMITS, "dx", 1e-9)
    with pytest.raises(SystemExit, match=r"dx is off by .* units, and at most 1e-09 are allowed: shape \(3, 2, 4\)"):
        bench.main()
    monkeypatch.setattr(sys, "argv", ["cuda.py"])
    monkeypatch.setitem(bench.LIMITS, "dx", 8.0)
    with pytest.raises(SystemExit, match="a simulated GPU has no speed"):
        bench.main()


@simulated
def test_bench_sees_what_lies_between(bench):
    """A view of larger memory: its values, and an error where something else was written."""
    x = sample((2, 3, 4), F32)
    for lay in bench.MEMORIES.values():
        same_bits(bench.Window(x, lay).host(), x)
    window = bench.Window(x, bench.MEMORIES["[:, ::2]"])
    window.base.array[5] = 1  # of an odd channel
    with pytest.raises(SystemExit, match="memory between an output's elements was written"):
        window.host()


@simulated
def test_bench_sees_what_is_not_written(bench, monkeypatch):
    """A result that a kernel leaves alone is NaN, though memory may hold what is right."""
    plain = kernels.device_array

    def old(shape, strides, dtype, stream):
        array = plain(shape, strides, dtype, stream)
        array.array[...] = 0  # as Σ dy of constant gradients is
        return array

    monkeypatch.setattr(kernels, "device_array", old)
    x = device(sample((4, 3, 8), F32))
    with bench.poisoned():
        new = gpu_empty(x)
    assert np.isnan(host(new)).all() and (host(gpu_empty(x)) == 0).all()


def gpu_empty(x):
    from fastbn import gpu

    with gpu._on(x) as stream:
        return gpu.empty(x, (3,), F32, stream).owner


@simulated
def test_bench_checks_libraries(bench, monkeypatch, capsys):
    """With a CuPy of NumPy's arrays: they are checked on its stream, and wrong results found."""

    class ndarray(np.ndarray):
        __module__ = "cupy"
        device = SimpleNamespace(id=0)

        def __new__(cls, shape, dtype, memory, strides):
            return np.ndarray.__new__(cls, shape, dtype, memory, 0, strides)

        @property
        def __cuda_array_interface__(self):
            return {**self.__array_interface__, "stream": module.cuda.now, "version": 3}

    class Stream:
        null = SimpleNamespace(synchronize=lambda: None)

        def __init__(self, non_blocking):
            assert non_blocking

        def __enter__(self):
            module.cuda.now = 77

        def __exit__(self, *error):
            module.cuda.now = 0

    module = ModuleType("cupy")
    module.ndarray, module.add, module.moveaxis = ndarray, np.add, np.moveaxis
    module.asarray = lambda values: np.array(values).view(ndarray)
    module.zeros = module.empty = lambda size, dtype: np.zeros(size, dtype).view(ndarray)
    module.asnumpy = np.array
    module.cuda = SimpleNamespace(now=0, is_available=lambda: True, Stream=Stream)
    module.cuda.get_current_stream = lambda: SimpleNamespace(ptr=module.cuda.now)
    monkeypatch.setitem(sys.modules, "cupy", module)
    monkeypatch.setattr(bench, "torch_with_cuda", lambda: None)
    launch, streams = kernels._launch, set()
    monkeypatch.setattr(kernels, "_launch", lambda k, b, s, *a: (streams.add(s.key), launch(k, b, s, *a)))
    with bench.poisoned():
        bench.libraries(np.random.default_rng(1))
    said = capsys.readouterr().out
    assert "torch: skipped" in said and "CuPy, on a stream of its own: right" in said
    assert streams == {(0, 77)}
    monkeypatch.setattr(kernels, "normalize", lambda *arguments: None)
    with bench.poisoned(), pytest.raises(AssertionError):
        bench.libraries(np.random.default_rng(1))
