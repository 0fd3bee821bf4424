"""Forward with the batch's statistics."""

import pytest
from peers import EPS
from shapes import DENSE, RESNET50

import fastbn


def call(case):
    return lambda: fastbn.batch_norm_forward(case.x, case.weight, case.bias, eps=EPS, out=case.y)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("shape", RESNET50, ids=lambda s: "x".join(map(str, s)))
def test_images(measure, shape, layout):
    measure("forward", shape, layout, call)


@pytest.mark.parametrize("shape", DENSE, ids=lambda s: "x".join(map(str, s)))
def test_dense(measure, shape):
    measure("forward", shape, "NC", call)
