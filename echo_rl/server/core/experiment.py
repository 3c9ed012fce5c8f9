"""An A/B experiment on live traffic: two controllers take turns over blocks of busy time.

Pure logic: it is told what each step took and brought, and says who decides the next one. A switchback
design: blocks come in pairs, one of each arm, in an order drawn for every pair, so that drifting load falls
on both alike; the first steps of a block are left out, since a switch leaves something behind (a
drafter that must catch up, a controller that must settle). Only seconds in which the engine worked count, so an idle
server proves nothing.

Arms are compared by tokens a request and second. On a server that is always full that is their throughput; on one that
isn't, throughput is what clients ask for, whoever decides, and how fast each of them is answered tells the arms apart.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, Literal

from echo_rl.errors import ConfigError
from echo_rl.utils.statistics import Interval, Rate, rate_ratio

CONTROL, TREATMENT = "control", "treatment"
CARRY_OVER = 2
"""First steps of a block that don't count."""
PAIRS_FOR_HARM = 3
"""Fewest pairs of blocks whose interval may end an experiment."""
FALSE_ALARM = 0.05
"""Chance that equal arms are called harmful, over all the looks of an experiment."""
RESAMPLES = 20_000
"""Of the interval that may end it, whose ends lie far out."""
MOST_DRAWS = 1_000_000
"""Blocks drawn for an interval, in all: the engine waits for it."""
RUNNING, DONE, STOPPED, HARM = "running", "done", "stopped", "harm"


@dataclass(frozen=True)
class ExperimentOptions:
    """Who is compared, for how long, and when to stop early. Raises `ConfigError`."""

    control: str
    treatment: str
    block_seconds: float = 20.0
    """Busy seconds of a block."""
    blocks: int = 20
    """Blocks of each arm."""
    harm: float = 1.0
    """Stop as soon as the interval of treatment over control lies wholly below this ratio; 0 never stops. The interval
    is wider than the one that is shown, by as many looks as are taken (Bonferroni)."""
    seed: int = 0
    """Of the order of the arms."""

    def __post_init__(self) -> None:
        if not 0.0 < self.block_seconds < float("inf"):
            raise ConfigError(f"block_seconds is {self.block_seconds}; give a number above 0")
        if self.blocks < 1:
            raise ConfigError(f"blocks is {self.blocks}; give at least 1 of each arm (3 make an interval)")
        if not 0.0 <= self.harm <= 1.0:
            raise ConfigError(f"harm is {self.harm}; give a ratio in [0, 1], 0 for never")


@dataclass(frozen=True)
class Block:
    """What one arm did in its turn."""

    tokens: int
    seconds: float
    """In which the engine worked."""
    request_seconds: float
    """The same, once for each request in the batch."""


class Switchback:
    """One experiment. `arm` decides the next step; `step` tells what it brought."""

    def __init__(self, options: ExperimentOptions) -> None:
        self.options = options
        self.state = RUNNING
        self.reason: str | None = None
        """Why it is over."""
        self._random = random.Random(options.seed)
        self._order: list[str] = []  # the rest of the pair under way
        self._blocks: dict[str, list[Block]] = {CONTROL: [], TREATMENT: []}
        self._begin_block()

    @property
    def pairs(self) -> int:
        """Pairs of blocks that are complete."""
        return min(map(len, self._blocks.values()))

    def step(self, tokens: int, seconds: float, running: int = 1) -> bool:
        """Counts a step of the arm in force; True where it ended a block (`arm` and `state` may differ then).

        `running`: requests in the batch.
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
            self._judge()
        self._begin_block()
        return True

    def stop(self, reason: str, state: str = STOPPED) -> None:
        """End it from outside; once over it stays as it ended."""
        if self.state == RUNNING:
            self.state, self.reason = state, reason

    def interval(self, level: float = 0.95, resamples: int = 2000) -> Interval | None:
        """Treatment's tokens a request and second over control's, by the complete pairs."""
        treatment, control = (
            [Rate(block.tokens, block.request_seconds) for block in self._blocks[arm][: self.pairs]]
            for arm in (TREATMENT, CONTROL)
        )
        return rate_ratio(treatment, control, level, min(resamples, MOST_DRAWS // self.pairs)) if control else None

    def report(self) -> dict[str, Any]:
        """Plain JSON types: arms, rates, ratio with its interval, how it ended."""
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
        """Who decides: ``control`` or ``treatment``."""
        self._steps, self._tokens, self._seconds, self._request_seconds = 0, 0, 0.0, 0.0

    def _judge(self) -> None:
        if self._harmful():
            ratio = self.interval()
            assert ratio is not None
            self.stop(f"treatment is slower: {ratio.text(3)} of control's tokens a request and second", HARM)
        elif self.pairs >= self.options.blocks:
            self.stop(f"{self.pairs} blocks of each arm are done", DONE)

    def _harmful(self) -> bool:
        if self.pairs < PAIRS_FOR_HARM or not self.options.harm:
            return False
        looks = max(1, self.options.blocks - PAIRS_FOR_HARM + 1)
        ratio = self.interval(1.0 - FALSE_ALARM / looks, RESAMPLES)
        return ratio is not None and ratio.side(self.options.harm) < 0


def _rate(blocks: list[Block], over: Literal["seconds", "request_seconds"]) -> float | None:
    seconds = sum(getattr(block, over) for block in blocks)
    return sum(block.tokens for block in blocks) / seconds if seconds else None
