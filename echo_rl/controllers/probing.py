"""Accounts for what speculating costs besides its own steps: prompts that the drafter reads, and probes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from echo_rl.contracts import LoadView, StepReport


class PromptShare:
    """Prompt tokens for each output token, lately: what a speculating server must let its drafter read on top.

    Starts from one for one, worth `MEMORY` tokens of evidence, and forgets at that rate. Prompts whose answers end at
    their first token, or refuse speculation, are counted too though no drafter reads them: `MOST` bounds what they do.
    """

    MEMORY = 2_000.0
    MOST = 32.0

    def __init__(self) -> None:
        self._prompt = self._output = self.MEMORY

    @property
    def ratio(self) -> float:
        return self._prompt / self._output

    def observe(self, report: StepReport) -> None:
        kept = math.exp(-report.committed / self.MEMORY)
        self._prompt = min(self._prompt * kept + report.load.prefill_tokens, self.MOST * self.MEMORY)
        self._output = self._output * kept + report.committed


class PlainProbe:
    """Decides when a server that keeps speculating decodes plainly for a step, to see what that costs by now.

    Counted by batch octave: first after `FIRST` speculative steps, then after twice as many each time, since the
    first probes show most of what the profile misjudges.
    """

    FIRST = 8

    def __init__(self) -> None:
        self._speculative: dict[int, int] = {}  # batch octave -> speculative steps since a plain one
        self._taken: dict[int, int] = {}  # batch octave -> probes so far

    def due(self, load: LoadView, most: float) -> bool:
        """`most`: speculative steps after which one is due in any case."""
        octave = load.batch_size.bit_length()
        wait = min(most, self.FIRST << min(self._taken.get(octave, 0), 16))
        return not load.prefill_tokens and self._speculative.get(octave, 0) >= wait

    def observe(self, report: StepReport, probed: bool) -> None:
        """`probed`: the step was planned as a probe."""
        octave, speculates = report.load.batch_size.bit_length(), report.plan.speculates
        self._speculative[octave] = self._speculative.get(octave, 0) + 1 if speculates else 0
        if probed and not speculates:
            self._taken[octave] = self._taken.get(octave, 0) + 1


@dataclass
class ProbeBudget:
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
