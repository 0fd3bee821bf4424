"""How the benchmarks take times, by a clock that only the calls move."""

import pytest

from fastbn import bench

FAST = [(20, 23), (200, 230)]  # when the machine is twice as fast: for a turn of one function, and again later


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 0.0

        def call(self):
            self.now += 0.5 if any(start <= self.now < end for start, end in FAST) else 1.0

    clock = Clock()
    monkeypatch.setattr(bench, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(bench, "wait_until_quiet", lambda: None)
    return clock


def test_stops_when_time_is_up(clock):
    assert sorted(bench.interleaved([clock.call, clock.call], seconds=60)) == [0.5, 1]
    assert 60 <= clock.now < 80


def test_goes_on_while_a_least_time_stands_alone(clock):
    assert min(bench.interleaved([clock.call, clock.call], seconds=60, at_most=1000)) == 0.5
    assert 200 <= clock.now < 250


def test_counts_enough_calls_in_no_time(clock):
    bench.interleaved([clock.call], seconds=0, least=15)
    assert clock.now == 1 + 3 * (1 + bench.CALLS_A_TURN)  # one; then three turns, whose first call does not count


def test_does_not_go_on_for_ever(clock):
    bench.interleaved([clock.call, clock.call], seconds=60, at_most=120)
    assert 120 <= clock.now < 140
