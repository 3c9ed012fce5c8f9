"""Plans ECHO's budget: the nodes to verify in a step, and the depth and width to draft for them.

Compares a small ladder of budgets by predicted tokens a second, never past the profile's knee
K_max(B), and answers "none" where plain decoding is predicted to be as fast. Knows nothing of
gates or forests.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from echo_rl.contracts import LoadView, StepReport
from echo_rl.controllers.echo.acceptance import AcceptanceModel
from echo_rl.controllers.probing import PlainProbe, ProbeBudget, PromptShare
from echo_rl.controllers.tree_shapes import affordable_trees
from echo_rl.costs.correction import CostCorrector, basis
from echo_rl.costs.profile import BREAK_EVEN_ACCEPTANCE, CostProfile, context_of, half_octave
from echo_rl.errors import ConfigError

Floats = NDArray[np.float64]

LADDER = (0.25, 0.5, 1.0, 2.0, 3.0, 5.0, 7.0, 9.0, 11.0, 15.0, 23.0, 31.0, 47.0, 60.0)
"""Budgets to compare, in nodes a request, up to ECHO's total at batch 1. With its root a request then
verifies a round number of rows, where matrix products are cheapest a row."""


@dataclass(frozen=True)
class Shape:
    """One way to spend a step. Budget 0 is plain decoding."""

    budget: int
    depth: int = 1
    width: int = 1
    nodes: float = 0.0
    """The ladder's nodes a request that this budget stands for."""


PLAIN = Shape(0)
MOST_CACHED = 1024
"""Most entries of a cache; a full one is emptied."""
OPTIMISM = 1.0
"""Standard deviations by which an untried pass may be cheaper than its prediction."""


@dataclass(frozen=True)
class PlannerOptions:
    period: int = 8
    """Most steps for which a decision for a batch size stands."""
    margin: float = 0.03
    """Predicted gain that it takes to leave the shape in use; switching off takes none."""
    theta: float = BREAK_EVEN_ACCEPTANCE
    """Break-even acceptance that defines K_max, see `CostProfile.knee`."""
    horizon: float = 256.0
    """Requests over which acceptance is averaged."""
    probe_share: float = 0.01
    """Share of the time that trying the alternative may cost, see `ProbeBudget`."""
    probe_period: int = 64
    """Fewest steps between two probes."""

    def __post_init__(self) -> None:
        if self.period < 1 or self.probe_period < 1 or not self.horizon > 0:
            raise ConfigError(f"planner period, probe_period and horizon must be positive, not {self}")
        if self.margin < 0 or not 0 <= self.probe_share < 1 or not self.theta > 0:
            raise ConfigError(f"planner needs margin >= 0, 0 <= probe_share < 1 and theta > 0, not {self}")


@dataclass(frozen=True)
class CandidateShapes:
    """The shapes open to one batch size, with what they cost and would yield whatever the context."""

    shapes: tuple[Shape, ...]
    index: dict[tuple[float, int, int], int]
    """A shape's place in `shapes`, by its nodes a request, depth and width."""
    draft: Floats  # [O] seconds
    rest: Floats  # [O] seconds outside the passes
    yields: Floats  # [S, O, D] see AcceptanceModel


@dataclass(frozen=True)
class PricedShapes:
    """The candidates at one context, with what verifying them costs."""

    candidates: CandidateShapes
    rows: tuple[float, float]  # of a plain pass without the load's prompts, and with them
    plain: float  # seconds of the former
    beside: float  # seconds of the latter
    verify: Floats  # [O] seconds of a pass that verifies beside the prompts
    weights: Floats  # [O, OCTAVES] see `correction.basis`


@dataclass(frozen=True)
class Decision:
    shape: Shape
    best: Shape
    """The best shape that speculates, whether or not it pays; PLAIN where there is none."""
    excess: float
    """Predicted seconds that `best` takes longer than a plain step."""
    speedup: float
    """Predicted tokens a second of `best` over those of plain decoding."""
    expires: int
    stands: int
    """Steps that it is for: few at first, when little is known."""


