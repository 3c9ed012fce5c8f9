"""What speculating costs besides its own steps: prompts that the drafter has to read, and looks that may not pay."""

from __future__ import annotations

import math
from dataclasses import dataclass

from echo_rl.contracts import StepReport


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
