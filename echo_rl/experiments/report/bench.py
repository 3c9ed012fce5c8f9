"""Reports what a benchmark found: a cell per arm and load, blocks pooled, speed-ups paired by block."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from echo_rl.experiments.plan import BenchConfig, Run
from echo_rl.experiments.report.measures import blocks_of, compare_outputs, rates
from echo_rl.utils import statistics
from echo_rl.workloads import metrics
from echo_rl.workloads.records import RunRecord, pool

Rates = Callable[[Sequence[RunRecord]], list[statistics.Rate]]
BY_CLOCK: Rates = partial(rates, kind="tokens_per_second")


def report(
    config: BenchConfig,
    runs: Mapping[Run, RunRecord],
    environment: Mapping[str, str] | None = None,
    rates_of: Rates = BY_CLOCK,
) -> dict[str, Any]:
    """The result as plain JSON types: one cell per arm and load, blocks pooled, speed-ups paired by block.

    `rates_of` gives the rate of each block that throughput and speed-ups are of.
    """
    cells = []
    for load in config.loads:
        baseline = blocks_of(runs, load.workload, config.arms[0])
        for arm in config.arms:
            ours = blocks_of(runs, load.workload, arm)
            ratio = statistics.rate_ratio(rates_of(ours), rates_of(baseline))
            pooled = pool(ours)
            cells.append(
                {
                    **metrics.summary(pooled, config.slo),
                    "arm": arm,
                    "throughput": asdict(statistics.rate(rates_of(ours))),
                    "speedup": None if arm == config.arms[0] else asdict(ratio),
                    "outputs": compare_outputs(pooled, pool(baseline)),
                }
            )
    return {
        "config": asdict(config),
        "environment": dict(environment or {}),
        "baseline": config.arms[0],
        "cells": cells,
    }
