"""The machine's pace and what looking costs: corrections of a cost profile by what steps really took.

`Pace` scales the profile's predictions by the measured phases; `ProbeLedger` decides when a controller
that switched speculation off may afford to try it again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from echo_rl.contracts import StepReport
from echo_rl.profile import CostProfile

RATE = 0.05
"""Share of a new measurement in the running averages."""


class Pace:
    """Running ratios of measured to predicted seconds, one a phase. Steps that also prefill are left out.

    Verify passes are timed in speculative and plain steps alike, so a machine that slows down for
    everyone changes no decision by itself. Where the profile misjudges the one kind of pass against
    the other, only a switch between them at the same load shows it: such steps set `contrast`, all
    others the common ratio. Drafting right after plain steps may have a backlog to work off and is not counted.
    """

    def __init__(self, profile: CostProfile) -> None:
        self._profile = profile
        self._common = 1.0
        self._contrast: dict[int, tuple[float, int]] = {}  # batch octave -> (plain / speculative ratio, switches seen)
        self._last: tuple[bool, int] | None = None
        self.draft = 1.0
        self.rest = {False: 1.0, True: 1.0}
        """Measured over predicted seconds outside the passes, of plain and of speculative steps."""

    def verify(self, batch: int, speculative: bool) -> float:
        """Measured over predicted seconds of a verify pass."""
        return self._common if speculative else self._common * self._contrast.get(batch.bit_length(), (1.0, 0))[0]

    def observe(self, report: StepReport) -> None:
        load, plan, times = report.load, report.plan, report.times
        if load.prefill_tokens or not load.batch_size:
            return
        kind, before = (plan.speculates, load.batch_size.bit_length()), self._last
        self._last = kind
        self._observe_verify(report, kind, before)
        usual = self._profile.overhead_seconds(load.batch_size, report.verified, plan.speculates)
        if usual > 0.0:
            rest = times.total - times.verify - times.draft
            self.rest[plan.speculates] = _follow(self.rest[plan.speculates], rest / usual)
        if plan.speculates and (before is None or before[0]):
            drafted = self._profile.draft_seconds(load.batch_size, plan.width, plan.max_depth)
            self.draft = _follow(self.draft, times.draft / drafted)

    def _observe_verify(self, report: StepReport, kind: tuple[bool, int], before: tuple[bool, int] | None) -> None:
        load, (speculative, octave) = report.load, kind
        rows = load.batch_size + report.verified
        predicted = self._profile.verify_seconds(load.batch_size, rows, load.mean_context)
        ratio = report.times.verify / predicted
        if before is None or before != (not speculative, octave):
            self._common = _follow(self._common, ratio * self._common / self.verify(load.batch_size, speculative))
            return
        contrast, seen = self._contrast.get(octave, (1.0, 0))
        measured = self.verify(load.batch_size, before[0]) / ratio if speculative else ratio / self._common
        rate = max(0.25, 1.0 / (seen + 2))
        self._contrast[octave] = (_follow(contrast, measured, rate), seen + 1)


class PromptShare:
    """Prompt tokens for each output token, lately: what a speculating server must let its drafter read on top.

    Starts from one for one, worth `MEMORY` tokens of evidence, and forgets at that rate.
    """

    MEMORY = 2_000.0

    def __init__(self) -> None:
        self._prompt = self._output = self.MEMORY

    @property
    def ratio(self) -> float:
        return self._prompt / self._output

    def observe(self, report: StepReport) -> None:
        kept = math.exp(-report.committed / self.MEMORY)
        self._prompt = self._prompt * kept + report.load.prefill_tokens
        self._output = self._output * kept + report.committed


def _follow(average: float, ratio: float, rate: float = RATE) -> float:
    """Geometric running average; one measurement counts as at most a factor of 4 either way."""
    if not ratio > 0.0:
        return average
    return average * math.exp(rate * max(-1.4, min(1.4, math.log(ratio / average))))


@dataclass
class ProbeLedger:
    """Pays for probes out of a fixed share of plain decoding time.

    Invariant: the excess seconds spent on probes never exceed ``share`` of the plain decoding seconds
    by more than one probe's, whatever a probe turns out to cost: a probe waits until the credit covers
    its predicted excess, and an excess that was larger than predicted is a debt to be worked off first.
    The prediction includes the tokens that the drafter has to catch up on, as last measured: where they
    cost more than the share, no probe is ever affordable and the last statistics stand until the load
    changes. Tokens gained by a probe are not credited.
    """

    share: float = 0.005
    period: int = 64
    """Fewest plain steps between probes."""
    credit: float = 0.0
    steps: int = 0
    """Plain steps since speculation last ran."""
    backlog: float = 0.0
    """Drafting seconds that a plain step leaves to the next speculative one."""

    def plain(self, seconds: float) -> None:
        self.credit += self.share * seconds
        self.steps += 1

    def affords(self, excess: float) -> bool:
        return self.steps >= self.period and self.credit >= excess + self.backlog * self.steps

    def spent(self, excess: float) -> None:
        self.credit -= max(0.0, excess)
        self.steps = 0

    def restart(self) -> None:
        """Speculation pays again: no debt, no credit."""
        self.credit, self.steps = 0.0, 0
