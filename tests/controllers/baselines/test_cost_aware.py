"""The cost-aware trees against their rules, by hand and by brute force; then budget and closure over random forests."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from echo_rl.contracts import AUTOREGRESSIVE, LoadView
from echo_rl.controllers.baselines.cost_aware import Cast, CastOptions, Evict, EvictOptions, Smart, SmartOptions
from echo_rl.controllers.baselines.sequoia import Sequoia, SequoiaOptions
from echo_rl.controllers.tree_shapes import likeliest_tree
from echo_rl.errors import ConfigError
from tests.controllers.baselines.test_dynamic import check_step, check_tunable, level, serve
from tests.controllers.test_selection import forests
from tests.profiles import hinge_profile

RULES = ((Evict, EvictOptions), (Smart, SmartOptions), (Cast, CastOptions), (Sequoia, SequoiaOptions))


@pytest.fixture
def steep(make_profile):
    """A plain step takes 11 ms, a speculative one 11.5 ms and 5 ms for each row past 4; a level takes 2 ms."""
    return make_profile(base=10e-3, free_rows=4, per_row=5e-3)


@pytest.fixture
def paired(make_profile):
    """For two requests a plain step is 11 ms; a node each is free, then it takes 2 ms, as does a level."""
    return make_profile(base=10e-3, free_rows=4, per_row=1e-3)


def test_evict_takes_the_prefix_with_the_best_rate(steep, make_load, make_forest):
    evict = Evict(EvictOptions(profile=steep, depth=2, top_k=3))
    plan = evict.plan(make_load(1))
    forest = make_forest([(-1, 0.9), (-1, 0.2), (0, 0.6), (0, 0.5), (2, 0.1)])
    # tokens 1, 1.9, 2.5, 3.0, 3.2 in 11.5, 11.5, 11.5, 11.5, 16.5 ms
    assert evict.select(forest, plan).tokens.tolist() == [0, 2, 3]


def test_evict_has_one_k_for_the_batch(steep, make_load, make_forest):
    evict = Evict(EvictOptions(profile=steep, depth=2, top_k=2))
    forest = make_forest([(-1, 0.9), (-1, 0.05), (0, 0.8)], [(-1, 0.3), (-1, 0.2), (0, 0.1)])
    # 4 rows are free: one node each. A second brings .8 + .2 tokens in 10 ms, 3.2 come in 11.5 ms without
    assert evict.select(forest, evict.plan(make_load(2))).counts.tolist() == [1, 1]


def test_evict_counts_every_requests_own_token(paired, make_load, make_forest):
    evict = Evict(EvictOptions(profile=paired, depth=2, top_k=2))
    forest = make_forest([(-1, 0.8), (0, 0.25)], [(-1, 0.8), (0, 0.25)])
    # 3.6 tokens in 11.5 ms are 313 a second, 4.1 in 13.5 ms 304; with one token for both requests it would be 226, 230
    assert evict.select(forest, evict.plan(make_load(2))).counts.tolist() == [1, 1]


def test_evict_may_keep_nothing_but_never_plans_for_it(make_profile, make_load, make_forest):
    evict = Evict(EvictOptions(profile=make_profile(base=10e-3, free_rows=1, per_row=5e-3)))
    plan = evict.plan(make_load(1))
    assert plan.budget == 32 and plan.max_depth == 8
    assert evict.select(make_forest([(-1, 0.2), (0, 0.1)]), plan).size == 0


def test_smart_moves_nodes_to_the_request_that_earns_more(steep, make_load, make_forest):
    smart = Smart(SmartOptions(profile=steep, depth=2, top_k=2))
    plan = smart.plan(make_load(2))
    forest = make_forest([(-1, 0.9), (-1, 0.05), (0, 0.8)], [(-1, 0.1), (-1, 0.05), (0, 0.04)])
    # 4 rows are free; then a node of probability .1 costs 5 ms while 3.7 tokens come in 15.5 ms
    assert smart.select(forest, plan).tokens.tolist() == [0, 2]


def test_smart_counts_the_drafting_that_was_paid(make_profile, make_load, make_forest):
    smart = Smart(SmartOptions(profile=make_profile(base=10e-3, free_rows=2, per_row=4e-3), depth=2, top_k=2))
    plan = smart.plan(make_load(1))
    # 1.9 tokens in 11.5 ms and 4 ms of drafting; another 4 ms pay from .49 on (from .66 on if drafting were free)
    for probability, tokens in ((0.55, [0, 1]), (0.45, [0])):
        assert smart.select(make_forest([(-1, 0.9), (0, probability)]), plan).tokens.tolist() == tokens


def test_smart_drafts_on_where_a_node_beats_the_speedup(make_profile, make_load):
    profile = make_profile(base=10e-3, free_rows=2, per_row=4e-3)
    smart = Smart(SmartOptions(profile=profile, depth=3, top_k=2))
    plan = smart.plan(make_load(2))
    assert [depth for depth, _ in plan.gates] == [0, 1]
    # 2 tokens in 13.5 ms: 148 a second. A node takes 4 ms and a quarter of a level: .9 earns 200, then .5 earns 111
    assert smart.extend(level(0, [0.9, 0.05], [0.5, 0.2]), plan).tolist() == [True, False]
    # then 2.9 tokens in 19.5 ms: 149 a second. A node takes 4 ms and half of a level: .7 earns 140
    assert smart.extend(level(1, [0.7, 0.01], [0.0, 0.0], alive=[True, False]), plan).tolist() == [False, False]
    assert smart.extend(level(0, [0.0, 0.0], [0.0, 0.0]), plan).tolist() == [False, False]


def test_smart_leaves_the_root_alone_where_one_level_cannot_pay(make_profile, make_load):
    # 32 requests: plain 23.8 ms; a level for all takes 2 ms, its nodes 17.6 ms, speculating .5 ms
    assert Smart(SmartOptions(profile=make_profile(), prior=0.9)).plan(make_load(32)).speculates
    assert Smart(SmartOptions(profile=make_profile(), prior=0.8)).plan(make_load(32)) == AUTOREGRESSIVE
    assert Smart(SmartOptions(profile=make_profile(), prior=0.8)).plan(make_load(1)).speculates


@settings(max_examples=60)
@given(forest=forests(), per_row=st.sampled_from([0.0, 1e-3, 8e-3]), free=st.sampled_from([1, 4, 12]))
def test_smart_selects_the_fastest_prefix(forest, per_row, free):
    profile, batch = hinge_profile(free_rows=free, per_row=per_row), forest.batch_size
    smart = Smart(SmartOptions(profile=profile, depth=4, top_k=4))
    plan, cut, selection = serve(smart, LoadView(batch, 0, 0, 128.0, 0.1, 64), forest)
    if selection is None:
        return
    depth = int(cut.depths[-1]) + 1
    ranked = sorted(cut.scores.exp().nan_to_num(nan=0.0).flatten().tolist(), reverse=True)
    rates = [
        (batch + sum(ranked[:n]))
        / (profile.verify_seconds(batch, batch + n, 128.0) + profile.overhead_seconds(batch, n, True)
           + profile.draft_seconds(batch, 4, depth))
        for n in range(min(plan.budget, len(ranked)) + 1)
    ]  # fmt: skip
    assert rates[selection.size] >= max(rates) * (1.0 - 1e-5) or bool(cut.scores.isnan().any())


def test_cast_widens_deepens_and_reranks(paired, make_load, make_forest):
    cast = Cast(CastOptions(profile=paired, depth=2, top_k=2, c1=1.0, c2=1.0, c3=1.0, alpha=0.8))
    plan = cast.plan(make_load(2))
    # a node costs 2 / 11 = .18, so .15 and .1 are dropped; a level and its node cost .36: u = .5 pays, u = .4 not
    assert cast.extend(level(0, [0.15, 0.5], [0.4, 0.1]), plan).tolist() == [True, False]
    first = [(-1, 0.15), (-1, 0.5), (1, 0.4), (0, 0.14), (1, 0.05)]
    second = [(-1, 0.4), (-1, 0.1), (0, 0.0), (0, 0.0), (1, 0.0)]
    selection = cast.select(make_forest(first, second), plan)
    assert selection.tokens.tolist() == [1, 2, 5] and selection.counts.tolist() == [2, 1]


def test_cast_constants_move_each_decision(paired, make_profile, make_load, make_forest):
    front = level(0, [0.3, 0.05], [0.15, 0.05])  # u * alpha is .24 and .12; a level and its node cost .36
    for c2, deeper in ((1.0, [False, False]), (0.5, [True, False]), (0.3, [True, True])):
        cast = Cast(CastOptions(profile=paired, depth=2, top_k=2, c2=c2))
        assert cast.extend(front, cast.plan(make_load(2))).tolist() == deeper, c2
    alone = make_profile(base=10e-3, free_rows=2, per_row=1e-3)  # one node is free, each further one costs .091
    forest = make_forest([(-1, 0.5), (-1, 0.15), (0, 0.3)])
    for constants, tokens in (({"c3": 0.1}, [0, 1, 2]), ({"c3": 4.0}, [0]), ({"c1": 4.0, "c3": 0.1}, [0, 2])):
        cast = Cast(CastOptions(profile=alone, depth=2, top_k=2, **constants))
        plan = cast.plan(make_load(1))
        cast.extend(level(0, [0.5, 0.15]), plan)
        assert cast.select(forest, plan).tokens.tolist() == tokens, constants
    plan = cast.plan(make_load(1))  # the last step dropped node 1; a new one that isn't asked has dropped nothing
    assert cast.select(forest, plan).tokens.tolist() == [0, 1, 2]


def test_cast_stops_where_its_tree_is_full(make_profile, make_load):
    profile = make_profile(base=10e-3, free_rows=2, per_row=1e-3)  # both candidates are kept, a free level always pays
    for total, deeper in ((2, False), (3, True)):
        cast = Cast(CastOptions(profile=profile, total=total, depth=2, top_k=2, c2=0.0))
        assert cast.extend(level(0, [0.5, 0.15]), cast.plan(make_load(1))).tolist() == [deeper]


def test_cast_decodes_plainly_where_no_level_pays(make_profile, make_load):
    # 32 requests: a level, a node each and speculating take 20.1 ms of a plain step's 23.8: .845
    assert Cast(CastOptions(profile=make_profile(), alpha=0.8)).plan(make_load(32)) == AUTOREGRESSIVE
    assert Cast(CastOptions(profile=make_profile(), alpha=0.9)).plan(make_load(32)).speculates


def brute_force(hit: float, nodes: int, depth: int) -> float:
    """Sequoia's dynamic program: the best yield of at most `nodes` nodes in `depth` levels below one node."""

    @cache
    def best(left: int, levels: int, rank: int) -> float:
        if not left or not levels:
            return 0.0
        p = hit * (1.0 - hit) ** rank
        taken = (p * (1.0 + best(m - 1, levels - 1, 0)) + best(left - m, levels, rank + 1) for m in range(1, left + 1))
        return max(taken)

    return best(nodes, depth, 0)


