"""SmartSpec's and AdaSpec's rules by hand; then in a closed loop, and over random forests."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from echo_rl.contracts import AUTOREGRESSIVE, PhaseTimes, SpecPlan, StepReport
from echo_rl.controllers.baselines.efficiency import (
    CostedOptions,
    DraftingSwitch,
    StepTimePredictor,
    YieldCurve,
    running_sum,
)
from echo_rl.controllers.baselines.goodput import AdaSpec, AdaSpecOptions, TurboSpec, TurboSpecOptions
from echo_rl.controllers.tree_shapes import REFERENCE_HIT
from echo_rl.errors import ConfigError
from tests.controllers.baselines.test_dynamic import check_step, level
from tests.controllers.conftest import load_of
from tests.controllers.forest_world import ForestWorld, check_values, cut
from tests.controllers.test_selection import forests
from tests.profiles import hinge_profile


@pytest.mark.parametrize(("batch", "free_rows"), [(1, 16), (2, 16), (4, 8), (8, 16), (16, 16)])
def test_turbospec_takes_the_length_with_the_best_goodput(batch, free_rows, make_profile):
    profile = make_profile(free_rows=free_rows)
    tokens = [sum(REFERENCE_HIT**i for i in range(k + 1)) for k in range(9)]
    rates = [t / profile.step_seconds(batch, k * batch, 1, k, 128.0) for k, t in enumerate(tokens)]
    k = rates.index(max(rates))
    plan = TurboSpec(TurboSpecOptions(profile=profile)).plan(load_of(batch))
    assert plan == (SpecPlan(k * batch, k, 1) if k else AUTOREGRESSIVE)


def test_turbospec_follows_acceptance_and_measured_time(make_profile):
    profile = make_profile(level=1e-3)

    def settled(truth, hit):
        turbo = TurboSpec(TurboSpecOptions(profile=profile))
        return ForestWorld(truth, hit).run(turbo, 1, 300)[-1].plan

    assert settled(profile, 0.95).max_depth > settled(profile, 0.7).max_depth
    slower = make_profile(level=4e-3)  # than the profile says
    assert settled(slower, 0.95).max_depth < settled(profile, 0.95).max_depth
    assert settled(make_profile(level=40e-3), 0.7) == AUTOREGRESSIVE


@pytest.mark.parametrize(
    "make", [lambda p: TurboSpec(TurboSpecOptions(profile=p)), lambda p: AdaSpec(AdaSpecOptions(p))]
)
def test_switches_off_for_a_useless_drafter_and_recovers(make, make_profile):
    profile = make_profile(level=2e-3)
    world, rule = ForestWorld(profile, 0.05, claim=0.02), make(profile)
    world.run(rule, 2, 300)
    assert sum(r.plan.speculates for r in world.run(rule, 2, 320)) <= 320 / 64 + 1
    world.hit, world.claim = 0.9, 1.0
    world.run(rule, 2, 1500)
    assert all(r.plan.speculates for r in world.run(rule, 2, 50))


@pytest.mark.parametrize(
    "make", [lambda p: TurboSpec(TurboSpecOptions(profile=p)), lambda p: AdaSpec(AdaSpecOptions(p))]
)
def test_pays_where_it_can_and_costs_nothing_where_it_cannot(make, make_profile):
    profile = make_profile(level=1e-3)
    never = TurboSpec(TurboSpecOptions(profile=make_profile(level=1.0)))
    plain = {batch: ForestWorld(profile, 0.8).rate(never, batch, 200) for batch in (2, 32)}
    assert ForestWorld(profile, 0.8).rate(make(profile), 2, 200) > 1.3 * plain[2]
    assert ForestWorld(profile, 0.3).rate(make(profile), 32, 200) > 0.98 * plain[32]


@pytest.fixture
def asked(make_profile):
    """An AdaSpec that has planned for three requests: a level takes 2 ms, a pass 14 ms for any rows up to 16."""

    def asked(**options):
        adaspec = AdaSpec(AdaSpecOptions(**({"profile": make_profile(), "depth": 4} | options)))
        plan = adaspec.plan(load_of(3))
        assert plan == SpecPlan(12, 4, 1, ((0, 0.0), (1, 0.0), (2, 0.0)))
        return adaspec, plan

    return asked


def test_adaspec_drafts_on_while_the_step_becomes_more_efficient(asked):
    """Three sure requests have 5.7 tokens in 17.5 ms; one more level promises 0.6 * 2.7 in 2 ms. Unsure ones don't."""
    adaspec, plan = asked()
    assert 5.7 / 17.5 < (5.7 + 0.6 * 2.7) / 19.5
    assert adaspec.extend(level(0, [0.9], [0.9], [0.9]), plan).tolist() == [True] * 3
    assert (3 + 0.3) / 17.5 > (3 + 0.3 + 0.6 * 0.3) / 19.5
    assert adaspec.extend(level(0, [0.1], [0.1], [0.1]), plan).tolist() == [False] * 3


def test_adaspec_asks_the_likeliest_requests_only_where_rows_cost(asked, make_profile):
    """Past 6 rows each costs 2 ms: the sure request is worth another, the unsure are not."""
    adaspec, plan = asked(profile=make_profile(free_rows=6, per_row=2e-3, level=0.1e-3))
    frontier = level(0, [0.95], [0.3], [0.2])
    assert adaspec.extend(frontier, plan).tolist() == [True, False, False]
    stopped = replace(frontier, alive=torch.tensor([False, True, True]))
    assert not adaspec.extend(stopped, plan)[0]


