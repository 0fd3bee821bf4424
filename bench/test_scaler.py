"""StreamingStandardScaler held against scikit-learn's StandardScaler, as one calls them: float32, rows by features."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from cases import Call
from peers import Missing

SHAPES = [(100_000, 64), (1_000_000, 4), (2_000, 4096)]  # as asked for; narrow; wide
OPERATIONS = ("fit", "partial_fit", "transform")
CHUNKS = 10


@dataclass
class Data:
    """What both scale: columns of different means and deviations. `measure` asks for a shape and a layout."""

    shape: tuple[int, int]
    layout: str = "NC"
    x: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(0)
        features = self.shape[1]
        self.x = rng.standard_normal(self.shape, np.float32)
        self.x *= rng.uniform(0.5, 2, features).astype(np.float32)
        self.x += rng.uniform(-3, 3, features).astype(np.float32)


class Scaler:
    """A scaler's calls. The first two begin with a new one and return it; transform allocates its output."""

    def __init__(self, kind: Any, data: Data) -> None:
        x, chunks, fitted = data.x, np.array_split(data.x, CHUNKS), kind().fit(data.x)

        def partial_fit() -> Any:
            scaler = kind()
            for chunk in chunks:
                scaler.partial_fit(chunk)
            return scaler

        self.fit: Call = lambda: kind().fit(x)
        self.partial_fit: Call = partial_fit
        self.transform: Call = lambda: fitted.transform(x)


def fastbn_scaler(data: Data) -> Scaler:
    pytest.importorskip("sklearn", "1.6", reason="fastbn.estimators needs scikit-learn, 1.6 or later")
    from fastbn.estimators import StreamingStandardScaler

    return Scaler(StreamingStandardScaler, data)


def scikit_learn_scaler(data: Data) -> Scaler:
    try:
        from sklearn.preprocessing import StandardScaler
    except ImportError:
        raise Missing("scikit-learn is not installed") from None
    return Scaler(StandardScaler, data)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("operation", OPERATIONS)
def test_scaler(peers, measure, benchmark, operation, shape):
    data = Data(shape if benchmark.enabled else (50, shape[1]))
    calls = {"fastbn": getattr(fastbn_scaler(data), operation)}
    calls |= peers({"scikit-learn": scikit_learn_scaler}, operation, data)
    measure("scaler", operation, data, calls, {}, chunks=CHUNKS if operation == "partial_fit" else 1)
    if benchmark.enabled and "scikit-learn" in calls:
        ms = benchmark.extra_info["ms"]
        benchmark.extra_info["scikit-learn / fastbn"] = ms["scikit-learn"] / ms["fastbn"]


@pytest.mark.parametrize("features", [4, 300])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_scikit_learn_scales_the_same(operation, features):
    data = Data((2_000, features))
    ours = getattr(fastbn_scaler(data), operation)()
    try:
        theirs = getattr(scikit_learn_scaler(data), operation)()
    except Missing as reason:
        pytest.skip(str(reason))
    if operation == "transform":
        assert ours.dtype == theirs.dtype == np.float32
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
        return
    assert ours.n_samples_seen_ == theirs.n_samples_seen_ == 2_000
    for name in ("mean_", "var_", "scale_"):
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), rtol=1e-5, atol=1e-5)