@pytest.mark.parametrize("hit", [0.3, 0.6, 0.85])
def test_sequoia_trees_are_the_dynamic_programs(hit, make_profile):
    sequoia = Sequoia(SequoiaOptions(profile=make_profile(), hit=hit, total=9, depth=4, top_k=9))
    for depth, trees in enumerate(sequoia._grown, 1):
        for nodes in range(1, 10):
            assert trees.gain[nodes - 1] == pytest.approx(brute_force(hit, nodes, depth))


def test_sequoia_picks_the_fastest_tree_for_the_batch(make_profile, make_load):
    profile = make_profile()
    sequoia = Sequoia(SequoiaOptions(profile=profile, hit=0.7, total=20, depth=6, top_k=8))

    def rate(batch, nodes, depth):
        tree = likeliest_tree(nodes, depth, 0.7)
        deepest = max(map(len, tree))
        parents = [len({path[:-1] for path in tree if len(path) == n}) for n in range(1, deepest + 1)]
        width = max(*parents, 1 + max(rank for path in tree for rank in path))
        gain = sum(0.7 ** len(path) * 0.3 ** sum(path) for path in tree)
        return batch * (1.0 + gain) / profile.step_seconds(batch, batch * nodes, width, deepest, 128.0)

    for batch in (1, 4, 8):
        best, nodes = max((rate(batch, n, d), n) for n in range(1, 21) for d in range(1, 7))
        plan = sequoia.plan(make_load(batch))
        assert plan.budget == batch * nodes and best > batch / profile.step_seconds(batch, 0, 0, 0, 128.0)
    assert sequoia.plan(make_load(32)) == AUTOREGRESSIVE


