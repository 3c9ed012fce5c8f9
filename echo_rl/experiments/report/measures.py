"""Measures what all experiments report: rates of tokens, and whether two runs gave the same outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from echo_rl.experiments.plan import Run
from echo_rl.utils import statistics
from echo_rl.workloads.arrivals import Workload
from echo_rl.workloads.records import RequestRecord, RunRecord

R = TypeVar("R")

RATES: Mapping[str, Callable[[RunRecord], float]] = {
    "tokens_per_second": lambda run: run.seconds,
    "tokens_per_busy_second": lambda run: run.busy_seconds,
    "tokens_per_request_second": lambda run: run.request_seconds,
}
"""Three rates of the same tokens. A second of the clock measures a saturated server; under open arrivals
it measures the arrivals. A busy second measures the server's effort, idle time left out (a fast one
meets smaller batches there). A request-second is the speed that a user sees, queueing included; at a
fixed concurrency it ranks as the first does."""


def blocks_of(done: Mapping[Run, R], workload: str, arm: str) -> list[R]:
    """The results of an arm under a workload, block after block."""
    return [result for run, result in done.items() if (run.workload, run.arm) == (workload, arm)]


def rates(runs: Sequence[RunRecord], kind: str) -> list[statistics.Rate]:
    """One rate a run; `kind` is one of `RATES`."""
    return [statistics.Rate(run.output_tokens, RATES[kind](run)) for run in runs]


def decoding_rates(runs: Sequence[RunRecord]) -> list[statistics.Rate]:
    """One rate a run, of the steps that decode the largest batch and read no prompts: how fast a full batch decodes,
    whatever the prompts' lengths, and however the last requests of a run end. A run without such steps counts whole."""
    return [_decoding_rate(run) for run in runs]


def _decoding_rate(run: RunRecord) -> statistics.Rate:
    decoding = [step for step in run.steps if step.batch_size and not step.prefill_tokens]
    if not decoding:
        return statistics.Rate(run.output_tokens, run.seconds)
    largest = max(step.batch_size for step in decoding)
    full = [step for step in decoding if step.batch_size == largest]
    return statistics.Rate(sum(step.committed for step in full), sum(step.seconds for step in full))


def headline(workload: Workload) -> str:
    """The rate to judge a workload by: the clock's where the load is closed, else what users see."""
    closed = all(phase.concurrency is not None for phase in workload.phases)
    return "tokens_per_second" if closed else "tokens_per_request_second"


def compare_outputs(ours: RunRecord, baseline: RunRecord) -> dict[str, Any]:
    """The numbers of requests and tokens that were compared, and where each differing request first differs.

    Compares requests that both runs served; of one that either run cut off, as many tokens as both have.
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
