"""Workloads and arrivals: the right number at the right time, whatever the way of asking."""

from __future__ import annotations

import math
from itertools import chain, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echo_rl.errors import ConfigError
from echo_rl.workloads.arrivals import Arrivals, Phase, Workload, bursty, closed, parse, poisson, ramp, shift

MIXED = Workload("mixed", (Phase(3.0, rate=4.0, suites=("a", "b")), Phase(2.0, rate=1.0, rate_end=9.0, suites=("c",))))


def collect(workload: Workload, times: list[float], seed: int = 0) -> list[list[str]]:
    """The arrivals due at each of the times, nothing ever being in flight."""
    arrivals = Arrivals(workload, seed)
    return [arrivals.due(now, 0) for now in times]


def arrival_times(workload: Workload, until: float, seed: int = 0, step: float = 1 / 64) -> list[float]:
    times = [i * step for i in range(int(until / step) + 1)]
    return [now for now, got in zip(times, collect(workload, times, seed), strict=True) for _ in got]


def test_a_closed_load_is_topped_up_to_its_concurrency():
    arrivals = Arrivals(closed(3), 0)
    assert arrivals.due(0.0, 0) == ["", "", ""]
    assert arrivals.due(1.0, 3) == [] and arrivals.due(2.0, 1) == ["", ""] and arrivals.due(3.0, 5) == []
    assert arrivals.next_time(3.0) is None


def test_poisson_arrivals_come_at_the_rate_with_exponential_gaps():
    times = arrival_times(poisson(5.0), until=2000.0)
    gaps = [b - a for a, b in pairwise(times)]
    mean = sum(gaps) / len(gaps)
    spread = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps))
    assert mean == pytest.approx(0.2, rel=0.03) and spread == pytest.approx(mean, rel=0.05)


@given(st.lists(st.floats(0.0, 40.0), min_size=1, max_size=30), st.integers(0, 5))
def test_open_arrivals_do_not_depend_on_when_they_are_asked_for(times, seed):
    times = sorted(times)
    (at_once,) = collect(MIXED, [times[-1]], seed)
    assert list(chain(*collect(MIXED, times, seed))) == at_once


def test_seeds_decide_the_arrivals():
    assert arrival_times(MIXED, 50.0, seed=1) == arrival_times(MIXED, 50.0, seed=1) != arrival_times(MIXED, 50.0, 2)


def test_closed_phases_between_do_not_change_the_open_arrivals():
    suites = [f"s{i}" for i in range(50)]
    workload = Workload("x", (Phase(5.0, rate=3.0, suites=tuple(suites)), Phase(5.0, concurrency=2, suites=("c",))))

    def opened(in_flight: int) -> list[str]:
        arrivals = Arrivals(workload, 3)
        return [suite for now in range(100) for suite in arrivals.due(float(now), in_flight) if suite != "c"]

    assert len(opened(0)) > 50 and opened(0) == opened(2)


def test_a_burst_brings_all_of_its_requests_while_it_is_on():
    times = arrival_times(bursty(0.0, 8.0, on_seconds=2.0, off_seconds=3.0), until=500.0)
    assert all(now % 5.0 <= 2.0 + 1 / 64 for now in times)
    assert len(times) == pytest.approx(8.0 * 2.0 * 100, rel=0.06)


def test_a_ramp_brings_a_quarter_in_its_first_half_then_starts_again():
    times = arrival_times(ramp(0.0, 10.0, 20.0), until=2000.0)
    early = sum(now % 20.0 < 10.0 for now in times)
    assert early / len(times) == pytest.approx(0.25, abs=0.02) and len(times) == pytest.approx(10_000, rel=0.04)


@given(st.floats(0.0, 50.0), st.floats(0.0, 50.0), st.floats(0.01, 100.0), st.floats(0.0, 0.999))
def test_time_of_inverts_the_mean_count(first, last, seconds, share):
    if first + last < 1e-3:
        return
    phase = Phase(seconds, rate=first, rate_end=last)
    count = share * phase.expected
    t = phase.time_of(count)
    assert 0.0 <= t <= seconds
    assert first * t + 0.5 * (last - first) / seconds * t * t == pytest.approx(count, rel=1e-6, abs=1e-9)


def test_a_shift_goes_from_suite_to_suite():
    arrivals = Arrivals(shift(("chat", "code", "math"), 10.0, 2), 0)
    seen = [arrivals.due(now, 1) for now in (0.0, 9.9, 10.0, 25.0, 30.0)]
    assert seen == [["chat"], ["chat"], ["code"], ["math"], ["chat"]]
    assert arrivals.next_time(30.0) == 40.0


def test_an_idle_server_always_gets_on():
    """Waiting until `next_time` brings either a request or a later `next_time`."""
    phases = (Phase(0.1, rate=0.0), Phase(0.3, rate=0.5), Phase(0.7, rate=0.0, rate_end=1.0), Phase(0.2, concurrency=1))
    arrivals, now, got = Arrivals(Workload("x", phases), 0), 0.0, 0
    for _ in range(500):
        got += len(arrivals.due(now, 0))
        upcoming = arrivals.next_time(now)
        assert upcoming is not None and upcoming > now
        now = upcoming
    assert got > 100


def test_open_arrivals_count_towards_a_closed_phases_concurrency():
    workload = Workload(
        "x", (Phase(10.0, rate=1.0, suites=("open",)), Phase(10.0, concurrency=100, suites=("closed",)))
    )
    got = Arrivals(workload, 0).due(10.0, in_flight=30)
    assert len(got) == 70 and 0 < got.count("open") < 30


@pytest.mark.parametrize("text", ["closed:8", "poisson:2.5", "bursty:0.5,8,5,5", "ramp:0.5,8,60", "shift:10,16"])
def test_texts_and_workloads_stand_for_each_other(text):
    workload = parse(text)
    assert workload.name == text and parse(workload.name) == workload


def test_parse_reads_the_numbers_in_their_order():
    assert parse("bursty:0.5,8,4,6").phases == (Phase(4.0, rate=8.0), Phase(6.0, rate=0.5))
    assert parse("shift:10,16", suites=("a", "b")) == shift(("a", "b"), 10.0, 16)


@pytest.mark.parametrize(
    "text", ["closed", "closed:", "closed:1.5", "closed:0", "poisson:0", "poisson:nan", "poisson:inf", "bursty:1,2,3",
             "bursty:0,0,1,1", "bursty:1,2,inf,3", "ramp:1,2,inf", "ramp:-1,2,3", "shift:0,4", "surge:3", ""]
)  # fmt: skip
def test_bad_texts_are_refused(text):
    with pytest.raises(ConfigError):
        parse(text)


@pytest.mark.parametrize(
    "phase",
    [{}, {"concurrency": 1, "rate": 1.0}, {"concurrency": 0}, {"concurrency": 2, "rate_end": 1.0}, {"rate": -1.0}],
)
def test_bad_phases_are_refused(phase):
    with pytest.raises(ConfigError):
        Phase(1.0, **phase)


def test_a_workload_without_phases_is_refused():
    with pytest.raises(ConfigError, match="no request"):
        Workload("nothing", ())