def test_sequoia_is_a_fixed_topology(make_profile, make_load, make_forest):
    free = make_profile(free_rows=64, level=1e-5)
    sequoia = Sequoia(SequoiaOptions(profile=free, hit=0.6, total=3, depth=2, top_k=2))
    plan = sequoia.plan(make_load(1))  # (0,), (0, 0), (1,) are the likeliest
    assert (plan.budget, plan.max_depth, plan.width) == (3, 2, 2)
    forest = make_forest([(-1, 0.1), (-1, 0.5), (0, 0.01), (1, 0.02), (1, 0.4)])
    assert sequoia.select(forest, plan).tokens.tolist() == [0, 1, 4]
    assert sequoia.plan(make_load(1, max_nodes=2)).budget == 2


def test_sequoia_stays_within_its_width(make_profile):
    for trees in Sequoia(SequoiaOptions(profile=make_profile(), hit=0.2, top_k=3))._grown:
        assert max(trees.width) <= 3 and max(rank for path in trees.paths for rank in path) < 3


@pytest.mark.parametrize(
    ("options", "bad"),
    [
        (EvictOptions, {"total": 0}),
        (SmartOptions, {"prior": 0.0}),
        (SmartOptions, {"depth": 0}),
        (CastOptions, {"c1": -1.0}),
        (CastOptions, {"c3": float("nan")}),
        (CastOptions, {"alpha": 0.0}),
        (SequoiaOptions, {"hit": 1.0}),
        (SequoiaOptions, {"top_k": 0}),
    ],
)
def test_bad_options_are_refused(options, bad):
    with pytest.raises(ConfigError, match="give"):
        options(**bad)


