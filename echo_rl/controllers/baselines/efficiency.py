"""Maximises expected tokens a second: the base of rules that weigh a step's yield against its time.

The time of a step is the machine's profile scaled by what steps really took (`StepTimePredictor`), its yield
the drafter's own confidence corrected by what was accepted (`YieldCurve`). `DraftingSwitch` decides whether to
draft at all, and pays for rare probes while that does not pay.

Shapes: B requests, M forest nodes a request, N ranked nodes of the whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import Tensor

from echo_rl.contracts import AUTOREGRESSIVE, Forest, Gates, LoadView, Selection, SpecPlan, StepReport
from echo_rl.controllers.base import BaseController
from echo_rl.controllers.baselines.dynamic import probabilities
from echo_rl.controllers.probing import ProbeBudget
from echo_rl.controllers.selection import likeliest
from echo_rl.controllers.tree_shapes import REFERENCE_HIT
from echo_rl.costs.batched_profile import BatchedCostProfile, Floats
from echo_rl.costs.correction import CostCorrector, basis
from echo_rl.costs.profile import CostProfile
from echo_rl.errors import ConfigError

MOST_LEVELS = 8
"""Levels that recordings hold."""
FAR = 1_000_000
"""Rows past a profile's last, up to which its last slope is followed."""


@dataclass(frozen=True)
class CostedOptions:
    """The options of every rule of this kind. The papers state none of these numbers."""

    profile: CostProfile | str | Path | None = None
    """The machine's costs, or their file; None takes this machine's own, else the packaged one."""
    horizon: float = 128.0
    """Requests served over which acceptance is averaged."""
    probe_share: float = 0.005
    """Share of plain decoding time that probing the drafter may cost, see `ProbeBudget`."""
    probe_period: int = 64
    """Fewest plain steps between two probes."""

    def __post_init__(self) -> None:
        if not self.horizon > 0 or self.probe_period < 1 or not 0 <= self.probe_share < 1:
            raise ConfigError(
                f"horizon {self.horizon}, probe_period {self.probe_period}, probe_share {self.probe_share}: "
                "give positive numbers and a share in [0, 1)"
            )


class StepTimePredictor:
    """Predicted seconds of whole steps."""

    def __init__(self, profile: CostProfile | str | Path | None) -> None:
        self.profile = CostProfile.of(profile)
        self._arrays = BatchedCostProfile(self.profile)
        self._corrector = CostCorrector(self.profile)
        rows = self.profile.rows
        self._knots = (*rows, rows[-1] + FAR)  # of the verify pass's seconds by its rows
        self._weights = basis(self._knots)
        self._at: tuple[int, float] | None = None  # the batch and context of `_curve`
        self._curve: Floats = np.empty(0)  # seconds at the knots

    def plain(self, load: LoadView) -> float:
        """Seconds of a step that does not speculate."""
        batch, corrector = load.batch_size, self._corrector
        verify = self.profile.ar_seconds(batch, load.mean_context) * corrector.verify.factor(batch)
        return verify + self.profile.overhead_seconds(batch) * corrector.rest[False]

    def speculative(self, load: LoadView, nodes: Floats, width: int, depth: Floats | float) -> Floats:
        """Seconds of steps that draft `depth` levels and verify `nodes` over the batch; arrays broadcast."""
        batch, corrector, profile = load.batch_size, self._corrector, self.profile
        at = (batch, load.mean_context)
        if self._at != at:
            self._at, self._curve = at, np.array(profile.verify_each(batch, self._knots, load.mean_context))
        verify = np.interp(batch + nodes, self._knots, self._curve * corrector.verify.factors(self._weights))
        rest = (profile.overhead_seconds(batch, 0, True) + profile.node_overhead * nodes) * corrector.rest[True]
        seconds: Floats = verify + rest + self._drafting(batch, width, depth) * corrector.draft
        return seconds

    def level(self, alive: Floats, width: int, depth: int) -> Floats:
        """Seconds of drafting level `depth` (0 = the root's children) for `alive` requests, on top of those above
        it."""
        arrays = self._arrays
        return (arrays.draft(alive, width, depth + 1) - arrays.draft(alive, width, depth)) * self._corrector.draft

    def _drafting(self, batch: int, width: int, depth: Floats | float) -> Floats | float:
        draft = self.profile.draft_seconds
        if not isinstance(depth, np.ndarray):
            return draft(batch, width, int(depth))
        return np.array([draft(batch, width, int(levels)) for levels in depth.flat]).reshape(depth.shape)

    def draft(self, load: LoadView, width: int, depth: int) -> float:
        """Seconds of drafting `depth` levels."""
        return self.profile.draft_seconds(load.batch_size, width, depth) * self._corrector.draft

    def observe(self, report: StepReport) -> None:
        levels = len(report.drafting)
        if 0 < levels < report.plan.max_depth:  # drafting that stopped early is timed as what it was
            report = replace(report, plan=replace(report.plan, max_depth=levels))
        self._corrector.observe(report)


