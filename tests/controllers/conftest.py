"""Hand-made forests, profiles and a small world to step controllers in."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch

from echo_rl.contracts import Controller, Forest, LoadView, PhaseTimes, SpecPlan, StepReport
from echo_rl.costs.profile import CostProfile
from tests.profiles import hinge_profile

Node = tuple[int, float]  # (parent, cumulative probability; 0 = does not exist)


def forest_of(*rows: Sequence[Node]) -> Forest:
    """A forest from each request's (parent, probability) nodes; every row lists the same depths."""
    parents = torch.tensor([[parent for parent, _ in row] for row in rows])
    scores = torch.tensor([[p for _, p in row] for row in rows]).log()
    depths: list[int] = []
    for parent, _ in rows[0]:
        depths.append(0 if parent < 0 else depths[parent] + 1)
    tokens = torch.arange(parents.numel()).view_as(parents)
    return Forest(tokens, parents, torch.tensor(depths), scores, torch.full((len(rows),), max(depths)))


def load_of(batch: int, max_nodes: int = 64, context: float = 128.0) -> LoadView:
    return LoadView(batch, 0, 0, context, 0.1, max_nodes)


@dataclass
class World:
    """Steps a controller against a known machine and drafter.

    A request accepts at depth d with probability ``1 - (1 - hit)**sqrt(nodes / depth)`` while the tree has
    nodes to go that deep: deliberately not the controllers' own model.
    """

    truth: CostProfile
    hit: float
    catch_up: float = 0.0
    """Seconds that drafting takes longer for every plain step before it."""
    noise: float = 0.0

    def __post_init__(self) -> None:
        self.rng = random.Random(0)
        self.plain_steps = 0
        self.seconds = 0.0
        self.tokens = 0

    def step(self, controller: Controller, load: LoadView) -> StepReport:
        plan, batch = controller.plan(load), load.batch_size
        decoding = batch + load.plain
        reached, accepted = self._accept(plan, batch)
        jitter = self.rng.lognormvariate(0.0, self.noise) if self.noise else 1.0
        draft = self.truth.draft_seconds(batch, plan.width, plan.max_depth) if plan.speculates else 0.0
        times = PhaseTimes(
            draft=(draft + self.catch_up * self.plain_steps) * jitter if plan.speculates else 0.0,
            verify=self.truth.verify_seconds(decoding, decoding + plan.budget, load.mean_context) * jitter,
            commit=self.truth.step_overhead + (self.truth.spec_overhead if plan.speculates else 0.0),
        )
        self.plain_steps = 0 if plan.speculates else self.plain_steps + 1
        report = StepReport(
            load, plan, (), plan.budget, plan.budget, sum(accepted), sum(accepted) + batch, reached, accepted, times
        )
        controller.observe(report)
        self.seconds += times.total
        self.tokens += report.committed
        return report

    def _accept(self, plan: SpecPlan, batch: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if not plan.speculates:
            return (), ()
        nodes = plan.budget / batch
        chance = 1.0 - (1.0 - self.hit) ** max(1.0, nodes / plan.max_depth) ** 0.5
        reached, accepted = [0] * plan.max_depth, [0] * plan.max_depth
        for _ in range(batch):
            for depth in range(plan.max_depth):
                if self.rng.random() > nodes - depth:
                    break
                reached[depth] += 1
                if self.rng.random() > chance:
                    break
                accepted[depth] += 1
        return tuple(reached), tuple(accepted)


@pytest.fixture
def make_forest() -> Callable[..., Forest]:
    return forest_of


@pytest.fixture
def make_load() -> Callable[..., LoadView]:
    return load_of


@pytest.fixture
def make_profile() -> Callable[..., CostProfile]:
    return hinge_profile


@pytest.fixture
def make_world() -> type[World]:
    return World