@pytest.mark.parametrize(("rule", "options"), RULES)
def test_a_missing_profile_is_refused_and_the_default_found(rule, options):
    with pytest.raises(ConfigError, match="no/such/file"):
        rule(options(profile="no/such/file.json"))
    assert rule(options()).plan(LoadView(0, 0, 0, 0.0, 0.0, 64)) == AUTOREGRESSIVE


@pytest.mark.parametrize("options", [options for _, options in RULES])
def test_tunable_values_are_usable(options):
    check_tunable(options)


@pytest.mark.parametrize(("rule", "options"), RULES)
@settings(max_examples=60)
@given(
    forest=forests(),
    total=st.integers(1, 12),
    per_row=st.sampled_from([0.0, 0.5e-3, 8e-3]),
    limit=st.integers(1, 8),
)
def test_steps_stay_within_budget_and_closed(rule, options, forest, total, per_row, limit):
    controller = rule(options(profile=hinge_profile(per_row=per_row), total=total, top_k=4, depth=5))
    load = LoadView(forest.batch_size, 0, 0, 64.0, 0.1, limit)
    check_step(controller, load, forest)
    check_step(controller, load, forest)  # nothing is left over from the step before


def test_the_same_step_twice_is_the_same_selection(steep, make_load, make_forest):
    forest = make_forest([(-1, 0.9), (-1, 0.2), (0, 0.6), (1, 0.1), (2, 0.5)])
    for rule, options in RULES:
        controller = rule(options(profile=steep, depth=3, top_k=2))
        (_, _, one), (_, _, two) = (serve(controller, make_load(1), forest) for _ in range(2))
        assert one is not None and two is not None and torch.equal(one.tokens, two.tokens), controller.name
