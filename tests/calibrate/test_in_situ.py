"""Live steps of a known machine, fitted: what it costs is found again."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from echo_rl.calibrate.in_situ import GATES, SHAPES, STRETCH, RandomPlans, Sample, correct, predicted
from echo_rl.contracts import LoadView, PhaseTimes, RequestOutput, SpecPlan, StepReport
from echo_rl.costs.profile import CostProfile

SINGLE = CostProfile.default()
LIVE = replace(
    SINGLE,
    verify=tuple(tuple(tuple(1.25 * t for t in line) for line in plane) for plane in SINGLE.verify),
    draft=tuple(tuple(tuple(1.5 * t for t in line) for line in plane) for plane in SINGLE.draft),
    step_overhead=3e-4,
    request_overhead=8e-5,
    spec_overhead=5e-4,
    node_overhead=2e-5,
    catch_up=4e-5,
    gate_overhead=1.5e-4,
    prefill_weight=0.7,
    noise=0.0,
)


def samples(count=1200, noise=0.0):
    """Steps of the machine LIVE under random plans, levels drafted by all or, where gated, by ever fewer."""
    rng = random.Random(0)
    for _ in range(count):
        batch = rng.choice(SINGLE.batches[:4])
        nodes, depth, width = rng.choice(SHAPES)
        gate = rng.choice(GATES) if nodes else 0.0
        plan = SpecPlan(round(nodes * batch), depth, width, tuple((d, gate) for d in range(depth - 1) if gate))
        on = plan.speculates
        drafting = tuple(max(1, batch - d * bool(gate)) for d in range(depth)) if on else ()
        prefill = rng.choice((0, 0, 0, 64))
        load = LoadView(batch, prefill, 0, 200.0, 0.1, 64)
        report = StepReport(
            load, plan, (), 0, plan.budget, 0, batch, (), (), PhaseTimes(), drafting=drafting, confidence=()
        )
        unseen = rng.choice((0, 0, 20 * batch)) if on else 0
        took, factor = predicted(LIVE, [Sample(report, unseen)]), rng.lognormvariate(0.0, noise)
        verify, draft, rest = (factor * float(t[0]) for t in (took.verify, took.draft, took.overhead))
        times = PhaseTimes(verify=verify, draft=draft, commit=rest)
        yield Sample(replace(report, times=times), unseen)


@pytest.mark.parametrize(("noise", "within"), [(0.0, 0.03), (0.05, 0.15)])
def test_a_live_machine_is_found_from_its_steps(noise, within):
    found = correct(SINGLE, list(samples(noise=noise)))
    for name in ("step_overhead", "request_overhead", "spec_overhead", "node_overhead", "catch_up", "gate_overhead"):
        assert getattr(found, name) == pytest.approx(getattr(LIVE, name), rel=2 * within), name
    assert found.prefill_weight == pytest.approx(0.7, abs=0.1)
    assert found.noise == pytest.approx(noise, abs=0.02)
    for batch in SINGLE.batches[:4]:
        assert found.verify_seconds(batch, 4 * batch, 200) == pytest.approx(
            LIVE.verify_seconds(batch, 4 * batch, 200), rel=within
        )
        assert found.draft_seconds(batch, 3, 4) == pytest.approx(LIVE.draft_seconds(batch, 3, 4), rel=within)


def test_a_prediction_is_the_profiles_own():
    """Two steps by hand: a gated tree with catching up beside a prompt, and a plain step."""
    plan = SpecPlan(12, 2, 3, ((0, 0.1),))
    load = LoadView(4, 64, 0, 200.0, 0.1, 64)
    tree = StepReport(load, plan, (), 0, 12, 0, 4, (), (), PhaseTimes(), drafting=(4, 2))
    plain = replace(tree, load=replace(load, prefill_tokens=0), plan=SpecPlan(0), verified=0, drafting=())
    found = predicted(LIVE, [Sample(tree, 9), Sample(plain, 9)])
    level = [LIVE.draft_seconds(4, 3, 1), LIVE.draft_seconds(2, 3, 2) - LIVE.draft_seconds(2, 3, 1)]
    assert found.verify == pytest.approx([LIVE.verify_seconds(4, 16 + 0.7 * 64, 200), LIVE.ar_seconds(4, 200)])
    assert found.draft == pytest.approx([sum(level) + 9 * LIVE.catch_up + LIVE.gate_overhead, 0.0])
    assert found.overhead == pytest.approx([LIVE.overhead_seconds(4, 12, True), LIVE.overhead_seconds(4)])


def test_unusual_steps_are_left_out():
    given = list(samples(8))
    plans = RandomPlans({}, usual=lambda report: report.plan.speculates)
    for sample in given:
        plans.observe(sample.report)
    assert [s.report for s in plans.samples] == [s.report for s in given if s.report.plan.speculates]
    assert 0 < len(plans.samples) < 8


def test_too_few_steps_change_nothing():
    assert correct(SINGLE, []) == SINGLE


def test_random_plans_hold_for_a_stretch_and_count_what_the_drafter_has_not_seen():
    plans = RandomPlans({"a": 30, "b": 10}, seed=3)
    load = LoadView(2, 0, 0, 20.0, 0.1, 64)
    chosen = [plans.propose(load) for _ in range(60)]
    for i in range(0, 60, STRETCH):
        assert len(set(chosen[i : i + STRETCH])) == 1
    assert any(plan.gates for plan in chosen) and any(plan.speculates and not plan.gates for plan in chosen)

    def step(batch, plan, *outputs):
        report = StepReport(
            LoadView(batch, 0, 0, 20.0, 0.1, 64), plan, outputs, 0, 0, 0, batch, (), (), PhaseTimes(), confidence=()
        )
        plans.observe(report)
        return plans.samples[-1].unseen

    token = lambda name: RequestOutput(name, (1,))  # noqa: E731
    step(0, SpecPlan(0), token("a"), token("b"))  # the prompts
    assert step(2, SpecPlan(0), token("a"), token("b")) == 28 + 8
    assert step(2, SpecPlan(4, 2, 2), token("a"), token("b")) == 31 - 2 + 11 - 2
    assert step(2, SpecPlan(4, 2, 2), token("a"), token("b")) == 0
