"""Two controllers against each other: paired blocks, interleaved A B B A, on replay, on the live engine or both.

``run_ab(...)`` writes ``ab.json`` and ``ab.html`` into its folder, and what each venue needs to go on
after an interruption into a folder of its own there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from echo_rl.contracts import MakeController
from echo_rl.errors import ConfigError
from echo_rl.experiments.plan import Trial, TrialConfig
from echo_rl.experiments.report import html as report_html
from echo_rl.experiments.report.blocks import compare_outputs
from echo_rl.experiments.trials import RATES, Decisions, Venue, headline, rates, run_trials
from echo_rl.utils import statistics
from echo_rl.utils.result_store import write_json
from echo_rl.workloads import metrics
from echo_rl.workloads.metrics import SLO
from echo_rl.workloads.records import RunRecord, StepRecord, pool

BUCKETS: tuple[tuple[int, int | None], ...] = ((1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (17, 32), (33, None))
"""Batch sizes, both ends included, by which decisions are told apart."""
TIMES = 24
"""Stretches of a block by which decisions are told apart."""


def run_ab(
    venues: Sequence[Venue],
    config: TrialConfig,
    make: MakeController,
    out: Path,
    console: Console | None = None,
) -> dict[str, Any]:
    """Runs what `out` lacks, writes the result and the report there, and returns the result.

    The first arm of the config is A, the second B; ratios are B over A. Raises `ConfigError` where
    there are not two arms, an arm or a workload can't be made, or `out` holds another comparison.
    """
    if len(config.arms) != 2:
        raise ConfigError(f"an A/B comparison has two arms, not {len(config.arms)}; `eval` ranks any number")
    if not venues:
        raise ConfigError("an A/B comparison needs a venue: replay or live")
    found = []
    for venue in venues:
        runs = run_trials(venue, config, make, out / venue.name, console)
        found.append(venue_result(venue, config, runs))
    result = {"a": config.arms[0], "b": config.arms[1], "config": asdict(config), "venues": found}
    write_json(out / "ab.json", result)
    (out / "ab.html").write_text(report_html.ab_page(result))
    return result


def venue_result(venue: Venue, config: TrialConfig, runs: Mapping[Trial, RunRecord]) -> dict[str, Any]:
    """One venue's part of the result as plain JSON types: a cell a workload, decisions by batch size over all."""
    cells, paired = [], []
    for workload in config.workloads:
        a, b = ([runs[Trial(block, workload, arm)] for block in range(config.blocks)] for arm in config.arms)
        head = headline(venue.workload(workload))
        cells.append({"workload": workload, "headline": head, **compare(a, b, config.slo)})
        paired.append((rates(b, head), rates(a, head)))
    steps = [[step for t, run in runs.items() if t.arm == arm for step in run.steps] for arm in config.arms]
    return {
        "venue": venue.name,
        "environment": dict(venue.environment),
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
    """What each side decided at each batch size that occurred."""
    rows = []
    for low, high in BUCKETS:
        sides = [
            [s for s in steps if s.batch_size >= low and (high is None or s.batch_size <= high)] for steps in (a, b)
        ]
        name = str(low) if low == high else f"{low}-{high}" if high else f"{low} and more"
        rows.append({"batch": name, **_decided(*sides)})
    return [row for row in rows if row["a"] or row["b"]]


def over_time(a: Sequence[StepRecord], b: Sequence[StepRecord], times: int = TIMES) -> list[dict[str, Any]]:
    """What each side decided in each stretch of a block, blocks laid over each other; `time` is a stretch's middle."""
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
