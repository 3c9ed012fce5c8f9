"""One server's loads and reports as one lane of arrays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from echo_rl.codec import DEPTHS, quantiles
from echo_rl.contracts import LoadView, StepReport
from echo_rl.costs.batched_records import BatchedLoadView, BatchedStepReport


def loads_of(load: LoadView) -> BatchedLoadView:
    values = (load.batch_size, load.prefill_tokens, load.waiting, load.mean_context, load.kv_used, load.arrived)
    return BatchedLoadView(*(np.array([float(v)]) for v in values))


def outcomes_of(report: StepReport) -> BatchedStepReport:
    plan, on, first = report.plan, report.plan.speculates, report.confidence
    return BatchedStepReport(
        loads=loads_of(report.load),
        budget=np.array([float(plan.budget)]),
        depth=np.array([float(plan.max_depth if on else 0)]),
        width=np.array([float(plan.width if on else 0)]),
        verified=np.array([float(report.verified)]),
        committed=np.array([float(report.committed)]),
        reached=_levels(report.reached_by_depth),
        accepted=_levels(report.accepted_by_depth),
        confidence=quantiles(np.array(first))[None] if first else np.full((1, 3), np.nan),
        verify_seconds=np.array([report.times.verify]),
        draft_seconds=np.array([report.times.draft]),
        other_seconds=np.array([report.times.total - report.times.verify - report.times.draft]),
    )


def _levels(counts: Sequence[int]) -> np.ndarray:
    """[1, DEPTHS], zeros where the step had no such depth."""
    row = np.zeros((1, DEPTHS))
    row[0, : min(len(counts), DEPTHS)] = counts[:DEPTHS]
    return row
