"""Half and double data beside float32, each over the floor of its own bytes."""

import numpy as np
import pytest
from cases import CALLS, TENSORS, floor
from shapes import FEW, LAYOUTS, name

from fastbn import backends


def dtypes():
    found = {"float32": np.float32, "float64": np.float64, "float16": np.float16}
    try:
        from ml_dtypes import bfloat16
    except ImportError:
        return found, {"bfloat16": "ml_dtypes is not installed"}
    return found | {"bfloat16": bfloat16}, {}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", FEW, ids=name)
@pytest.mark.parametrize("operation", CALLS)
def test_dtypes(case, measure, benchmark, operation, shape, layout):
    found, benchmark.extra_info["skipped"] = dtypes()
    calls, floors = {}, {}
    for title, dtype in found.items():
        c = case(shape, layout, dtype)
        calls[title] = CALLS[operation](c, c.out(operation))
        floors[f"floor of {title}"] = floor(c, TENSORS[operation])
    # A tensor counts as beyond the cache where even its halves are.
    caches = {"half bytes": c.x.size * 2, "last-level cache": backends.load("cython").caches()[1]}
    measure("dtypes", operation, c, calls, floors, **caches)
