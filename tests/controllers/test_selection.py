"""The pure functions that pick nodes: hand-computed picks, then properties over random forests."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from echo_rl.contracts import NO_GATE, Forest, Frontier, Selection
from echo_rl.controllers import selection
from echo_rl.controllers.baselines.fixed import Static, StaticOptions, child_ranks, path_ids
from echo_rl.controllers.selection import even_split, global_top_k, likeliest, pack, passing, per_request_top_k, scaled

LEVELS = (0.0, -0.25, -0.5, -1.0, -3.0, float("nan"), NO_GATE)  # few values, so that ties are common

CHANCES = (float("nan"), 0.0, 0.1, 0.3, 0.5, 0.7, 1.0)


@st.composite
def forests(draw: st.DrawFn) -> Forest:
    """Any forest that a drafter could propose, with ties, padding, NaN and truncated requests."""
    batch, width, depth = draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    sizes = [width] + [draw(st.integers(1, 6)) for _ in range(depth - 1)]
    starts = [sum(sizes[:i]) for i in range(depth)]
    parents, scores = [], []
    for _ in range(batch):
        row_parents, row_scores = [-1] * width, [draw(st.sampled_from(LEVELS)) for _ in range(width)]
        for level in range(1, depth):
            for _ in range(sizes[level]):
                parent = draw(st.integers(starts[level - 1], starts[level] - 1))
                row_parents.append(parent)
                row_scores.append(row_scores[parent] + draw(st.sampled_from(LEVELS)))
        if draw(st.booleans()):  # a NaN parent whose child has a score all the same
            row_scores[-1] = -0.125 if row_scores[row_parents[-1]] != row_scores[row_parents[-1]] else row_scores[-1]
        parents.append(row_parents)
        scores.append(row_scores)
    depths = torch.tensor([level for level in range(depth) for _ in range(sizes[level])])
    tokens = torch.arange(batch * len(depths)).view(batch, -1)
    stop = torch.full((batch,), depth - 1)
    return Forest(tokens, torch.tensor(parents), depths, torch.tensor(scores), stop)


def existing(forest: Forest) -> torch.Tensor:
    """[B, M] nodes with a score whose whole path has scores, the slow way."""
    exists = torch.zeros_like(forest.exists)
    for b in range(forest.batch_size):
        for m in range(forest.scores.shape[1]):
            parent = int(forest.parents[b, m])
            exists[b, m] = bool(forest.scores[b, m] > NO_GATE) and (parent < 0 or bool(exists[b, parent]))
    return exists


def check_closed(forest: Forest, mask: torch.Tensor) -> None:
    for b, m in mask.nonzero().tolist():
        parent = int(forest.parents[b, m])
        assert parent < 0 or mask[b, parent]


def check_packed(forest: Forest, mask: torch.Tensor, selection: Selection) -> None:
    """The selection holds exactly the mask's nodes, each with its own parent, parents first."""
    counts = selection.counts.tolist()
    assert counts == mask.sum(1).tolist()
    assert sum(counts) == selection.size == len(selection.parents) == len(selection.depths)
    assert len(set(selection.tokens.tolist())) == selection.size  # tokens are unique in these forests
    start = 0
    for b, count in enumerate(counts):
        tokens = selection.tokens[start : start + count].tolist()
        parents = selection.parents[start : start + count].tolist()
        depths = selection.depths[start : start + count].tolist()
        for i, (token, parent, depth) in enumerate(zip(tokens, parents, depths, strict=True)):
            node = token - int(forest.tokens[b, 0])
            above = int(forest.parents[b, node])
            assert mask[b, node] and depth == int(forest.depths[node])
            assert parent < i
            assert (parent == -1) == (above == -1)
            assert parent == -1 or tokens[parent] == int(forest.tokens[b, above])
        start += count


def test_global_top_k_by_hand(make_forest):
    forest = make_forest(
        [(-1, 0.9), (-1, 0.1), (0, 0.8), (2, 0.7)],
        [(-1, 0.5), (-1, 0.4), (0, 0.3), (2, 0.0)],
    )
    mask = global_top_k(forest, 5)
    assert mask.tolist() == [[True, False, True, True], [True, True, False, False]]
    selection = pack(forest, mask)
    assert selection.counts.tolist() == [3, 2]
    assert selection.tokens.tolist() == [0, 2, 3, 4, 5]
    assert selection.parents.tolist() == [-1, 0, 1, -1, -1]
    assert selection.depths.tolist() == [0, 1, 2, 0, 0]


def test_ties_take_shallow_nodes_of_all_requests_first(make_forest):
    certain = [(-1, 1.0), (0, 1.0), (1, 1.0)]
    assert global_top_k(make_forest(certain, certain), 3).tolist() == [[True, True, False], [True, False, False]]


