"""Evaluation: y by given statistics."""

from itertools import product

import numpy as np
import pytest
from conftest import WIDE, close_y, computed, oracle_normalize, parameters, same_bits, sample

import fastbn


def test_shapes(kernels, dtype, case):
    x = sample(case.shape, dtype, case.axis)
    weight, bias, mean, var = parameters(x.shape[case.axis], np.float64)
    y = fastbn.batch_norm(x, mean, var, weight, bias, axis=case.axis)
    assert y.dtype == dtype and y.shape == x.shape
    close_y(y, oracle_normalize(x, mean, var, weight, bias, case.axis), weight, bias, case.axis)


@pytest.mark.parametrize(
    ("stats_dtype", "weight_dtype", "bias_dtype"), [*product(WIDE, [None, *WIDE], [None, *WIDE])], ids=str
)
def test_parameters(kernels, dtype, stats_dtype, weight_dtype, bias_dtype):
    x = sample((5, 7, 6), dtype)
    weight, bias, mean, var = parameters(7, np.float64)
    weight = None if weight_dtype is None else weight.astype(weight_dtype)
    bias = None if bias_dtype is None else bias.astype(bias_dtype)
    mean, var = mean.astype(stats_dtype), var.astype(stats_dtype)
    y = fastbn.batch_norm(x, mean, var, weight, bias)
    close_y(y, oracle_normalize(x, mean, var, weight, bias, 1), weight, bias, 1)


def test_statistics_are_read_only(kernels, dtype):
    """They are read and not written: neither gaps nor a read-only flag matter, and they stay."""
    x = sample((5, 3, 7), dtype)
    *_, mean, var = parameters(3, np.float32)
    want = fastbn.batch_norm(x, mean, var)
    table = np.stack([mean, var], axis=1)
    table.flags.writeable = False
    for out in (None, np.empty_like(x)):
        same_bits(fastbn.batch_norm(x, table[:, 0], table[:, 1], out=out), want)
    same_bits(table[:, 1].copy(), var)
    same_bits(fastbn.batch_norm(x, mean.tolist(), var.tolist()), want)


def test_one_value_a_channel(kernels, dtype):
    """Evaluation needs no second value."""
    x = sample((1, 3), dtype)
    *_, mean, var = parameters(3, np.float64)
    close_y(fastbn.batch_norm(x, mean, var), oracle_normalize(x, mean, var, None, None, 1), None, None, 1)


def test_eval_forward_is_batch_norm(kernels, dtype, case):
    x = sample(case.shape, dtype, case.axis)
    weight, bias, mean, var = parameters(x.shape[case.axis], computed(dtype))
    y, saved = fastbn.batch_norm_eval_forward(x, mean, var, weight, bias, axis=case.axis)
    same_bits(y, fastbn.batch_norm(x, mean, var, weight, bias, axis=case.axis))
    assert not saved.batch