class DraftingSwitch:
    """Decides whether a step drafts: while it pays, and as a rare probe while it does not."""

    def __init__(self, step_times: StepTimePredictor, options: CostedOptions) -> None:
        self._step_times = step_times
        self._probe_budget = ProbeBudget(options.probe_share, options.probe_period)
        self.probing = False
        """True while the step in progress is a probe."""

    def open(self, load: LoadView, pays: bool, excess: float) -> bool:
        """True where this step drafts; `excess` is the predicted seconds that drafting makes it longer."""
        self.probing = not pays and not load.prefill_tokens and self._probe_budget.affords(max(0.0, excess))
        return pays or self.probing

    def observe(self, report: StepReport) -> None:
        probes, load, plan = self._probe_budget, report.load, report.plan
        if not load.batch_size:  # it read prompts alone
            return
        if not plan.speculates:
            probes.plain(report.times.total)
            return
        if probes.steps:
            usual = self._step_times.draft(load, plan.width, max(1, len(report.drafting) or plan.max_depth))
            probes.backlog = max(0.0, report.times.draft - usual) / probes.steps
        if self.probing:
            probes.spent(report.times.total - self._step_times.plain(load))
        else:
            probes.restart()


class MeasurementWeight:
    """The weight of a new measurement: the more requests were served since the last, the more it weighs.

    So a probe after a long spell of plain decoding counts for more than a step among many.
    """

    MOST = 0.15

    def __init__(self, horizon: float) -> None:
        self._horizon = horizon
        self._served = 0

    def passed(self, report: StepReport) -> None:
        self._served += report.load.batch_size

    def weight(self) -> float:
        """The weight of what the step just reported says; forgets what was served until then."""
        served, self._served = self._served, 0
        return min(self.MOST, 1.0 - math.exp(-served / self._horizon))


class AcceptanceRate:
    """The running chance that a token is accepted when the one before it was."""

    def __init__(self, horizon: float) -> None:
        self._weight = MeasurementWeight(horizon)
        self.chance = REFERENCE_HIT

    def observe(self, report: StepReport) -> None:
        self._weight.passed(report)
        reached = sum(report.reached_by_depth)
        if reached:
            measured = sum(report.accepted_by_depth) / reached
            self.chance += self._weight.weight() * (measured - self.chance)


class YieldCurve:
    """The batch's running survival curve: accepted nodes a request that n verified nodes a request are worth.

    Nodes are taken likeliest first over the whole batch, so the curve holds what unequal requests gain
    from sharing. It is made of the drafter's path probabilities, of verified and unverified nodes alike
    (what was picked does not bias it), times one correction: accepted over promised, where verified. The
    prior is a chain with the reference hit rate.
    """

    NODES = np.array([*np.arange(0.25, 8.25, 0.25), 10.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0])

    def __init__(self, horizon: float) -> None:
        self._weight = MeasurementWeight(horizon)
        chain = np.cumsum(REFERENCE_HIT ** np.arange(1, MOST_LEVELS + 1))
        self._gains: Floats = np.interp(self.NODES, np.arange(MOST_LEVELS + 1), np.append(0.0, chain))
        self._reach: Floats = chain  # [MOST_LEVELS] what all nodes of the first 1, 2, ... levels are worth
        self._accepted = self._promised = 1.0  # nodes a request
        self._seen: tuple[Floats, Floats] | None = None  # both curves of the step in progress
        self._picked = 0.0  # what its verified nodes promise

    @property
    def correction(self) -> float:
        """Accepted over promised nodes."""
        return self._accepted / self._promised

    def gains(self, depths: Sequence[int]) -> Floats:
        """[D, NODES] accepted nodes a request when so many levels are drafted.

        Fewer levels bound the curve by what they hold in all, which is exact at both of its ends.
        """
        bound = self._reach[np.asarray(depths) - 1][:, None]
        return np.minimum(np.minimum(self._gains, bound) * self.correction, self.NODES)

    def observe_forest(self, running: Floats, levels: Floats, batch: int, picked: int) -> None:
        """Note the forest that was drafted in this step.

        `running` [N + 1]: summed probability of the likeliest 0, 1, ... nodes, of which `picked` are
        verified. `levels` [D]: summed probability of each level.
        """
        gains = np.interp(self.NODES, np.arange(len(running)) / batch, running / batch)
        reach = np.cumsum(np.pad(levels, (0, MOST_LEVELS - len(levels)))) / batch
        self._seen, self._picked = (gains, reach), float(running[picked])

    def observe(self, report: StepReport) -> None:
        self._weight.passed(report)
        if self._seen is None:
            return
        weight, batch = self._weight.weight(), report.load.batch_size
        gains, reach = self._seen
        self._gains = self._gains + weight * (gains - self._gains)
        self._reach = self._reach + weight * (reach - self._reach)
        if self._picked:
            self._accepted += weight * (report.accepted / batch - self._accepted)
            self._promised += weight * (self._picked / batch - self._promised)
        self._seen = None


