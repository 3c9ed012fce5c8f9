"""Fixed controllers against their rules, by hand."""

from __future__ import annotations

import pytest
import torch

from echo_rl.contracts import AUTOREGRESSIVE, Frontier, SpecPlan
from echo_rl.controllers import make
from echo_rl.controllers.baselines.fixed import EAGLE1_TREE, Static, StaticOptions
from echo_rl.errors import ConfigError


def test_none_never_speculates(make_load):
    assert make("none").plan(make_load(8)) == AUTOREGRESSIVE


def test_chain_asks_for_one_path_a_request(make_load):
    assert make("chain").plan(make_load(4)) == SpecPlan(budget=12, max_depth=3, width=1)
    assert make("chain", steps=5).plan(make_load(2, max_nodes=2)) == SpecPlan(budget=4, max_depth=2, width=1)


def test_chain_verifies_the_whole_path(make_load, make_forest):
    chain = make("chain")
    plan = chain.plan(make_load(2))
    path = [(-1, 0.5), (0, 0.4), (1, 0.1)]
    selection = chain.select(make_forest(path, path), plan)
    assert selection.counts.tolist() == [3, 3] and selection.parents.tolist() == [-1, 0, 1, -1, 0, 1]


def test_eagle3_is_blind_to_the_batch(make_load, make_forest):
    eagle = make("eagle3", total=2, depth=2, top_k=2)
    plan = eagle.plan(make_load(2))
    assert plan == SpecPlan(budget=4, max_depth=2, width=2)
    sure, unsure = [(-1, 0.9), (-1, 0.8), (0, 0.7)], [(-1, 0.3), (-1, 0.2), (0, 0.1)]
    selection = eagle.select(make_forest(sure, unsure), plan)
    assert selection.counts.tolist() == [2, 2]  # the batch-wide choice would give the first request all three
    assert selection.tokens.tolist() == [0, 1, 3, 4]


def test_eagle3_defaults(make_load):
    assert make("eagle3").plan(make_load(2)) == SpecPlan(budget=120, max_depth=8, width=10)
    assert make("eagle3").plan(make_load(2, max_nodes=32)).budget == 64


def test_static_picks_child_ranks_whatever_the_scores(make_load, make_forest):
    static = make("static", paths=((0,), (1,), (1, 0)))
    plan = static.plan(make_load(1))
    assert plan == SpecPlan(budget=3, max_depth=2, width=2)
    # nodes 0, 1, 2 are children of the root with ranks 1, 0, 2; node 3 and 4 are children of node 0
    forest = make_forest([(-1, 0.3), (-1, 0.5), (-1, 0.2), (0, 0.01), (0, 0.02), (1, 0.4)])
    selection = static.select(forest, plan)
    assert selection.tokens.tolist() == [0, 1, 4]  # (1,), (0,), (1, 0): the likelier child of the rank-1 node
    assert selection.parents.tolist() == [-1, -1, 0]


def test_static_leaves_out_what_was_not_drafted(make_load, make_forest):
    static = make("static", paths=((0,), (1,), (1, 0)))
    selection = static.select(make_forest([(-1, 0.5), (-1, 0.0), (0, 0.4)]), static.plan(make_load(1)))
    assert selection.tokens.tolist() == [0]


def test_static_cuts_deep_paths_first_under_a_node_limit(make_load, make_forest):
    static = make("static", paths=((0, 0), (0,), (1,)))
    plan = static.plan(make_load(1, max_nodes=2))
    assert (plan.budget, plan.max_depth) == (2, 1)
    assert static.select(make_forest([(-1, 0.5), (-1, 0.3)]), plan).size == 2


def test_default_static_tree():
    assert len(EAGLE1_TREE) == 25 and max(map(len, EAGLE1_TREE)) == 5
    Static(StaticOptions())  # every node has its parent


@pytest.mark.parametrize("paths", [(), ((0, 0),), ((0,), (0,)), ((-1,),)])
def test_bad_topologies_are_refused(paths):
    with pytest.raises(ConfigError, match="static path"):
        make("static", paths=paths)


def test_no_requests_means_no_speculation(make_load):
    for name in ("chain", "static", "eagle3", "echo"):
        assert make(name).plan(make_load(0)) == AUTOREGRESSIVE


def test_default_extend_follows_the_plan():
    plan = SpecPlan(budget=4, max_depth=3, width=2, gates=((0, 0.5),))
    scores = torch.tensor([[0.6, 0.1], [0.4, 0.3], [0.9, 0.9], [float("nan"), 0.1], [0.5, 0.0]]).log()
    alive = torch.tensor([True, True, False, True, True])
    chain = make("chain")
    assert chain.extend(Frontier(0, scores, alive), plan).tolist() == [True, False, False, False, True]
    assert chain.extend(Frontier(1, scores, alive), plan).tolist() == alive.tolist()
