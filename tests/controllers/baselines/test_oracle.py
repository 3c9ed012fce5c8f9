"""The clairvoyant upper bound: it verifies what is accepted and nothing else, and refuses live forests."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from echo_rl.contracts import OFF_PATH, Forest, LoadView
from echo_rl.controllers.registry import make
from echo_rl.errors import ConfigError, PlanViolation

LOAD = LoadView(2, 0, 0, 100.0, 0.1, 8)
FOREST = Forest(
    tokens=torch.tensor([[7, OFF_PATH, 9, OFF_PATH], [OFF_PATH, OFF_PATH, OFF_PATH, OFF_PATH]]),
    parents=torch.tensor([[-1, -1, 0, 0], [-1, -1, 0, 0]]),
    depths=torch.tensor([0, 0, 1, 1]),
    scores=torch.tensor([[-1.0, -0.1, -1.5, -1.2], [-0.1, -0.2, -0.3, -0.4]]),
    stop_depth=torch.tensor([1, 1]),
)


def test_only_the_path_is_verified():
    oracle = make("oracle", depth=2, width=2)
    plan = oracle.plan(LOAD)
    selection = oracle.select(FOREST, plan)
    assert selection.counts.tolist() == [2, 0]
    assert selection.tokens.tolist() == [7, 9]
    assert selection.size <= plan.budget == 4


def test_an_unlikely_node_of_the_path_is_verified_in_a_large_tree():
    """The cap on a request's nodes is of verified ones; the path is the last of ten nodes."""
    tokens = torch.full((1, 10), OFF_PATH)
    tokens[0, 9] = 7
    wide = Forest(
        tokens=tokens, parents=torch.full((1, 10), -1), depths=torch.zeros(10, dtype=torch.int64),
        scores=-torch.arange(1.0, 11.0)[None], stop_depth=torch.tensor([0]),
    )  # fmt: skip
    oracle = make("oracle", depth=1, width=10)
    assert oracle.select(wide, oracle.plan(replace(LOAD, batch_size=1))).tokens.tolist() == [7]
    low = oracle.plan(replace(LOAD, max_nodes=1))
    assert oracle.select(FOREST, low).tokens.tolist() == [7]


def test_a_step_in_which_all_is_accepted_is_no_live_one():
    """One node a level, every one on the path."""
    lucky = Forest(
        tokens=torch.tensor([[7, 9]]), parents=torch.tensor([[-1, 0]]), depths=torch.tensor([0, 1]),
        scores=torch.tensor([[-1.0, -1.5]]), stop_depth=torch.tensor([1]),
    )  # fmt: skip
    oracle = make("oracle", depth=2, width=1)
    assert oracle.select(lucky, oracle.plan(replace(LOAD, batch_size=1))).tokens.tolist() == [7, 9]


def test_dear_drafting_is_left_out():
    assert not make("oracle", depth=8, width=6).plan(replace(LOAD, batch_size=64)).speculates


def test_a_live_forest_and_bad_options_are_refused():
    oracle = make("oracle")
    with pytest.raises(PlanViolation, match="replay"):
        oracle.select(replace(FOREST, tokens=FOREST.tokens.abs() + 3), oracle.plan(LOAD))
    with pytest.raises(ConfigError, match="depth 9"):
        make("oracle", depth=9)
