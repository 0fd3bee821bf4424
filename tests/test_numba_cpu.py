"""What is special to the Numba kernels: drivers, threads and forks, forms, conversions, and second looks at blocks.

That they compute what the reference computes is tested with all backends.
"""

import os
import threading

import ml_dtypes
import numpy as np
import pytest

numba = pytest.importorskip("numba")

from fastbn._kernels import numba_cpu, reference  # noqa: E402

EPS = 1e-5
SHAPES = [
    (4096, 96, 1),  # rows: chunks of rows, two passes
    (200, 640, 1),  # rows: fused groups
    (33, 101, 49),  # small planes
    (5, 3, 40000),  # few channels: chunks of blocks
    (9, 17, 1200),  # fused runs
]


# What is compiled apart: the data's type, the slope, whether there is a residual.
FORMS = [
    (np.float32, 1.0, False),
    (np.float64, 0.0, False),
    (ml_dtypes.bfloat16, 0.1, False),
    (np.float32, 0.1, True),
    (np.float16, 0.0, True),
]
forms = pytest.mark.parametrize(
    ("dtype", "slope", "added"), FORMS, ids=[f"{np.dtype(d)}-{s}{'-residual' * r}" for d, s, r in FORMS]
)


def run(x, threads, *, y=None, slope=1.0, added=False):
    """Everything the interface computes of x, of shape (outer, channels, inner), with |x| as gradient."""
    outer, channels, inner = x.shape
    weight, bias = np.linspace(-1, 2, channels), np.linspace(1, 3, channels).astype(np.float32)
    dy, residual = np.abs(x), x[::-1].copy() if added else None
    mean, var, grad_weight, grad_bias = np.empty((4, channels))
    y, eval_y = np.empty_like(x) if y is None else y, np.empty_like(x)
    dx, dresidual, eval_dx, eval_dresidual = (np.zeros_like(x) for _ in range(4))
    numba_cpu.forward(x, y, outer, channels, inner, weight, bias, EPS, mean, var, residual, slope, threads)
    for batch, dx_, dresidual_ in ((False, eval_dx, eval_dresidual), (True, dx, dresidual)):
        numba_cpu.backward(
            dy, x, dx_, outer, channels, inner, mean, var, weight, bias, EPS, grad_weight, grad_bias, batch,
            y if added else None, dresidual_ if added else None, slope, threads,
        )  # fmt: skip
    numba_cpu.normalize(x, eval_y, outer, channels, inner, mean, var, weight, bias, EPS, residual, slope, threads)
    return y, dx, eval_y, eval_dx, dresidual, eval_dresidual, mean, var, grad_weight, grad_bias


def normalized(x):
    outer, channels, inner = x.shape
    y, mean, var = np.empty_like(x), np.empty(channels), np.empty(channels)
    numba_cpu.forward(x, y, outer, channels, inner, None, None, EPS, mean, var, None, 1.0, 1)
    return y, mean, var


def expected(x):
    outer, channels, inner = x.shape
    y, mean, var = np.empty(x.shape), np.empty(channels), np.empty(channels)
    reference.forward(x, y, outer, channels, inner, None, None, EPS, mean, var, None, 1.0, 1)
    return y, mean, var


def same_bits(results, others):
    return all(a.tobytes() == b.tobytes() for a, b in zip(results, others, strict=True))


@forms
@pytest.mark.parametrize("shape", SHAPES)
def test_serial_and_parallel_give_the_same_bits(shape, dtype, slope, added):
    x = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    one = run(x, 1, slope=slope, added=added)
    for threads in (2, 3, 64):  # more than Numba has are cut to what it has
        assert same_bits(one, run(x, threads, slope=slope, added=added))


def test_the_callers_number_of_threads_is_put_back():
    before = numba.get_num_threads()
    run(np.ones((64, 64, 64), np.float32), 2)
    assert numba.get_num_threads() == before


