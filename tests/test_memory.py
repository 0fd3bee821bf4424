"""What is allocated: outputs, vectors of channels, and nothing else of a tensor's size."""

import tracemalloc
from itertools import product

import numpy as np
import pytest
from conftest import computed, parameters, sample

import fastbn

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
