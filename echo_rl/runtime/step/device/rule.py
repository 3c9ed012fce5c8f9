"""Decides which steps the device may decide by itself, and gives the numbers that it decides by."""

from __future__ import annotations

import math
from dataclasses import dataclass

from echo_kernels.device_interface import MAX_FAN
from echo_rl.contracts import Controller, FollowsPlan, SpecPlan
from echo_rl.runtime.scheduler import Batch


@dataclass(frozen=True)
class DevicePlan:
    """A plan as numbers for the device."""

    budget: int
    depth: int
    width: int
    thresholds: tuple[float, ...]
    """[depth] least probability of a best path that goes on; 0 where the plan has no gate."""
    powers: tuple[float, ...]
    """[depth] the power that path probabilities are raised to before nodes are compared."""
    log_floor: float
    """Least log-probability, after the power, of a node to verify; -inf for none."""

    @classmethod
    def of(cls, plan: SpecPlan, powers: tuple[float, ...]) -> DevicePlan:
        levels = range(plan.max_depth if plan.speculates else 0)
        return cls(
            budget=plan.budget,
            depth=len(levels),
            width=plan.width if plan.speculates else 0,
            thresholds=tuple(plan.gate(depth) or 0.0 for depth in levels),
            powers=tuple(powers[min(depth, len(powers) - 1)] if powers else 1.0 for depth in levels),
            log_floor=math.log(plan.floor) if plan.floor else -math.inf,
        )


def device_plan(plan: SpecPlan, controller: Controller, batch: Batch) -> DevicePlan | str:
    """The plan for the device, or in one word why the host must serve this step."""
    if any(s.request.logprobs is not None for s in batch.sampling):
        return "logprobs"
    if not plan.speculates:
        return DevicePlan.of(plan, ())
    if plan.nested:
        return "nested"
    if plan.width > MAX_FAN:
        return "width"
    powers = controller.score_powers(plan) if isinstance(controller, FollowsPlan) else None
    return DevicePlan.of(plan, powers) if powers is not None else "controller"
