"""Speculates by estimated goodput: SmartSpec's length for the whole batch, AdaSpec's stopping rule level by level.

Source: SmartSpec / TurboSpec (arXiv 2406.14066), AdaSpec / SpecServe (arXiv 2503.05096). Both compare
expected tokens a second; their yields and step times are in `efficiency`.

Shapes: B requests, F candidates of a level, A requests that still draft.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from echo_rl.contracts import AUTOREGRESSIVE, Frontier, LoadView, SpecPlan, StepReport
from echo_rl.controllers.base import BaseController
from echo_rl.controllers.baselines.dynamic import Values, every_level, probabilities
from echo_rl.controllers.baselines.efficiency import (
    MOST_LEVELS,
    AcceptanceRate,
    CostedOptions,
    DraftingSwitch,
    Efficient,
    StepTimePredictor,
    running_sum,
)
from echo_rl.costs.batched_profile import Floats
from echo_rl.errors import ConfigError


@dataclass(frozen=True)
class TurboSpecOptions(CostedOptions):
    most: int = 8
    """Longest chain to compare."""
    TUNABLE: ClassVar[Values] = {"most": (3, 5, 8), "horizon": (32.0, 128.0, 512.0)}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.most <= MOST_LEVELS:
            raise ConfigError(f"turbospec most is {self.most}; give 1 to {MOST_LEVELS} tokens")


class TurboSpec(BaseController):
    """SmartSpec (arXiv 2406.14066): the chain length k >= 0 with the highest goodput, one for the whole batch.

    goodput(k) = B * (1 - a**(k + 1)) / (1 - a) / t(B, k), with a the moving chance that a token is accepted.
    The paper fits a linear model to t; here t is the measured profile times its running ratio to real steps.
    """

    name = "turbospec"

    def __init__(self, options: TurboSpecOptions) -> None:
        super().__init__(options)
        self.step_times = StepTimePredictor(options.profile)
        self.materials = (self.step_times.profile,)
        self.acceptance = AcceptanceRate(options.horizon)
        self._switch = DraftingSwitch(self.step_times, options)

    def propose(self, load: LoadView) -> SpecPlan:
        batch, plain = load.batch_size, self.step_times.plain(load)
        lengths = np.arange(1.0, min(self.options.most, load.max_nodes) + 1.0)
        tokens = batch * (1.0 + np.cumsum(self.acceptance.chance**lengths))
        seconds = self.step_times.speculative(load, batch * lengths, 1, lengths)
        best = int((tokens / seconds).argmax())
        pays = bool(tokens[best] / seconds[best] > batch / plain)
        if not self._switch.open(load, pays, float(seconds[best]) - plain):
            return AUTOREGRESSIVE
        return SpecPlan((best + 1) * batch, best + 1, 1)

    def observe(self, report: StepReport) -> None:
        self.step_times.observe(report)
        self.acceptance.observe(report)
        self._switch.observe(report)


@dataclass(frozen=True)
class AdaSpecOptions(CostedOptions):
    depth: int = 8
    """Most levels."""
    width: int = 1
    """Nodes expanded a level, and children of each; 1 drafts chains as the paper does."""
    slo: float | None = None
    """Time per output token in seconds that a step may take; None for the highest efficiency whatever it takes."""
    TUNABLE: ClassVar[Values] = {"depth": (3, 5, 8), "width": (1, 2, 3, 4)}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.depth <= MOST_LEVELS or not 1 <= self.width <= 8:
            raise ConfigError(f"adaspec depth {self.depth}, width {self.width}: give 1 to {MOST_LEVELS}, 1 to 8")
        if self.slo is not None and not self.slo > 0:
            raise ConfigError(f"adaspec slo is {self.slo}; give seconds a token, or None for no bound")


class AdaSpec(Efficient):
    """SpecServe (arXiv 2503.05096): stop drafting where a level lowers the step's efficiency, verify by confidence.

    After each level the requests are ranked by their best path. The n likeliest draft on, where n
    maximises (tokens expected so far + what one more node each would bring) over (the step's time so far +
    that level's drafting + those nodes' verification); a further token is expected to be accepted as often
    as tokens lately were. The prior then decides what is verified: the nodes whose marginal efficiency is positive
    (`Efficient`). With an SLO no choice is allowed whose step is predicted to take longer; where plain
    decoding already does, the bound is dropped, since fewer steps are then all that helps.
    """

    name = "adaspec"

    def __init__(self, options: AdaSpecOptions) -> None:
        super().__init__(options, options.depth, options.width)
        self.acceptance = AcceptanceRate(options.horizon)
        self._gates, self._depths = every_level(options.depth), range(1, options.depth + 1)
        self._bound: float | None = None
        self._drafted: list[Tensor] = []  # per level of the step in progress, its nodes' probabilities

    def propose(self, load: LoadView) -> SpecPlan:
        slo = self.options.slo
        self._bound = slo if slo is not None and self.step_times.plain(load) <= slo else None
        return super().propose(load)

    def rates(self, tokens: Floats, seconds: Floats) -> Floats:
        rates = tokens / seconds
        return rates if self._bound is None else np.where(seconds <= self._bound, rates, 0.0)

    def extend(self, frontier: Frontier, plan: SpecPlan) -> Tensor:
        """[B] bool: the requests whose next level raises the estimated efficiency."""
        near = probabilities(frontier.scores)
        self._drafted = [near.flatten()] if frontier.depth == 0 else [*self._drafted, near.flatten()]
        best = near.amax(1) * frontier.alive  # [B]
        going = self._worth_extending(best, frontier.depth, plan)
        if not going:
            return torch.zeros_like(frontier.alive)
        return frontier.alive & (best >= best.topk(going).values[-1])

    def _worth_extending(self, best: Tensor, depth: int, plan: SpecPlan) -> int:
        """The number of requests that should draft another level."""
        held = running_sum(torch.cat(self._drafted), plan.budget)
        ahead = running_sum(best, len(best))  # [A + 1]
        seconds = self.step_times.speculative(
            self._load, np.arange(float(len(held) + len(ahead) - 1)), plan.width, depth + 1
        )
        now = len(best) + self.trust * held
        k = int(self.rates(now, seconds[: len(now)]).argmax())
        others = np.arange(float(len(ahead)))
        level = np.where(others > 0, self.step_times.level(others, plan.width, depth + 1), 0.0)
        tokens = now[k] + self.acceptance.chance * self.trust * ahead
        return int(self.rates(tokens, seconds[k : k + len(ahead)] + level).argmax())

    def observe(self, report: StepReport) -> None:
        super().observe(report)
        self.acceptance.observe(report)
