"""Makes the report of a served step for the rest of the system. Holds no state."""

from __future__ import annotations

from echo_rl.contracts import LoadView, PhaseTimes, RequestOutput, RequestTree, SpecPlan, StepReport
from echo_rl.runtime.scheduler import Batch
from echo_rl.runtime.step.base import StepResult


def report_of(
    load: LoadView,
    plan: SpecPlan,
    result: StepResult,
    outputs: tuple[RequestOutput, ...],
    times: PhaseTimes,
    contended: bool,
    trees: tuple[RequestTree, ...],
) -> StepReport:
    """The report of a step."""
    verdict, selection, draft = result.verdict, result.selection, result.draft
    paths = verdict.accepted[: load.batch_size]
    depths = selection.depths.tolist()
    deepest = max(depths, default=-1) + 1
    owner = [r for r, count in enumerate(selection.counts.tolist()) for _ in range(count)]
    has = set(zip(owner, depths, strict=True))
    return StepReport(
        load=load,
        plan=plan,
        outputs=outputs,
        drafted=draft.drafted if draft else 0,
        verified=selection.size,
        accepted=sum(map(len, paths)),
        committed=sum(len(t) for t in verdict.tokens[: load.batch_size]),
        reached_by_depth=tuple(sum(len(p) >= d and (r, d) in has for r, p in enumerate(paths)) for d in range(deepest)),
        accepted_by_depth=tuple(sum(len(p) > d for p in paths) for d in range(deepest)),
        times=times,
        drafting=draft.drafting if draft else (),
        confidence=draft.confidence if draft else (),
        trees=trees,
        contended=contended,
    )


def verified_trees(batch: Batch, result: StepResult) -> tuple[RequestTree, ...]:
    """The nodes that were verified for each drafting request, to be shown."""
    if result.draft is None:
        return tuple(RequestTree(s.id, (), (), (), 0) for s in batch.drafting)
    selection = result.selection
    counts = selection.counts.tolist()[: len(batch.drafting)]
    parents = [tuple(part.tolist()) for part in selection.parents.split(counts)]
    depths = [tuple(part.tolist()) for part in selection.depths.split(counts)]
    rows = zip(batch.drafting, parents, depths, result.verdict.accepted, result.draft.levels, strict=False)
    return tuple(RequestTree(s.id, above, depth, accepted, levels) for s, above, depth, accepted, levels in rows)
