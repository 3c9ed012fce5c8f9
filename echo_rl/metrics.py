"""Pure functions from a `RunRecord` to the numbers that are reported.

Conventions. *MAT* is committed tokens per decoding request and step, so plain decoding has 1.00.
*ITL* spreads the gap before a step's tokens evenly over them, as serving benchmarks do, so its mean
is comparable with plain decoding. *TPOT* of a request is (last - first token time) / (tokens - 1).
The tokens of a request that the run's end cut off count for rates; its latencies do not count.
Times are seconds, rates are per second. Quantities that do not exist (the TPOT of one token, the
acceptance of a depth that was never reached) are absent or None, never zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from statistics import NormalDist

import numpy as np

from echo_rl.contracts import PhaseTimes
from echo_rl.errors import ConfigError
from echo_rl.records import RequestRecord, RunRecord, StepRecord

PHASES: tuple[str, ...] = tuple(phase.name for phase in fields(PhaseTimes))


@dataclass(frozen=True)
class Latency:
    """Mean and percentiles of a latency, in seconds."""

    mean: float
    p50: float
    p95: float
    p99: float


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


@dataclass(frozen=True)
class SLO:
    """A service-level objective in seconds: both must hold for a request to count."""

    ttft: float
    tpot: float


# ----------------------------------------------------------------------------- speculation


def tokens_per_second(record: RunRecord) -> float:
    """Output tokens over the run's wall time (prefill included)."""
    return record.output_tokens / record.seconds if record.seconds > 0 else 0.0


def mean_accepted_tokens(steps: Iterable[StepRecord]) -> float | None:
    """MAT over all decoding request-steps; None where nothing was decoded."""
    committed, rows = 0, 0
    for step in steps:
        committed += step.committed
        rows += step.batch_size
    return committed / rows if rows else None


