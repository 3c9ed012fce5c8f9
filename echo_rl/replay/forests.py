"""The recorded forest of one step under a plan, and what of a selection from it the target accepts."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from echo_rl.contracts import NO_GATE, OFF_PATH, Forest, Frontier, Selection, SpecPlan
from echo_rl.errors import TraceError
from echo_rl.replay.scheduler import ScheduledStep
from echo_rl.replay.trace import Trace


def recorded_forest(
    trace: Trace, step: ScheduledStep, plan: SpecPlan, extend: Callable[[Frontier, SpecPlan], Tensor]
) -> Forest:
    """The forest of this plan, cut where `extend` stops a request. Raises `TraceError` past the trace."""
    if plan.max_depth > trace.max_depth:
        raise TraceError(
            f"the trace holds {trace.max_depth} levels, not {plan.max_depth}; record with "
            f"--depth {plan.max_depth}, or give the controller a smaller depth"
        )
    recorded = trace.restricted(plan.width)
    rows = torch.from_numpy(step.positions)
    scores = torch.from_numpy(recorded.scores[step.positions, : recorded.nodes(plan.max_depth)])
    alive, depth = torch.ones(len(rows), dtype=torch.bool), 1
    stop = torch.zeros(len(rows), dtype=torch.int64)
    while depth < plan.max_depth:
        begin, end = recorded.nodes(depth - 1), recorded.nodes(depth)
        if plan.gate(depth - 1) is not None:
            shown = scores[:, begin:end].masked_fill(~alive[:, None], NO_GATE)
            alive = alive & extend(Frontier(depth - 1, shown, alive), plan)
        if not bool(alive.any()):
            break
        stop[alive] = depth
        depth += 1
    size = recorded.nodes(depth)
    depths = torch.from_numpy(recorded.depths[:size])
    return Forest(
        tokens=_tokens(trace, step, recorded.path[step.positions, :depth], size),
        parents=torch.from_numpy(recorded.parents[step.positions, :size]),
        depths=depths,
        scores=scores[:, :size].masked_fill(depths > stop[:, None], NO_GATE),
        stop_depth=stop,
    )


def _tokens(trace: Trace, step: ScheduledStep, path: np.ndarray, size: int) -> Tensor:
    """[B, size] the target's tokens on the path, `OFF_PATH` elsewhere."""
    tokens = np.full((len(path), size), OFF_PATH, dtype=np.int64)
    for row, (response, t) in enumerate(zip(step.responses, step.emitted, strict=True)):
        nodes = path[row][path[row] >= 0]
        tokens[row, nodes] = trace.responses[response].tokens[t : t + len(nodes)]
    return torch.from_numpy(tokens)


def accepted_nodes(selection: Selection) -> Tensor:
    """[B] accepted nodes: selected nodes on the target's path (a selection holds its nodes' ancestors)."""
    owner = torch.repeat_interleave(torch.arange(len(selection.counts)), selection.counts)
    return torch.bincount(owner[selection.tokens != OFF_PATH], minlength=len(selection.counts))


def selected_levels(selection: Selection) -> int:
    """Levels that hold a selected node."""
    return int(selection.depths.max()) + 1 if selection.size else 0


def reached_by_depth(selection: Selection, accepted: Tensor) -> tuple[int, ...]:
    """For each depth, the number of requests with a selected node there whose path was accepted up to it."""
    owner = torch.repeat_interleave(torch.arange(len(selection.counts)), selection.counts)
    has = torch.zeros(len(accepted), selected_levels(selection), dtype=torch.bool)
    has[owner, selection.depths] = True
    return tuple(int((has[:, d] & (accepted >= d)).sum()) for d in range(has.shape[1]))
