"""Runs a controller on synthetic steps before real ones depend on it. Needs no engine."""

from __future__ import annotations

import torch

from echo_rl.contracts import Controller, Forest, Frontier, LoadView, PhaseTimes, SpecPlan, StepReport
from echo_rl.errors import ConfigError
from echo_rl.server.guard.guarded import LearnedController
from echo_rl.server.guard.validation import Limits, check_mask, check_plan, check_selection, clamp_plan

BATCHES = (1, 8, 32)
STEPS = 3
"""Synthetic steps at each batch size."""


def dry_run(controller: Controller, limits: Limits) -> None:
    """Takes a few steps at several batch sizes. Raises `ConfigError` on whatever a guard would catch.

    The controller has then observed synthetic steps: dry-run one and serve with another.
    """
    try:
        for batch in BATCHES:
            for _ in range(STEPS):
                _step(controller, LoadView(batch, 0, 0, 256.0, 0.5, 64), limits)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"controller '{controller.name}' failed its dry run ({type(error).__name__}: {error})"
        ) from error
    if isinstance(controller, LearnedController) and controller.fallbacks:
        raise ConfigError("the policy's numbers are not finite; train again, or use another checkpoint")


def _step(controller: Controller, load: LoadView, limits: Limits) -> None:
    plan = controller.plan(load)
    check_plan(plan, load)
    plan = clamp_plan(plan, limits)
    verified = 0
    if plan.speculates:
        forest = _forest(load.batch_size, plan)
        for depth, _ in plan.gates:
            level = forest.scores[:, forest.depths == depth]
            if level.shape[1]:
                frontier = Frontier(depth, level, torch.ones(load.batch_size, dtype=torch.bool))
                check_mask(controller.extend(frontier, plan), frontier)
        selection = controller.select(forest, plan)
        check_selection(selection, forest, plan, load.max_nodes)
        verified = selection.size
    controller.observe(_report(load, plan, verified))


def _forest(batch: int, plan: SpecPlan) -> Forest:
    """Returns levels of `width` nodes, each the child of the node above it."""
    width, depth = plan.width, plan.max_depth
    index = torch.arange(width * depth)
    depths, rank = index // width, index % width
    scores = (-0.4 * (depths + 1) - 0.3 * rank)[None] * torch.linspace(0.5, 2.0, batch)[:, None]
    return Forest(
        tokens=index.expand(batch, -1),
        parents=torch.where(depths == 0, -1, index - width).expand(batch, -1),
        depths=depths,
        scores=scores,
        stop_depth=torch.full((batch,), depth - 1),
    )


def _report(load: LoadView, plan: SpecPlan, verified: int) -> StepReport:
    """Returns a report in which every second request accepts a token, where any were verified."""
    batch, reached = load.batch_size, min(load.batch_size, verified)
    accepted = reached // 2
    return StepReport(
        load=load,
        plan=plan,
        outputs=(),
        drafted=plan.budget,
        verified=verified,
        accepted=accepted,
        committed=batch + accepted,
        reached_by_depth=(reached,) if verified else (),
        accepted_by_depth=(accepted,) if verified else (),
        times=PhaseTimes(draft=0.004 if plan.speculates else 0.0, verify=0.02),
        drafting=(batch,) * plan.max_depth if plan.speculates else (),
        confidence=(0.5,) * batch if plan.speculates else (),
    )