@forms
@pytest.mark.parametrize("shape", [*SHAPES, (9, 17, 1207)])
def test_streaming_changes_no_bit(shape, dtype, slope, added, monkeypatch):
    x = np.random.default_rng(1).standard_normal(shape).astype(dtype)
    plain = run(x, 1, slope=slope, added=added)
    monkeypatch.setattr(numba_cpu, "_last_level_cache", lambda: 0)
    assert same_bits(plain, run(x, 1, slope=slope, added=added))
    memory = np.empty(x.size + 3, dtype)[3:]  # an address that no vector likes
    assert same_bits(plain, run(x, 1, y=memory.reshape(shape), slope=slope, added=added))


@pytest.mark.parametrize("shape", SHAPES)
def test_in_place(shape):
    x = np.random.default_rng(2).standard_normal(shape).astype(np.float32)
    y, mean, var = normalized(x)
    outer, channels, inner = shape
    numba_cpu.forward(x, x, outer, channels, inner, None, None, EPS, mean, var, None, 1.0, 2)
    np.testing.assert_array_equal(x, y)


def test_read_only_inputs_need_no_second_compilation():
    x = np.random.default_rng(3).standard_normal((300, 40, 1)).astype(np.float32)
    run(x, 1)
    compiled = len(numba_cpu.FORWARD["columns"].serial.signatures)
    x.flags.writeable = False
    run(x, 1)
    assert len(numba_cpu.FORWARD["columns"].serial.signatures) == compiled


def test_a_form_is_compiled_once():
    """Every slope of leaky_relu is the same, and so is every activation of a residual."""

    def compiled(dtype, slope, added):
        run(np.ones((300, 40, 1), dtype), 1, slope=slope, added=added)
        return tuple(len(drivers["columns"].serial.signatures) for drivers in (numba_cpu.FORWARD, numba_cpu.BACKWARD))

    assert compiled(ml_dtypes.bfloat16, 0.1, False) == compiled(ml_dtypes.bfloat16, 0.2, False)
    assert compiled(np.float32, 0.1, True) == compiled(np.float32, 0.0, True) == compiled(np.float32, 1.0, True)


def converted(x, dtype):
    """x in another dtype, by loads and stores of vectors and of parts of them."""

    @numba_cpu._jit
    def convert(x_, y_):
        x, y = numba_cpu.pointer(x_), numba_cpu.pointer(y_)
        width = numba_cpu.lanes(x)
        whole = x_.size - x_.size % width
        for i in range(0, whole, width):
            numba_cpu.store(y, i, numba_cpu.load(x, i))
        n = x_.size - whole
        zero = numba_cpu.splat(x, 0.0)
        numba_cpu.store_part(y, whole, n, numba_cpu.load_part(x, whole, n, zero))
        return np.float64(numba_cpu.element(x, x_.size - 1))

    y = np.empty(x.shape, dtype)
    last = convert(numba_cpu._input(x), numba_cpu._flat(y))
    np.testing.assert_array_equal(last, np.float64(x[-1]))
    return y


