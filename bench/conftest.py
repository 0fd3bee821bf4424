"""How a figure is taken: a ratio in one run.

fastbn, the floor and the peers are called in turns, on the same arrays, in an order that changes, and each one's least
time counts, of at least 15 (`fastbn.bench.interleaved`). A case goes on, for up to three times its time, while some
least time has come in one turn only. The floor is the time to copy the tensor (forward, eval) or to add two tensors
into a third (backward), by the better of plain and streaming stores, with as many threads.

A turn begins with rest, goes on with 3 ms of calls that are not counted (and eight of them, where that takes at most 12
ms), and ends with five that are. Why:

- Rest. A library's OpenMP workers spin after a call: libgomp's for 4 to 5 ms, torch's copy of it for up to 10. On two
  processors they take one from whoever comes next: without a rest, a floor of 0.04 ms became 8, the scheduler's slice.
  So the process sleeps until it uses no processor time.
- Calls that are not counted. After the rest the workers sleep, and the first call wakes them: 50 µs and more, which in
  a trainer no call but the first pays. From the third on, times are those of a tight loop. Where the tensors are about
  as large as the last-level cache, it takes six to eight calls until it holds what it will hold: with a single one,
  eval on 32×128×28×28 looked up to a tenth slower than it is, and the floor less so; with 3 ms alone, backward, of
  which that is three or four calls, looked slower beside a floor of ten.

Both are the same for all: a floor and a peer get what fastbn gets.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastbn import backends
from fastbn import bench as user_bench

sys.path.insert(0, str(Path(__file__).parent))

from cases import Call, Case, Floor, make_case
from peers import Missing


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seconds", type=float, default=0.1, help="for each of a case's calls; thrice, if unsteady")
    parser.addoption("--no-peers", action="store_true", help="fastbn and the floor alone: to compare two runs of ours")


@pytest.fixture
def case(benchmark: Any) -> Callable[..., Case]:
    """case(shape, layout, dtype): the arrays. Where nothing is timed, of two images only."""

    def make(shape: tuple[int, ...], layout: str, dtype: Any = np.float32) -> Case:
        small = len(shape) == 4 and not benchmark.enabled
        return make_case((2, *shape[1:]) if small else shape, layout, dtype)

    return make


@pytest.fixture
def peers(request: pytest.FixtureRequest, benchmark: Any) -> Callable[..., dict[str, Call]]:
    """peers(kinds, operation, *arguments): the calls of those that are there, and a note why the others are not."""

    def calls(kinds: Mapping[str, Callable[..., Any]], operation: str, *arguments: Any) -> dict[str, Call]:
        there = {}
        for name, peer in {} if request.config.getoption("--no-peers") else kinds.items():
            try:
                there[name] = getattr(peer(*arguments), operation)
            except Missing as reason:
                benchmark.extra_info.setdefault("skipped", {})[name] = str(reason)
        return there

    return calls


@pytest.fixture
def measure(request: pytest.FixtureRequest, benchmark: Any) -> Callable[..., None]:
    """measure(table, operation, case, calls, floors, **labels): times them all, and writes it down.

    The first of `calls` is what pytest-benchmark's own figures are of; the first of `floors` is its floor.
    """

    def run(
        table: str, operation: str, case: Case, calls: dict[str, Call], floors: dict[str, Floor], **labels: Any
    ) -> None:
        named = [*calls.items(), *((name, call) for name, floor in floors.items() for call in floor.calls)]
        ours = next(iter(calls))
        benchmark.group = table
        if benchmark.enabled:
            seconds = request.config.getoption("--seconds") * len(named)
            times = user_bench.least_of(named, seconds=seconds, at_most=3 * seconds)
            config = backends.config()
            benchmark.extra_info |= {
                "table": table, "operation": operation, "shape": list(case.shape), "layout": case.layout,
                "threads": config["threads"], "instruction set": config["instruction set"],
                "backend": config["backend"], "ms": {name: t * 1e3 for name, t in times.items()},
                **labels,
            }  # fmt: skip
            if floors:
                name, floor = next(iter(floors.items()))
                benchmark.extra_info |= {
                    "bytes": floor.bytes,
                    "GB/s": floor.bytes / times[ours] / 1e9,
                    "floor ratio": times[ours] / times[name],
                }
        else:  # a smoke test: everything is called once
            for _, call in named:
                call()
        user_bench.wait_until_quiet()
        benchmark.pedantic(calls[ours], rounds=30, warmup_rounds=5)

    return run
