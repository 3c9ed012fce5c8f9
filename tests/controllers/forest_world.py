"""A closed loop with real forests: a known machine, and requests whose drafter says how sure it is."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, fields
from itertools import product
from types import SimpleNamespace
from typing import Any, cast

import torch

from echo_rl.contracts import NO_GATE, Controller, Forest, LoadView, PhaseTimes, StepReport
from echo_rl.costs.profile import CostProfile
from tests.controllers.baselines.test_dynamic import serve
from tests.controllers.conftest import load_of


@dataclass
class ForestWorld:
    """Chains whose every token is the target's with probability `hit` (one in three: `hit` ** 3).

    The drafter says so, to the power `claim`: 1 is calibrated, 0 claims certainty.
    """

    truth: CostProfile
    hit: float
    claim: float = 1.0

    def __post_init__(self) -> None:
        self.rng = random.Random(0)
        self.seconds = 0.0
        self.tokens = 0

    def run(self, controller: Controller, batch: int, steps: int) -> list[StepReport]:
        return [self.step(controller, load_of(batch)) for _ in range(steps)]

    def rate(self, controller: Controller, batch: int, steps: int = 400) -> float:
        """Tokens a second after as many steps to settle."""
        self.run(controller, batch, steps)
        self.seconds, self.tokens = 0.0, 0
        self.run(controller, batch, steps)
        return self.tokens / self.seconds

    def step(self, controller: Controller, load: LoadView) -> StepReport:
        batch = load.batch_size
        chances = [self.hit ** (3 if self.rng.random() < 1 / 3 else 1) for _ in range(batch)]
        plan = controller.plan(load)
        planned = cast(
            Controller, SimpleNamespace(plan=lambda _: plan, extend=controller.extend, select=controller.select)
        )
        _, forest, selection = serve(planned, load, cut(self._forest(chances), plan.max_depth))
        counts = selection.counts.tolist() if selection is not None else [0] * batch
        accepted = [self._accepted(chance, count) for chance, count in zip(chances, counts, strict=True)]
        deepest, levels = max(counts), len(forest.depths) if selection is not None else 0
        drafting = tuple(int((forest.stop_depth >= d).sum()) for d in range(levels))
        draft = sum(
            self.truth.draft_seconds(n, plan.width, d + 1) - self.truth.draft_seconds(n, plan.width, d)
            for d, n in enumerate(drafting)
        )
        times = PhaseTimes(
            draft=draft,
            verify=self.truth.verify_seconds(batch, batch + sum(counts), load.mean_context),
            commit=self.truth.overhead_seconds(batch, sum(counts), plan.speculates),
        )
        report = StepReport(
            load, plan, (), batch * levels, sum(counts), sum(accepted), sum(accepted) + batch,
            tuple(sum(c > d and a >= d for c, a in zip(counts, accepted, strict=True)) for d in range(deepest)),
            tuple(sum(a > d for a in accepted) for d in range(deepest)), times, drafting,
        )  # fmt: skip
        controller.observe(report)
        self.seconds += times.total
        self.tokens += report.committed
        return report

    def _accepted(self, chance: float, count: int) -> int:
        return next((d for d in range(count) if self.rng.random() >= chance), count)

    def _forest(self, chances: list[float]) -> Forest:
        levels, batch = torch.arange(8), len(chances)
        scores = torch.tensor(chances).log()[:, None] * (levels + 1) * self.claim
        parents = (levels - 1).expand(batch, -1)
        stop = torch.full((batch,), 7)
        return Forest(torch.arange(batch * 8).view(batch, 8), parents, levels, scores.clamp(min=NO_GATE), stop)


def cut(forest: Forest, depth: int) -> Forest:
    """The forest's first `depth` levels."""
    kept = forest.depths < depth
    return Forest(
        forest.tokens[:, kept], forest.parents[:, kept], forest.depths[kept], forest.scores[:, kept],
        forest.stop_depth.clamp(max=depth - 1),
    )  # fmt: skip


def check_values(options: Any) -> None:
    """TUNABLE names known fields, all its combinations are accepted, and there are few of them."""
    assert set(options.TUNABLE) <= {field.name for field in fields(options)}
    assert 3 <= math.prod(map(len, options.TUNABLE.values())) <= 24
    for values in product(*options.TUNABLE.values()):
        options(**dict(zip(options.TUNABLE, values, strict=True)))
