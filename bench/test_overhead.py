"""What a call costs around its kernel, on an array so small that this is most of it."""

import pytest
from cases import CALLS, kernel_call
from peers import Torch, TorchOut

from fastbn import backends

SHAPE = (32, 64)


@pytest.mark.parametrize("operation", CALLS)
def test_overhead(case, peers, measure, operation):
    c = case(SHAPE, "NC")
    call = CALLS[operation]
    calls = {
        "fastbn": call(c, c.out(operation)),
        "fastbn called": call(c, None),
        "kernel": kernel_call(backends.kernels(), operation, c),
    }
    measure("overhead", operation, c, calls | peers({"torch": Torch, "torch out": TorchOut}, operation, c), {})
