"""How a figure is taken: a ratio in one run.

fastbn, the floor and the peers are called in turn, in an order that changes, on the same arrays, and each one's least
time counts. The floor is the time to copy the tensor (forward, eval) or to add two tensors into a third (backward), by
the better of plain and streaming stores, with all threads. The threads of one library may still spin for a while after
its call; before another library's turn there is a pause, and a call that is not counted; five that count follow.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastbn
from fastbn import backends

sys.path.insert(0, str(Path(__file__).parent))

from peers import PEERS, Case, Missing

from fastbn.bench import interleaved

# Tensors read and written: what the floor moves.
TENSORS = {"forward": 2, "normalize": 2, "backward": 3}


def make_case(shape: tuple[int, ...], layout: str) -> Case:
    rng = np.random.default_rng(0)

    def tensor() -> np.ndarray:
        if layout == "NHWC":  # channels-last memory, labelled (N, C, H, W)
            return rng.standard_normal((shape[0], *shape[2:], shape[1]), np.float32).transpose(0, 3, 1, 2)
        return rng.standard_normal(shape, np.float32)

    channels = shape[1]
    x = tensor()
    moments = fastbn.moments(x)
    return Case(
        x, tensor(), tensor(), tensor(), rng.random(channels, np.float32) + 0.5, rng.random(channels, np.float32),
        moments.mean.astype(np.float32), moments.var().astype(np.float32), backends.num_threads(),
    )  # fmt: skip


def floors(case: Case, operation: str) -> dict[str, Callable[[], Any]]:
    """A copy of x, or x + dy, with plain and with streaming stores."""
    limit = backends.load("cython").limit
    memory = [np.ravel(a, order="K") for a in (case.x, case.dy, case.dx)]
    other = memory[1] if TENSORS[operation] == 3 else None
    return {
        f"floor {kind}": lambda streaming=streaming: limit(memory[0], other, memory[2], streaming, case.threads)
        for kind, streaming in (("plain", False), ("streaming", True))
    }


@pytest.fixture
def measure(request: pytest.FixtureRequest, benchmark: Any) -> Callable[..., None]:
    """measure(operation, shape, layout, call): times call(case) beside floor and peers, and writes it down."""

    def run(operation: str, shape: tuple[int, ...], layout: str, call: Callable[[Case], Callable[[], Any]]) -> None:
        case = make_case(shape, layout)
        ours = call(case)
        calls: dict[str, Callable[[], Any]] = {"fastbn": ours}
        try:
            calls |= floors(case, operation)
        except ImportError as error:  # the floor is compiled code, like the kernels that it measures
            benchmark.extra_info["floor"] = str(error)
        skipped = {}
        for name, peer in PEERS.items():
            try:
                calls[name] = getattr(peer(case), operation)
            except Missing as reason:
                skipped[name] = str(reason)
        if benchmark.enabled:
            seconds = request.config.getoption("--seconds")
            times = dict(zip(calls, interleaved(list(calls.values()), seconds=seconds, settle=0.004), strict=True))
            floor = min((t for name, t in times.items() if name.startswith("floor")), default=float("nan"))
            moved = TENSORS[operation] * prod(shape) * 4
            config = backends.config()
            benchmark.extra_info |= {
                "operation": operation, "shape": list(shape), "layout": layout,
                "bytes": moved, "GB/s": moved / times["fastbn"] / 1e9, "floor ratio": times["fastbn"] / floor,
                "threads": config["threads"], "instruction set": config["instruction set"],
                "backend": config["backend"], "ms": {name: t * 1e3 for name, t in times.items()}, "skipped": skipped,
            }  # fmt: skip
        else:  # a smoke test: everything is called once
            for peer_call in calls.values():
                peer_call()
        benchmark.pedantic(ours, rounds=5, warmup_rounds=1)

    return run


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seconds", type=float, default=2.0, help="for each case, all its calls together")
