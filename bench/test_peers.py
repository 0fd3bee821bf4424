"""The peers compute what fastbn computes: a comparison of speed is worth nothing between different results."""

import numpy as np
import pytest
from cases import CALLS, make_case, tensor
from peers import PEERS, UNFUSED, Missing
from shapes import LAYOUTS

SHAPE = (4, 5, 6, 7)


def check(peer, operation, case, expected, *arguments):
    try:
        call = getattr(peer(case, *arguments), operation)
    except Missing as reason:
        pytest.skip(str(reason))
    for _ in range(2):  # the second may write where the first did
        returned = call()
    if returned is None:
        returned = case.out(operation)
    first = np.asarray(returned[0] if isinstance(returned, (tuple, list)) else returned)
    if first.shape != case.shape:  # jax has channels-last arrays as they lie in memory
        first = first.transpose(0, 3, 1, 2)
    np.testing.assert_allclose(first, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("operation", CALLS)
@pytest.mark.parametrize("peer", PEERS)
def test_peers(peer, operation, layout):
    case = make_case(SHAPE, layout)
    result = CALLS[operation](case, None)()
    check(PEERS[peer], operation, case, result[0] if isinstance(result, tuple) else result)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("operation", ["forward", "backward"])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("peer", UNFUSED)
def test_unfused(peer, added, operation, layout):
    case = make_case(SHAPE, layout)
    residual = tensor(np.random.default_rng(1), SHAPE, layout) if added else None
    expected = CALLS[operation](case, None, activation="relu", residual=residual)()[0]
    check(UNFUSED[peer], operation, case, expected, residual)
