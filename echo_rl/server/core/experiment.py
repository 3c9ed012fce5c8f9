"""An A/B experiment on live traffic: two controllers take turns over blocks of busy time.

Pure logic: it takes what each step took and brought, and says which arm decides the next one. The design is a
switchback: blocks come in pairs, one of each arm, in an order drawn for every pair, so that drifting load falls on both
alike; the first steps of a block are left out, since a switch carries over (a drafter must catch up, a controller must
settle). Only seconds in which the engine worked count, so an idle server proves nothing.

Arms are compared by tokens a request and second. On a server that is always full that is their throughput; on one that
isn't, throughput is what clients ask for under either arm, and how fast each of them is answered tells the arms
apart.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, Literal

from echo_rl.server.config import ExperimentOptions
from echo_rl.utils.statistics import Interval, Rate, rate_ratio

CONTROL, TREATMENT = "control", "treatment"
CARRY_OVER = 2
"""First steps of a block, which don't count."""
PAIRS_FOR_HARM = 3
"""Fewest pairs of blocks whose interval may end an experiment."""
FALSE_ALARM = 0.05
"""Chance that equal arms are called harmful, over all the analyses of an experiment."""
RESAMPLES = 20_000
"""Bootstrap resamples of the interval that may end an experiment, whose ends lie far out."""
MOST_DRAWS = 1_000_000
"""Most blocks drawn for one interval, since the engine waits for it."""
RUNNING, DONE, STOPPED, HARM = "running", "done", "stopped", "harm"


@dataclass(frozen=True)
class Block:
    """Sums up one arm's steps of one block."""

    tokens: int
    seconds: float
    """Seconds in which the engine worked."""
    request_seconds: float
    """The same seconds, once for each request in the batch."""


class Switchback:
    """One experiment: `arm` decides the next step, and `step` takes what that brought."""

    def __init__(self, options: ExperimentOptions) -> None:
        self.options = options
        self.state = RUNNING
        self.reason: str | None = None
        """The reason of its end, once it is over."""
        self._random = random.Random(options.seed)
        self._order: list[str] = []  # the rest of the pair under way
        self._blocks: dict[str, list[Block]] = {CONTROL: [], TREATMENT: []}
        self._begin_block()

    @property
    def pairs(self) -> int:
        """Returns how many pairs of blocks are complete."""
        return min(map(len, self._blocks.values()))

    def step(self, tokens: int, seconds: float, running: int = 1) -> bool:
        """Counts a step of `arm`; returns whether it ended a block, after which `arm` and `state` may differ.

        `running` is the number of requests in the batch.
        """
        if self.state != RUNNING:
            return False
        self._steps += 1
        if self._steps <= CARRY_OVER:
            return False
        self._tokens += tokens
        self._seconds += seconds
        self._request_seconds += max(1, running) * seconds
        if self._seconds < self.options.block_seconds or not self._tokens:
            return False
        self._blocks[self.arm].append(Block(self._tokens, self._seconds, self._request_seconds))
        if not self._order:
            self._check_end()
        self._begin_block()
        return True

    def stop(self, reason: str, state: str = STOPPED) -> None:
        """Ends the experiment from outside; one that is over stays as it ended."""
        if self.state == RUNNING:
            self.state, self.reason = state, reason

    def interval(self, level: float = 0.95, resamples: int = 2000) -> Interval | None:
        """Returns the ratio of treatment's tokens a request and second to control's, over the complete pairs."""
        treatment, control = (
            [Rate(block.tokens, block.request_seconds) for block in self._blocks[arm][: self.pairs]]
            for arm in (TREATMENT, CONTROL)
        )
        return rate_ratio(treatment, control, level, min(resamples, MOST_DRAWS // self.pairs)) if control else None

    def report(self) -> dict[str, Any]:
        """Returns arms, rates, the ratio with its interval and how it ended, as plain JSON types."""
        o, ratio = self.options, self.interval()
        return {
            "state": self.state,
            "reason": self.reason,
            "control": o.control,
            "treatment": o.treatment,
            "block_seconds": o.block_seconds,
            "harm": o.harm,
            "blocks": {arm: len(blocks) for arm, blocks in self._blocks.items()},
            "of": o.blocks,
            "tokens_per_second": {arm: _rate(blocks, "seconds") for arm, blocks in self._blocks.items()},
            "tokens_per_request_second": {
                arm: _rate(blocks, "request_seconds") for arm, blocks in self._blocks.items()
            },
            "ratio": None
            if ratio is None
            else {"estimate": ratio.estimate, "low": ratio.low, "high": ratio.high, "pairs": ratio.blocks},
        }

    def _begin_block(self) -> None:
        if not self._order:
            self._order = [CONTROL, TREATMENT]
            self._random.shuffle(self._order)
        self.arm = self._order.pop(0)
        """The arm that decides: ``control`` or ``treatment``."""
        self._steps, self._tokens, self._seconds, self._request_seconds = 0, 0, 0.0, 0.0

    def _check_end(self) -> None:
        if self._harmful():
            ratio = self.interval()
            assert ratio is not None
            self.stop(f"treatment is slower: {ratio.text(3)} of control's tokens a request and second", HARM)
        elif self.pairs >= self.options.blocks:
            self.stop(f"{self.pairs} blocks of each arm are done", DONE)

    def _harmful(self) -> bool:
        if self.pairs < PAIRS_FOR_HARM or not self.options.harm:
            return False
        analyses = max(1, self.options.blocks - PAIRS_FOR_HARM + 1)
        ratio = self.interval(1.0 - FALSE_ALARM / analyses, RESAMPLES)
        return ratio is not None and ratio.side(self.options.harm) < 0


def _rate(blocks: list[Block], over: Literal["seconds", "request_seconds"]) -> float | None:
    seconds = sum(getattr(block, over) for block in blocks)
    return sum(block.tokens for block in blocks) / seconds if seconds else None