class BudgetPlanner:
    """Picks a `Shape` a step from the cost profile and a running estimate of acceptance.

    With B requests and E[L] accepted nodes a request, a shape yields ``B * (E[L] + 1)`` tokens in
    T_draft + T_verify + overheads (ECHO's objective). While off, a rare probe keeps the estimate of
    acceptance alive; while on, a rare plain step keeps the price of plain decoding honest. Either costs
    at most `probe_share` of the time (plus one probe, and the first few checks). In a step that also reads prompts a
    node costs what it adds to a pass of the roots and the prompts, which have used up the idle arithmetic by then; the
    prompts' own seconds are spent whatever is planned and count on neither side. Nothing is tried out in such steps,
    since nothing is learned from their times. Requests that refuse speculation are rows of every pass and gain a token
    a step whatever is planned: they count on both sides.
    """

    def __init__(self, profile: CostProfile, options: PlannerOptions, pooled: bool = True) -> None:
        self._profile, self._options = profile, options
        self._acceptance = AcceptanceModel(options.horizon, pooled)
        self._corrector = CostCorrector(profile)
        self._prompts = PromptShare()
        self._probe_budget = ProbeBudget(options.probe_share, options.probe_period)
        self._candidates: dict[tuple[int, int, int], CandidateShapes] = {}
        self._priced_shapes: dict[tuple[int, ...], PricedShapes] = {}
        self._decisions: dict[tuple[int, int, int], Decision] = {}  # by `_served`
        self._in_use = PLAIN
        self._probing = False  # the step in progress is a probe, of drafting or of plain decoding
        self._unread: list[StepReport] = []  # not yet learned from
        self._plain_probe = PlainProbe()
        self._step = 0
        every = [tree for nodes in LADDER for tree in affordable_trees(nodes)]
        self._acceptance.yields(every, batch=2)  # fills the caches, so that no step has to

    def choose(self, load: LoadView) -> Shape:
        """The shape of the coming step."""
        self._step += 1
        served = _served(load)
        decision = self._decisions.get(served)
        if decision is None or decision.expires <= self._step:
            decision = self._decisions[served] = self._decide(load)
        if not load.prefill_tokens:
            self._in_use = decision.shape
        if decision.shape.budget:
            self._probing = self._worth_probing_plain(load, decision)
            return PLAIN if self._probing else decision.shape
        self._probing = self._worth_probing_drafting(load, decision)
        return decision.best if self._probing else PLAIN

    def observe(self, report: StepReport) -> None:
        speculated, probes = report.plan.speculates, self._probe_budget
        self._unread.append(report)
        self._plain_probe.observe(report, self._probing)
        if self._probing:
            self._decisions.clear()
        if self._probing or (speculated and probes.steps) or len(self._unread) >= 2 * self._options.period:
            self._catch_up()
        if not report.load.batch_size:  # it read prompts alone
            return
        if speculated and probes.steps:
            drafting = self._profile.draft_seconds(report.load.batch_size, report.plan.width, report.plan.max_depth)
            probes.backlog = max(0.0, report.times.draft - drafting * self._corrector.draft) / probes.steps
        if speculated and self._probing:
            probes.spent(report.times.total - self._plain_seconds(report.load))
        elif speculated:
            probes.restart()
        elif not self._probing:
            probes.plain(report.times.total)
        self._probing = False

    def _catch_up(self) -> None:
        """Learn from the steps since the last decision. Nobody asks in between, and together they cost less."""
        for report in self._unread:
            self._corrector.observe(report)
            self._acceptance.observe(report)
            self._prompts.observe(report)
        self._unread.clear()

    def knee(self, load: LoadView) -> int:
        """K_max at this load."""
        return self._profile.knee(load.decoding, load.mean_context, self._options.theta, self._prompt_rows(load))

    def _decide(self, load: LoadView) -> Decision:
        self._catch_up()
        priced = self._priced(load)
        shapes, previous = priced.candidates.shapes, self._decisions.get(_served(load))
        stands = min(self._options.period, 2 * previous.stands) if previous is not None else 1
        expires = self._step + stands
        if not shapes:
            return Decision(PLAIN, PLAIN, math.inf, 0.0, expires, stands)
        decoding, plain = load.decoding, self._plain_seconds(load)
        accepted = self._acceptance.expected(priced.candidates.yields) * load.batch_size
        tokens, read = accepted + decoding, accepted + load.batch_size
        factors = self._corrector.verify.factors(priced.weights)
        seconds = self._seconds(priced, read, factors)
        rates, off = tokens / seconds, decoding / plain
        in_use = previous.shape if previous is not None else self._in_use
        incumbent = priced.candidates.index.get((in_use.nodes, in_use.depth, in_use.width))
        optimistic = rates
        if incumbent is not None and not load.prefill_tokens:  # else what the profile makes too dear is never tried
            uncertainty = self._corrector.verify.uncertainty(priced.weights, decoding + shapes[incumbent].budget)
            optimistic = tokens / self._seconds(priced, read, factors * np.exp(-OPTIMISM * uncertainty))
        current = float(rates[incumbent]) if incumbent is not None else off
        best = int(optimistic.argmax())
        shape = shapes[best]
        if optimistic[best] <= max(off, current * (1.0 + self._options.margin)):  # not worth a move
            shape = shapes[incumbent] if incumbent is not None and current > off else PLAIN
        return Decision(shape, shapes[best], float(seconds[best]) - plain, float(rates[best]) / off, expires, stands)

    def _seconds(self, priced: PricedShapes, tokens: Floats, factors: Floats) -> Floats:
        """[O] a step of each shape without what its prompts add to a plain one, with its share of letting the drafter
        read prompts.

        `tokens` [O] of the requests that speculate, `factors` [O]: what verifying takes over what the profile says.
        """
        corrector = self._corrector
        reading = tokens * self._prompts.ratio * self._profile.catch_up * corrector.draft
        prompts = priced.beside * corrector.verify.factor(priced.rows[1])  # with the plain pass
        prompts -= priced.plain * corrector.verify.factor(priced.rows[0])
        passes = priced.verify * factors + priced.candidates.draft * corrector.draft - prompts
        return passes + priced.candidates.rest * corrector.rest[True] + reading

    def _plain_seconds(self, load: LoadView) -> float:
        rest = self._profile.overhead_seconds(load.decoding) * self._corrector.rest[False]
        return self._priced(load).plain * self._corrector.verify.factor(load.decoding) + rest

    def _worth_probing_plain(self, load: LoadView, decision: Decision) -> bool:
        """True where a plain step is due: it loses ``1 - 1 / speedup`` of a step, spread to stay within the share."""
        options = self._options
        loss = max(0.0, 1.0 - 1.0 / decision.speedup)
        most = max(options.probe_period, loss / max(1e-9, options.probe_share))
        return options.probe_share > 0 and self._plain_probe.due(load, most)

    def _worth_probing_drafting(self, load: LoadView, decision: Decision) -> bool:
        """True where a probe is affordable and could change the decision.

        It could if a drafter with half the misses would pay; the longer ago the drafter was last
        seen, the less is known of it, so the misses are halved once more every 512 plain steps.
        """
        if load.prefill_tokens or not decision.best.budget or not self._probe_budget.affords(decision.excess):
            return False
        self._catch_up()
        priced = self._priced(load)
        miss = 0.5 ** (1.0 + self._probe_budget.steps / 512)
        accepted = self._acceptance.expected(priced.candidates.yields, miss)
        read = (accepted + 1.0) * load.batch_size
        seconds = self._seconds(priced, read, self._corrector.verify.factors(priced.weights))
        return bool(((read + load.plain) / seconds).max() > load.decoding / self._plain_seconds(load))

    def _priced(self, load: LoadView) -> PricedShapes:
        """The ladder cut at K_max and at the load's node limit; built once a batch and half octave of context."""
        key = (*_served(load), half_octave(load.mean_context), load.max_nodes)
        if key not in self._priced_shapes:
            if len(self._priced_shapes) >= MOST_CACHED:
                self._priced_shapes.clear()
            self._priced_shapes[key] = self._price(load, context_of(key[3]))
        return self._priced_shapes[key]

    def _price(self, load: LoadView, context: float) -> PricedShapes:
        batch, most = load.batch_size, min(self.knee(load), load.max_nodes * load.batch_size)
        key, decoding = (batch, load.plain, most), load.decoding
        if key not in self._candidates:
            if len(self._candidates) >= MOST_CACHED:
                self._candidates.clear()
            self._candidates[key] = self._build_candidates(batch, load.plain, most)
        candidates = self._candidates[key]
        occupied = decoding + self._prompt_rows(load)
        rows = [decoding, occupied, *(occupied + shape.budget for shape in candidates.shapes)]
        plain, beside, *verify = self._profile.verify_each(decoding, rows, context)
        return PricedShapes(candidates, (decoding, occupied), plain, beside, np.array(verify), basis(rows[2:]))

    def _prompt_rows(self, load: LoadView) -> float:
        """Verified rows that cost as much as the load's prompt tokens, by the half octave."""
        return self._profile.prefill_weight * context_of(half_octave(load.prefill_tokens))

    def _build_candidates(self, batch: int, refusing: int, most: int) -> CandidateShapes:
        profile, budgets = self._profile, dict[int, float]()
        for nodes in LADDER:
            if 0 < round(nodes * batch) <= most:
                budgets.setdefault(round(nodes * batch), nodes)
        shapes: list[Shape] = []
        for budget, nodes in budgets.items():
            trees = [(depth, width) for _, depth, width in affordable_trees(nodes) if depth <= budget]
            shapes.extend(Shape(budget, depth, width, nodes) for depth, width in trees)
        return CandidateShapes(
            tuple(shapes),
            {(s.nodes, s.depth, s.width): place for place, s in enumerate(shapes)},
            np.array([profile.draft_seconds(batch, s.width, s.depth) for s in shapes]),
            np.array([profile.overhead_seconds(batch + refusing, s.budget, True) for s in shapes]),
            self._acceptance.yields([(s.nodes, s.depth, s.width) for s in shapes], batch) if shapes else np.empty(0),
        )


def _served(load: LoadView) -> tuple[int, int, int]:
    """Requests that speculate, that refuse to, and half octaves of the prompt tokens beside them."""
    return load.batch_size, load.plain, half_octave(load.prefill_tokens)
