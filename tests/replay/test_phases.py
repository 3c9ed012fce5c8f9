"""The two phases of a replayed step: equal to the step and to the live engine's, whatever comes and goes between."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from echo_rl.contracts import AUTOREGRESSIVE, Request, SamplingParams, SpecPlan
from echo_rl.controllers.base import BaseController
from echo_rl.costs.batched_profile import BatchedCostProfile
from echo_rl.costs.files import packaged
from echo_rl.costs.profile import CostProfile
from echo_rl.errors import ConfigError, PlanViolation, TraceError
from echo_rl.replay.backend import ReplayBackend, ReplayOptions
from echo_rl.replay.recorder import RecordOptions, record
from echo_rl.replay.scheduler import ReplaySchedulerOptions
from echo_rl.replay.trace import Trace
from echo_rl.runtime.engine import Engine
from tests import tiny
from tests.recorded import random_trace

PLANS = (AUTOREGRESSIVE, SpecPlan(6, 3, 2), SpecPlan(4, 4, 1), SpecPlan(20, 3, 3, ((0, 0.05), (1, 0.02))))
LIMITS = ReplaySchedulerOptions(max_batch=3, prefill_chunk=16, max_nodes=24)
COSTS = BatchedCostProfile(CostProfile.load(packaged("profile.json")))


class Plans(BaseController):
    """One of `PLANS` after the other, by the default rules."""

    name = "plans"

    def __init__(self) -> None:
        super().__init__()
        self.loads, self.reports = [], []

    def propose(self, load):
        self.loads.append(load)
        return PLANS[len(self.loads) % len(PLANS)]

    def observe(self, report):
        self.reports.append(report)


@pytest.fixture(scope="module")
def trace() -> Trace:
    return random_trace(length=12)


@pytest.fixture
def backend(trace) -> ReplayBackend:
    """With three of five requests in the batch, all decoding."""
    backend = ReplayBackend(trace, COSTS, ReplayOptions(LIMITS))
    for request in trace.requests()[:5]:
        backend.add(request)
    while backend.prepare().batch_size < 3:
        backend.execute(AUTOREGRESSIVE, Plans())
    return backend


def ids(backend: ReplayBackend) -> list[str]:
    """The requests of the prepared step, which a copy serves."""
    return [o.id for o in copy.deepcopy(backend).execute(AUTOREGRESSIVE, Plans()).outputs]


def test_the_phases_are_the_step(trace):
    whole, phased = Plans(), Plans()
    one, two = (ReplayBackend(trace, COSTS, ReplayOptions(LIMITS), seed=4) for _ in range(2))
    for request in trace.requests():
        one.add(request)
        two.add(request)
    while one.has_work:
        one.step(whole)
        load = two.prepare()
        two.execute(phased.plan(load) if load.batch_size else PLANS[1], phased)
    assert not two.has_work and one.clock() == two.clock() > 0.0
    assert phased.reports == whole.reports and phased.loads == whole.loads
    assert sum(r.accepted for r in whole.reports) > 0 and any(not r.load.batch_size for r in whole.reports)


def test_preparing_again_and_adding_change_nothing(backend, trace):
    load = backend.prepare()
    backend.add(replace(trace.requests()[0], id="late"))
    assert backend.prepare() == load
    report = backend.execute(PLANS[1], Plans())
    assert report.load == load and "late" not in {o.id for o in report.outputs}
    after = backend.prepare()
    assert (after.waiting, after.arrived) == (load.waiting + 1, 1)


def test_a_cancelled_request_takes_the_prepared_step_apart(backend):
    load, first = backend.prepare(), ids(backend)[0]
    backend.cancel("unknown")
    assert backend.prepare() == load
    backend.cancel(first)
    report = backend.execute(PLANS[1], Plans())
    assert (report.load.batch_size, report.load.waiting) == (2, load.waiting - 1) and report.load.prefill_tokens > 0
    assert first not in {o.id for o in report.outputs}


def test_a_restart_forgets_the_prepared_step(backend, trace):
    backend.prepare()
    backend.restart(0)
    with pytest.raises(ConfigError, match="no request"):
        backend.prepare()
    backend.add(trace.requests()[0])
    assert (backend.prepare().batch_size, backend.prepare().arrived) == (0, 1)


def test_a_copy_goes_on_by_itself(backend):
    """From the prepared step on: equal reports, and neither disturbs the other."""
    twin = copy.deepcopy(backend)
    reports = [backend.execute(PLANS[1], Plans()), backend.step(Plans())]
    assert [twin.execute(PLANS[1], Plans()), twin.step(Plans())] == reports
    assert twin.clock() == backend.clock()


@pytest.mark.parametrize(
    ("plan", "error"), [(SpecPlan(4, 50), TraceError), (SpecPlan(4, 2, 50), TraceError), (SpecPlan(1, 3, 4), None)]
)
def test_what_fails_changes_nothing(backend, plan, error):
    class Greedy(Plans):
        def select(self, forest, plan):
            return super().select(forest, replace(plan, budget=20))

    load, begin = backend.prepare(), backend.clock()
    with pytest.raises(error or PlanViolation):
        backend.execute(plan, Greedy())
    assert backend.prepare() == load and backend.clock() == begin
    assert backend.execute(PLANS[1], Plans()).load == load


@pytest.fixture(scope="module")
def live(tmp_path_factory) -> Engine:
    return tiny.engine(
        tmp_path_factory.mktemp("live"), prefill_chunk=16, max_nodes=24, max_batch_size=3, max_expanded=32, block_size=4
    )


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    prompts = ((70, 71, 72, 80, 66), (75,) * 9, (80, 81, 82) * 7, (85, 66) * 11)
    return [
        Request(f"tiny/{i}", prompt, SamplingParams(temperature=0.8, seed=i, max_new_tokens=10, ignore_eos=True))
        for i, prompt in enumerate(prompts)
    ]


@pytest.fixture(scope="module")
def recorded(live, requests, tmp_path_factory) -> Trace:
    return record(live, requests, frozenset({0}), RecordOptions(4, 3, 3), tmp_path_factory.mktemp("parts"), "tiny")


ACTIONS = st.one_of(
    st.tuples(st.just("add"), st.integers(0, 3)),
    st.tuples(st.just("cancel"), st.integers(0, 9)),
    st.tuples(st.just("prepare"), st.just(0)),
    st.tuples(st.just("execute"), st.integers(0, len(PLANS) - 1)),
    st.tuples(st.just("execute"), st.integers(0, len(PLANS) - 1)),
)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(actions=st.lists(ACTIONS, min_size=5, max_size=40))
def test_any_order_of_adding_cancelling_and_phases_is_that_of_the_live_engine(live, recorded, requests, actions):
    replay, held = ReplayBackend(recorded, COSTS, ReplayOptions(LIMITS)), set()
    for name in list(live._sequences):  # an example that failed
        live.cancel(name)
    live._arrived.clear()
    for number, (action, index) in enumerate([*actions, *[("execute", 1)] * 60]):
        if action == "add":
            request = replace(requests[index], id=f"{requests[index].id}#{number}")
            live.add(request)
            replay.add(request)
            held.add(request.id)
        elif action == "cancel" and held:
            name = sorted(held)[index % len(held)]
            held.remove(name)
            live.cancel(name)
            replay.cancel(name)
        elif action == "prepare" and held:
            kv_used = live.prepare().kv_used  # the replay takes memory for unfragmented
            assert live.prepare() == replace(replay.prepare(), kv_used=kv_used)
        elif action == "execute" and held:
            one, two = live.execute(PLANS[index], Plans()), replay.execute(PLANS[index], Plans())
            assert replace(one.load, kv_used=0.0) == replace(two.load, kv_used=0.0)
            assert {o.id: (o.tokens, o.finish_reason) for o in one.outputs} == {
                o.id: (o.tokens, o.finish_reason) for o in two.outputs
            }
            assert (one.drafted, one.verified, one.accepted) == (two.drafted, two.verified, two.accepted)
            held -= {o.id for o in one.outputs if o.finish_reason}
        live.check_integrity()
    assert not held and not live.has_work and not replay.has_work