def test_limit_hands_the_surplus_to_other_requests(make_forest):
    forest = make_forest([(-1, 0.9), (0, 0.8), (1, 0.7)], [(-1, 0.5), (0, 0.4), (1, 0.3)])
    assert global_top_k(forest, 4).sum(1).tolist() == [3, 1]
    assert global_top_k(forest, 4, limit=2).sum(1).tolist() == [2, 2]
    assert global_top_k(forest, 3, limit=2).sum(1).tolist() == [2, 1]


def test_per_request_top_k_takes_a_share_each(make_forest):
    forest = make_forest([(-1, 0.9), (0, 0.8), (1, 0.7)], [(-1, 0.5), (0, 0.4), (1, 0.0)])
    assert per_request_top_k(forest, 2).sum(1).tolist() == [2, 2]
    assert per_request_top_k(forest, 3).sum(1).tolist() == [3, 2]
    assert per_request_top_k(forest, torch.tensor([0, 1])).sum(1).tolist() == [0, 1]


def test_even_split():
    assert even_split(7, 3).tolist() == [3, 2, 2]
    assert even_split(2, 4).tolist() == [1, 1, 0, 0]


def test_nothing_to_select(make_forest):
    forest = make_forest([(-1, 0.0), (0, 0.0)])
    for k in (0, 1, 5):
        selection = pack(forest, global_top_k(forest, k))
        assert selection.size == 0 and selection.counts.tolist() == [0]


def test_pack_refuses_an_open_mask(make_forest):
    with pytest.raises(AssertionError, match="closed under ancestors"):
        pack(make_forest([(-1, 0.9), (0, 0.8)]), torch.tensor([[False, True]]))


@settings(max_examples=120)
@given(forest=forests(), k=st.integers(0, 60), limit=st.none() | st.integers(1, 20))
def test_global_top_k_properties(forest, k, limit):
    mask, exists = global_top_k(forest, k, limit), existing(forest)
    room = exists.sum(1) if limit is None else exists.sum(1).clamp(max=limit)
    assert int(mask.sum()) == min(k, int(room.sum()))  # strict, and nothing is wasted
    assert limit is None or int(mask.sum(1).amax()) <= limit
    assert not (mask & ~exists).any()
    check_closed(forest, mask)
    check_packed(forest, mask, pack(forest, mask))
    if limit is None and 0 < int(mask.sum()) < int(exists.sum()):
        assert forest.scores[mask].min() >= forest.scores[exists & ~mask].max()


@settings(max_examples=200)
@given(
    forest=forests(),
    k=st.integers(0, 60),
    limit=st.none() | st.integers(1, 20),
    powers=st.sampled_from([None, (0.5,), (1.0, 1.25, 2.0)]),
    floor=st.sampled_from([0.0, 0.1, 0.6]),
    few=st.sampled_from([0, 256]),
)
def test_the_quick_pick_is_the_specified_one(forest, k, limit, powers, floor, few):
    powers = None if powers is None else np.array(powers, dtype=np.float32)
    mask = global_top_k(scaled(forest, powers, floor), k, limit)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "FEW", few)
        picked = likeliest(forest, k, limit, powers, floor)
    check_packed(forest, mask, picked)
    for field, wanted in vars(pack(forest, mask)).items():
        assert torch.equal(getattr(picked, field), wanted), field


@given(
    chances=st.lists(st.sampled_from(CHANCES), min_size=1, max_size=6),
    alive=st.booleans(),
    gate=st.sampled_from((0.0, *CHANCES[2:])),
    few=st.sampled_from((0, selection.FEW)),
)
def test_requests_pass_a_gate_by_their_best_path(chances, alive, gate, few):
    scores = torch.tensor([chances, [1.0 if alive else 0.0] * len(chances)]).log()
    frontier = Frontier(1, scores, torch.tensor([True, alive]))
    best = scores.amax(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "FEW", few)
        passed = passing(frontier, gate)
    least = math.log(gate) if gate > 0.0 else NO_GATE
    assert (passed & frontier.alive).tolist() == (frontier.alive & (best >= least)).tolist()


@settings(max_examples=80)
@given(forest=forests(), budget=st.integers(0, 60))
def test_per_request_properties(forest, budget):
    shares, exists = even_split(budget, forest.batch_size), existing(forest)
    mask = per_request_top_k(forest, shares)
    assert mask.sum(1).tolist() == torch.minimum(shares, exists.sum(1)).tolist()
    assert int(mask.sum()) <= budget and not (mask & ~exists).any()
    check_closed(forest, mask)
    check_packed(forest, mask, pack(forest, mask))


@settings(max_examples=40)
@given(forest=forests())
def test_child_ranks_and_topology_properties(forest):
    ranks = child_ranks(forest)
    for b in range(forest.batch_size):
        for parent in set(forest.parents[b].tolist()):
            children = (forest.parents[b] == parent).nonzero().flatten().tolist()
            assert sorted(ranks[b, children].tolist()) == list(range(len(children)))
    mask = path_ids(forest, Static(StaticOptions())._next) > 0
    assert not (mask & ~existing(forest)).any()
    check_closed(forest, mask)
