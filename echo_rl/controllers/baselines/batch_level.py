"""Decides the verified length of chains over the batch: TETRIS, SGLang's adaptive steps, DSpark."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from echo_rl.contracts import AUTOREGRESSIVE, LoadView, SpecPlan, StepReport
from echo_rl.controllers.base import BaseController
from echo_rl.controllers.baselines.dynamic import Values
from echo_rl.controllers.baselines.efficiency import MOST_LEVELS, CostedOptions, Efficient
from echo_rl.controllers.probing import ProbeBudget
from echo_rl.errors import ConfigError


@dataclass(frozen=True)
class TetrisOptions:
    base: int = 3
    """Verified tokens a request, averaged over the batch (base_k)."""
    extra: int = 2
    """Tokens drafted past that, to choose from (1 to 3 in the paper)."""
    TUNABLE: ClassVar[Values] = {"base": (1, 2, 3, 5), "extra": (1, 2, 3)}

    def __post_init__(self) -> None:
        if self.base < 1 or self.extra < 0 or self.base + self.extra > MOST_LEVELS:
            raise ConfigError(
                f"tetris base {self.base}, extra {self.extra}: give at least 1 and 0, {MOST_LEVELS} levels together"
            )


class Tetris(BaseController):
    """TETRIS (arXiv 2502.15197): of chains of base + extra tokens, verify the batch's likeliest base * B.

    A token's value is its cumulative log-probability, so a chain is always cut at its end.
    """

    name = "tetris"
    options: TetrisOptions

    def propose(self, load: LoadView) -> SpecPlan:
        options = self.options
        return SpecPlan(options.base * load.batch_size, min(options.base + options.extra, load.max_nodes), 1)


Ladders = tuple[tuple[int, tuple[int, ...]], ...]
"""(least batch size, the chain lengths to move between)."""

SGLANG_LADDERS: Ladders = ((1, (1, 3, 5, 7)), (8, (0, 1, 3)), (32, (0, 1)), (64, (0,)))


@dataclass(frozen=True)
class SglangAdaptiveOptions:
    ladders: Ladders = SGLANG_LADDERS
    """A batch size uses the last ladder that starts at or below it."""
    initial: int = 3
    """Chain length to start from; each ladder takes its longest rung that is not longer."""
    rate: float = 0.2
    """Share of a new step in the moving average of the accept length."""
    warmup: int = 10
    """Speculative steps of a ladder before it moves."""
    interval: int = 5
    """Speculative steps between two moves."""
    down: float = -0.25
    """Added to the accept length below which a shorter chain is taken."""
    up: float = 0.0
    """Added to the accept length above which a longer chain is taken."""
    off: float = 0.5
    """Accept length at the edge of a ladder's 0; the published ``round(average) + 1`` alone would never reach it."""
    probe_share: float = 0.005
    """Share of plain decoding time that trying the drafter again may cost, see `ProbeBudget`."""
    probe_period: int = 64
    """Fewest plain steps between two tries."""
    TUNABLE: ClassVar[Values] = {"rate": (0.1, 0.2, 0.4), "interval": (5, 20), "off": (0.25, 0.5, 0.75)}

    def __post_init__(self) -> None:
        _check_ladders(self.ladders)
        if self.initial < 0 or self.warmup < 0 or min(self.interval, self.probe_period) < 1:
            raise ConfigError(
                f"sglang_adaptive counts must not be negative, interval and probe_period positive: {self}"
            )
        if not 0.0 < self.rate <= 1.0 or not 0.0 <= self.probe_share < 1.0:
            raise ConfigError(f"sglang_adaptive rate {self.rate}, probe_share {self.probe_share}: give shares of 1")
        if not self.down <= self.up or not self.off + self.down >= 0.0:
            raise ConfigError(
                f"sglang_adaptive down {self.down}, up {self.up}, off {self.off}: give down <= up and off + down >= 0"
            )


def _check_ladders(ladders: Ladders) -> None:
    starts = [start for start, _ in ladders]
    if starts[:1] != [1] or any(b <= a for a, b in pairwise(starts)):
        raise ConfigError(f"sglang_adaptive ladders start at batch sizes {starts}; give increasing ones from 1")
    for start, rungs in ladders:
        if not rungs or any(b <= a for a, b in pairwise(rungs)) or rungs[0] < 0 or rungs[-1] > MOST_LEVELS:
            raise ConfigError(f"sglang_adaptive ladder {rungs} of batch {start}: give increasing lengths, 0 to 8")


