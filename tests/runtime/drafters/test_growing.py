"""Tree growth against a literal drafter: every path recomputed alone, densely, without a cache."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F

from echo_rl.contracts import AUTOREGRESSIVE, Forest, LoadView, Request, SamplingParams, SpecPlan
from echo_rl.controllers.base import BaseController
from echo_rl.runtime.engine import Engine
from echo_rl.runtime.models.architecture import rope_table
from echo_rl.runtime.runner import FAR_BEHIND
from tests import tiny

PROMPTS = ((70, 71, 72, 80, 66), (75,) * (FAR_BEHIND + 9), (66, 67))
"""One of them long enough that all but its last pair are absorbed apart."""


class Snapshot(BaseController):
    """Speculates with one fixed plan and keeps the last forest it saw."""

    name = "snapshot"

    def __init__(self, plan: SpecPlan) -> None:
        super().__init__()
        self.fixed = plan
        self.forest: Forest | None = None

    def propose(self, load: LoadView) -> SpecPlan:
        return self.fixed if load.prefill_tokens == 0 else AUTOREGRESSIVE

    def select(self, forest, plan):
        self.forest = forest
        return super().select(forest, plan)


def rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, 1e-5)


def literal_log_probs(weights: dict[str, torch.Tensor], embed: torch.Tensor, features: torch.Tensor, tokens: list[int]):
    """[V'] after the pairs (features[i], tokens[i + 1]) and then the drafter's own hidden states for
    the tokens that go past the features. One causal pass from scratch a token."""
    c = tiny.drafter_config()
    cos, sin = rope_table(c.head_dim, c.rope_theta, 64)
    w = {n.removeprefix("midlayer."): t for n, t in weights.items()}
    states = list(features @ w["fc.weight"].T)

    def rotate(x: torch.Tensor, n: int) -> torch.Tensor:
        a, b = x.chunk(2, -1)
        return x * cos[:n, None] + torch.cat([-b, a], -1) * sin[:n, None]

    while True:
        n = len(states)
        x = torch.stack(states)
        e = rms(embed[torch.tensor(tokens[1 : n + 1])], w["input_layernorm.weight"])
        both = torch.cat([e, rms(x, w["hidden_norm.weight"])], 1)
        q, k, v = ((both @ w[f"self_attn.{p}_proj.weight"].T).view(n, -1, c.head_dim) for p in "qkv")
        q, k = rotate(q, n), rotate(k, n)
        a = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None], is_causal=True, enable_gqa=True
        )[0]
        x = x + a.transpose(0, 1).reshape(n, -1) @ w["self_attn.o_proj.weight"].T
        y = rms(x, w["post_attention_layernorm.weight"])
        y = F.silu(y @ w["mlp.gate_proj.weight"].T) * (y @ w["mlp.up_proj.weight"].T)
        x = x + y @ w["mlp.down_proj.weight"].T
        if n == len(tokens) - 1:
            return (rms(x[-1], w["norm.weight"]) @ w["lm_head.weight"].T).log_softmax(0)
        states.append(x[-1])


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Engine:
    return tiny.engine(tmp_path_factory.mktemp("forest"), block_size=4)


@pytest.mark.parametrize("plan", [SpecPlan(12, 4, 3), SpecPlan(20, 3, 5), SpecPlan(6, 5, 1)])
def test_scores_and_structure_equal_the_literal_drafter(engine, plan):
    snapshot = Snapshot(plan)
    for i, prompt in enumerate(PROMPTS):
        engine.add(Request(f"r{i}", prompt, SamplingParams(max_new_tokens=30)))
    for _ in range(4):
        sequences = list(engine.scheduler.running)
        before = [(list(s.tokens), s.kv_len) for s in sequences]
        features = [engine.runner.cache.features[_slots(s, engine)].clone().cpu() for s in sequences]
        engine.step(snapshot)
    forest = snapshot.forest
    weights, embed = tiny.drafter_tensors(tiny.drafter_config()), engine.runner.target.embed.cpu()
    assert forest.scores.shape == (3, plan.width + (plan.max_depth - 1) * plan.width**2)
    for r, (tokens, kv_len) in enumerate(before):
        assert len(tokens) == kv_len + 1
        for node in {0, plan.width - 1, *range(plan.width, forest.scores.shape[1], 3)}:
            path, at = [], node
            while at >= 0:
                path.insert(0, int(forest.tokens[r, at]))
                at = int(forest.parents[r, at])
            assert len(path) == int(forest.depths[node]) + 1
            total = 0.0
            for n in range(len(path)):
                log_probs = literal_log_probs(weights, embed, features[r], tokens + path[:n])
                total += float(log_probs[path[n] - tiny.COMMON[0]])
            assert float(forest.scores[r, node]) == pytest.approx(total, abs=1e-4)
    for i in range(len(PROMPTS)):
        engine.cancel(f"r{i}")


def _slots(sequence, engine) -> list[int]:
    size = engine.config.block_size
    return [sequence.blocks[p // size] * size + p % size for p in range(sequence.kv_len)]


def test_each_level_expands_the_best_of_the_level_before(engine):
    snapshot = Snapshot(SpecPlan(30, 3, 4))
    engine.add(Request("x", PROMPTS[0], SamplingParams(max_new_tokens=20)))
    engine.step(snapshot)
    engine.step(snapshot)
    engine.cancel("x")
    forest = snapshot.forest
    level1 = (forest.depths == 1).nonzero().flatten()
    level2 = (forest.depths == 2).nonzero().flatten()
    best = level1[forest.scores[0, level1].topk(4).indices]
    assert set(forest.parents[0, level2].tolist()) == set(best.tolist())
    assert set(forest.parents[0, level1].tolist()) == {0, 1, 2, 3}


def test_gates_stop_requests_one_by_one(engine):
    class Gated(Snapshot):
        calls: ClassVar[list[tuple[int, list[bool]]]] = []

        def extend(self, frontier, plan):
            self.calls.append((frontier.depth, frontier.alive.tolist()))
            keep = frontier.alive.clone()
            keep[frontier.depth % len(keep)] = False
            return keep

    gated = Gated(SpecPlan(50, 5, 2, gates=((0, 0.1), (1, 0.1), (2, 0.1))))
    for i, prompt in enumerate(PROMPTS):
        engine.add(Request(f"g{i}", prompt, SamplingParams(max_new_tokens=20)))
    engine.step(gated)
    engine.step(gated)
    for i in range(3):
        engine.cancel(f"g{i}")
    assert gated.calls == [(0, [True] * 3), (1, [False, True, True]), (2, [False, False, True])]
    assert gated.forest.stop_depth.tolist() == [0, 1, 2]
    deepest = [int(gated.forest.depths[gated.forest.exists[r]].max()) for r in range(3)]
    assert deepest == [0, 1, 2]
