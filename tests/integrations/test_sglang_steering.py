"""Batch information in, shapes out: the controller's own decisions, strict budgets, SGLang's order of events."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echo_rl.contracts import AUTOREGRESSIVE, Request, SamplingParams, SpecPlan
from echo_rl.controllers import registry
from echo_rl.controllers.base import BaseController
from echo_rl.costs.profile import CostProfile
from echo_rl.integrations.sglang.settings import ALLOWED, CHAINS, PluginConfig, Shape
from echo_rl.integrations.sglang.steering import Steering
from tests import tiny
from tests.integrations.sglang_fakes import Clock, load

CHAIN = tuple(Shape.chain(steps) for steps in range(8))


class Scripted(BaseController):
    """Plans as told, and keeps what it is told."""

    name = "scripted"

    def __init__(self, *plans):
        super().__init__()
        self.plans, self.log = list(plans), []

    def plan(self, load):
        self.log.append(("plan", load))
        plan = self.plans.pop(0) if len(self.plans) > 1 else self.plans[0]
        if isinstance(plan, Exception):
            raise plan
        return plan

    def propose(self, load):
        raise NotImplementedError

    def observe(self, report):
        self.log.append(("observe", report))

    @property
    def order(self):
        return [what for what, _ in self.log]

    @property
    def reports(self):
        return [report for what, report in self.log if what == "observe"]


def per_request(report):
    """Accepted tokens, one number a request, from counts by depth."""
    return [sum(n > i for n in report.accepted_by_depth) for i in range(report.load.batch_size)]


@pytest.mark.parametrize("concurrency", [1, 3])
def test_decisions_equal_the_engines_on_its_recorded_steps(tmp_path, concurrency):
    options = {"initial": 3, "warmup": 1, "interval": 1, "ladders": ((1, (1, 2, 3, 5, 7)),)}
    engine, controller = tiny.engine(tmp_path), registry.make("sglang_adaptive", **options)
    for i in range(concurrency):
        params = SamplingParams(temperature=1.0, seed=i, max_new_tokens=60, ignore_eos=True)
        engine.add(Request(f"{i}", (70 + i, 71, 72), params))
    reports = []
    while engine.has_work:
        reports.append(engine.step(controller))
    steering = Steering(registry.make("sglang_adaptive", **options), CHAIN)
    decided = [report for report in reports if report.load.batch_size]
    seen = []
    for report in decided:
        seen.append(CHAIN[steering.launch(report.load).shape].steps)
        steering.complete(per_request(report), report.load.batch_size)
    assert seen == [report.plan.max_depth for report in decided]
    assert len(set(seen)) > 1, "the recording must hold more than one decision"


@pytest.mark.parametrize("name", CHAINS)
def test_plans_are_the_controllers_own(name):
    """A twin that is driven as the engine drives one, on the same loads and reports, plans the same."""
    config = PluginConfig(controller=name, profile="packaged", gates="packaged")
    controller, twin, clock, rng = config.make(), config.make(), Clock(), random.Random(0)
    plans, reports = [], []
    plan, observe = controller.plan, controller.observe
    controller.plan = lambda view: plans.append((view, plan(view))) or plans[-1][1]
    controller.observe = lambda report: reports.append(report) or observe(report)
    steering = Steering(controller, CHAIN, profile=CostProfile.default(), clock=clock)
    steering._planned_nodes = lambda plan, batch, deepest: min(
        plan.max_depth, plan.budget // batch
    )  # no select: twin has none
    for step in range(60):
        batch = 1 + (step // 20) * 7
        shape = CHAIN[steering.launch(load(batch, context=200.0 + step)).shape]
        clock.now += 0.01 + 0.002 * shape.steps
        steering.complete([rng.randint(0, shape.steps) for _ in range(batch)], batch)
        view, planned = plans[-1]
        assert twin.plan(view) == planned
        assert view.max_nodes == 7 and view.batch_size == batch
        twin.observe(reports[-1])
    assert len(plans) == len(reports) == 60 and not steering.counts.failures


@pytest.mark.parametrize(("mode", "top_k", "shapes"), [
    ("adaptive", 1, CHAIN),
    ("trees", 4, (Shape.chain(0), Shape(2, 4), Shape(4, 8), Shape(5, 16, 4))),
])  # fmt: skip
def test_every_controller_runs_within_its_budget(mode, top_k, shapes):
    for name in ALLOWED[mode]:
        controller = PluginConfig(controller=name, mode=mode, profile="packaged", gates="packaged").make()
        clock, rng = Clock(), random.Random(1)
        steering = Steering(controller, shapes, top_k, CostProfile.default(), clock)
        for step in range(40):
            batch = (1, 4, 9)[step % 3]
            shape = shapes[steering.launch(load(batch)).shape]
            assert shape.allows(batch)
            clock.now += 0.02
            steering.complete([rng.randint(0, shape.steps) for _ in range(batch)], batch)
            assert steering.counts.verified <= steering.counts.budget, name
        assert not steering.counts.failures and not steering.counts.lost, name
        assert bool(steering.counts.verified) == (name != "none"), name


@given(
    budget=st.integers(0, 200), depth=st.integers(1, 8), batch=st.integers(1, 40), top_k=st.sampled_from([1, 4]),
)  # fmt: skip
def test_the_cap_is_strict_and_the_fit_is_the_largest(budget, depth, batch, top_k):
    shapes = CHAIN if top_k == 1 else (Shape.chain(0), Shape(1, 3), Shape(3, 8), Shape(5, 20, 10))
    plan = SpecPlan(budget, depth) if budget else AUTOREGRESSIVE
    steering = Steering(Scripted(plan), shapes, top_k)
    chosen = shapes[steering.launch(load(batch)).shape]
    assert chosen.nodes * batch <= budget
    fits = [s for s in shapes if s.allows(batch) and s.steps <= depth and s.nodes * batch <= budget]
    assert chosen.nodes == max(s.nodes for s in fits)


def test_a_step_is_reported_as_it_was():
    plan = SpecPlan(8, 3, 4, gates=((0, 0.1),))
    controller, clock = Scripted(plan), Clock()
    steering = Steering(controller, CHAIN, clock=clock)
    view = load(2)
    assert CHAIN[steering.launch(view).shape].steps == 3
    steering.complete([3, 1], 2)
    (report,) = controller.reports
    assert report.load == view and report.plan == SpecPlan(8, 3, 1, gates=((0, 0.1),))
    assert (report.drafted, report.verified, report.accepted, report.committed) == (6, 6, 4, 6)
    assert report.reached_by_depth == (2, 2, 1) and report.accepted_by_depth == (2, 1, 1)
    assert report.drafting == (2, 2, 2)


def test_a_plain_step_is_reported_as_plain():
    controller = Scripted(SpecPlan(1, 3))  # one node for two requests: no shape fits
    steering = Steering(controller, CHAIN)
    assert CHAIN[steering.launch(load(2)).shape].steps == 0
    steering.complete([0, 0], 2)
    (report,) = controller.reports
    assert report.plan == AUTOREGRESSIVE and report.committed == 2 and report.verified == 0


def test_gates_reach_the_device_by_depth():
    steering = Steering(Scripted(SpecPlan(100, 3, 4, ((0, 0.2), (2, 0.4)))), (Shape.chain(0), Shape(3, 8)), top_k=4)
    decision = steering.launch(load(2))
    assert decision.shape == 1 and decision.gates == (0.2, 0.0, 0.4)


def test_a_gate_stops_a_chain_that_lately_broke_off_there():
    steering = Steering(Scripted(SpecPlan(14, 7, 1, ((1, 0.3),))), CHAIN)
    lengths = []
    for _ in range(400):
        shape = CHAIN[steering.launch(load(2)).shape]
        lengths.append(shape.steps)
        steering.complete([1, 0], 2)
    assert lengths[0] == 7 and lengths[-1] == 2, "depth 1 is gated: it is drafted, nothing past it"


class TestOverlap:
    """SGLang launches a step before the one before it is reported."""

    def test_plan_and_observe_alternate(self):
        controller = Scripted(SpecPlan(6, 3))
        steering = Steering(controller, CHAIN)
        steering.launch(load(2))
        for _ in range(9):
            steering.launch(load(2))
            steering.complete([1, 1], 2)
        first = controller.order
        plans = [i for i, what in enumerate(first) if what == "plan"]
        assert len(plans) == 5 and steering.counts.steps == 9
        assert all("observe" in first[a:b] for a, b in pairwise(plans))
        assert first.count("observe") >= steering.counts.steps - 1, "no report is dropped"

    def test_a_repeat_keeps_within_the_plan_when_the_batch_grew(self):
        steering = Steering(Scripted(SpecPlan(6, 3)), CHAIN)
        assert CHAIN[steering.launch(load(2)).shape].steps == 3
        assert CHAIN[steering.launch(load(3)).shape].steps == 2
        assert CHAIN[steering.launch(load(7)).shape].steps == 0

    def test_a_lost_report_does_not_shift_the_others(self):
        controller = Scripted(SpecPlan(20, 3))
        steering = Steering(controller, CHAIN)
        steering.launch(load(2))
        steering.launch(load(3))
        steering.complete([1, 1, 1], 3)
        assert steering.counts.lost == 1 and controller.reports[0].load.batch_size == 3
        steering.launch(load(4))
        assert controller.order[-1] == "plan"

    def test_a_late_report_is_handed_on_though_the_open_decision_is_lost(self):
        controller = Scripted(SpecPlan(6, 3))
        steering = Steering(controller, CHAIN)
        steering.launch(load(2))  # a decision
        steering.launch(load(2))  # its repeat
        steering.complete([1, 1], 2)
        steering.launch(load(3))  # another decision, which gets lost
        steering.complete([1, 1], 2)
        assert len(controller.reports) == 1, "the repeat's report waits for the open decision's"
        steering.complete([1, 1, 1, 1], 4)
        assert steering.counts.lost == 1 and len(controller.reports) == 2

    def test_a_report_of_nothing_launched_is_ignored(self):
        steering = Steering(Scripted(SpecPlan(6, 3)), CHAIN)
        steering.complete([1], 1)
        assert steering.counts.steps == 0


class TestTimes:
    def steering(self):
        controller, clock = Scripted(SpecPlan(4, 2)), Clock()
        return controller, clock, Steering(controller, CHAIN, profile=CostProfile.default(), clock=clock)

    def step(self, clock, steering, seconds):
        steering.launch(load(2))
        clock.now += seconds
        steering.complete([1, 1], 2)

    def test_a_step_took_from_the_end_of_the_step_before(self):
        controller, clock, steering = self.steering()
        self.step(clock, steering, 5.0)
        self.step(clock, steering, 0.25)
        assert controller.reports[1].times.total == pytest.approx(0.25)
        assert controller.reports[1].times.draft > 0 and controller.reports[1].times.verify > 0

    def test_what_ran_between_two_steps_is_not_counted(self):
        controller, clock, steering = self.steering()
        self.step(clock, steering, 5.0)
        self.step(clock, steering, 0.25)
        steering.interrupt()
        self.step(clock, steering, 7.0)
        self.step(clock, steering, 0.5)
        totals = [report.times.total for report in controller.reports]
        assert totals[2] == pytest.approx(0.25), "as slow as the last one that could be timed"
        assert totals[3] == pytest.approx(0.5)

    def test_a_clock_that_stood_still_says_nothing(self):
        controller, clock, steering = self.steering()
        self.step(clock, steering, 5.0)
        self.step(clock, steering, 0.25)
        self.step(clock, steering, 0.0)
        assert controller.reports[2].times.total == pytest.approx(0.25)


def test_a_controller_that_raises_means_plain_decoding(caplog):
    controller = Scripted(ValueError("broken"), SpecPlan(6, 3))
    steering = Steering(controller, CHAIN)
    assert CHAIN[steering.launch(load(2)).shape].steps == 0
    steering.complete([0, 0], 2)
    assert CHAIN[steering.launch(load(2)).shape].steps == 3
    assert steering.counts.failures == 1 and "broken" in caplog.text


def test_a_controller_that_cannot_learn_goes_on(caplog):
    controller = Scripted(SpecPlan(6, 3))
    controller.observe = lambda report: 1 / 0
    steering = Steering(controller, CHAIN)
    for _ in range(2):
        assert CHAIN[steering.launch(load(2)).shape].steps == 3
        steering.complete([1, 1], 2)
    assert steering.counts.failures == 2 and caplog.text.count("can't learn") == 1


def test_switches_and_decisions_are_counted():
    steering = Steering(Scripted(SpecPlan(6, 3), SpecPlan(2, 1), SpecPlan(2, 1)), CHAIN)
    for _ in range(3):
        steering.launch(load(2))
        steering.complete([0, 0], 2)
    assert (steering.counts.decisions, steering.counts.switches, steering.counts.budget) == (3, 1, 10)
