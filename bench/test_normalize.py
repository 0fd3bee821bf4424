"""Eval mode: normalize with given statistics."""

import pytest
from cases import TENSORS, floor, normalize
from peers import PEERS
from shapes import DENSE, LAYOUTS, RESNET50, name


def run(case, peers, measure):
    ours = {"fastbn": normalize(case, case.y), "fastbn called": normalize(case, None)}
    calls = ours | peers(PEERS, "normalize", case)
    measure("operations", "normalize", case, calls, {"floor": floor(case, TENSORS["normalize"])})


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", RESNET50, ids=name)
def test_images(case, peers, measure, shape, layout):
    run(case(shape, layout), peers, measure)


@pytest.mark.parametrize("shape", DENSE, ids=name)
def test_dense(case, peers, measure, shape):
    run(case(shape, "NC"), peers, measure)
