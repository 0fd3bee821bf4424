"""The Numba kernels beside the compiled ones."""

import pytest
from cases import CALLS, TENSORS, floor, kernel_call
from shapes import LAYOUTS, RESNET50, name

from fastbn import backends


@pytest.fixture(scope="module")
def both():
    try:
        return {name: backends.load(name) for name in ("numba", "cython")}
    except ImportError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", RESNET50, ids=name)
@pytest.mark.parametrize("operation", CALLS)
def test_backends(case, measure, both, operation, shape, layout):
    c = case(shape, layout)
    calls = {backend: kernel_call(kernels, operation, c) for backend, kernels in both.items()}
    measure("backends", operation, c, calls, {"floor": floor(c, TENSORS[operation])}, backend=next(iter(calls)))
