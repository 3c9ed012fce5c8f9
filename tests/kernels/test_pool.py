"""The kernels' threads: results do not depend on how many there are, who calls, or whether they come at all."""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from benchmarks.engine.neighbours import neighbours

ROWS, WIDTH = 200, 512  # more than one thread's share


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def threads(cpp):
    return cpp.trusted


@pytest.fixture(scope="module")
def product(cpp):
    panels = cpp.pack_weight(torch.randn(32 * 16, WIDTH))
    x = torch.randn(ROWS, WIDTH)
    return lambda: cpp.linear(x, panels)


def test_counts_its_calls_and_their_times(threads, product):
    before = threads.pool_times()
    product()
    calls, working, waiting = (now - old for now, old in zip(threads.pool_times(), before, strict=True))
    assert calls == 1 and 0 <= waiting <= working


def test_one_thread_uses_no_other(threads, product):
    expected = product()
    torch.set_num_threads(1)
    before = threads.pool_times()
    assert torch.equal(product(), expected)
    assert threads.pool_times() == before


def test_callers_at_once_do_not_meet(product):
    expected, wrong, start = product(), [], threading.Barrier(4)

    def call() -> None:
        start.wait()
        for _ in range(50):
            if not torch.equal(product(), expected):
                wrong.append(1)

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_threads_that_never_come_are_not_waited_for(product):
    """A forked child has none of its parent's threads, and its calls end all the same."""
    expected = product()
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(product(), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_beside_a_busy_process_two_threads_keep_up_with_one(product):
    """They did not where they waited at barriers for one that was put aside: many times as long, as a rule."""
    with neighbours([0]):
        ratios = []
        for _ in range(9):
            torch.set_num_threads(1)
            alone = seconds_of(product)
            torch.set_num_threads(2)
            ratios.append(seconds_of(product) / alone)
    assert statistics.median(ratios) < 3.0


def seconds_of(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    for _ in range(40):
        call()
    return time.perf_counter() - begin