def depth_counts(steps: Iterable[StepRecord]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(reached, accepted) summed over steps, index = depth, ragged steps padded with zeros."""
    reached: list[int] = []
    accepted: list[int] = []
    for step in steps:
        _add_ragged(reached, step.reached_by_depth)
        _add_ragged(accepted, step.accepted_by_depth)
    _add_ragged(accepted, (0,) * len(reached))
    return tuple(reached), tuple(accepted)


def acceptance_by_depth(reached: Sequence[int], accepted: Sequence[int]) -> tuple[float | None, ...]:
    """Probability of accepting a node at each depth, given that the path up to it was accepted."""
    return tuple(yes / tried if tried else None for tried, yes in zip(reached, accepted, strict=True))


def budget_utilisation(steps: Iterable[StepRecord]) -> float | None:
    """Verified nodes over budgeted nodes; None where no step speculated."""
    verified, budget = 0, 0
    for step in steps:
        verified += step.verified
        budget += step.budget
    return verified / budget if budget else None


def phase_seconds(steps: Iterable[StepRecord]) -> dict[str, float]:
    """Seconds by phase over all steps; ``other`` is step time that no phase accounts for."""
    total = dict.fromkeys((*PHASES, "other"), 0.0)
    for step in steps:
        for phase in PHASES:
            total[phase] += getattr(step.times, phase)
        total["other"] += max(0.0, step.seconds - step.times.total)
    return total


def _add_ragged(total: list[int], counts: Sequence[int]) -> None:
    total.extend([0] * (len(counts) - len(total)))
    for index, count in enumerate(counts):
        total[index] += count


# ----------------------------------------------------------------------------- latency


def ttft(request: RequestRecord) -> float | None:
    """Time to first token; None where the request returned none."""
    return request.token_times[0] - request.arrival if request.token_times else None


def tpot(request: RequestRecord) -> float | None:
    """Time per output token after the first; None below two tokens."""
    times = request.token_times
    return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None


def inter_token_latencies(request: RequestRecord) -> list[float]:
    """One gap per token after the first step's: a step's n tokens each count 1/n of the gap before them."""
    gaps: list[float] = []
    times = request.token_times
    start = 0
    while start < len(times):
        end = start
        while end < len(times) and times[end] == times[start]:
            end += 1
        if start:
            gaps.extend([(times[start] - times[start - 1]) / (end - start)] * (end - start))
        start = end
    return gaps


def latency(values: Iterable[float | None]) -> Latency | None:
    """Mean, p50, p95 and p99 (linear interpolation) of the values that exist."""
    known = np.array([value for value in values if value is not None], dtype=float)
    if not known.size:
        return None
    p50, p95, p99 = np.percentile(known, [50, 95, 99])
    return Latency(mean=float(known.mean()), p50=float(p50), p95=float(p95), p99=float(p99))


def meets(request: RequestRecord, slo: SLO) -> bool:
    """Whether a request finished without error within the objective (a missing TPOT passes)."""
    first, each = ttft(request), tpot(request)
    served = request.finish_reason in ("stop", "length") and first is not None
    return served and first <= slo.ttft and (each is None or each <= slo.tpot)  # type: ignore[operator]


def goodput(record: RunRecord, slo: SLO) -> float:
    """Requests per second that met the objective."""
    good = sum(meets(request, slo) for request in record.requests)
    return good / record.seconds if record.seconds > 0 else 0.0


# ----------------------------------------------------------------------------- fairness


def request_speeds(record: RunRecord) -> list[float]:
    """Tokens per second of each request that was not cut, from its arrival to its end."""
    done = (r for r in record.requests if not r.cut and r.finish > r.arrival)
    return [len(request.tokens) / (request.finish - request.arrival) for request in done]


def jain(values: Sequence[float]) -> float | None:
    """Jain's index (1984), ``sum(x)^2 / (n sum(x^2))``: 1 where all are equal, 1/n where one has everything."""
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else None


def worst_tenth(values: Sequence[float]) -> float | None:
    """Mean of the lowest tenth (rounded up) over the mean of all: 1 where all are equal."""
    total = sum(values)
    if not total:
        return None
    lowest = sorted(values)[: -(-len(values) // 10)]
    return (sum(lowest) / len(lowest)) / (total / len(values))


# ----------------------------------------------------------------------------- intervals


def rate(blocks: Sequence[Rate], level: float = 0.95, resamples: int = 2000, seed: int = 0) -> Interval:
    """Amount per second over all blocks, with a bootstrap interval over blocks."""
    amounts, seconds = _columns(blocks)
    return _bootstrap(lambda rows: amounts[rows].sum(-1) / seconds[rows].sum(-1), len(blocks), level, resamples, seed)


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

    return _bootstrap(ratio, len(ours), level, resamples, seed)


def mean_ratio(
    ours: Sequence[Sequence[Rate]],
    theirs: Sequence[Sequence[Rate]],
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
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

    return _bootstrap(mean, sizes.pop(), level, resamples, seed)


def geometric_mean(ratios: Sequence[float], level: float = 0.95, resamples: int = 2000, seed: int = 0) -> Interval:
    """Geometric mean of independent ratios, each one block. Raises `ConfigError` where there is none."""
    if not len(ratios):
        raise ConfigError("a mean needs at least one ratio")
    logs = np.log(np.asarray(ratios, dtype=float))
    return _bootstrap(lambda rows: np.exp(logs[rows].mean(-1)), len(logs), level, resamples, seed)


def kendall(a: Mapping[str, float], b: Mapping[str, float]) -> float | None:
    """Kendall's tau-b (1945) of two rankings, by the names that both score; ties count half on their side.

    1 where they agree on every pair, -1 where on none; None where either cannot tell any two apart.
    """
    names = sorted(a.keys() & b.keys())
    x, y = (np.array([scores[name] for name in names], dtype=float) for scores in (a, b))
    first, second = np.sign(np.subtract.outer(x, x)), np.sign(np.subtract.outer(y, y))
    told = float(np.sqrt((first**2).sum() * (second**2).sum()))
    return float((first * second).sum()) / told if told else None


def _columns(blocks: Sequence[Rate]) -> tuple[np.ndarray, np.ndarray]:
    if not blocks:
        raise ConfigError("a rate needs at least one block")
    return np.array([b.amount for b in blocks], dtype=float), np.array([b.seconds for b in blocks], dtype=float)


def _bootstrap(
    statistic: Callable[[np.ndarray], np.ndarray], blocks: int, level: float, resamples: int, seed: int
) -> Interval:
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
    """What a bootstrap over few blocks lacks: it divides by n for n - 1, and takes a normal for Student's t.

    The t quantile by its expansion around the normal one (Abramowitz and Stegun 26.7.5); exact to 2 % from 3 blocks on.
    """
    z, v = NormalDist().inv_cdf((1 + level) / 2), blocks - 1
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return math.sqrt(blocks / v) * (1.0 + (first / v + second / v**2 + third / v**3) / z)


# ----------------------------------------------------------------------------- summary


def summary(record: RunRecord, slo: SLO | None = None) -> dict[str, object]:
    """Everything above as plain JSON types, for one run."""
    reached, accepted = depth_counts(record.steps)
    done = [request for request in record.requests if not request.cut]
    latencies = {
        "ttft": latency(map(ttft, done)),
        "tpot": latency(map(tpot, done)),
        "itl": latency(gap for request in done for gap in inter_token_latencies(request)),
        "e2e": latency(request.finish - request.arrival for request in done),
    }
    return {
        "controller": record.controller,
        "concurrency": record.concurrency,
        "seconds": record.seconds,
        "requests": len(record.requests),
        "steps": len(record.steps),
        "output_tokens": record.output_tokens,
        "tokens_per_second": tokens_per_second(record),
        "mat": mean_accepted_tokens(record.steps),
        "acceptance_by_depth": acceptance_by_depth(reached, accepted),
        "budget_utilisation": budget_utilisation(record.steps),
        "phase_seconds": phase_seconds(record.steps),
        "latency": {name: asdict(value) if value else None for name, value in latencies.items()},
        "goodput": goodput(record, slo) if slo else None,
    }