@pytest.mark.parametrize("native", [True, False], ids=["by the processor", "by integers"])
@pytest.mark.parametrize("half", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.filterwarnings("ignore:.* encountered in cast:RuntimeWarning")
def test_half_types_are_converted_exactly_and_rounded_to_nearest_even(half, native, monkeypatch):
    if not native:
        monkeypatch.setattr(numba_cpu, "_converts", lambda context: False)
    every = np.arange(1 << 16, dtype=np.uint16)[:-5].view(half)
    np.testing.assert_array_equal(converted(every, np.float32), every.astype(np.float32))

    # Every half number, the ties between neighbours, and the float32 numbers beside both.
    numbers = every.astype(np.float32).view(np.int32)
    ties = numbers + (1 << (12 if half == np.float16 else 15))
    random = np.random.default_rng(10).integers(-(1 << 31), 1 << 31, 100_003)
    near = np.concatenate([v.astype(np.int64) + d for v in (numbers, ties) for d in (-1, 0, 1)] + [random])
    x = near.astype(np.int32).view(np.float32)
    got, want = converted(x, half), x.astype(half)
    nan = np.isnan(x)
    np.testing.assert_array_equal(np.isnan(got.astype(np.float32)), nan)
    np.testing.assert_array_equal(got.view(np.uint16)[~nan], want.view(np.uint16)[~nan])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_backward_pass_cuts_where_its_forward_pass_cut(shape, dtype):
    """Where z is nothing but the rounding of one formula: with another, its sign would be another."""
    outer, channels, inner = shape
    rng = np.random.default_rng(11)
    x = np.repeat(rng.standard_normal((2, channels, 1)), (outer + 1) // 2, axis=0)[:outer].repeat(inner, axis=2)
    x = x.astype(dtype)
    mean, var, weight = rng.standard_normal(channels), rng.random(channels) + 0.1, rng.standard_normal(channels)
    bias = -(x[0, :, 0] - mean) * weight / np.sqrt(var + EPS)  # so z is about 0 in half the rows
    y, ones, dx = np.empty_like(x), np.ones_like(x), np.empty_like(x)
    grad_weight, grad_bias = np.empty((2, channels))
    for batch in (False, True):
        numba_cpu.normalize(x, y, outer, channels, inner, mean, var, weight, bias, EPS, None, 0.0, 1)
        numba_cpu.backward(
            ones, x, dx, outer, channels, inner, mean, var, weight, bias, EPS, grad_weight, grad_bias, batch,
            None, None, 0.0, 1,
        )  # fmt: skip
        np.testing.assert_array_equal(grad_bias, (y > 0).sum(axis=(0, 2)))
        if not batch:
            np.testing.assert_array_equal(dx != 0, y > 0)


@pytest.mark.parametrize("shape", [(1001, 33, 1), (37, 33, 49), (3, 33, 9001)])
@pytest.mark.parametrize(("slope", "added"), [(0.0, False), (0.1, True)])
def test_gradients_whose_sums_float32_cannot_hold(shape, slope, added):
    rng = np.random.default_rng(12)
    outer, channels, inner = shape
    x, dy, y = (rng.standard_normal(shape).astype(np.float32) for _ in range(3))
    dy[:, 3] *= np.float32(2e37)
    mean, var, bias = rng.standard_normal(channels), rng.random(channels) + 0.5, rng.standard_normal(channels)
    results = []
    for kernels in (numba_cpu, reference):
        dx, dresidual, grad_weight, grad_bias = np.empty_like(x), dy.copy(), np.empty(channels), np.empty(channels)
        kernels.backward(
            dresidual if added else dy, x, dx, outer, channels, inner, mean, var, None, bias, EPS,
            grad_weight, grad_bias, False, y if added else None, dresidual if added else None, slope, 1,
        )  # fmt: skip
        results.append((dx, dresidual, grad_weight, grad_bias))
    size = np.abs(dy).max(axis=(0, 2))
    for got, want, many in zip(*results, (1, 1, outer * inner, outer * inner), strict=True):
        error = np.abs(got - want) if many > 1 else np.abs(got - want).max(axis=(0, 2))
        assert (error <= 1e-6 * size * many).all()


def test_python_threads_call_at_once():
    rng = np.random.default_rng(4)
    inputs = [rng.standard_normal((64, 32, 100)).astype(np.float32) for _ in range(4)]
    alone = [run(x, 2) for x in inputs]
    wrong = []

    def work(i):
        for _ in range(10):
            if not same_bits(alone[i], run(inputs[i], 2)):
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_runs_on_one_thread():
    x = np.random.default_rng(5).standard_normal((64, 32, 100)).astype(np.float32)
    parents = run(x, 2)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if same_bits(parents, run(x, 2)) else 2
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


@pytest.mark.parametrize(("dtype", "bound"), [(np.float32, 2e-6), (np.float64, 1e-9)])
@pytest.mark.parametrize("shape", [(1000, 7, 1), (40, 7, 49), (3, 7, 9001)])
@pytest.mark.parametrize("ratio", [0, 1e3, 1e6])
def test_poor_pivots(shape, dtype, bound, ratio):
    x = np.random.default_rng(6).standard_normal(shape) + ratio
    x[:8, :, :16] += 30  # the values that pivots are taken from are far from the rest
    x = x.astype(dtype)
    y, mean, var = normalized(x)
    y_, mean_, var_ = expected(x)
    assert (np.abs(y - y_) <= bound * np.maximum(1, np.abs(y_) / 5)).all()
    assert (np.abs(mean - mean_) <= bound * np.sqrt(var_)).all()
    np.testing.assert_allclose(var, var_, rtol=bound)


@pytest.mark.parametrize("half", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape", [(16, 5, 4096), (1000, 7, 1), (40, 7, 49)])
def test_coarse_values_are_not_rounded_the_same_way_every_time(shape, half):
    """Half values far from 0 lie on a coarse grid. With a pivot beside it, 14 units were lost."""
    x = (np.random.default_rng(13).standard_normal(shape) + 10).astype(half)
    outer, channels, inner = shape
    mean, m2 = np.empty(channels), np.empty(channels)
    numba_cpu.moments(x, outer, channels, inner, mean, m2, 1)
    np.testing.assert_allclose(m2 / (outer * inner), x.astype(np.float64).var(axis=(0, 2)), rtol=1e-7)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(1001, 5, 1), (3, 5, 1), (37, 5, 49), (3, 5, 9001), (2, 5, 7)])
@pytest.mark.parametrize("value", [0, 0.1, -1 / 3, 1e-42, 1e30, -3e38])
def test_a_constant_channel_gives_exactly_the_bias(shape, dtype, value):
    outer, channels, inner = shape
    x = np.full(shape, value, dtype)
    bias = np.linspace(-1, 1, channels).astype(dtype)
    y, mean, var = np.empty_like(x), np.empty(channels), np.empty(channels)
    numba_cpu.forward(x, y, outer, channels, inner, None, bias, EPS, mean, var, None, 1.0, 1)
    np.testing.assert_array_equal(y, np.broadcast_to(bias[:, np.newaxis], shape))
    np.testing.assert_array_equal(mean, np.float64(dtype(value)))
    np.testing.assert_array_equal(var, 0)


@pytest.mark.parametrize("shape", [(1001, 33, 1), (37, 33, 49), (3, 33, 9001)])
@pytest.mark.parametrize("scale", [1e30, 1e-25])
def test_squares_that_float32_cannot_hold(shape, scale):
    x = (np.random.default_rng(7).standard_normal(shape) * scale).astype(np.float32)
    outer, channels, inner = shape
    mean, m2 = np.empty(channels), np.empty(channels)
    numba_cpu.moments(x, outer, channels, inner, mean, m2, 1)
    _, _, var = expected(x)
    np.testing.assert_allclose(m2 / (outer * inner), var, rtol=1e-9)
    y, _, _ = normalized(x)
    y_, _, _ = expected(x)
    assert np.abs(y - y_).max() <= 2e-6


@pytest.mark.parametrize("shape", [(1001, 33, 1), (37, 33, 49), (3, 33, 9001)])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_in_its_channel(shape, value):
    x = np.random.default_rng(8).standard_normal(shape).astype(np.float32)
    clean = run(x, 1)
    x[-1, 17, -1] = value
    y, dx, eval_y, _, _, _, mean, var, grad_weight, grad_bias = run(x, 1)
    others = np.arange(shape[1]) != 17
    for result, before in zip((y, dx, eval_y), clean, strict=False):
        assert np.isnan(result[:, 17]).all()
        np.testing.assert_array_equal(result[:, others], before[:, others])
    for result, before in zip((mean, var, grad_weight, grad_bias), clean[6:], strict=True):
        assert not np.isfinite(result[17])
        np.testing.assert_array_equal(result[others], before[others])


def test_it_says_what_it_runs_on():
    run(np.ones((64, 64, 64), np.float32), 2)
    if numba.config.NUMBA_NUM_THREADS > 1:
        assert numba.threading_layer() in numba_cpu.openmp()
    assert "host" in numba_cpu.INSTRUCTION_SET
