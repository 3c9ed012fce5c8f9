"""Corrects a cost profile by what steps really took.

A profile that was measured in another hour or on another machine is wrong in level and in shape: where
arithmetic is slower than it says but memory isn't, large passes cost twice what it predicts and small ones
almost what it predicts. So the verify pass is corrected by a curve over its rows, not by one number.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from echo_rl.contracts import StepReport
from echo_rl.costs.profile import CostProfile

Floats = NDArray[np.float64]

RATE = 0.05
"""Share of a new measurement in the running averages."""
OCTAVES = 14
"""Knots of the curve: passes of 1, 2, 4, ..., 8192 rows."""
LEVEL, SHAPE, REACH = 2.0, 0.35, 4.0
"""Standard deviations before anything was measured, in log seconds: of the whole curve, and of each knot about it; and
the octaves over which knots go together."""
NOISE = 0.15
"""Standard deviation of a pass's log seconds about the curve."""
FORGOTTEN = 1e-4
"""Share of what is known that a step forgets."""
STEP = 1.4
"""Log ratio to the running average that a measurement counts for at most."""
OUTLIER = 3.0
"""Standard deviations that a measurement counts for at most."""


def _prior() -> Floats:
    apart = np.abs(np.subtract.outer(np.arange(OCTAVES), np.arange(OCTAVES)))
    covariance: Floats = LEVEL**2 + SHAPE**2 * np.exp(-apart / REACH)
    return covariance


PRIOR = _prior()
_RELAPSE = FORGOTTEN * PRIOR


def basis(rows: ArrayLike) -> Floats:
    """[..., OCTAVES] the weight of each knot of a curve for passes of so many rows (linear interpolation)."""
    place = np.log2(np.clip(np.asarray(rows, dtype=float), 1.0, 2.0 ** (OCTAVES - 1)))
    weights: Floats = np.maximum(0.0, 1.0 - np.abs(place[..., None] - np.arange(OCTAVES)))
    return weights


class CorrectionCurve:
    """Log of measured over predicted seconds of a verify pass, over log2 of its rows.

    A Kalman filter whose state is the curve at its knots. All knots may move together, each a little by itself:
    a machine that slows down for everyone moves the whole curve, and steps of different sizes close in time
    bend it. Between knots it is linear; what was never measured follows its neighbours.
    """

    def __init__(self) -> None:
        self._logs = np.zeros(OCTAVES)
        self._covariance = PRIOR.copy()

    def factors(self, weights: Floats) -> Floats:
        """[...] measured over predicted seconds of passes with these `basis`."""
        factors: Floats = np.exp(weights @ self._logs)
        return factors

    def uncertainty(self, weights: Floats, rows: float) -> Floats:
        """[...] standard deviation of log `factors` against that of a pass of `rows` rows."""
        apart = weights - basis(rows)
        deviations: Floats = np.sqrt(np.maximum(0.0, np.einsum("...i,...i", apart @ self._covariance, apart)))
        return deviations

    def factor(self, rows: float) -> float:
        """`factors` of one pass, without arrays."""
        return math.exp(_between(self._logs, *_place(rows)))

    def follow(self, rows: float, ratio: float) -> None:
        """Learn from a pass of `rows` rows that took `ratio` of its predicted seconds."""
        if not 0.0 < ratio < math.inf:
            return
        known, place = self._covariance, _place(rows)
        known *= 1.0 - FORGOTTEN
        known += _RELAPSE
        gain = _between(known, *place)
        spread = float(_between(gain, *place)) + NOISE**2
        most = OUTLIER * math.sqrt(spread)
        surprise = max(-most, min(most, math.log(ratio) - float(_between(self._logs, *place))))
        self._logs += gain * (surprise / spread)
        known -= gain[:, None] * (gain / spread)


def _place(rows: float) -> tuple[int, float]:
    """The knot below and the position towards the next."""
    place = min(max(math.log2(max(rows, 1.0)), 0.0), OCTAVES - 1.0)
    low = min(int(place), OCTAVES - 2)
    return low, place - low


def _between(values: Floats, low: int, share: float) -> Any:
    """`values` (a knot's number, or its row) at a place."""
    return (1.0 - share) * values[low] + share * values[low + 1]


class Ratios:
    """Measured over predicted seconds, phase by phase."""

    def __init__(self) -> None:
        self.verify = CorrectionCurve()
        self.draft = 1.0
        self.rest = {False: 1.0, True: 1.0}
        """Outside the passes, of plain and of speculative steps."""


class CostCorrector:
    """Running ratios of measured to predicted seconds, one a phase. Steps that also prefill are left out.

    Verify passes are timed in speculative and plain steps alike, with the rows of requests that refuse speculation.
    Drafting right after plain steps or prompts has a backlog to work off and is not counted. Drafting that gates stop
    early is held against the plan's whole depth: it counts as cheaper drafting, so that the ratio prices the gates in.

    Beside a busy neighbour steps take longer, large passes more than small ones. So contended steps have ratios of
    their own, which start from the others': what was learnt of the idle machine holds again as soon as it is idle.
    """

    def __init__(self, profile: CostProfile) -> None:
        self._profile = profile
        self._behind = False  # the drafter has tokens to catch up on
        self._idle = self._ratios = Ratios()
        self._contended: Ratios | None = None

    @property
    def verify(self) -> CorrectionCurve:
        return self._ratios.verify

    @property
    def draft(self) -> float:
        return self._ratios.draft

    @property
    def rest(self) -> dict[bool, float]:
        """Measured over predicted seconds outside the passes, of plain and of speculative steps."""
        return self._ratios.rest

    def observe(self, report: StepReport) -> None:
        load, plan, times, profile = report.load, report.plan, report.times, self._profile
        ratios = self._ratios = self._ratios_of(report.contended)
        behind, self._behind = self._behind, not plan.speculates or load.prefill_tokens > 0
        if load.prefill_tokens or not load.batch_size:
            return
        rows = load.decoding + report.verified
        ratios.verify.follow(rows, times.verify / profile.verify_seconds(load.decoding, rows, load.mean_context))
        usual = profile.overhead_seconds(load.decoding, report.verified, plan.speculates)
        if usual > 0.0:
            rest = times.total - times.verify - times.draft
            ratios.rest[plan.speculates] = _follow(ratios.rest[plan.speculates], rest / usual)
        if plan.speculates and not behind:
            drafted = profile.draft_seconds(load.batch_size, plan.width, plan.max_depth)
            ratios.draft = _follow(ratios.draft, times.draft / drafted)

    def _ratios_of(self, contended: bool) -> Ratios:
        """Those that a step's times belong to."""
        if not contended:
            return self._idle
        if self._contended is None:
            self._contended = copy.deepcopy(self._idle)
        return self._contended


def _follow(average: float, ratio: float) -> float:
    """The geometric running average after a measurement; one that isn't positive changes nothing."""
    if not ratio > 0.0:
        return average
    return average * math.exp(RATE * max(-STEP, min(STEP, math.log(ratio / average))))
