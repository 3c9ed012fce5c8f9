"""A busy neighbour is seen, and so is its going; what it costs is in the reports."""

from __future__ import annotations

import os

import pytest
import torch

from benchmarks.engine.neighbours import neighbours
from echo_kernels import backend
from echo_kernels.threads import kernel_threads, pool
from echo_rl.runtime.contention import Contention, RunDelays
from tests import tiny
from tests.runtime.driving import requests
from tests.runtime.test_engine import Plain


class Machine:
    """A clock, and the seconds that threads waited, at a share of the time."""

    def __init__(self) -> None:
        self.now = self.waited = 0.0

    def run(self, seconds: float, share: float) -> None:
        self.now += seconds
        self.waited += share * seconds


@pytest.fixture
def machine() -> Machine:
    return Machine()


@pytest.fixture
def contention(machine: Machine) -> Contention:
    return Contention(lambda: machine.waited, lambda: machine.now)


def test_a_neighbour_is_seen_within_a_second_and_its_going_too(machine, contention):
    for share, expected in ((0.01, False), (0.5, True), (0.01, False), (0.2, True)):
        for _ in range(100):
            machine.run(0.01, share)
            found = contention()
        assert found is expected


def test_one_short_wait_is_no_neighbour(machine, contention):
    machine.run(1.0, 0.0)
    machine.run(0.005, 1.0)
    assert not contention()


def test_a_share_between_the_limits_changes_nothing(machine, contention):
    found = []
    for share in (0.07, 0.5, 0.07, 0.01):
        for _ in range(200):
            machine.run(0.01, share)
            now = contention()
        found.append(now)
    assert found == [False, True, True, False]


def test_two_calls_at_one_time_are_no_reason_to_fail(contention):
    assert contention() is contention() is False


@pytest.mark.skipif(not os.path.exists("/proc/thread-self/schedstat"), reason="this system doesn't count waiting")
def test_waiting_for_a_processor_is_counted():
    """On one processor with a busy process, a busy thread is put aside now and then."""
    processors = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(processors)})
    try:
        with neighbours([0]):
            delays = RunDelays(torch.device("cpu"))
            before = delays()
            while delays() == before:  # ends as soon as the neighbour has run once
                pass
    finally:
        os.sched_setaffinity(0, processors)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    return tiny.engine(tmp_path_factory.mktemp("tiny"))


def test_reports_say_whether_their_step_was_contended(engine):
    for request in requests(2, 0.0):
        engine.add(request)
    found = []
    for answer in (True, False):
        engine._contention = lambda answer=answer: answer
        found.append(engine.step(Plain()).contended)
    while engine.has_work:
        engine.step(Plain())
    assert found == [True, False]


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.skipif(backend("cpu") != "cpp" or not pool().multiplies, reason="torch's threads do the work here")
def test_in_a_step_the_kernels_have_the_threads_and_torch_has_one(engine, two_threads):
    seen = []

    class Spy(Plain):
        def observe(self, report):
            seen.append((torch.get_num_threads(), pool().threads()))

    verify = engine.runner.verify
    engine.runner.verify = lambda *a: seen.append((torch.get_num_threads(), pool().threads())) or verify(*a)
    engine.add(requests(1, 0.0)[0])
    engine.step(Spy())
    engine.runner.verify = verify
    while engine.has_work:
        engine.step(Plain())
    assert seen[:2] == [(1, 2), (2, 0)]


def test_threads_are_given_back_after_an_error_and_nesting_changes_nothing(two_threads):
    with pytest.raises(RuntimeError), kernel_threads("cpu"):
        within = torch.get_num_threads()
        with kernel_threads("cpu"):
            assert torch.get_num_threads() == within
        assert torch.get_num_threads() == within
        raise RuntimeError
    assert torch.get_num_threads() == 2
