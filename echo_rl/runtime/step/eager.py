"""Serves a step that the host drives: it asks the controller level by level and reads back what it needs."""

from __future__ import annotations

from dataclasses import replace

import torch

from echo_rl.contracts import Controller, Forest, Selection, SpecPlan
from echo_rl.errors import PlanViolation
from echo_rl.runtime.runner import Runner
from echo_rl.runtime.scheduler import Batch
from echo_rl.runtime.step.base import Clock, DraftStats, StepResult
from echo_rl.runtime.verification import accept


class EagerStep:
    """Draft, select, verify and accept one after the other; the host waits for each."""

    def __init__(self, runner: Runner, max_nodes: int) -> None:
        self._runner = runner
        self._max_nodes = max_nodes

    def run(self, batch: Batch, plan: SpecPlan, controller: Controller, clock: Clock) -> StepResult:
        runner, layout = self._runner, self._runner.layout(batch.sequences)
        clock.lap("plan")
        forest = runner.draft(batch.drafting, layout, plan, controller.extend) if plan.speculates else None
        clock.lap("draft")
        draft = DraftStats.of(forest) if forest is not None else None
        selection = self._select(controller, forest, plan, len(batch.decodes))
        clock.lap("select")
        verified = runner.verify(batch, selection, layout)
        clock.lap("verify")
        sampling = batch.sampling
        params, logprobs = [s.request.params for s in sampling], [s.request.logprobs for s in sampling]
        verdict = accept(verified.tree, verified.logits, params, [s.next_position for s in sampling], logprobs)
        clock.lap("accept")
        runner.keep(layout, verdict.accepted)
        return StepResult(verdict, selection, draft)

    def _select(self, controller: Controller, forest: Forest | None, plan: SpecPlan, decodes: int) -> Selection:
        if forest is None:
            empty = torch.zeros(0, dtype=torch.int64, device=self._runner.device)
            return Selection(empty.new_zeros(decodes), empty, empty, empty)
        selection = controller.select(forest, plan)
        if selection.size > plan.budget or max(selection.counts.tolist()) > self._max_nodes:
            raise PlanViolation(
                f"controller '{controller.name}' selected {selection.size} nodes (most for one request: "
                f"{int(selection.counts.max())}); the plan allows {plan.budget}, a request {self._max_nodes}"
            )
        idle = selection.counts.new_zeros(decodes - len(selection.counts))  # those that asked for no speculation
        return replace(selection, counts=torch.cat([selection.counts, idle])) if len(idle) else selection
