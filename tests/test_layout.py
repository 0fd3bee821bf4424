"""The same numbers from any memory: views, gaps, orders; and the output's memory."""

import numpy as np
import pytest
from conftest import (
    COPIES,
    ORDERS,
    close_gradients,
    close_y,
    oracle_backward,
    oracle_forward,
    parameters,
    same_bits,
    sample,
)

import fastbn

SHAPES = [(9, 5), (7, 3, 5), (9, 5, 6, 7), (2, 3, 24, 23), (2, 3, 4, 5, 7), (1, 3, 5, 1), (5, 1, 7)]


def run_all(x, dy, given, axis=1):
    """Every operation's results."""
    weight, bias, mean, var = given
    y, saved = fastbn.batch_norm_forward(x, weight, bias, axis=axis)
    m = fastbn.moments(x, axis=axis)
    return [
        y,
        *fastbn.batch_norm_backward(dy, saved),
        fastbn.batch_norm(x, mean, var, weight, bias, axis=axis),
        *fastbn.batch_norm_backward(dy, fastbn.batch_norm_eval_forward(x, mean, var, weight, bias, axis=axis)[1]),
        m.mean,
        m.m2,
    ]


def longer(array):
    """Strides of the axes that have any: an axis of length 1 may have any stride."""
    return [stride for stride, length in zip(array.strides, array.shape, strict=True) if length > 1]


@pytest.mark.parametrize("memory", COPIES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_view_has_the_bits_of_its_copy(kernels, dtype, shape, memory):
    x, dy = sample(shape, dtype), sample(shape, dtype, seed=2)
    given = parameters(shape[1], np.float32)
    for got, want in zip(run_all(memory(x), memory(dy), given), run_all(x, dy, given), strict=True):
        same_bits(got, want)


@pytest.mark.parametrize("memory", ORDERS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_memory_is_followed(kernels, dtype, shape, memory):
    """Right numbers, and outputs in the input's order; dy may lie in another one."""
    x, dy = memory(sample(shape, dtype)), sample(shape, dtype, seed=2)
    weight, bias, *_ = given = parameters(shape[1], np.float32)
    y, *gradients = run_all(x, dy, given)[:4]
    want, mean, var = oracle_forward(x, weight, bias, 1)
    close_y(y, want, weight, bias, 1)
    close_gradients(gradients, oracle_backward(dy, x, mean, var, weight, 1, True), dy, x, mean, var, weight, 1, True)
    for result in (y, gradients[0]):
        assert longer(result) == longer(x)
    for got, other in zip(gradients, run_all(x, memory(dy), given)[1:4], strict=True):
        np.testing.assert_array_equal(got, other)


def test_transposed_view_is_channels_last(kernels, dtype):
    """axis=1 of a transposed view and axis=-1 of what it views are one thing."""
    x, dy = sample((5, 6, 7, 9), dtype, -1), sample((5, 6, 7, 9), dtype, -1, seed=2)
    given = parameters(9, np.float32)
    views = run_all(np.moveaxis(x, -1, 1), np.moveaxis(dy, -1, 1), given)
    for view, plain in zip(views, run_all(x, dy, given, axis=-1), strict=True):
        same_bits(np.moveaxis(view, 1, -1) if view.ndim == 4 else view, plain)


def test_overlapping_windows(kernels, dtype):
    """A read-only input whose elements share memory is still an array."""
    signal = sample((40, 1), dtype)[:, 0]
    windows = np.lib.stride_tricks.sliding_window_view(signal, 6)[:, :5]
    broadcast = np.broadcast_to(signal[:, np.newaxis, np.newaxis], (40, 3, 4))
    for x in (windows, broadcast):
        same_bits(
            np.ascontiguousarray(fastbn.batch_norm_forward(x)[0]),
            np.ascontiguousarray(fastbn.batch_norm_forward(np.ascontiguousarray(x))[0]),
        )


@pytest.mark.parametrize("x_memory", [np.copy, *ORDERS, *COPIES])
@pytest.mark.parametrize("out_memory", [np.copy, *ORDERS, *(m for m in COPIES if m.__name__ != "read_only")])
def test_out(kernels, dtype, x_memory, out_memory):
    """Whatever the order of `out` and of x: `out` is filled, returned, and holds what would have been returned."""
    shape = (3, 5, 6, 4)
    x, dy = x_memory(sample(shape, dtype)), sample(shape, dtype, seed=2)
    weight, bias, mean, var = parameters(5, np.float32)
    _, saved = fastbn.batch_norm_forward(x, weight, bias)
    for call in (
        lambda **to: fastbn.batch_norm_forward(x, weight, bias, **to)[0],
        lambda **to: fastbn.batch_norm(x, None, None, weight, bias, training=True, **to),
        lambda **to: fastbn.batch_norm(x, mean, var, weight, **to),
        lambda **to: fastbn.batch_norm_eval_forward(x, mean, var, **to)[0],
        lambda **to: fastbn.batch_norm_backward(dy, saved, **to)[0],
    ):
        out = out_memory(np.full(shape, np.nan, dtype))
        assert call(out=out) is out
        np.testing.assert_array_equal(out, call())


@pytest.mark.parametrize("memory", [np.copy, *ORDERS, *(m for m in COPIES if m.__name__ != "read_only")])
@pytest.mark.parametrize("shape", [(9, 5), (9, 5, 7), (2, 3, 30, 23)], ids=str)
def test_in_place(kernels, dtype, shape, memory):
    """batch_norm(out=x) and batch_norm_backward(out=dy)."""
    x, dy = sample(shape, dtype), sample(shape, dtype, seed=2)
    weight, bias, mean, var = parameters(shape[1], np.float32)
    for settings in ({"training": True}, {"running_mean": mean, "running_var": var}):
        here = memory(x)
        want = fastbn.batch_norm(memory(x), weight=weight, bias=bias, **settings)
        assert fastbn.batch_norm(here, weight=weight, bias=bias, out=here, **settings) is here
        np.testing.assert_array_equal(here, want)
    x = memory(x)
    for _, saved in (fastbn.batch_norm_forward(x, weight), fastbn.batch_norm_eval_forward(x, mean, var, weight)):
        here = memory(dy)
        want, want_dweight, _ = fastbn.batch_norm_backward(memory(dy), saved)
        got, dweight, _ = fastbn.batch_norm_backward(here, saved, out=here)
        assert got is here
        np.testing.assert_array_equal(here, want)
        same_bits(dweight, want_dweight)


def test_out_beside_x_in_one_buffer(kernels):
    """Halves of one buffer lie interleaved in memory without sharing any of it: this is no overlap."""
    x = sample((4, 3, 5), np.float32)
    buffer = np.concatenate([x, np.zeros_like(x)], axis=1)
    fastbn.batch_norm(buffer[:, :3], training=True, out=buffer[:, 3:])
    same_bits(buffer[:, 3:].copy(), fastbn.batch_norm(x, training=True))
    same_bits(buffer[:, :3].copy(), x)
