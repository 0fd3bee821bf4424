"""Training: the batch's statistics, and y by them."""

from itertools import product

import numpy as np
import pytest
from conftest import (
    WIDE,
    close_statistics,
    close_y,
    oracle_forward,
    parameters,
    same_bits,
    sample,
)

import fastbn


def test_shapes(kernels, dtype, case):
    x = sample(case.shape, dtype, case.axis)
    weight, bias, *_ = parameters(x.shape[case.axis], np.float32)
    y, saved = fastbn.batch_norm_forward(x, weight, bias, axis=case.axis)
    want, mean, var = oracle_forward(x, weight, bias, case.axis)
    assert y.dtype == dtype and y.shape == x.shape and saved.mean.dtype == saved.var.dtype == np.float64
    close_statistics(saved.mean, saved.var, mean, var, dtype)
    close_y(y, want, weight, bias, case.axis)


@pytest.mark.parametrize(("weight_dtype", "bias_dtype"), [*product([None, *WIDE], repeat=2)], ids=str)
@pytest.mark.parametrize(("shape", "axis"), [((5, 7, 6, 4), 1), ((9, 7), 1)])
def test_parameters(kernels, dtype, weight_dtype, bias_dtype, shape, axis):
    x = sample(shape, dtype, axis)
    weight, bias, *_ = parameters(7, np.float64)
    weight = None if weight_dtype is None else weight.astype(weight_dtype)
    bias = None if bias_dtype is None else bias.astype(bias_dtype)
    y, _ = fastbn.batch_norm_forward(x, weight, bias, axis=axis)
    want, *_ = oracle_forward(x, weight, bias, axis)
    assert y.dtype == dtype
    close_y(y, want, weight, bias, axis)


@pytest.mark.parametrize("eps", [1e-12, 1e-3, 10.0])
def test_eps(kernels, dtype, eps):
    x = sample((6, 5, 7), dtype)
    y, _ = fastbn.batch_norm_forward(x, eps=eps)
    close_y(y, oracle_forward(x, None, None, 1, eps)[0], None, None, 1)


def test_parameters_with_gaps(kernels, dtype):
    x = sample((6, 5, 7), dtype)
    table = np.full((5, 2), np.nan)
    weight, bias, *_ = parameters(5, np.float64)
    table[:, 0] = weight
    same_bits(
        fastbn.batch_norm_forward(x, table[:, 0], bias[::-1])[0],
        fastbn.batch_norm_forward(x, weight, bias[::-1].copy())[0],
    )


@pytest.mark.parametrize("stats_dtype", WIDE, ids=str)
@pytest.mark.parametrize("momentum", [0.0, 0.1, 1.0])
def test_running_statistics(kernels, dtype, stats_dtype, momentum):
    """Updated in place with the unbiased variance; y is batch_norm_forward's."""
    x = sample((5, 3, 7), dtype)
    weight, bias, running_mean, running_var = parameters(3, stats_dtype)
    was_mean, was_var = running_mean.astype(np.float64), running_var.astype(np.float64)
    y = fastbn.batch_norm(x, running_mean, running_var, weight, bias, training=True, momentum=momentum)
    same_bits(y, fastbn.batch_norm_forward(x, weight, bias)[0])
    _, mean, var = oracle_forward(x, None, None, 1)
    tolerance = 1e-14 if dtype == stats_dtype == np.float64 else 1e-6
    np.testing.assert_allclose(running_mean, was_mean + momentum * (mean - was_mean), rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(running_var, was_var + momentum * (var * 35 / 34 - was_var), rtol=tolerance)


def test_running_statistics_in_a_table(kernels):
    """Statistics may be views, here the columns' halves of one array; what lies between them stays."""
    x = sample((5, 3, 7), np.float32)
    table = np.zeros((2, 6), np.float32)
    table[1] = 1
    plain_mean, plain_var = np.zeros(3, np.float32), np.ones(3, np.float32)
    fastbn.batch_norm(x, table[0, ::2], table[1, ::2], training=True)
    fastbn.batch_norm(x, plain_mean, plain_var, training=True)
    same_bits(table[0, ::2].copy(), plain_mean)
    same_bits(table[1, ::2].copy(), plain_var)
    assert (table[0, 1::2] == 0).all() and (table[1, 1::2] == 1).all()


def test_no_running_statistics(kernels, dtype):
    x = sample((5, 3, 7), dtype)
    same_bits(fastbn.batch_norm(x, training=True), fastbn.batch_norm_forward(x)[0])


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 5), (4, 3, 0), (4, 3, 0, 2), (2, 3, 0, 1, 1)])
def test_empty_batch(kernels, dtype, shape):
    """An empty result of x's shape; the statistics stay."""
    x = np.empty(shape, dtype)
    running_mean, running_var = np.full(3, 5.0), np.full(3, 7.0)
    y = fastbn.batch_norm(x, running_mean, running_var, training=True)
    assert y.shape == shape and y.dtype == dtype
    assert (running_mean == 5).all() and (running_var == 7).all()
    out = np.empty(shape, dtype)
    y, saved = fastbn.batch_norm_forward(x, np.ones(3), np.zeros(3), out=out)
    assert y is out
    dx, dweight, dbias = fastbn.batch_norm_backward(y, saved)
    assert dx.shape == shape and (dweight == 0).all() and (dbias == 0).all()
    assert fastbn.batch_norm(x, running_mean, running_var).shape == shape


def test_input_is_left_alone(kernels, dtype, case):
    x = sample(case.shape, dtype, case.axis)
    before = x.copy()
    fastbn.batch_norm_forward(x, axis=case.axis)
    same_bits(x, before)


def test_a_list_is_an_array(kernels):
    values = [[1.0, 2.0], [3.0, 5.0], [4.0, 4.0]]
    same_bits(fastbn.batch_norm(values, training=True), fastbn.batch_norm(np.array(values), training=True))
