"""Computes the numbers that are reported from a `RunRecord`, in pure functions.

Conventions. *MAT* is committed tokens per decoding request and step, so plain decoding has 1.00.
*ITL* spreads the gap before a step's tokens evenly over them, as serving benchmarks do, so its mean
is comparable with plain decoding. *TPOT* of a request is (last - first token time) / (tokens - 1).
The tokens of a request that the run's end cut off count for rates; its latencies do not count.
Times are seconds, rates are per second. Quantities that do not exist (the TPOT of one token, the
acceptance of a depth that was never reached) are absent or None, never zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import zip_longest

import numpy as np

from echo_rl.contracts import PhaseTimes
from echo_rl.workloads.records import RequestRecord, RunRecord, StepRecord

PHASES: tuple[str, ...] = tuple(phase.name for phase in fields(PhaseTimes))


@dataclass(frozen=True)
class Latency:
    """Mean and percentiles of a latency, in seconds."""

    mean: float
    p50: float
    p95: float
    p99: float


@dataclass(frozen=True)
class SLO:
    """A service-level objective in seconds: both must hold for a request to count."""

    ttft: float
    tpot: float


# ----------------------------------------------------------------------------- speculation


def tokens_per_second(record: RunRecord) -> float:
    """Output tokens over the run's wall time (prefill included)."""
    return record.output_tokens / record.seconds if record.seconds > 0 else 0.0


def mean_accepted_tokens(steps: Sequence[StepRecord]) -> float | None:
    """MAT over all decoding request-steps; None where nothing was decoded."""
    rows = sum(step.batch_size for step in steps)
    return sum(step.committed for step in steps) / rows if rows else None


def depth_counts(steps: Sequence[StepRecord]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(reached, accepted) summed over steps, index = depth, ragged steps padded with zeros."""
    ragged = [step.reached_by_depth for step in steps], [step.accepted_by_depth for step in steps]
    reached, accepted = (tuple(map(sum, zip_longest(*counts, fillvalue=0))) for counts in ragged)
    return reached, accepted + (0,) * (len(reached) - len(accepted))


def acceptance_by_depth(reached: Sequence[int], accepted: Sequence[int]) -> tuple[float | None, ...]:
    """Probability of accepting a node at each depth, given that the path up to it was accepted."""
    return tuple(yes / tried if tried else None for tried, yes in zip(reached, accepted, strict=True))


def budget_utilisation(steps: Sequence[StepRecord]) -> float | None:
    """Verified nodes over budgeted nodes; None where no step speculated."""
    budget = sum(step.budget for step in steps)
    return sum(step.verified for step in steps) / budget if budget else None


def phase_seconds(steps: Iterable[StepRecord]) -> dict[str, float]:
    """Seconds by phase over all steps; ``other`` is step time that no phase accounts for."""
    total = dict.fromkeys((*PHASES, "other"), 0.0)
    for step in steps:
        for phase in PHASES:
            total[phase] += getattr(step.times, phase)
        total["other"] += max(0.0, step.seconds - step.times.total)
    return total


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
    """True where a request finished without error within the objective (a missing TPOT passes)."""
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


def speed_line(record: RunRecord) -> str:
    """Tokens, throughput, MAT and the first request's TTFT in one line, without those that do not exist."""
    mat, first = mean_accepted_tokens(record.steps), ttft(record.requests[0])
    parts = [f"{record.output_tokens} tokens", f"{tokens_per_second(record):.1f} tokens/s"]
    parts += [f"MAT {mat:.2f}"] if mat is not None else []
    parts += [f"first token after {first:.2f} s"] if first is not None else []
    return ", ".join(parts)
