"""Gradients: against the reference, and against finite differences."""

import numpy as np
import pytest
from conftest import (
    WIDE,
    close_gradients,
    computed,
    oracle_backward,
    oracle_forward,
    parameters,
    same_bits,
    sample,
    unit,
)

import fastbn


@pytest.mark.parametrize("batch", [True, False], ids=["batch", "eval"])
def test_shapes(kernels, dtype, case, batch):
    x, dy = sample(case.shape, dtype, case.axis), sample(case.shape, dtype, case.axis, seed=2)
    weight, bias, mean, var = parameters(x.shape[case.axis], np.float32)
    if batch:
        _, saved = fastbn.batch_norm_forward(x, weight, bias, axis=case.axis)
        _, mean, var = oracle_forward(x, weight, bias, case.axis)
    else:
        _, saved = fastbn.batch_norm_eval_forward(x, mean, var, weight, bias, axis=case.axis)
    got = fastbn.batch_norm_backward(dy, saved)
    assert got[0].dtype == dtype and got[0].shape == x.shape
    want = oracle_backward(dy, x, mean, var, weight, case.axis, batch)
    close_gradients(got, want, dy, x, mean, var, weight, case.axis, batch)


@pytest.mark.parametrize("weight_dtype", [None, *WIDE], ids=str)
@pytest.mark.parametrize("bias_dtype", [None, *WIDE], ids=str)
def test_parameters(kernels, dtype, weight_dtype, bias_dtype):
    """Gradients have the dtype of what they are gradients of, and are None where there is none."""
    x, dy = sample((6, 5, 7), dtype), sample((6, 5, 7), dtype, seed=2)
    weight, bias, *_ = parameters(5, np.float64)
    weight = None if weight_dtype is None else weight.astype(weight_dtype)
    bias = None if bias_dtype is None else bias.astype(bias_dtype)
    _, saved = fastbn.batch_norm_forward(x, weight, bias)
    dx, dweight, dbias = fastbn.batch_norm_backward(dy, saved)
    assert (None if dweight is None else dweight.dtype) == weight_dtype
    assert (None if dbias is None else dbias.dtype) == bias_dtype
    _, mean, var = oracle_forward(x, weight, bias, 1)
    want = oracle_backward(dy, x, mean, var, weight, 1, True)
    close_gradients((dx, dweight, dbias), want, dy, x, mean, var, weight, 1, True)


def central_differences(loss, array, step=1e-5):
    gradient = np.empty_like(array)
    for i in np.ndindex(array.shape):
        here = array[i]
        array[i] = here + step
        above = loss()
        array[i] = here - step
        gradient[i] = (above - loss()) / (2 * step)
        array[i] = here
    return gradient


@pytest.mark.parametrize("batch", [True, False], ids=["batch", "eval"])
@pytest.mark.parametrize(("shape", "axis"), [((5, 3), 1), ((3, 2, 4), 1), ((2, 3, 2, 3), 1), ((2, 2, 2, 3), -1)])
def test_finite_differences(kernels, shape, axis, batch):
    """The loss is a fixed random weighting of y. Truncation is about step²; rounding about 1e-16/step."""
    x, cotangent = sample(shape, np.float64, axis), sample(shape, np.float64, axis, seed=2)
    weight, bias, mean, var = parameters(shape[axis], np.float64)

    def forward():
        if batch:
            return fastbn.batch_norm_forward(x, weight, bias, axis=axis)
        return fastbn.batch_norm_eval_forward(x, mean, var, weight, bias, axis=axis)

    def loss():
        return float((forward()[0] * cotangent).sum())

    gradients = fastbn.batch_norm_backward(cotangent, forward()[1])
    for got, argument in zip(gradients, (x, weight, bias), strict=True):
        np.testing.assert_allclose(got, central_differences(loss, argument), rtol=1e-7, atol=1e-8)


def test_statistics_updated_before_backward(kernels):
    """batch_norm_eval_forward keeps its own copy: a training step may update the running ones in between."""
    x, dy = sample((9, 5, 7), np.float32), sample((9, 5, 7), np.float32, seed=2)
    weight, bias, mean, var = parameters(5, np.float32)
    want = fastbn.batch_norm_backward(dy, fastbn.batch_norm_eval_forward(x, mean, var, weight, bias)[1])
    _, saved = fastbn.batch_norm_eval_forward(x, mean, var, weight, bias)
    mean += 1
    var *= 2
    for got, expected in zip(fastbn.batch_norm_backward(dy, saved), want, strict=True):
        same_bits(got, expected)


def test_constant_gradient_has_no_effect(kernels, dtype):
    """Adding a constant to y changes nothing that x could change: dx is 0 up to rounding, dbias the count."""
    x = sample((6, 5, 7), dtype)
    _, saved = fastbn.batch_norm_forward(x, np.ones(5), np.zeros(5))
    dx, dweight, dbias = fastbn.batch_norm_backward(np.ones_like(x), saved)
    tolerance = 64 * unit(computed(dtype))
    assert np.abs(dx).max() < tolerance and np.abs(dweight).max() < 42 * tolerance
    assert (dbias == 42).all()


def test_repeated(kernels, dtype):
    """`saved` can be used again, and dy is left alone."""
    x, dy = sample((6, 5, 7), dtype), sample((6, 5, 7), dtype, seed=2)
    before = dy.copy()
    _, saved = fastbn.batch_norm_forward(x)
    first, second = fastbn.batch_norm_backward(dy, saved)[0], fastbn.batch_norm_backward(dy, saved)[0]
    same_bits(first, second)
    same_bits(dy, before)
