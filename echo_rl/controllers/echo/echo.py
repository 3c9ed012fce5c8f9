"""Decides by ECHO: sparse gates, a batch-wide node budget under the knee, and freed budget moved where it pays.

Source: ECHO (arXiv 2604.09603). Three decisions: `plan` sets the step's budget and shape
(`planner`), `extend` stops unlikely requests at the sparse gates, `select` spends the budget.

How `select` realises the paper's two priorities. It verifies the likeliest nodes of the whole batch,
by calibrated path probability. (1) *Depth extension*: a request that passed its gate has a likely
path, and the deeper nodes on it outrank what unlikely paths offer, so they are taken first. (2)
*Widening*: a request that was stopped keeps the candidates of the level where it stopped ("late
break"); what budget remains after the deep nodes goes to them, which is extra width at the truncation
point. Theorem 2's exchange argument says when to prefer one to the other: move a node from i to j iff
it adds more expected acceptance there. With calibrated scores that is the order of path
probabilities, so the batch-wide top-K *is* the greedy optimum. Its size never exceeds the budget.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from echo_rl.contracts import AUTOREGRESSIVE, Forest, Gates, LoadView, Selection, SpecPlan, StepReport
from echo_rl.controllers.base import BaseController
from echo_rl.controllers.echo.gates import GateCalibration
from echo_rl.controllers.echo.planner import BudgetPlanner, PlannerOptions, Shape
from echo_rl.controllers.selection import even_split, likeliest, pack, per_request_top_k, scaled
from echo_rl.controllers.tree_shapes import affordable
from echo_rl.costs.profile import CostProfile
from echo_rl.errors import ConfigError


@dataclass(frozen=True)
class EchoOptions:
    profile: CostProfile | str | Path | None = None
    """The machine's costs, or their file; None takes this machine's own, else the packaged one."""
    calibration: GateCalibration | str | Path | None = None
    """The drafter's gates, or their file; None takes this machine's own, else the packaged ones."""
    nodes: float | None = None
    """Fixed budget in nodes a request instead of the planner's choice, still under K_max."""
    planner: PlannerOptions = field(default_factory=PlannerOptions)
    """The options by which budgets are compared; only from Python, not on a command line."""

    def __post_init__(self) -> None:
        if self.nodes is not None and not self.nodes > 0:
            raise ConfigError(f"echo nodes is {self.nodes}; give a positive number, or None to let the planner choose")
        if not isinstance(self.planner, PlannerOptions):
            raise ConfigError(f"echo planner is {self.planner!r}; give PlannerOptions")


class CalibratedSelection(BaseController):
    """ECHO's gates and scheduler under any plan: the likeliest nodes of the batch by calibrated path probability."""

    scheduled = True

    def __init__(self, calibration: GateCalibration | str | Path | None) -> None:
        super().__init__()
        self.calibration = GateCalibration.of(calibration)
        self.materials = (self.calibration,)
        powers = self.calibration.score_power
        self._powers = np.array(powers, dtype=np.float32) if powers else None

    def select(self, forest: Forest, plan: SpecPlan) -> Selection:
        if self.scheduled:
            return likeliest(forest, plan.budget, self._node_cap, self._powers, plan.floor)
        scored = scaled(forest, self._powers, plan.floor)
        return pack(forest, per_request_top_k(scored, even_split(plan.budget, forest.batch_size, forest.scores.device)))

    def score_powers(self, plan: SpecPlan) -> tuple[float, ...] | None:
        return self.calibration.score_power if self.scheduled and self._decides_as(CalibratedSelection) else None


class Echo(CalibratedSelection):
    """The whole method (arXiv 2604.09603): sparse calibrated gates, planned budget, batch-wide scheduler."""

    name = "echo"

    def __init__(self, options: EchoOptions) -> None:
        super().__init__(options.calibration)
        self.profile = CostProfile.of(options.profile)
        self.materials += (self.profile,)
        self.planner = BudgetPlanner(self.profile, options.planner, pooled=self.scheduled)
        self._nodes = options.nodes
        self._plans: dict[Shape, SpecPlan] = {}

    def gates(self, max_depth: int) -> Gates:
        return self.calibration.sparse(max_depth)

    def propose(self, load: LoadView) -> SpecPlan:
        shape = self.planner.choose(load) if self._nodes is None else self._fixed_shape(load, self._nodes)
        if not shape.budget:
            return AUTOREGRESSIVE
        if shape not in self._plans:
            self._plans[shape] = SpecPlan(shape.budget, shape.depth, shape.width, self.gates(shape.depth))
        return self._plans[shape]

    def observe(self, report: StepReport) -> None:
        self.planner.observe(report)

    def _fixed_shape(self, load: LoadView, nodes: float) -> Shape:
        depth, width = affordable(nodes)
        return Shape(min(round(nodes * load.batch_size), self.planner.knee(load)), depth, width, nodes)


class EchoDense(Echo):
    """Ablation of ECHO: a gate at every depth."""

    name = "echo_dense"

    def gates(self, max_depth: int) -> Gates:
        return self.calibration.dense(max_depth)


@dataclass(frozen=True)
class EchoFixedOptions(EchoOptions):
    tau: float = 0.2
    """The one threshold (the ECHO authors' figure for the first levels)."""
    everywhere: bool = False
    """Gate every depth instead of the sparse ones."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.tau <= 1.0:
            raise ConfigError(f"echo_fixed tau is {self.tau}; give a probability")


class EchoFixed(Echo):
    """Ablation of ECHO: one fixed threshold at all gates instead of one calibrated a depth."""

    name = "echo_fixed"

    def __init__(self, options: EchoFixedOptions) -> None:
        super().__init__(options)
        self._tau, self._everywhere = options.tau, options.everywhere

    def gates(self, max_depth: int) -> Gates:
        places = self.calibration.dense(max_depth) if self._everywhere else self.calibration.sparse(max_depth)
        return tuple((depth, self._tau) for depth, _ in places)


class EchoUnscheduled(Echo):
    """Ablation of ECHO: the same budget split evenly; nodes that a truncated request saves stay with it."""

    name = "echo_unscheduled"
    scheduled = False
