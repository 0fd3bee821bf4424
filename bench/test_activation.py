"""Activation and residual in the same pass as batch norm, beside the plain operation and the unfused sequences."""

import numpy as np
import pytest
from cases import CALLS, TENSORS, floor, in_turn, tensor
from peers import UNFUSED
from shapes import FEW, LAYOUTS, name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", FEW, ids=name)
@pytest.mark.parametrize("operation", CALLS)
def test_activation(case, peers, measure, operation, shape, layout):
    c = case(shape, layout)
    residual = tensor(np.random.default_rng(1), c.shape, layout)
    variants = {
        "relu": {"activation": "relu"},
        "leaky_relu": {"activation": "leaky_relu"},
        "residual": {"residual": residual},
        "residual + relu": {"activation": "relu", "residual": residual},
        "residual + leaky_relu": {"activation": "leaky_relu", "residual": residual},
    }
    call, out = CALLS[operation], c.out(operation)
    calls = {title: call(c, out, **options) for title, options in variants.items()}
    calls["plain"] = call(c, out)
    for kinds, added in (("relu", None), ("residual + relu", residual)) if operation != "normalize" else ():
        calls |= {f"{kinds}, {peer}": f for peer, f in peers(UNFUSED, operation, c, added).items()}
    floors = {"floor": floor(c, TENSORS[operation]), "copy": floor(c, 2)}
    floors |= in_turn(c, operation, calls["plain"], residual)
    measure("activation", operation, c, calls, floors)
