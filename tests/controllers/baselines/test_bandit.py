"""The bandits: the index by hand, learning in a closed loop, and their options."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from echo_rl.contracts import AUTOREGRESSIVE, PhaseTimes, SpecPlan, StepReport
from echo_rl.controllers.baselines.bandit import PLAIN_ARM, Bandit, BanditOptions, _Choice, _Context
from echo_rl.errors import ConfigError
from tests.controllers.baselines.test_dynamic import check_step
from tests.controllers.conftest import load_of
from tests.controllers.forest_world import ForestWorld, check_values, cut
from tests.controllers.test_selection import forests

TWO = (PLAIN_ARM, (2.0, 2, 1))


def played(bandit, load, seconds):
    """One step that takes `seconds(plan)` for one token a request."""
    plan = bandit.plan(load)
    times = PhaseTimes(verify=seconds(plan))
    report = StepReport(load, plan, (), plan.budget, plan.budget, 0, load.batch_size, (), (), times)
    bandit.observe(report)
    return plan


def dear(plan):
    return 20e-3 if plan.speculates else 10e-3


def cheap(plan):
    return 5e-3 if plan.speculates else 10e-3


def test_tries_every_arm_once_then_the_better():
    bandit = Bandit(BanditOptions(arms=TWO, hold=2, explore=0.01))
    plans = [played(bandit, load_of(3), dear).speculates for _ in range(10)]
    assert plans == [False, False, True, True] + [False] * 6
    assert bandit._contexts[2].losses == pytest.approx([10e-3, 20e-3])


def test_the_index_is_loss_less_bound_plus_the_price_of_leaving():
    context = _Context(2)
    context.losses, context.pulls = [0.9, 1.0], [9.0, 1.0]
    bound = math.sqrt(2.0 * math.log(11.0))
    even = 0.1 / (bound * (1.0 - 1.0 / 3.0))  # the width at which both indices are equal
    for explore, arm in ((even * 0.98, 0), (even * 1.02, 1)):
        assert Bandit(BanditOptions(arms=TWO, explore=explore, switching=0.0))._optimistic(context, 0) == arm
    held = Bandit(BanditOptions(arms=TWO, explore=even * 1.02, switching=0.02))
    assert held._optimistic(context, current=0) == 0 and held._optimistic(context, current=1) == 1


def test_exp3_weighs_by_summed_losses_and_mixes_uniformly():
    bandit = Bandit(BanditOptions(arms=TWO, rule="exp3", explore=0.2, memory=100.0))
    context = _Context(2)
    context.losses = [1.0, 2.0]
    context.learn(_Choice(1, arm=1, chance=0.5, seconds=3.0, tokens=1.0, switched=True), 0.25, 100.0)
    assert context.losses == [1.0, 3.0] and context.regret == pytest.approx([0.0, (1.0 + 0.25) / 0.5])
    weight = math.exp(-math.sqrt(2.0 * math.log(2.0) / 200.0) * 2.5)
    expected = [0.8 / (1.0 + weight) + 0.1, 0.8 * weight / (1.0 + weight) + 0.1]
    assert bandit._chances(context) == pytest.approx(expected)


def test_each_batch_octave_learns_for_itself():
    bandit = Bandit(BanditOptions(arms=TWO, hold=1, explore=0.01))
    for _ in range(10):
        played(bandit, load_of(2), cheap)
    for _ in range(10):
        played(bandit, load_of(16), dear)
    assert played(bandit, load_of(3), cheap).speculates and not played(bandit, load_of(20), dear).speculates


def test_steps_that_prefill_teach_nothing():
    bandit = Bandit(BanditOptions(arms=TWO, hold=1))
    load = load_of(2)
    busy = type(load)(2, 100, 0, 128.0, 0.1, 64)
    for _ in range(5):
        played(bandit, busy, lambda plan: 1.0)
    assert bandit._contexts[2].losses == [0.0, 0.0]


def test_an_arm_is_the_batch_budget_and_shape():
    bandit = Bandit(BanditOptions(arms=(PLAIN_ARM, (0.5, 3, 2)), hold=1))
    assert played(bandit, load_of(6), dear) == AUTOREGRESSIVE
    assert played(bandit, load_of(6), dear) == SpecPlan(3, 3, 2)
    assert Bandit(BanditOptions(arms=((9.0, 4, 2), PLAIN_ARM))).plan(load_of(2, 2)) == SpecPlan(4, 2, 2)


@pytest.mark.parametrize("rule", ["ucb", "exp3"])
def test_the_same_seed_plays_the_same(rule):
    def plans(seed):
        bandit = Bandit(BanditOptions(rule=rule, seed=seed, hold=1))
        return [played(bandit, load_of(2), dear).budget for _ in range(200)]

    assert plans(1) == plans(1)
    assert (plans(1) == plans(2)) == (rule == "ucb")


@pytest.mark.parametrize("rule", ["ucb", "exp3"])
def test_switches_off_where_speculation_loses_and_recovers(rule, make_profile):
    profile = make_profile(free_rows=8, level=4e-3)
    world, bandit = ForestWorld(profile, 0.05), Bandit(BanditOptions(arms=CHAINS, rule=rule, memory=100.0))
    world.run(bandit, 2, 2000)
    share = [sum(r.plan.speculates for r in world.run(bandit, 2, 800)) / 800]
    world.hit = 0.95
    world.run(bandit, 2, 2000)
    share.append(sum(r.plan.speculates for r in world.run(bandit, 2, 800)) / 800)
    assert share[0] < (0.2 if rule == "ucb" else 0.5) and share[1] > (0.8 if rule == "ucb" else 0.5), share


CHAINS = (PLAIN_ARM, (4.0, 4, 1))


@settings(max_examples=40)
@given(forest=forests(), limit=st.integers(1, 8), arm=st.integers(1, 4))
def test_budget_and_closure_over_random_forests(forest, limit, arm):
    bandit = Bandit(BanditOptions(arms=(BanditOptions().arms[arm], PLAIN_ARM)))
    load = load_of(forest.batch_size, limit)
    check_step(bandit, load, cut(forest, max(1, bandit.plan(load).max_depth)))


def test_values_worth_trying():
    check_values(BanditOptions)


@pytest.mark.parametrize(
    "bad",
    [
        {"arms": (PLAIN_ARM,)},
        {"arms": (PLAIN_ARM, PLAIN_ARM)},
        {"arms": (PLAIN_ARM, (4.0, 9, 1))},
        {"arms": (PLAIN_ARM, (-1.0, 1, 1))},
        {"rule": "greedy"},
        {"explore": 0.0},
        {"memory": 1.0},
        {"hold": 0},
        {"switching": -0.1},
    ],
)
def test_bad_options_are_refused(bad):
    with pytest.raises(ConfigError):
        BanditOptions(**bad)
