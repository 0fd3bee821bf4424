"""Forward with the batch's statistics."""

import pytest
from cases import TENSORS, floor, forward, reads
from peers import PEERS
from shapes import DENSE, LAYOUTS, RESNET50, name


def run(case, peers, measure):
    ours = {"fastbn": forward(case, case.y), "fastbn called": forward(case, None)}
    calls = ours | peers(PEERS, "forward", case)
    limits = {"floor": floor(case, TENSORS["forward"]), "reads": reads(case, TENSORS["forward"])}
    measure("operations", "forward", case, calls, limits)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", RESNET50, ids=name)
def test_images(case, peers, measure, shape, layout):
    run(case(shape, layout), peers, measure)


@pytest.mark.parametrize("shape", DENSE, ids=name)
def test_dense(case, peers, measure, shape):
    run(case(shape, "NC"), peers, measure)
