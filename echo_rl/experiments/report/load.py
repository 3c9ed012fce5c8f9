"""Reports what a load test found: a cell per arm and workload, blocks pooled, ratios paired by block."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from echo_rl.experiments.plan import Run
from echo_rl.experiments.report.measures import blocks_of, compare_outputs, headline, rates
from echo_rl.experiments.targets.http.config import LoadConfig
from echo_rl.experiments.targets.http.record import LoadRecord, together
from echo_rl.utils import statistics
from echo_rl.workloads import metrics
from echo_rl.workloads.arrivals import Workload
from echo_rl.workloads.records import RequestRecord, RunRecord

KINDS = ("tokens_per_second", "tokens_per_request_second")
"""Those of `measures.RATES` that a client can measure."""
LATENCIES: Mapping[str, Callable[[RequestRecord], float | None]] = {
    "ttft": metrics.ttft,
    "tpot": metrics.tpot,
    "e2e": lambda request: request.finish - request.arrival,
}
SEEN = ("concurrency", "seconds", "requests", "output_tokens", "tokens_per_second", "latency", "goodput")
"""The entries of `metrics.summary` that a client can know."""


def report(
    config: LoadConfig,
    workloads: Mapping[str, Workload],
    done: Mapping[Run, LoadRecord],
    environment: Mapping[str, str],
) -> dict[str, Any]:
    """Plain JSON types. `overall` is each arm over the baseline, the geometric mean over workloads."""
    arms = tuple(config.servers)
    blocks = {(text, arm): blocks_of(done, text, arm) for text in config.workloads for arm in arms}
    heads = {text: headline(workload) for text, workload in workloads.items()}
    paired = {arm: [_rates(blocks[text, arm], head) for text, head in heads.items()] for arm in arms}
    return {
        "config": asdict(config),
        "environment": dict(environment),
        "baseline": arms[0],
        "cells": [
            {"workload": text, "arm": arm, "headline": heads[text]}
            | cell(ours, blocks[text, arms[0]] if arm != arms[0] else None, config.slo)
            for (text, arm), ours in blocks.items()
        ],
        "overall": {arm: asdict(statistics.mean_ratio(paired[arm], paired[arms[0]])) for arm in arms[1:]},
    }


def cell(
    blocks: Sequence[LoadRecord], baseline: Sequence[LoadRecord] | None, slo: metrics.SLO | None
) -> dict[str, Any]:
    """One arm under one workload; ratios over the baseline, which has none itself.

    Latencies and rates are of requests that did not fail; failed ones are counted by kind.
    """
    whole = together(blocks)
    summary = metrics.summary(whole.served, slo)
    return {
        **{key: summary[key] for key in SEEN},
        "requests_per_second": sum(not request.cut for request in whole.served.requests) / whole.run.seconds,
        "rates": {kind: asdict(statistics.rate(_rates(blocks, kind))) for kind in KINDS},
        "ratios": ratios(blocks, baseline) if baseline else {},
        "outputs": compare_outputs(whole.texts_as_tokens, together(baseline).texts_as_tokens) if baseline else None,
        "cut": sum(request.cut for request in whole.run.requests),
        "errors": errors(whole.run),
        "retries": whole.retries,
        "client_cpu_seconds": whole.client_cpu_seconds,
        "client_cpu_share": whole.client_cpu_seconds / whole.run.seconds,
        "client_cpu_seconds_per_chunk": whole.client_cpu_seconds / whole.chunks,
    }


def ratios(ours: Sequence[LoadRecord], theirs: Sequence[LoadRecord]) -> dict[str, Any]:
    """Ours over theirs, paired by block: rates (more is better) and mean latencies (less is better).

    A latency that a block of either side lacks is None.
    """
    pairs = ((kind, statistics.rate_ratio(_rates(ours, kind), _rates(theirs, kind))) for kind in KINDS)
    found: dict[str, Any] = {kind: asdict(ratio) for kind, ratio in pairs}
    for name, value in LATENCIES.items():
        sides = [[_mean(record.served, value) for record in side] for side in (ours, theirs)]
        known = all(rate is not None and rate.amount > 0 for side in sides for rate in side)
        found[name] = asdict(statistics.rate_ratio(*sides)) if known else None  # type: ignore[arg-type]
    return found


def errors(run: RunRecord) -> dict[str, int]:
    """Failed requests by kind, the most frequent first."""
    return dict(Counter(r.error.partition(":")[0] for r in run.requests if r.error is not None).most_common())


def _rates(blocks: Sequence[LoadRecord], kind: str) -> list[statistics.Rate]:
    return rates([record.served for record in blocks], kind)


def _mean(run: RunRecord, value: Callable[[RequestRecord], float | None]) -> statistics.Rate | None:
    """A mean as an amount per request, so that it pools and pairs as rates do."""
    known = [found for request in run.requests if not request.cut and (found := value(request)) is not None]
    return statistics.Rate(sum(known), len(known)) if known else None
