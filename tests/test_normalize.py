"""Evaluation: y by given statistics."""

from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import WIDE, close_y, computed, oracle_normalize, parameters, same_bits, sample

import fastbn
from fastbn import backends


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


@pytest.mark.parametrize(
    ("shape", "axis"), [((6, 5, 4, 5), 1), ((6, 5, 4, 5), -1), ((7, 5), 1), ((3, 1, 4), 1), ((2, 5, 3, 2, 4), 1)]
)
@pytest.mark.parametrize("where", ["new", "out", "x", "residual"])
@pytest.mark.parametrize("order", ["C", "F", "channels last"])
def test_usual_arguments(compiled, dtype, shape, axis, where, order, monkeypatch):
    """The way of the usual call gives what the other way does, that of arguments that must be looked at in Python."""
    other = SimpleNamespace(**{name: getattr(compiled, name) for name in dir(compiled)})
    other.usual = other.usual_statistics = lambda *arguments: False
    other.normalize_usual = other.forward_usual = lambda *arguments: None

    def made(seed):
        array = sample(shape, dtype, seed=seed)
        if order == "channels last":
            return np.moveaxis(np.moveaxis(array, 1, -1).copy(), -1, 1)
        return array.copy(order)

    def results(backend, added, of, **settings):
        monkeypatch.setattr(backends, "_backend", backend)
        weight, bias, mean, var = parameters(shape[axis], of)

        def call(function, *statistics, keep=True):
            x, residual = made(0), made(3) if added or where == "residual" else None
            to = {"new": None, "out": made(4), "x": None if keep else x, "residual": residual}[where]
            result = function(x, *statistics, weight, bias, axis=axis, residual=residual, out=to, **settings)
            y = result[0] if keep else result
            assert y is to if to is not None else y.shape == shape
            return result

        yield call(fastbn.batch_norm, mean, var, keep=False)
        for function, statistics in (fastbn.batch_norm_forward, ()), (fastbn.batch_norm_eval_forward, (mean, var)):
            y, saved = call(function, *statistics)
            yield y
            dy = made(5)
            gradients = fastbn.batch_norm_backward(dy, saved, out={"new": None, "out": made(6)}.get(where, dy))
            assert where == "new" or gradients[0] is dy or where == "out"
            yield from gradients

    for added, of, activation in product((False, True), WIDE, (None, "relu", "leaky_relu")):
        settings = {"added": added, "of": of, "eps": 1e-3, "activation": activation}
        for ours, want in zip(results(compiled, **settings), [*results(other, **settings)], strict=True):
            same_bits(ours, want)


def test_the_usual_way_is_taken(kernels, monkeypatch):
    """It goes without the functions that the other way calls; where that is taken, they are missed."""
    x, (weight, bias, mean, var) = sample((6, 5, 4), np.float32), parameters(5, np.float32)
    channels_last = np.moveaxis(np.moveaxis(x, 1, -1).copy(), -1, 1)
    monkeypatch.setattr(fastbn.functional, "output", None)
    monkeypatch.setattr(fastbn.functional.checks, "overlap", None)
    monkeypatch.setattr(fastbn.functional.checks, "running", None)
    if kernels.NAME == "cython":
        for array in (x, channels_last, np.ones((1024, 5, 1024), np.float32)):
            fastbn.batch_norm(array, mean, var, weight, bias)
            fastbn.batch_norm(array, mean, var, out=array)
            y, saved = fastbn.batch_norm_forward(array, weight, bias)
            fastbn.batch_norm_backward(y, saved, out=y)
            fastbn.batch_norm_forward(array, weight, bias, residual=array.copy(order="K"), out=y)
            y, saved = fastbn.batch_norm_eval_forward(array, mean, var, weight, bias, activation="relu")
            fastbn.batch_norm_backward(y, saved)
            fastbn.batch_norm(array, mean, var, training=True, out=y)
        with monkeypatch.context() as missing:
            missing.setattr(fastbn.functional, "canonical", None)
            fastbn.batch_norm(channels_last, mean, var, weight, bias)
            fastbn.batch_norm_forward(x, weight, bias)
    for call in (
        lambda: fastbn.batch_norm(x.tolist(), mean, var),
        lambda: fastbn.batch_norm(x, list(mean), var),
        lambda: fastbn.batch_norm_forward(x, out=channels_last),
        lambda: fastbn.batch_norm_forward(x[::2]),
    ):
        with pytest.raises(TypeError, match="not callable"):
            call()


def test_usual_arguments_that_overlap(kernels, dtype):
    memory = np.concatenate([sample((8, 3), dtype), sample((8, 3), dtype)])
    x, (weight, bias, mean, var) = memory[:8], parameters(3, computed(dtype))
    with pytest.raises(ValueError, match="out overlaps x in memory"):
        fastbn.batch_norm(x, mean, var, out=memory[1:9])
    with pytest.raises(ValueError, match="out overlaps residual in memory"):
        fastbn.batch_norm(x, mean, var, residual=memory[7:15], out=memory[8:])
    want = fastbn.batch_norm(x, mean, var)
    for axis in (1, np.int64(1)):  # the same memory, though read-only by this name
        again = x.copy()
        view = again.view()
        view.flags.writeable = False
        same_bits(fastbn.batch_norm(view, mean, var, axis=axis, out=again), want)
    if dtype == computed(dtype):
        for name in ("weight", "bias", "running_mean", "running_var"):
            given = {"running_mean": mean, "running_var": var, "weight": weight, "bias": bias}
            given[name] = memory[9]
            with pytest.raises(ValueError, match=f"out overlaps {name} in memory"):
                fastbn.batch_norm(x, **given, out=memory[8:])
