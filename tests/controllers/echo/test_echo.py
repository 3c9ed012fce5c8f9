"""ECHO's scheduler and gates: where the budget goes, and how the ablations differ."""

from __future__ import annotations

import random

import pytest
import torch

from echo_rl.contracts import Frontier, SpecPlan
from echo_rl.controllers import make
from echo_rl.controllers.echo.gates import DepthGate, GateCalibration

GATES = GateCalibration((DepthGate(0, 0.2), DepthGate(1, 0.25), DepthGate(2, 0.35), DepthGate(4, 0.4)), (0, 2))
FAMILY = ("echo", "echo_dense", "echo_fixed", "echo_unscheduled")

DEEP = [(-1, 0.95), (-1, 0.04), (-1, 0.01), (0, 0.9), (0, 0.05), (3, 0.85), (3, 0.04), (5, 0.8), (7, 0.7)]
MODEST = [(-1, 0.5), (-1, 0.3), (-1, 0.1), (0, 0.4), (0, 0.2), (3, 0.35), (3, 0.1), (5, 0.3), (7, 0.25)]
STOPPED = [(-1, 0.15), (-1, 0.12), (-1, 0.1), *[(p, 0.0) for p in (0, 0, 3, 3, 5, 7)]]


@pytest.fixture
def make_echo(make_profile):
    return lambda name="echo", **options: make(name, **{"profile": make_profile(), "calibration": GATES} | options)


@pytest.fixture
def plan():
    return SpecPlan(budget=6, max_depth=5, width=3, gates=((0, 0.2),))


def deepest(selection, request):
    ends = selection.counts.cumsum(0).tolist()
    depths = selection.depths[ends[request] - int(selection.counts[request]) : ends[request]]
    return int(depths.max()) if len(depths) else -1


def test_a_confident_request_goes_deeper_when_another_is_truncated(make_echo, make_forest, plan):
    echo = make_echo()
    together = echo.select(make_forest(DEEP, MODEST), plan)
    relieved = echo.select(make_forest(DEEP, STOPPED), plan)
    assert together.size == relieved.size == plan.budget  # the saved nodes are spent, not lost
    assert together.counts.tolist() == [5, 1] and relieved.counts.tolist() == [5, 1]
    tighter = SpecPlan(budget=8, max_depth=5, width=3)
    assert deepest(echo.select(make_forest(MODEST, MODEST), tighter), 0) == 2
    assert deepest(echo.select(make_forest(MODEST, STOPPED), tighter), 0) == 4


def test_leftover_widens_the_truncation_point(make_echo, make_forest):
    echo = make_echo()
    selection = echo.select(make_forest(DEEP, STOPPED), SpecPlan(budget=8, max_depth=5, width=3))
    assert selection.counts.tolist() == [5, 3]  # all of the path of one, then all gated candidates of the other
    assert selection.parents[5:].tolist() == [-1, -1, -1] and selection.depths[5:].tolist() == [0, 0, 0]


def test_unscheduled_keeps_the_savings_where_they_were_made(make_echo, make_forest, plan):
    forest = make_forest(DEEP, STOPPED)
    assert make_echo("echo_unscheduled").select(forest, plan).counts.tolist() == [3, 3]
    assert make_echo("echo").select(forest, plan).counts.tolist() == [5, 1]


def test_score_power_reorders_but_stays_closed(make_echo, make_forest):
    powers = GateCalibration((DepthGate(0, 0.2),), (0,), score_power=(1.0, 4.0))
    forest = make_forest([(-1, 0.9), (0, 0.8), (1, 0.7)], [(-1, 0.6), (0, 0.5), (1, 0.4)])
    plan = SpecPlan(budget=3, max_depth=3, width=1)
    assert make_echo().select(forest, plan).counts.tolist() == [3, 0]
    assert make_echo(calibration=powers).select(forest, plan).counts.tolist() == [2, 1]  # 0.7**4 < 0.6


def test_gates_of_the_ablations(make_echo, make_load):
    plans = {name: make_echo(name, nodes=60.0).plan(make_load(1)) for name in FAMILY}
    assert plans["echo"].gates == ((0, 0.2), (2, 0.35)) == plans["echo_unscheduled"].gates
    assert [depth for depth, _ in plans["echo_dense"].gates] == list(range(7))
    assert plans["echo_fixed"].gates == ((0, 0.2), (2, 0.2))
    everywhere = make_echo("echo_fixed", nodes=60.0, tau=0.3, everywhere=True).plan(make_load(1))
    assert everywhere.gates == tuple((depth, 0.3) for depth in range(7))
    assert len({(p.budget, p.max_depth, p.width) for p in plans.values()}) == 1  # equal budgets: a fair ablation


def test_extend_stops_only_the_hopeless(make_echo, make_load):
    echo = make_echo(nodes=60.0)
    plan = echo.plan(make_load(1))
    frontier = Frontier(2, torch.tensor([[0.5, 0.1], [0.3, 0.3]]).log(), torch.tensor([True, True]))
    assert echo.extend(frontier, plan).tolist() == [True, False]


def test_fixed_budget_is_published_at_both_ends_and_held_to_the_knee(make_echo, make_load, make_profile):
    free = make_echo(profile=make_profile(free_rows=10_000))
    for nodes, shape in ((60.0, (60, 8, 10)), (5.0, (5, 3, 3))):
        plan = make_echo(profile=free.profile, nodes=nodes).plan(make_load(1))
        assert (plan.budget, plan.max_depth, plan.width) == shape
    steep = make_profile(per_row=0.2)
    assert make_echo(profile=steep, nodes=60.0).plan(make_load(4)).budget == 12
    assert not make_echo(profile=steep, nodes=60.0).plan(make_load(16)).speculates


@pytest.mark.parametrize("name", FAMILY)
def test_the_budget_is_strict_step_after_step(name, make_echo, make_forest, make_load):
    """Whatever the forest and the load, a step never verifies more than its plan allows."""
    echo, rng = make_echo(name), random.Random(0)
    for _ in range(200):
        load = make_load(rng.choice((1, 2, 3, 5, 8)), max_nodes=rng.choice((2, 5, 64)))
        plan = echo.plan(load)
        rows = [rng.choice((DEEP, MODEST, STOPPED)) for _ in range(load.batch_size)]
        selection = echo.select(make_forest(*rows), plan)
        assert selection.size <= plan.budget <= load.batch_size * load.max_nodes
        assert int(selection.counts.max()) <= load.max_nodes
