"""How weights start."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import checks

Array = np.ndarray[Any, np.dtype[Any]]


def weights(
    init: str | float, shape: tuple[int, ...], fan_in: int, fan_out: int, rng: np.random.Generator, dtype: np.dtype[Any]
) -> Array:
    """Weights of this shape: see `Linear` for what `init` means.

    Parameters
    ----------
    init : {"he", "glorot"} or float
    shape : tuple of int
    fan_in, fan_out : int
        How many inputs an output is made of, and how many outputs an input goes into.
    rng : numpy.random.Generator
    dtype : {float32, float64}
    """
    kind: Any = dtype.type
    if init == "glorot":
        weight = rng.random(shape, kind)
        weight -= 0.5
        weight *= 2 * (6 / (fan_in + fan_out)) ** 0.5
        return weight
    std = checks.deviation(init, fan_in)
    weight = rng.standard_normal(shape, kind)
    weight *= std
    return weight
