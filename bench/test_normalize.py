"""Eval mode: normalize with given statistics."""

import pytest
from peers import EPS
from shapes import DENSE, RESNET50

import fastbn


def call(case):
    return lambda: fastbn.batch_norm(case.x, case.mean, case.var, case.weight, case.bias, eps=EPS, out=case.y)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("shape", RESNET50, ids=lambda s: "x".join(map(str, s)))
def test_images(measure, shape, layout):
    measure("normalize", shape, layout, call)


@pytest.mark.parametrize("shape", DENSE, ids=lambda s: "x".join(map(str, s)))
def test_dense(measure, shape):
    measure("normalize", shape, "NC", call)
