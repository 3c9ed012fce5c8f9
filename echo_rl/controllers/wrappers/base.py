"""The base of controllers that wrap another controller."""

from __future__ import annotations

from typing import TYPE_CHECKING

from echo_rl.contracts import Controller, Forest, Frontier, LoadView, Selection, SpecPlan, StepReport

if TYPE_CHECKING:
    from torch import Tensor


class ControllerWrapper:
    """A controller around another one, which decides whatever a subclass doesn't."""

    def __init__(self, controller: Controller) -> None:
        self.name = controller.name
        self._controller = controller

    def plan(self, load: LoadView) -> SpecPlan:
        return self._controller.plan(load)

    def extend(self, frontier: Frontier, plan: SpecPlan) -> Tensor:
        return self._controller.extend(frontier, plan)

    def select(self, forest: Forest, plan: SpecPlan) -> Selection:
        return self._controller.select(forest, plan)

    def observe(self, report: StepReport) -> None:
        self._controller.observe(report)

    def score_powers(self, plan: SpecPlan) -> tuple[float, ...] | None:
        """The inner controller's powers, where it has any: a device may then decide in its stead.

        A subclass that extends or selects otherwise must answer None.
        """
        powers = getattr(self._controller, "score_powers", None)
        return None if powers is None else powers(plan)
