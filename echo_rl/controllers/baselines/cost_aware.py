"""Grows and sizes trees by what the machine charges for them: SMART, CAST, EVICT.

All read the machine's `CostProfile`. Where a paper considers one request, the batch's cost of giving
every request as many nodes stands in for its cost. Where a rule compares one node's benefit with its
marginal cost, the run of nodes up to the best total is taken instead: for falling benefits and
rising costs that is the same set, and one step of a measured curve does not end it.

Shapes: B requests, F candidates of a level, M forest nodes a request, N = most drafted nodes of a batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from echo_rl.contracts import AUTOREGRESSIVE, NO_GATE, Forest, Frontier, LoadView, Selection, SpecPlan
from echo_rl.controllers.baselines.dynamic import (
    TreeOptions,
    Values,
    beam,
    closed,
    every_level,
    existing,
    probabilities,
)
from echo_rl.controllers.baselines.fixed import Eagle3
from echo_rl.controllers.selection import MISSING, likeliest, pack, per_request_top_k
from echo_rl.costs.batched_profile import BatchedCostProfile
from echo_rl.costs.profile import CostProfile, context_of, half_octave
from echo_rl.errors import ConfigError


@dataclass(frozen=True)
class CostAwareOptions(TreeOptions):
    profile: CostProfile | str | Path | None = None
    """The machine's costs, or their file; None takes this machine's own, else the packaged one."""


@dataclass(frozen=True)
class Costs:
    """Seconds of a step at one load."""

    plain: float
    """Seconds of a whole step of plain decoding."""
    verify: Tensor
    """[N + 1] float32 seconds of a speculative step without its drafting, by drafted nodes verified over the batch."""
    each: Tensor
    """[total + 1] the same over `plain`, by nodes that every request has verified."""
    draft: tuple[float, ...]
    """Seconds of drafting, by levels drafted from 0 on."""

    def level(self, depth: int) -> float:
        """Seconds of drafting level `depth` (0 = the root's children) on top of those above it."""
        return self.draft[depth + 1] - self.draft[depth]


class CostAware(Eagle3):
    """EAGLE's tree with the costs of the step at hand; they are kept by batch size and half octave of context."""

    options: CostAwareOptions
    _costs: Costs

    def __init__(self, options: CostAwareOptions) -> None:
        super().__init__(options)
        self.profile = CostProfile.of(options.profile)
        self.materials = (self.profile,)
        self._arrays = BatchedCostProfile(self.profile)
        self._known: dict[tuple[int, int], Costs] = {}
        self._gates = every_level(options.depth)

    def propose(self, load: LoadView) -> SpecPlan:
        self._costs = self._costs_of(load)
        return super().propose(load)

    def _costs_of(self, load: LoadView) -> Costs:
        key, batch = (load.batch_size, half_octave(load.mean_context)), load.batch_size
        if key not in self._known:
            context, options = context_of(key[1]), self.options
            nodes = np.arange(options.total * batch + 1)
            seconds = self._arrays.verify(batch, batch + nodes, context) + self._arrays.overhead(batch, nodes, True)
            verify = torch.from_numpy(seconds).float()
            draft = (self.profile.draft_seconds(batch, options.top_k, d) for d in range(options.depth + 1))
            plain = self.profile.step_seconds(batch, 0, 0, 0, context)
            self._known[key] = Costs(plain, verify, verify[::batch] / plain, tuple(draft))
        return self._known[key]


@dataclass(frozen=True)
class EvictOptions(CostAwareOptions):
    total: int = 32
    """Most nodes k that a request keeps."""
    TUNABLE: ClassVar[Values] = {"depth": (3, 5, 8), "top_k": (3, 5, 8)}


class Evict(CostAware):
    """EVICT (arXiv 2605.00342): draft EAGLE's tree, verify the prefix with the most expected tokens a second.

    k* = argmax over k of (sum of the k likeliest paths + 1) / C(k). One k for the whole batch, since the
    profile has one cost for it; each request keeps its own k likeliest nodes. k = 0 is among the choices, but
    drafting precedes the choice, so there is no plan for plain decoding.
    """

    name = "evict"

    def select(self, forest: Forest, plan: SpecPlan) -> Selection:
        batch = forest.batch_size
        most = min(plan.budget // batch, forest.scores.shape[1])
        likeliest = probabilities(forest.scores).topk(most, dim=1).values.sum(0)
        k = int((_running(likeliest, batch) / self._costs.each[: most + 1].to(likeliest.device)).argmax())
        return pack(forest, per_request_top_k(forest, k))


@dataclass(frozen=True)
class SmartOptions(CostAwareOptions):
    prior: float = 1.0
    """Probability assumed of the root's best child before it is drafted; 1 drafts wherever it could pay."""
    TUNABLE: ClassVar[Values] = {
        "prior": (0.6, 0.8, 1.0),
        "depth": (3, 5, 8),
        "top_k": (4, 8),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.prior <= 1.0:
            raise ConfigError(f"smart prior is {self.prior}; give a probability above 0")


class Smart(CostAware):
    """SMART (arXiv 2604.09731): expand a node iff its benefit over its cost exceeds the current tree's speed-up.

    The benefit is the node's path probability. Its cost is one more verified node at the batch's present
    size and, while drafting, its share of the next level. The trees of a batch are verified in one pass, so
    they have one speed-up. A request drafts on while it has a node to expand. The root is a node too: where
    the first level's cost exceeds the prior's benefit, the step is plain decoding.
    """

    name = "smart"
    options: SmartOptions

    def __init__(self, options: SmartOptions) -> None:
        super().__init__(options)
        self._nodes = 0  # in the batch's trees so far in this step
        self._tokens = 0.0  # that they and the roots are expected to yield

    def propose(self, load: LoadView) -> SpecPlan:
        plan, costs = super().propose(load), self._costs
        first = costs.draft[1] + float(costs.verify[load.batch_size]) - costs.plain
        return replace(plan, gates=self._gates) if self.options.prior * costs.plain > first else AUTOREGRESSIVE

    def extend(self, frontier: Frontier, plan: SpecPlan) -> Tensor:
        """[B] bool: requests with at least one candidate worth expanding."""
        depth, costs = frontier.depth, self._costs
        if depth == 0:
            self._nodes, self._tokens = 0, float(len(frontier.alive))
        best = beam(frontier, plan)
        ranked = best.flatten().sort(descending=True).values[: plan.budget - self._nodes]
        share = costs.level(depth + 1) / max(1, int(frontier.alive.sum()) * best.shape[1])
        joined, tokens = self._best_run(ranked, depth + 1, share)
        self._nodes, self._tokens = self._nodes + joined, tokens
        if not joined:
            return torch.zeros_like(frontier.alive)
        return frontier.alive & (best[:, 0] >= ranked[joined - 1])

    def select(self, forest: Forest, plan: SpecPlan) -> Selection:
        """The rule over the whole forest, likeliest nodes first, with the drafting as it was."""
        self._nodes, self._tokens = 0, float(forest.batch_size)
        probs = probabilities(forest.scores).flatten()
        ranked = probs.topk(min(plan.budget, len(probs))).values
        k, _ = self._best_run(ranked, int(forest.depths[-1]) + 1, share=0.0)
        return likeliest(forest, k, self._node_cap)

    def _best_run(self, ranked: Tensor, levels: int, share: float) -> tuple[int, float]:
        """The number of ranked nodes to add for the highest speed-up, and the tokens then expected."""
        tokens = _running(ranked, self._tokens)
        verify = self._costs.verify[self._nodes : self._nodes + len(tokens)].to(tokens.device)
        seconds = verify + self._costs.draft[levels]
        if share:
            seconds = seconds + share * torch.arange(len(tokens), device=tokens.device)
        count = int((tokens / seconds).argmax())
        return count, float(tokens[count])


@dataclass(frozen=True)
class CastOptions(CostAwareOptions):
    c1: float = 0.5
    """Least benefit over cost of one more candidate of a level; 1 is what plain decoding yields for its time."""
    c2: float = 1.0
    """Least benefit over cost of one more level."""
    c3: float = 1.0
    """Least benefit over cost of one more verified node in the final ranking."""
    alpha: float = 0.8
    """Share of a level's probability that is expected in the next; only alpha / c2 matters."""
    TUNABLE: ClassVar[Values] = {
        "c2": (0.75, 1.0, 1.5),
        "c3": (0.75, 1.0, 1.5, 2.0),
        "top_k": (4, 8),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(c >= 0.0 for c in (self.c1, self.c2, self.c3)) or not 0.0 < self.alpha <= 1.0:
            given = f"c1 {self.c1}, c2 {self.c2}, c3 {self.c3}, alpha {self.alpha}"
            raise ConfigError(f"cast {given}: give constants >= 0 and alpha in (0, 1]")


class Cast(CostAware):
    """CAST (arXiv 2510.26577): widen while du/dc > C1, deepen iff alpha * u / c >= C2, rerank with du/dc > C3.

    u is path probability in a request's tree, c = f(B, context, n) the time of a batch in which every
    request has n nodes, over that of a plain step: at 1 a node earns as much as plain decoding does. A level
    costs its drafting and one verified node. The published constants are not known here; calibrate them.
    The root's u is 1: where even that does not pay for a level, the step is plain decoding.
    """

    name = "cast"
    options: CastOptions

    def __init__(self, options: CastOptions) -> None:
        super().__init__(options)
        self._nodes = torch.empty(0, dtype=torch.int64)  # [B] kept so far in this step
        self._floors: list[Tensor] = []  # per level [B], the least score that was kept

    def propose(self, load: LoadView) -> SpecPlan:
        plan, costs = super().propose(load), self._costs
        self._floors = []
        price = (costs.draft[1] + float(costs.verify[load.batch_size])) / costs.plain - 1.0
        pays = self.options.alpha >= self.options.c2 * price
        return replace(plan, gates=self._gates) if pays else AUTOREGRESSIVE

    def extend(self, frontier: Frontier, plan: SpecPlan) -> Tensor:
        """[B] bool: requests whose kept candidates are likely enough to pay for another level."""
        batch, options = len(frontier.alive), self.options
        scores = existing(frontier.scores).sort(dim=1, descending=True).values  # [B, F]
        price, most = self._costs.each.to(scores.device), plan.budget // batch
        if frontier.depth == 0:
            self._nodes, self._floors = torch.zeros_like(frontier.alive, dtype=torch.int64), []
        at = self._nodes[:, None] + torch.arange(scores.shape[1] + 1, device=scores.device)  # [B, F + 1]
        utility = _running(scores.exp(), 0.0)
        gain = (utility - options.c1 * price[at.clamp(max=most)]).masked_fill(at > most, NO_GATE)
        kept = gain.argmax(1, keepdim=True)  # [B, 1]
        floor = scores.gather(1, (kept - 1).clamp(min=0)).masked_fill(kept == 0, math.inf)
        self._nodes = self._nodes + kept[:, 0]
        self._floors.append(floor[:, 0])
        level = self._costs.level(frontier.depth + 1) / self._costs.plain
        deeper = level + price[(self._nodes + 1).clamp(max=most)] - price[self._nodes]
        pays = options.alpha * utility.gather(1, kept)[:, 0] >= options.c2 * deeper
        return frontier.alive & pays & (kept[:, 0] > 0) & (self._nodes < most)

    def select(self, forest: Forest, plan: SpecPlan) -> Selection:
        """Select each request's likeliest kept candidates while they pay by C3; a last level is kept whole."""
        scores = existing(forest.scores)
        unasked = int(forest.depths[-1]) + 1 - len(self._floors)
        open_to_all = scores.new_full((forest.batch_size,), MISSING)
        floors = torch.stack([*self._floors, *[open_to_all] * unasked], dim=1)  # [B, D]
        kept = closed(forest, scores >= floors.index_select(1, forest.depths))
        scores = scores.masked_fill(~kept, NO_GATE)
        most = min(plan.budget // forest.batch_size, scores.shape[1])
        utility = _running(scores.topk(most, dim=1).values.exp(), 0.0)
        price = self._costs.each[: most + 1].to(scores.device)
        counts = (utility - self.options.c3 * price).argmax(1)
        return pack(forest, per_request_top_k(replace(forest, scores=scores), counts))


def _running(values: Tensor, start: float) -> Tensor:
    """[..., K + 1]: the start, then the start and the sum of the first 1, 2, ... values."""
    return torch.nn.functional.pad(values.cumsum(-1), (1, 0)) + start
