"""The report over a benchmark's blocks: speed-ups paired by block, their intervals from resampling blocks."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from echo_rl.contracts import Controller
from echo_rl.experiments.plan import BenchConfig, Load, Unit
from echo_rl.utils import statistics
from echo_rl.utils.result_store import digest_of
from echo_rl.workloads import metrics
from echo_rl.workloads.records import RequestRecord, RunRecord, pool


def report(
    config: BenchConfig, units: Mapping[Unit, RunRecord], environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The result as plain JSON types: one cell per arm and load, blocks pooled, speed-ups paired by block."""
    cells = []
    for load in config.loads:
        baseline = _blocks(units, config.arms[0], load)
        for arm in config.arms:
            ours = _blocks(units, arm, load)
            speedup = None if arm == config.arms[0] else statistics.rate_ratio(_rates(ours), _rates(baseline))
            pooled = pool(ours)
            cells.append(
                {
                    **metrics.summary(pooled, config.slo),
                    "arm": arm,
                    "throughput": asdict(statistics.rate(_rates(ours))),
                    "speedup": asdict(speedup) if speedup else None,
                    "outputs": compare_outputs(pooled, pool(baseline)),
                }
            )
    return {
        "config": asdict(config),
        "environment": dict(environment or {}),
        "baseline": config.arms[0],
        "cells": cells,
    }


def compare_outputs(ours: RunRecord, baseline: RunRecord) -> dict[str, Any]:
    """How many requests and tokens were compared, and where each differing request first differs.

    Requests that both runs served; of one that either run cut off, as many tokens as both have.
    """
    expected = {request.id: request for request in baseline.requests}
    pairs = [
        (request.id, *_comparable(request, expected[request.id])) for request in ours.requests if request.id in expected
    ]
    first = {name: first_difference(a, b) for name, a, b in pairs if a != b}
    return {
        "requests": len(pairs),
        "tokens": sum(len(a) for _, a, _ in pairs),
        "differing": len(first),
        "first_difference": first,
    }


def _comparable(ours: RequestRecord, theirs: RequestRecord) -> tuple[tuple[int, ...], tuple[int, ...]]:
    both = min(len(ours.tokens), len(theirs.tokens)) if ours.cut or theirs.cut else None
    return ours.tokens[:both], theirs.tokens[:both]


def first_difference(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """Index of the first token that differs; the shorter length where one is a prefix of the other."""
    pairs = zip(ours, theirs, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))


def made_of(controller: Controller) -> dict[str, str]:
    """The digest of a controller's materials, where it has any: what was measured with others is not its own."""
    materials = getattr(controller, "materials", ())
    return {"made of": digest_of(pickle.dumps(materials))} if materials else {}


def arms_made_of(arms: Mapping[str, Controller]) -> dict[str, str]:
    """`made_of` of every arm."""
    return {f"{arm} {name}": digest for arm, each in arms.items() for name, digest in made_of(each).items()}


def _blocks(units: Mapping[Unit, RunRecord], arm: str, load: Load) -> list[RunRecord]:
    return [units[Unit(block, load.concurrency, arm)] for block in range(load.blocks)]


def _rates(records: Iterable[RunRecord]) -> list[statistics.Rate]:
    return [statistics.Rate(record.output_tokens, record.seconds) for record in records]
