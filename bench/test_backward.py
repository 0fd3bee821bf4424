"""Backward through the batch's statistics."""

import pytest
from peers import EPS
from shapes import DENSE, RESNET50

import fastbn


def call(case):
    _, saved = fastbn.batch_norm_forward(case.x, case.weight, case.bias, eps=EPS, out=case.y)
    return lambda: fastbn.batch_norm_backward(case.dy, saved, out=case.dx)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("shape", RESNET50, ids=lambda s: "x".join(map(str, s)))
def test_images(measure, shape, layout):
    measure("backward", shape, layout, call)


@pytest.mark.parametrize("shape", DENSE, ids=lambda s: "x".join(map(str, s)))
def test_dense(measure, shape):
    measure("backward", shape, "NC", call)
