"""The dynamic trees against their rules, by hand; then the budget and closure over random forests."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from echo_rl.config import EngineConfig
from echo_rl.contracts import NO_GATE, Controller, Forest, Frontier, LoadView, Selection, SpecPlan
from echo_rl.controllers.baselines.dynamic import (
    Ddd,
    DddOptions,
    Eagle2,
    Eagle2Options,
    OptTree,
    OptTreeOptions,
    Talon,
    TalonOptions,
    TreeOptions,
    closed,
)
from echo_rl.errors import ConfigError
from tests.controllers.test_selection import check_closed, check_packed, existing, forests

NAN = float("nan")
RULES = ((Eagle2, Eagle2Options), (Ddd, DddOptions), (Talon, TalonOptions), (OptTree, OptTreeOptions))


def level(depth: int, *rows: list[float], alive: list[bool] | None = None) -> Frontier:
    """The frontier of these path probabilities."""
    return Frontier(depth, torch.tensor(rows).log(), torch.tensor(alive or [True] * len(rows)))


def serve(controller: Controller, load: LoadView, forest: Forest) -> tuple[SpecPlan, Forest, Selection | None]:
    """One step on a forest that the drafter would have proposed, cut where the controller stops."""
    plan = controller.plan(load)
    if not plan.speculates:
        return plan, forest, None
    alive = torch.ones(forest.batch_size, dtype=torch.bool)
    stop, depth = torch.zeros(forest.batch_size, dtype=torch.int64), 1
    while depth <= int(forest.depths[-1]):
        scores = forest.scores[:, forest.depths == depth - 1].masked_fill(~alive[:, None], NO_GATE)
        if plan.gate(depth - 1) is not None:
            answer = controller.extend(Frontier(depth - 1, scores, alive), plan)
            assert answer.dtype == torch.bool and answer.shape == alive.shape and not (answer & ~alive).any()
            alive = answer
        if not alive.any():
            break
        stop[alive] = depth
        depth += 1
    drafted = forest.depths < depth
    scores = forest.scores[:, drafted].masked_fill(forest.depths[drafted] > stop[:, None], NO_GATE)
    cut = Forest(forest.tokens[:, drafted], forest.parents[:, drafted], forest.depths[drafted], scores, stop)
    return plan, cut, controller.select(cut, plan)


def check_step(controller: Controller, load: LoadView, forest: Forest) -> None:
    """Within the plan and the node limit, existing nodes only, closed under ancestors."""
    plan, cut, selection = serve(controller, load, forest)
    if selection is None:
        return
    assert selection.size <= plan.budget <= load.batch_size * load.max_nodes
    assert int(selection.counts.amax()) <= load.max_nodes
    mask = torch.isin(cut.tokens, selection.tokens)
    assert not (mask & ~existing(cut)).any()
    check_closed(cut, mask)
    check_packed(cut, mask, selection)


def check_tunable(options: type[TreeOptions]) -> None:
    """Known fields, values that are accepted, few combinations, and trees that recordings and engine hold."""
    tunable = options.TUNABLE
    assert set(tunable) <= {field.name for field in fields(options)}
    assert 3 <= math.prod(map(len, tunable.values())) <= 24
    for values in product(*tunable.values()):
        chosen = options(**dict(zip(tunable, values, strict=True)))
        assert chosen.depth <= 8 and ("top_k" not in tunable or chosen.top_k <= 8)
    default = options()
    assert default.top_k * (default.depth - 1) <= EngineConfig().max_expanded


def test_eagle2_is_eagle3_with_its_own_defaults(make_load, make_forest):
    assert Eagle2(Eagle2Options()).plan(make_load(2)) == SpecPlan(budget=118, max_depth=6, width=10)
    eagle = Eagle2(Eagle2Options(total=2, depth=2, top_k=2))
    sure, unsure = [(-1, 0.9), (-1, 0.8), (0, 0.7)], [(-1, 0.3), (-1, 0.2), (0, 0.1)]
    selection = eagle.select(make_forest(sure, unsure), eagle.plan(make_load(2)))
    assert selection.tokens.tolist() == [0, 1, 3, 4]


def test_ddd_asks_at_its_checks_only(make_load):
    ddd = Ddd(DddOptions())
    assert [depth for depth, _ in ddd.plan(make_load(1)).gates] == [4, 6, 8]
    shallow = Ddd(DddOptions(depth=7, checks=(1, 5, 7)))
    assert [depth for depth, _ in shallow.plan(make_load(1)).gates] == [0, 4]  # nothing is drafted past level 7


def test_ddd_sums_the_beam(make_load):
    ddd = Ddd(DddOptions(top_k=2, tau=math.log(0.5), checks=(1,)))
    front = level(
        0, [0.4, 0.1, 0.2], [0.3, 0.15, 0.1], [0.9, 0.05, 0.0], [NAN, 0.45, 0.1], [0.5, 0.0, NAN],
        alive=[True, True, False, True, True],
    )  # fmt: skip
    assert ddd.extend(front, ddd.plan(make_load(5))).tolist() == [True, False, False, True, True]


def test_talon_keeps_what_is_near_its_levels_best(make_load, make_forest):
    nodes = [(-1, 0.8), (-1, 0.01), (0, 0.6), (0, 0.05), (1, 0.009), (2, 0.4), (2, 0.055), (3, 0.045)]
    # level 0 whole; level 1 from .06 on; level 2 from .04 on, but node 7 lost its parent
    forest = make_forest(nodes)
    for total, kept in ((6, [0, 1, 2, 5, 6]), (5, [0, 1, 2, 5, 6]), (4, [0, 1, 2, 5]), (2, [0, 1]), (1, [0])):
        talon = Talon(TalonOptions(total=total, top_k=2, depth=3, mu=0.1))
        assert talon.select(forest, talon.plan(make_load(1))).tokens.tolist() == kept


def test_talon_drafts_until_the_budget_is_full(make_load):
    talon = Talon(TalonOptions(total=4, top_k=2, depth=4, mu=0.1))
    plan = talon.plan(make_load(2))
    assert [depth for depth, _ in plan.gates] == [0, 1, 2]
    assert talon.extend(level(0, [0.8, 0.01], [0.5, 0.4]), plan).tolist() == [True, True]  # 2 nodes each
    assert talon.extend(level(1, [0.6, 0.05, 0.009], [0.3, 0.2, 0.1]), plan).tolist() == [True, False]  # 3 and 5
    front = level(2, [0.5, 0.04], [0.0, 0.0], alive=[True, False])
    assert talon.extend(front, plan).tolist() == [False, False]
    assert talon.extend(level(0, [0.8, 0.01], [0.5, 0.4]), plan).tolist() == [True, True]  # the next step starts anew


def test_opt_tree_drafts_while_a_level_adds_enough(make_load):
    opt = OptTree(OptTreeOptions(total=2, top_k=2, depth=4, threshold=0.3))
    plan = opt.plan(make_load(2))
    assert opt.extend(level(0, [0.6, 0.3], [0.9, 0.05]), plan).tolist() == [True, True]
    # E(A) of the best two: .9 -> 1.1 and .95 -> 1.75
    assert opt.extend(level(1, [0.5, 0.1], [0.85, 0.04]), plan).tolist() == [False, True]
    assert opt.extend(level(2, [0.0, 0.0], [0.88, 0.01], alive=[False, True]), plan).tolist() == [False, False]
    assert opt.extend(level(0, [0.2, 0.05], [0.9, NAN]), plan).tolist() == [False, True]


def test_opt_tree_verifies_the_best_of_all_levels(make_load, make_forest):
    opt = OptTree(OptTreeOptions(total=3, top_k=2, depth=2))
    forest = make_forest([(-1, 0.6), (-1, 0.3), (0, 0.5), (0, 0.1)])
    assert opt.select(forest, opt.plan(make_load(1))).tokens.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("options", "bad"),
    [
        (Eagle2Options, {"total": 0}),
        (Eagle2Options, {"depth": 0}),
        (DddOptions, {"tau": 3.0}),
        (DddOptions, {"tau": NAN}),
        (DddOptions, {"checks": (0,)}),
        (DddOptions, {"checks": (5, 5)}),
        (TalonOptions, {"mu": 0.0}),
        (TalonOptions, {"mu": 1.5}),
        (TalonOptions, {"top_k": 0}),
        (OptTreeOptions, {"threshold": -0.1}),
        (OptTreeOptions, {"threshold": NAN}),
    ],
)
def test_bad_options_are_refused(options, bad):
    with pytest.raises(ConfigError, match="give"):
        options(**bad)


@pytest.mark.parametrize("options", [options for _, options in RULES])
def test_tunable_values_are_usable(options):
    check_tunable(options)


@settings(max_examples=80)
@given(forest=forests(), data=st.data())
def test_closed_is_the_largest_closed_part(forest, data):
    shape = forest.parents.shape
    draws = data.draw(st.lists(st.booleans(), min_size=forest.parents.numel(), max_size=forest.parents.numel()))
    mask = torch.tensor(draws).view(shape)
    everything = replace(forest, scores=torch.where(mask, 0.0, NO_GATE))
    assert torch.equal(closed(forest, mask), existing(everything))


@pytest.mark.parametrize(("rule", "options"), RULES)
@settings(max_examples=60)
@given(forest=forests(), total=st.integers(1, 12), top_k=st.integers(1, 4), limit=st.integers(1, 8))
def test_steps_stay_within_budget_and_closed(rule, options, forest, total, top_k, limit):
    controller = rule(options(total=total, top_k=top_k, depth=5))
    if rule is Ddd:
        controller = Ddd(DddOptions(total=total, top_k=top_k, depth=5, checks=(1, 3)))
    check_step(controller, LoadView(forest.batch_size, 0, 0, 64.0, 0.1, limit), forest)