class Efficient(BaseController):
    """Verifies the prefix of the batch's likeliest nodes with the most expected tokens a second.

    With b requests and survival probabilities sorted over the batch, k maximises
    ``(b + sum of the first k) / T(b + k)``. Before drafting the same is asked of the running survival curve:
    where no k beats plain decoding, the drafter is not run at all. For falling probabilities and rising
    marginal costs, the best k is where a node's own tokens a second fall below the step's.
    """

    def __init__(self, options: CostedOptions, depth: int, width: int) -> None:
        super().__init__(options)
        self._depth, self._width = depth, width
        self.step_times = StepTimePredictor(options.profile)
        self.materials = (self.step_times.profile,)
        self.curve = YieldCurve(options.horizon)
        self._switch = DraftingSwitch(self.step_times, options)
        self._depths: Sequence[int] = (depth,)  # levels that a step may end up drafting
        self._gates: Gates = ()
        self._load = LoadView(0, 0, 0, 0.0, 0.0, 0)

    def propose(self, load: LoadView) -> SpecPlan:
        self._load, batch = load, load.batch_size
        most = min(load.max_nodes, self._depth if self._width == 1 else load.max_nodes)
        sizes = self.curve.NODES
        open_to = (sizes * batch >= 1.0) & (sizes <= most)
        depths = [depth for depth in self._depths if depth <= load.max_nodes] or [load.max_nodes]
        gains = self.curve.gains(depths)[:, open_to]  # [D, O]
        seconds = self.step_times.speculative(
            load, sizes[open_to] * batch, self._width, np.array(depths, float)[:, None]
        )
        rates, seconds = self.rates(batch * (1.0 + gains), seconds).ravel(), seconds.ravel()
        best, plain = int(rates.argmax()), self.step_times.plain(load)
        excess = float(seconds[best]) - plain if rates[best] else math.inf
        if not self._switch.open(load, bool(rates[best] > batch / plain), excess):
            return AUTOREGRESSIVE
        return SpecPlan(most * batch, min(self._depth, load.max_nodes), self._width, self._gates)

    def rates(self, tokens: Floats, seconds: Floats) -> Floats:
        """Tokens a second of the choices, 0 for those that are not allowed."""
        return tokens / seconds

    @property
    def trust(self) -> float:
        """Accepted nodes per node promised by the drafter; a probe takes it at its word, or it could never recover."""
        return 1.0 if self._switch.probing else self.curve.correction

    def select(self, forest: Forest, plan: SpecPlan) -> Selection:
        probs = probabilities(forest.scores)
        running = running_sum(probs.flatten(), plan.budget)
        nodes = np.arange(float(len(running)))
        seconds = self.step_times.speculative(self._load, nodes, plan.width, int(forest.depths[-1]) + 1)
        tokens = forest.batch_size + self.trust * running
        k = int(self.rates(tokens, seconds).argmax())
        levels = np.bincount(forest.depths.cpu().numpy(), weights=probs.sum(0).cpu().numpy()).astype(np.float64)
        self.curve.observe_forest(running, levels, forest.batch_size, k)
        return likeliest(forest, k, self._node_cap)

    def observe(self, report: StepReport) -> None:
        self.step_times.observe(report)
        self.curve.observe(report)
        self._switch.observe(report)


def running_sum(values: Tensor, most: int) -> Floats:
    """[N + 1] 0, then the sums of the highest 1, 2, ... positive values, at most `most` of them."""
    ranked = values.sort(descending=True).values[:most]
    sums: Floats = ranked[ranked > 0.0].double().cumsum(0).cpu().numpy()
    return np.append(0.0, sums)
