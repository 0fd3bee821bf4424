"""Runs in an environment that has the package and NumPy alone: it imports, it computes, it drags nothing in.

python try_wheel.py [COMPILER]: built with that compiler; "false" for none, "cc-old" for one that knows neither OpenMP
nor wide vectors.
"""

import sys
from importlib.metadata import distributions

import numpy as np

import fastbn

installed = {d.metadata["Name"].lower() for d in distributions()}
assert installed <= {"fastbn", "numpy", "pip", "setuptools"}, installed
dragged_in = {"numba", "scipy", "matplotlib", "tqdm", "sklearn"} & set(sys.modules)
assert not dragged_in, dragged_in
assert "site-packages" in fastbn.__file__, fastbn.__file__

fastbn.show_config()
rng = np.random.default_rng(0)
x = rng.standard_normal((8, 5, 6, 7)).astype(np.float32)
y, saved = fastbn.batch_norm_forward(x, np.ones(5, np.float32), np.zeros(5, np.float32))
expected = (x - x.mean((0, 2, 3), keepdims=True)) / np.sqrt(x.var((0, 2, 3), keepdims=True) + 1e-5)
np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
dx, dweight, dbias = fastbn.batch_norm_backward(y, saved)
assert dx.shape == x.shape and np.abs(dx).max() < 1e-3  # the loss y²/2 has no gradient through a normalization
np.testing.assert_allclose(dweight, (y * y).sum((0, 2, 3)), rtol=1e-4)
np.testing.assert_allclose(dbias, np.zeros(5), atol=1e-3)

from fastbn.backends import config  # noqa: E402

compiler = sys.argv[1] if len(sys.argv) > 1 else "cc"
found = config()
assert found["backend"] == ("reference" if compiler == "false" else "cython"), found
assert found["threads"] == 1 or compiler == "cc", found
assert "libgomp" not in found["openmp"] or compiler == "cc", found
assert compiler != "cc-old" or found["instruction set"] in ("x86-64", "baseline"), found
print(f"works (compiler: {compiler})")
