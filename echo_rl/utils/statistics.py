"""Computes rates and ratios with bootstrap intervals over blocks.

Knows nothing of where an amount comes from. Arms are compared block by block, so noise that both share cancels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri, stdtrit

from echo_rl.errors import ConfigError

Statistic = Callable[[np.ndarray], np.ndarray]
"""Its value over the blocks [..., B] that are given by their numbers."""


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval; the ends are None with fewer than two blocks."""

    estimate: float
    low: float | None
    high: float | None
    blocks: int

    def text(self, digits: int = 2, unit: str = "") -> str:
        """``1.23x [1.20, 1.26]``, or the estimate alone where there is no interval."""
        value = f"{self.estimate:.{digits}f}{unit}"
        if self.low is None or self.high is None:
            return value
        return f"{value} [{self.low:.{digits}f}, {self.high:.{digits}f}]"

    def side(self, value: float = 1.0) -> int:
        """1 where the whole interval lies above the value, -1 below, 0 where it holds it or there is none."""
        if self.low is None or self.high is None:
            return 0
        return int(self.low > value) - int(self.high < value)


@dataclass(frozen=True)
class Rate:
    """An amount and the seconds that it took, of one block."""

    amount: float
    seconds: float


def rate(blocks: Sequence[Rate], level: float = 0.95, resamples: int = 2000, seed: int = 0) -> Interval:
    """Amount per second over all blocks, with a bootstrap interval over blocks."""
    amounts, seconds = _columns(blocks)
    return bootstrap(lambda rows: amounts[rows].sum(-1) / seconds[rows].sum(-1), len(blocks), level, resamples, seed)


def rate_ratio(
    ours: Sequence[Rate], theirs: Sequence[Rate], level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Our pooled rate over theirs, with an interval from resampling *pairs* of blocks.

    Block b of both arms served the same prompts close in time, so noise that both share cancels.
    Raises `ConfigError` where the arms have different numbers of blocks.
    """
    if len(ours) != len(theirs):
        raise ConfigError(f"paired arms need equal blocks, got {len(ours)} and {len(theirs)}")
    our_amounts, our_seconds = _columns(ours)
    their_amounts, their_seconds = _columns(theirs)

    def ratio(rows: np.ndarray) -> np.ndarray:
        top = our_amounts[rows].sum(-1) / our_seconds[rows].sum(-1)
        return top / (their_amounts[rows].sum(-1) / their_seconds[rows].sum(-1))

    return bootstrap(ratio, len(ours), level, resamples, seed)


def mean_ratio(ours: Sequence[Sequence[Rate]], theirs: Sequence[Sequence[Rate]]) -> Interval:
    """Geometric mean over loads of `rate_ratio`; ``ours[l][b]`` is block b at load l.

    Block b is resampled at all loads together. Raises `ConfigError` where blocks do not pair up.
    """
    sizes = {len(blocks) for side in (ours, theirs) for blocks in side}
    if len(ours) != len(theirs) or len(sizes) != 1:
        raise ConfigError("a mean over loads needs the same loads and the same number of blocks on both sides")
    columns = [(*_columns(a), *_columns(b)) for a, b in zip(ours, theirs, strict=True)]

    def mean(rows: np.ndarray) -> np.ndarray:
        sums = [[column[rows].sum(-1) for column in load] for load in columns]
        logs: np.ndarray = sum(np.log(a * d / (b * c)) for a, b, c, d in sums) / len(sums)
        return np.exp(logs)

    return bootstrap(mean, sizes.pop())


def _columns(blocks: Sequence[Rate]) -> tuple[np.ndarray, np.ndarray]:
    if not blocks:
        raise ConfigError("a rate needs at least one block")
    return np.array([b.amount for b in blocks], dtype=float), np.array([b.seconds for b in blocks], dtype=float)


def bootstrap(statistic: Statistic, blocks: int, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> Interval:
    """A statistic of all blocks, with its bootstrap interval from resampling them."""
    estimate = float(statistic(np.arange(blocks)))
    if blocks < 2:
        return Interval(estimate, None, None, blocks)
    rows = np.random.default_rng(seed).integers(blocks, size=(resamples, blocks))
    low, high = (float(x) for x in np.quantile(statistic(rows), [(1 - level) / 2, (1 + level) / 2]))
    factor = _widening(blocks, level)
    if low > 0.0:
        return Interval(estimate, estimate * (low / estimate) ** factor, estimate * (high / estimate) ** factor, blocks)
    return Interval(estimate, estimate - factor * (estimate - low), estimate + factor * (high - estimate), blocks)


def _widening(blocks: int, level: float) -> float:
    """The factor that a bootstrap over few blocks lacks: it divides by n for n - 1, and takes a normal for Student's t.

    Of two blocks the bootstrap's ends are the blocks themselves, a standard error from the mean.
    """
    upper = (1 + level) / 2
    student = float(stdtrit(blocks - 1, upper))
    return student if blocks == 2 else student / float(ndtri(upper)) * math.sqrt(blocks / (blocks - 1))
