"""One thread and two, each over the floor by as many."""

import pytest
from cases import CALLS, TENSORS, floor
from shapes import FEW, LAYOUTS, name

from fastbn import backends

THREADS = {"one thread": 1, "two threads": 2}


@pytest.mark.skipif(backends.num_threads() < 2, reason="this process has one thread")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", FEW, ids=name)
@pytest.mark.parametrize("operation", CALLS)
def test_threads(case, measure, operation, shape, layout):
    c = case(shape, layout)
    call, out = CALLS[operation], c.out(operation)
    calls = {title: call(c, out, num_threads=n) for title, n in THREADS.items()}
    floors = {f"floor of {title}": floor(c, TENSORS[operation], n) for title, n in THREADS.items()}
    measure("threads", operation, c, calls, floors, threads=1)
