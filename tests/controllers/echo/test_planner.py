"""The budget decision against machines and drafters whose truth is known."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import pairwise

import pytest

from echo_rl.contracts import PhaseTimes, StepReport
from echo_rl.controllers import make
from echo_rl.controllers.echo.planner import PlannerOptions
from echo_rl.costs.files import packaged
from echo_rl.costs.profile import CostProfile
from echo_rl.errors import ConfigError


@pytest.fixture
def run(make_load):
    """Run steps and return their reports."""

    def run(world, controller, batch, steps):
        return [world.step(controller, make_load(batch)) for _ in range(steps)]

    return run


def test_speculates_alone_and_not_in_a_crowd(make_profile, make_world, run):
    world, echo = make_world(make_profile(), hit=0.6), make("echo", profile=make_profile())
    assert sum(r.plan.speculates for r in run(world, echo, 1, 100)[20:]) >= 78  # two probes of a plain step
    assert sum(r.plan.speculates for r in run(world, echo, 32, 100)) <= 2  # probes
    assert sum(r.plan.speculates for r in run(world, echo, 1, 30)[10:]) >= 19


def test_requests_that_refuse_speculation_fill_the_batch_all_the_same(make_profile, make_world, make_load):
    world, echo = make_world(make_profile(), hit=0.6), make("echo", profile=make_profile())
    crowd = replace(make_load(1), plain=31)
    assert sum(world.step(echo, make_load(1)).plan.speculates for _ in range(100)) >= 90
    assert sum(world.step(echo, crowd).plan.speculates for _ in range(100)) <= 2  # probes
    assert sum(world.step(echo, make_load(1)).plan.speculates for _ in range(50)) >= 45  # they taught it nothing wrong


def test_the_budget_stays_under_the_knee(make_profile, make_world, run):
    profile = make_profile(per_row=0.2)
    world, echo = make_world(profile, hit=0.8), make("echo", profile=profile)
    for batch in (1, 4, 8, 12):
        budgets = [r.plan.budget for r in run(world, echo, batch, 60)]
        assert max(budgets) <= profile.knee(batch) == 16 - batch


def test_nodes_beside_prompts_are_priced_past_the_prompts_rows(make_profile, make_world, make_load):
    """Alone, twelve requests have four rows to spare; a step that also reads a prompt has none."""
    profile = make_profile(per_row=1e-3, level=0.5e-3)
    world, echo = make_world(profile, hit=0.9), make("echo", profile=profile)
    loads = [make_load(12), replace(make_load(12), prefill_tokens=64)] * 60
    reports = [world.step(echo, load) for load in loads][20:]
    assert not any(report.plan.speculates for report in reports if report.load.prefill_tokens)
    assert sum(report.plan.budget == 3 for report in reports if not report.load.prefill_tokens) >= 45
    few = [world.step(echo, replace(make_load(1), prefill_tokens=64)) for _ in range(40)]
    assert sum(report.plan.speculates for report in few) >= 35, "a token of one request is worth more than its rows"


@pytest.mark.parametrize(("free_rows", "per_row", "share"), [(16, 0.5e-3, 0.97), (48, 0.2e-3, 0.84)])
def test_a_profile_of_another_machine_is_corrected_while_serving(
    make_profile, make_world, run, free_rows, per_row, share
):
    """Rows are believed to be cheaper than they are: what passes take tells, trials of the rest included."""
    truth, believed = make_profile(free_rows=8, per_row=1e-3), make_profile(free_rows=free_rows, per_row=per_row)

    def speed(profile, batch):
        world = make_world(truth, hit=0.6, noise=0.05)
        run(world, make("echo", profile=profile), batch, 400)
        return world.tokens / world.seconds

    for batch in (1, 4, 16):
        assert speed(believed, batch) > share * speed(truth, batch)


def test_free_verification_buys_more_nodes_and_dear_drafting_fewer_levels(make_profile, make_world, run):
    def settled(profile):
        return run(make_world(profile, hit=0.7), make("echo", profile=profile), 1, 200)[-1].plan

    free, usual, dear = make_profile(free_rows=64), make_profile(), make_profile(level=8e-3)
    assert settled(free).budget > settled(usual).budget
    assert settled(usual).max_depth > settled(dear).max_depth


def test_switches_off_for_a_useless_drafter_and_recovers(make_profile, make_world, run):
    profile = make_profile(level=4e-3)
    world, echo = make_world(profile, hit=0.02), make("echo", profile=profile)
    run(world, echo, 1, 400)
    off = run(world, echo, 1, 400)
    assert sum(r.plan.speculates for r in off) <= 400 / 64 + 1
    world.hit = 0.8
    run(world, echo, 1, 3000)
    assert sum(r.plan.speculates for r in run(world, echo, 1, 50)) >= 49


def test_acceptance_learned_while_on_survives_a_spell_off(make_profile, make_world, run):
    echo = make("echo", profile=make_profile())
    world = make_world(make_profile(), hit=0.9)
    before = run(world, echo, 1, 300)[-1].plan
    run(world, echo, 32, 300)
    assert run(world, echo, 1, 1)[0].plan == before


@pytest.mark.parametrize("catch_up", [0.0, 2e-3])
@pytest.mark.parametrize("batch", [16, 32])
def test_being_off_costs_next_to_nothing(batch, catch_up, make_profile, make_world, run):
    """At a batch where speculation loses, probing costs under 1 % of the time, even when it finds a backlog."""
    generous = make_profile(free_rows=24)  # the planner expects more than the machine gives
    world = make_world(make_profile(free_rows=8, per_row=1e-3), hit=0.5, catch_up=catch_up)
    plain = make_world(world.truth, hit=0.5)
    run(world, make("echo", profile=generous), batch, 4000)
    run(plain, make("none"), batch, 4000)
    assert world.tokens / world.seconds >= 0.98 * plain.tokens / plain.seconds


@pytest.mark.parametrize("name", ["echo", "dspark", "turbospec", "adaspec"])
def test_reading_a_prompt_is_not_held_for_a_plain_steps_backlog(name, make_profile, make_world, make_load, run):
    """A step after a prompt drafts for longer; once speculation stops paying, probes are made all the same."""
    world, controller = make_world(make_profile(level=4e-3), hit=0.8), make(name, profile=make_profile(level=4e-3))
    run(world, controller, 1, 100)
    reading = replace(make_load(1), batch_size=0, prefill_tokens=150)
    plan, times = controller.plan(reading), PhaseTimes(verify=0.01)
    controller.observe(StepReport(reading, plan, (), 0, 0, 0, 0, (), (), times))
    world.plain_steps, world.catch_up = 1, 0.05
    run(world, controller, 1, 1)
    world.hit, world.catch_up = 0.02, 0.0
    run(world, controller, 1, 400)
    assert any(r.plan.speculates for r in run(world, controller, 1, 3000))


def test_a_slower_machine_than_profiled_is_noticed(make_profile, make_world, run):
    """The profile promises cheap drafting; measured drafting is so slow that plain decoding wins."""
    world = make_world(make_profile(level=30e-3), hit=0.5)
    echo = make("echo", profile=make_profile(level=1e-3))
    run(world, echo, 4, 300)
    assert sum(r.plan.speculates for r in run(world, echo, 4, 300)) <= 300 / 64 + 1


def test_noise_does_not_make_it_flap(make_profile, make_world, run):
    world, echo = make_world(make_profile(), hit=0.6, noise=0.1), make("echo", profile=make_profile())
    run(world, echo, 2, 300)
    plans = [r.plan for r in run(world, echo, 2, 800) if r.plan.speculates]  # a few others are checks
    assert len(plans) >= 780
    changes = sum(a != b for a, b in pairwise(plans))
    assert changes <= 8


def test_adaptive_budget_is_close_to_the_best_fixed_one(make_profile, make_world, run):
    """Compare with every fixed shape that the same controller could have used, in the same world."""

    def rate(controller, batch):
        world = make_world(make_profile(), hit=0.65)
        run(world, controller, batch, 500)
        return world.tokens / world.seconds

    for batch in (1, 4, 8):
        fixed = [rate(make("echo", profile=make_profile(), nodes=n), batch) for n in (1.0, 2.0, 4.0, 8.0, 16.0)]
        chains = [rate(make("chain", steps=n), batch) for n in (1, 2, 3, 4, 6)]
        plain = rate(make("none"), batch)
        assert rate(make("echo", profile=make_profile()), batch) >= 0.95 * max(*fixed, plain), batch
        assert max(chains) > plain or batch == 8


@pytest.mark.parametrize("batch", [1, 3, 32, 100])
@pytest.mark.parametrize("context", [0.0, 130.0, 1e5])
def test_passes_of_one_step_cost_together_what_they_cost_each(batch, context):
    profile = CostProfile.load(packaged("profile.json"))
    rows = [0.0, batch, batch + 0.5, 17.0, 2.0 * max(profile.rows)]
    each = [profile.verify_seconds(batch, n, context) for n in rows]
    assert profile.verify_each(batch, rows, context) == pytest.approx(each, rel=1e-12)


def test_planning_is_cheap(make_load):
    echo = make("echo")
    load = make_load(4)
    echo.plan(load)
    times = []
    for _ in range(400):
        start = time.perf_counter()
        echo.plan(load)
        times.append(time.perf_counter() - start)
    assert sorted(times)[200] < 200e-6


@pytest.mark.parametrize("options", [{"period": 0}, {"margin": -0.1}, {"probe_share": 1.0}, {"theta": 0.0}])
def test_bad_options_are_refused(options):
    with pytest.raises(ConfigError):
        PlannerOptions(**options)
