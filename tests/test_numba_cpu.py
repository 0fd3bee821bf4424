"""What is special to the Numba kernels: drivers, threads and forks, and the blocks' second look at poor pivots.

That they compute what the reference computes is tested with all backends.
"""

import os
import threading

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


def run(x, threads, *, y=None):
    """Everything the interface computes of x, of shape (outer, channels, inner), with |x| as gradient."""
    outer, channels, inner = x.shape
    weight, bias = np.linspace(-1, 2, channels), np.linspace(1, 3, channels).astype(np.float32)
    dy = np.abs(x)
    mean, var, grad_weight, grad_bias = np.empty((4, channels))
    y, dx, eval_y = np.empty_like(x) if y is None else y, np.empty_like(x), np.empty_like(x)
    numba_cpu.forward(x, y, outer, channels, inner, weight, bias, EPS, mean, var, threads)
    numba_cpu.backward(dy, x, dx, outer, channels, inner, mean, var, weight, EPS, grad_weight, grad_bias, True, threads)
    numba_cpu.normalize(x, eval_y, outer, channels, inner, mean, var, weight, bias, EPS, threads)
    return y, dx, eval_y, mean, var, grad_weight, grad_bias


def normalized(x):
    outer, channels, inner = x.shape
    y, mean, var = np.empty_like(x), np.empty(channels), np.empty(channels)
    numba_cpu.forward(x, y, outer, channels, inner, None, None, EPS, mean, var, 1)
    return y, mean, var


def expected(x):
    outer, channels, inner = x.shape
    y, mean, var = np.empty(x.shape), np.empty(channels), np.empty(channels)
    reference.forward(x, y, outer, channels, inner, None, None, EPS, mean, var, 1)
    return y, mean, var


def same_bits(results, others):
    return all(a.tobytes() == b.tobytes() for a, b in zip(results, others, strict=True))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_serial_and_parallel_give_the_same_bits(shape, dtype):
    x = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    one = run(x, 1)
    for threads in (2, 3, 64):  # more than Numba has are cut to what it has
        assert same_bits(one, run(x, threads))


def test_the_callers_number_of_threads_is_put_back():
    before = numba.get_num_threads()
    run(np.ones((64, 64, 64), np.float32), 2)
    assert numba.get_num_threads() == before


@pytest.mark.parametrize("shape", SHAPES)
def test_streaming_changes_no_bit(shape, monkeypatch):
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    plain = run(x, 1)
    monkeypatch.setattr(numba_cpu, "_last_level_cache", lambda: 0)
    assert same_bits(plain, run(x, 1))
    memory = np.empty(x.size + 3, np.float32)[3:]  # an address that no vector likes
    assert same_bits(plain, run(x, 1, y=memory.reshape(shape)))


@pytest.mark.parametrize("shape", SHAPES)
def test_in_place(shape):
    x = np.random.default_rng(2).standard_normal(shape).astype(np.float32)
    y, mean, var = normalized(x)
    outer, channels, inner = shape
    numba_cpu.forward(x, x, outer, channels, inner, None, None, EPS, mean, var, 2)
    np.testing.assert_array_equal(x, y)


def test_read_only_inputs_need_no_second_compilation():
    x = np.random.default_rng(3).standard_normal((300, 40, 1)).astype(np.float32)
    run(x, 1)
    compiled = len(numba_cpu.FORWARD["columns"].serial.signatures)
    x.flags.writeable = False
    run(x, 1)
    assert len(numba_cpu.FORWARD["columns"].serial.signatures) == compiled


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


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(1001, 5, 1), (3, 5, 1), (37, 5, 49), (3, 5, 9001), (2, 5, 7)])
@pytest.mark.parametrize("value", [0, 0.1, -1 / 3, 1e-42, 1e30, -3e38])
def test_a_constant_channel_gives_exactly_the_bias(shape, dtype, value):
    outer, channels, inner = shape
    x = np.full(shape, value, dtype)
    bias = np.linspace(-1, 1, channels).astype(dtype)
    y, mean, var = np.empty_like(x), np.empty(channels), np.empty(channels)
    numba_cpu.forward(x, y, outer, channels, inner, None, bias, EPS, mean, var, 1)
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
    y, dx, eval_y, mean, var, grad_weight, grad_bias = run(x, 1)
    others = np.arange(shape[1]) != 17
    for result, before in zip((y, dx, eval_y), clean, strict=False):
        assert np.isnan(result[:, 17]).all()
        np.testing.assert_array_equal(result[:, others], before[:, others])
    for result, before in zip((mean, var, grad_weight, grad_bias), clean[3:], strict=True):
        assert not np.isfinite(result[17])
        np.testing.assert_array_equal(result[others], before[others])


def test_it_says_what_it_runs_on():
    run(np.ones((64, 64, 64), np.float32), 2)
    if numba.config.NUMBA_NUM_THREADS > 1:
        assert numba.threading_layer() in numba_cpu.openmp()
    assert "host" in numba_cpu.INSTRUCTION_SET
