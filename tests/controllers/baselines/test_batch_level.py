"""TETRIS, SGLang's adaptive steps and DSpark against their rules, by hand; then in a closed loop."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from echo_rl.contracts import AUTOREGRESSIVE, PhaseTimes, SpecPlan, StepReport
from echo_rl.controllers.baselines.batch_level import (
    DSpark,
    DSparkOptions,
    SglangAdaptive,
    SglangAdaptiveOptions,
    Tetris,
    TetrisOptions,
)
from echo_rl.errors import ConfigError
from tests.controllers.baselines.test_dynamic import check_step
from tests.controllers.conftest import load_of
from tests.controllers.forest_world import ForestWorld, check_values, cut
from tests.controllers.test_selection import forests
from tests.profiles import hinge_profile

CHAINS = ([(-1, 0.9), (0, 0.8), (1, 0.7)], [(-1, 0.5), (0, 0.2), (1, 0.1)])


def reported(controller, batch, accepted, seconds=0.01):
    """One step of the controller in which every request had `accepted` drafted tokens accepted."""
    load = load_of(batch)
    plan = controller.plan(load)
    hits = round(accepted * batch) if plan.speculates else 0
    times = PhaseTimes(verify=seconds)
    controller.observe(StepReport(load, plan, (), plan.budget, plan.budget, hits, hits + batch, (), (), times))
    return plan


def test_tetris_takes_the_likeliest_of_longer_chains(make_forest):
    tetris = Tetris(TetrisOptions(base=2, extra=1))
    plan = tetris.plan(load_of(2))
    assert plan == SpecPlan(budget=4, max_depth=3, width=1)
    selection = tetris.select(make_forest(*CHAINS), plan)
    assert selection.counts.tolist() == [3, 1] and selection.parents.tolist() == [-1, 0, 1, -1]


def test_tetris_drafts_no_deeper_than_a_request_may_verify():
    assert Tetris(TetrisOptions()).plan(load_of(2, max_nodes=2)) == SpecPlan(budget=4, max_depth=2, width=1)


def test_sglang_climbs_to_the_accept_length_plus_one():
    sglang = SglangAdaptive(SglangAdaptiveOptions())
    lengths = [reported(sglang, 1, 3.0).max_depth for _ in range(40)]
    # The average starts at 2 and passes 2.5 after four steps; the first move is due after 15
    assert lengths[:15] == [3] * 15 and lengths[15:] == [5] * 25
    assert [reported(sglang, 1, 0.0).max_depth for _ in range(40)][-1] == 1


def test_sglang_holds_a_rung_within_the_hysteresis():
    sglang = SglangAdaptive(SglangAdaptiveOptions())
    assert {reported(sglang, 5, 0.4).max_depth for _ in range(60)} == {3}  # it leaves for 1 only at 1 - .5 - .25
    assert [reported(sglang, 5, 0.2).max_depth for _ in range(60)][-1] == 1
    assert {reported(sglang, 5, 0.4).max_depth for _ in range(60)} == {1}  # and comes back only above 1 - .5


@pytest.mark.parametrize(("batch", "steps"), [(1, 3), (7, 3), (8, 3), (31, 3), (32, 1), (63, 1), (64, 0), (200, 0)])
def test_sglang_uses_the_ladder_of_the_batch(batch, steps):
    plan = SglangAdaptive(SglangAdaptiveOptions()).plan(load_of(batch))
    assert plan == (SpecPlan(steps * batch, steps, 1) if steps else AUTOREGRESSIVE)


def test_sglang_leaves_zero_again_by_rare_probes():
    sglang = SglangAdaptive(SglangAdaptiveOptions(probe_period=20))
    for _ in range(60):
        reported(sglang, 32, 0.0)
    idle = [reported(sglang, 32, 0.0).speculates for _ in range(210)]
    assert 5 <= sum(idle) <= 10
    for _ in range(200):
        reported(sglang, 32, 1.0)
    assert all(reported(sglang, 32, 1.0).max_depth == 1 for _ in range(30))
    assert not any(reported(sglang, 64, 1.0).speculates for _ in range(100))  # its ladder has no chain to try


@pytest.mark.parametrize(("per_row", "counts"), [(0.1e-3, [3, 3]), (0.5e-3, [3, 2]), (4e-3, [3, 0]), (50e-3, [0, 0])])
def test_dspark_verifies_the_prefix_with_the_best_rate(per_row, counts, make_forest, make_profile):
    """Drafting 3 levels and the overheads take 7.5 ms, a pass 10 ms and `per_row` past 2 rows."""
    profile = make_profile(base=10e-3, free_rows=2, per_row=per_row)
    dspark = DSpark(DSparkOptions(profile=profile, depth=3))
    plan = SpecPlan(budget=6, max_depth=3)
    dspark.plan(load_of(2))
    survival = [0.9, 0.8, 0.7, 0.5, 0.2, 0.1]
    rates = [(2 + sum(survival[:n])) / (17.5e-3 + n * per_row) for n in range(7)]
    assert rates.index(max(rates)) == sum(counts)
    assert dspark.select(make_forest(*CHAINS), plan).counts.tolist() == counts


def test_dspark_weighs_promises_by_what_came_true(make_profile):
    """An overconfident drafter gets fewer tokens verified than an honest one that says the same."""
    profile = make_profile(free_rows=4, per_row=1e-3, level=0.5e-3)

    def verified(world):
        return sum(r.verified for r in world.run(DSpark(DSparkOptions(profile=profile)), 4, 300)[200:])

    assert verified(ForestWorld(profile, 0.5, claim=0.25)) < 0.7 * verified(ForestWorld(profile, 0.5**0.25))


def test_dspark_does_not_draft_where_it_cannot_pay(make_profile):
    dear = make_profile(level=20e-3)
    assert DSpark(DSparkOptions(profile=dear)).plan(load_of(1)) == AUTOREGRESSIVE
    assert DSpark(DSparkOptions(profile=make_profile(level=0.5e-3))).plan(load_of(1)).speculates


def test_dspark_beats_fixed_lengths_and_costs_nothing_in_a_crowd(make_profile):
    profile = make_profile(free_rows=12, level=0.5e-3)
    plain = {batch: ForestWorld(profile, 0.8).rate(SglangAdaptive(OFF), batch, 200) for batch in (4, 32)}
    assert ForestWorld(profile, 0.8).rate(DSpark(DSparkOptions(profile=profile)), 4, 200) > 1.3 * plain[4]
    assert ForestWorld(profile, 0.3).rate(DSpark(DSparkOptions(profile=profile)), 32, 200) > 0.98 * plain[32]


OFF = SglangAdaptiveOptions(ladders=((1, (0,)),))


def test_dspark_switches_off_for_a_useless_drafter_and_recovers(make_profile):
    profile = make_profile(level=2e-3)
    world, dspark = ForestWorld(profile, 0.05, claim=0.02), DSpark(DSparkOptions(profile=profile))
    world.run(dspark, 2, 300)
    assert sum(r.plan.speculates for r in world.run(dspark, 2, 320)) <= 320 / 64 + 1
    world.hit, world.claim = 0.9, 1.0
    world.run(dspark, 2, 1500)
    assert all(r.plan.speculates for r in world.run(dspark, 2, 50))


@cache
def rules():
    profile = hinge_profile(free_rows=8)
    return (
        Tetris(TetrisOptions(base=1, extra=2)),
        DSpark(DSparkOptions(profile=profile, depth=4)),
        SglangAdaptive(SglangAdaptiveOptions()),
    )


@settings(max_examples=60)
@given(forest=forests(), limit=st.integers(1, 8), rule=st.sampled_from(range(3)))
def test_budget_and_closure_over_random_forests(forest, limit, rule):
    controller, load = rules()[rule], load_of(forest.batch_size, limit)
    check_step(controller, load, cut(forest, max(1, controller.plan(load).max_depth)))


@pytest.mark.parametrize("options", [TetrisOptions, SglangAdaptiveOptions, DSparkOptions])
def test_values_worth_trying(options):
    check_values(options)


@pytest.mark.parametrize(
    ("options", "bad"),
    [
        (TetrisOptions, {"base": 0}),
        (TetrisOptions, {"base": 6, "extra": 3}),
        (SglangAdaptiveOptions, {"ladders": ()}),
        (SglangAdaptiveOptions, {"ladders": ((1, (3, 1)),)}),
        (SglangAdaptiveOptions, {"ladders": ((1, (1,)), (1, (3,)))}),
        (SglangAdaptiveOptions, {"rate": 0.0}),
        (SglangAdaptiveOptions, {"interval": 0}),
        (SglangAdaptiveOptions, {"down": 0.1}),
        (DSparkOptions, {"depth": 9}),
        (DSparkOptions, {"horizon": 0.0}),
        (DSparkOptions, {"probe_share": 1.0}),
    ],
)
def test_bad_options_are_refused(options, bad):
    with pytest.raises(ConfigError):
        options(**bad)
