"""Reports what an A/B comparison found: ratios paired by block, and what was decided, by batch size and time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from echo_rl.experiments.plan import AbConfig, Run
from echo_rl.experiments.report.measures import RATES, blocks_of, compare_outputs, headline, rates
from echo_rl.experiments.targets.backend import Target
from echo_rl.utils import statistics
from echo_rl.workloads import metrics
from echo_rl.workloads.metrics import SLO
from echo_rl.workloads.records import RunRecord, StepRecord, pool

BUCKETS: tuple[tuple[int, int | None], ...] = ((1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (17, 32), (33, None))
"""Batch sizes, both ends included, by which decisions are told apart."""
TIMES = 24
"""Stretches of a block by which decisions are told apart."""


@dataclass(frozen=True)
class Decisions:
    """A controller's decisions, as means over steps with decoding requests."""

    steps: int
    batch: float
    budget: float
    """Nodes a step, over the whole batch."""
    nodes: float
    """Nodes a request."""
    plain: float
    """Share of steps that did not speculate."""
    depth: float | None
    """Mean over the speculating steps; None where there are none."""
    width: float | None

    @classmethod
    def of(cls, steps: Sequence[StepRecord]) -> Decisions | None:
        """None where nothing was decoded."""
        own = [step for step in steps if step.batch_size]
        on = [step for step in own if step.budget]
        if not own:
            return None
        return cls(
            steps=len(own),
            batch=sum(step.batch_size for step in own) / len(own),
            budget=sum(step.budget for step in own) / len(own),
            nodes=sum(step.budget / step.batch_size for step in own) / len(own),
            plain=1.0 - len(on) / len(own),
            depth=sum(step.depth for step in on) / len(on) if on else None,
            width=sum(step.width for step in on) / len(on) if on else None,
        )


def target_result(target: Target, config: AbConfig, runs: Mapping[Run, RunRecord]) -> dict[str, Any]:
    """One target's part of the result as plain JSON types: a cell a workload, decisions by batch size over all."""
    cells, paired = [], []
    for workload in config.workloads:
        a, b = (blocks_of(runs, workload, arm) for arm in config.arms)
        head = headline(target.workload(workload))
        cells.append({"workload": workload, "headline": head, **compare(a, b, config.slo)})
        paired.append((rates(b, head), rates(a, head)))
    steps = [[step for run, record in runs.items() if run.arm == arm for step in record.steps] for arm in config.arms]
    return {
        "venue": target.name,
        "environment": dict(target.environment),
        "overall": asdict(statistics.mean_ratio([ours for ours, _ in paired], [theirs for _, theirs in paired])),
        "cells": cells,
        "by_batch": by_batch(steps[0], steps[1]),
    }


def compare(a: Sequence[RunRecord], b: Sequence[RunRecord], slo: SLO | None = None) -> dict[str, Any]:
    """Block i of both sides was the same workload. Ratios are B over A, paired by block."""
    both = (pool(a), pool(b))
    return {
        "ratios": {kind: asdict(statistics.rate_ratio(rates(b, kind), rates(a, kind))) for kind in RATES},
        "arms": [_side(blocks, pooled, slo) for blocks, pooled in zip((a, b), both, strict=True)],
        "outputs": compare_outputs(both[1], both[0]),
        "over_time": over_time(both[0].steps, both[1].steps),
    }


def by_batch(a: Sequence[StepRecord], b: Sequence[StepRecord]) -> list[dict[str, Any]]:
    """Each side's decisions at each batch size that occurred."""
    rows = []
    for low, high in BUCKETS:
        sides = [
            [s for s in steps if s.batch_size >= low and (high is None or s.batch_size <= high)] for steps in (a, b)
        ]
        name = str(low) if low == high else f"{low}-{high}" if high else f"{low} and more"
        rows.append({"batch": name, **_decided(*sides)})
    return [row for row in rows if row["a"] or row["b"]]


def over_time(a: Sequence[StepRecord], b: Sequence[StepRecord], times: int = TIMES) -> list[dict[str, Any]]:
    """Each side's decisions in each stretch of a block, blocks laid over each other; `time` is a stretch's middle."""
    length = max((step.end for step in [*a, *b]), default=0.0) / times
    binned: list[tuple[list[StepRecord], list[StepRecord]]] = [([], []) for _ in range(times)]
    for side, steps in enumerate((a, b)):
        for step in steps:
            binned[min(times - 1, int(step.end / length))][side].append(step)
    return [{"time": (i + 0.5) * length, **_decided(*sides)} for i, sides in enumerate(binned)]


def _decided(a: Sequence[StepRecord], b: Sequence[StepRecord]) -> dict[str, Any]:
    found = {"a": Decisions.of(a), "b": Decisions.of(b)}
    return {name: asdict(value) if value else None for name, value in found.items()}


def _side(blocks: Sequence[RunRecord], pooled: RunRecord, slo: SLO | None) -> dict[str, Any]:
    speeds = metrics.request_speeds(pooled)
    return {
        **metrics.summary(pooled, slo),
        "rates": {kind: asdict(statistics.rate(rates(blocks, kind))) for kind in RATES},
        "cut": sum(request.cut for request in pooled.requests),
        "fairness": {"jain": metrics.jain(speeds), "worst_tenth": metrics.worst_tenth(speeds)},
    }