def test_adaspec_forgets_the_step_before(asked):
    adaspec, plan = asked()
    unsure = level(0, [0.1], [0.1], [0.1])
    first = adaspec.extend(unsure, plan)
    adaspec.extend(level(1, [0.9], [0.9], [0.9]), plan)
    assert adaspec.extend(unsure, plan).tolist() == first.tolist()
    assert [len(nodes) for nodes in adaspec._drafted] == [3]


def test_adaspec_keeps_nodes_of_positive_marginal_efficiency(asked, make_forest, make_profile):
    """Past 4 rows each costs 2 ms of a step of 17.6 ms or more: a node must bring about 0.5 tokens."""
    adaspec, plan = asked(profile=make_profile(free_rows=4, per_row=2e-3, level=0.7e-3))
    rows = [[(-1, p), (0, p * q)] for p, q in ((0.95, 0.95), (0.8, 0.3), (0.2, 0.1))]
    assert adaspec.select(make_forest(*rows), plan).counts.tolist() == [2, 1, 0]


def test_adaspec_slo_bounds_the_step(make_profile):
    profile = make_profile(free_rows=4, per_row=1e-3, level=0.5e-3)
    free, bound = (AdaSpec(AdaSpecOptions(profile=profile, slo=slo)) for slo in (None, 19e-3))
    longest = {a: max(r.times.total for r in ForestWorld(profile, 0.95).run(a, 2, 100)) for a in (free, bound)}
    assert longest[bound] <= 19e-3 + 1e-9 < longest[free]
    too_slow = AdaSpec(AdaSpecOptions(profile=profile, slo=1e-3))  # plain decoding takes 15 ms
    assert ForestWorld(profile, 0.95).run(too_slow, 2, 50)[-1].plan.speculates
    tight = AdaSpec(AdaSpecOptions(profile=profile, slo=15.2e-3))
    assert not any(r.plan.speculates for r in ForestWorld(profile, 0.95).run(tight, 2, 200))


def test_yield_curve_counts_the_whole_batch_likeliest_first():
    curve = YieldCurve(horizon=1e-9)
    curve._weight.MOST = 1.0
    curve.observe_forest(running_sum(torch.tensor([0.2, 0.9, 0.0, 0.5]), 9), np.array([1.4, 0.2]), batch=2, picked=2)
    report = StepReport(load_of(2), SpecPlan(2), (), 4, 2, 1, 3, (2,), (1,), PhaseTimes())
    curve.observe(report)
    nodes, share = curve.NODES.tolist(), 1 / 1.4  # 1 accepted of 1.4 promised
    assert curve.correction == pytest.approx(share)
    deep, shallow = curve.gains([2, 1])
    assert deep[nodes.index(0.5)] == shallow[nodes.index(0.5)] == pytest.approx(share * 0.45)
    assert deep[nodes.index(1.0)] == shallow[nodes.index(1.0)] == pytest.approx(share * 0.7)
    assert deep[-1] == pytest.approx(share * 0.8) and shallow[-1] == pytest.approx(share * 0.7)


def test_probes_stay_within_their_share(make_profile):
    step_times = StepTimePredictor(make_profile())
    switch = DraftingSwitch(step_times, CostedOptions(probe_share=0.01, probe_period=1))
    plain = StepReport(load_of(1), AUTOREGRESSIVE, (), 0, 0, 0, 1, (), (), PhaseTimes(verify=10e-3))
    probe = StepReport(load_of(1), SpecPlan(1), (), 1, 1, 0, 1, (1,), (0,), PhaseTimes(verify=35e-3))
    opened = 0
    for _ in range(1000):
        now = switch.open(load_of(1), pays=False, excess=1e-3)
        switch.observe(probe if now else plain)
        opened += now
    assert 3 <= opened <= 6  # 10 s of plain steps pay 0.1 s, a probe costs 20 ms


def test_step_clock_agrees_with_the_profile(make_profile):
    profile = make_profile()
    step_times = StepTimePredictor(profile)
    assert step_times.plain(load_of(4)) == pytest.approx(profile.step_seconds(4, 0, 1, 0, 128.0))
    whole = profile.step_seconds(4, 12, 2, 3, 128.0)
    assert step_times.speculative(load_of(4), np.array([12.0]), 2, 3)[0] == pytest.approx(whole)
    third = profile.draft_seconds(2, 1, 3) - profile.draft_seconds(2, 1, 2)
    assert step_times.level(np.array([2.0]), 1, 2)[0] == pytest.approx(third)


@cache
def rules():
    profile = hinge_profile(free_rows=8, level=0.5e-3)
    return tuple(AdaSpec(AdaSpecOptions(profile=profile, depth=4, width=width)) for width in (1, 4))


@settings(max_examples=60)
@given(forest=forests(), limit=st.integers(1, 8), rule=st.sampled_from(range(2)))
def test_budget_and_closure_over_random_forests(forest, limit, rule):
    load = load_of(forest.batch_size, limit)
    check_step(rules()[rule], load, cut(forest, min(4, limit)))


@pytest.mark.parametrize("options", [TurboSpecOptions, AdaSpecOptions])
def test_values_worth_trying(options):
    check_values(options)


@pytest.mark.parametrize(
    ("options", "bad"),
    [
        (TurboSpecOptions, {"most": 0}),
        (TurboSpecOptions, {"most": 9}),
        (TurboSpecOptions, {"horizon": -1.0}),
        (AdaSpecOptions, {"width": 9}),
        (AdaSpecOptions, {"depth": 0}),
        (AdaSpecOptions, {"slo": 0.0}),
        (AdaSpecOptions, {"probe_period": 0}),
    ],
)
def test_bad_options_are_refused(options, bad):
    with pytest.raises(ConfigError):
        options(**bad)