class _Ladder:
    """One ladder's place and the moving average that moves it."""

    def __init__(self, rungs: tuple[int, ...], options: SglangAdaptiveOptions) -> None:
        self._rungs, self._options = rungs, options
        self._place = max(0, bisect_right(rungs, options.initial) - 1)
        self._average = max(0.0, self.steps - 1.0)
        self._seen = 0

    @property
    def steps(self) -> int:
        return self._rungs[self._place]

    @property
    def shortest(self) -> int:
        """The shortest chain of the ladder, 0 where it has none."""
        return next((rung for rung in self._rungs if rung), 0)

    def accepted(self, length: float, probed: bool) -> None:
        options = self._options
        self._average += options.rate * (length - self._average)
        self._seen += 1
        due = self._seen > options.warmup and self._seen % options.interval == 0
        if due or probed:
            self._move()

    def _move(self) -> None:
        """Move to ``round(average) + 1``, held back by the hysteresis."""
        options, rungs, before = self._options, self._rungs, self._place
        while self._place and self._average <= self._edge(rungs[self._place - 1]) + options.down:
            self._place -= 1
        if self._place < before:
            return
        while self._place < len(rungs) - 1 and self._average > self._edge(rungs[self._place]) + options.up:
            self._place += 1

    def _edge(self, rung: int) -> float:
        """The accept length from which this rung is too short: ``round(x) + 1 > rung``."""
        return rung - 0.5 if rung else self._options.off


class SglangAdaptive(BaseController):
    """SGLang's `--speculative-adaptive`: chains as long as the accept length lately was, plus one.

    Knows no costs: what a batch size can bear is in its ladder. The accept length counts drafted
    tokens only. At a ladder's 0 nothing is accepted any more, so its shortest chain is tried now and then.
    """

    name = "sglang_adaptive"

    def __init__(self, options: SglangAdaptiveOptions) -> None:
        super().__init__(options)
        self._starts = [start for start, _ in options.ladders]
        self._ladders = [_Ladder(rungs, options) for _, rungs in options.ladders]
        self._probe_budget = ProbeBudget(options.probe_share, options.probe_period)
        self._probing = False
        self._excess = 0.0  # seconds that the last probe took longer than plain steps
        self._plain: dict[int, float] = {}  # batch octave -> seconds of a plain step without prompts, running

    def propose(self, load: LoadView) -> SpecPlan:
        ladder = self._ladder(load)
        steps = ladder.steps
        self._probing = not steps and not load.prefill_tokens and self._probe_budget.affords(self._excess)
        steps = min(ladder.shortest if self._probing else steps, load.max_nodes)
        return SpecPlan(steps * load.batch_size, steps, 1) if steps else AUTOREGRESSIVE

    def observe(self, report: StepReport) -> None:
        batch, seconds = report.load.batch_size, report.times.total
        if not batch:
            return
        if not report.plan.speculates:
            self._probe_budget.plain(seconds)
            if not report.load.prefill_tokens:
                octave = batch.bit_length()
                self._plain[octave] = 0.9 * self._plain.get(octave, seconds) + 0.1 * seconds
            return
        self._ladder(report.load).accepted(report.accepted / batch, self._probing)
        if self._probing:
            self._excess = max(0.0, seconds - self._plain.get(batch.bit_length(), 0.0))
            self._probe_budget.spent(self._excess)

    def _ladder(self, load: LoadView) -> _Ladder:
        return self._ladders[bisect_right(self._starts, load.batch_size) - 1]


@dataclass(frozen=True)
class DSparkOptions(CostedOptions):
    depth: int = 7
    """Tokens drafted in a row for every request; to be tuned, since this drafter pays for every one of them."""
    TUNABLE: ClassVar[Values] = {"depth": (2, 3, 4, 5, 6, 7), "horizon": (64.0, 128.0, 512.0)}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.depth <= MOST_LEVELS:
            raise ConfigError(f"dspark depth is {self.depth}; give 1 to {MOST_LEVELS} tokens")


class DSpark(Efficient):
    """DSpark as in SGLang: chains, their verified lengths set by survival probability and a table of step times.

    `Efficient` with width 1: sort the survival probabilities of all drafted tokens, take as many as maximise
    (B + their sum) / step time, and give each request its share of them (a global top-k).
    """

    name = "dspark"

    def __init__(self, options: DSparkOptions) -> None:
        super().__init__(options, options.depth, width=1)
