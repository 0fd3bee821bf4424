"""The floor alone, by each kind of store: between two saved runs it shows how far the machine itself has moved."""

import pytest
from cases import floor
from shapes import FEW, name


@pytest.mark.parametrize("shape", FEW, ids=name)
@pytest.mark.parametrize("stores", ["plain", "streaming"])
@pytest.mark.parametrize("tensors", [2, 3], ids=["copy", "add"])
def test_floor(case, benchmark, tensors, stores, shape):
    plain, streaming = floor(case(shape, "NCHW"), tensors).calls
    benchmark.group = "floor"
    benchmark.pedantic(plain if stores == "plain" else streaming, rounds=30, warmup_rounds=5)
