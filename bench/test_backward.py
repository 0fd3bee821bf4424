"""Backward through the batch's statistics."""

import pytest
from cases import TENSORS, backward, floor, reads
from peers import PEERS
from shapes import DENSE, LAYOUTS, RESNET50, name


def run(case, peers, measure):
    ours = {"fastbn": backward(case, case.dx), "fastbn called": backward(case, None)}
    calls = ours | peers(PEERS, "backward", case)
    limits = {"floor": floor(case, TENSORS["backward"]), "reads": reads(case, TENSORS["backward"])}
    measure("operations", "backward", case, calls, limits)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", RESNET50, ids=name)
def test_images(case, peers, measure, shape, layout):
    run(case(shape, layout), peers, measure)


@pytest.mark.parametrize("shape", DENSE, ids=name)
def test_dense(case, peers, measure, shape):
    run(case(shape, "NC"), peers, measure)
