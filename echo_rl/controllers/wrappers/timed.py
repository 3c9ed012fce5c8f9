"""Measures the time that a controller takes to decide."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from echo_rl.contracts import Controller, Forest, Frontier, LoadView, Selection, SpecPlan, StepReport
from echo_rl.controllers.wrappers.base import ControllerWrapper

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


class TimedController(ControllerWrapper):
    """A controller with a stopwatch on its four methods."""

    def __init__(self, controller: Controller) -> None:
        super().__init__(controller)
        self.seconds = 0.0
        """Seconds that they took in all."""

    def plan(self, load: LoadView) -> SpecPlan:
        return self._time(super().plan, load)

    def extend(self, frontier: Frontier, plan: SpecPlan) -> Tensor:
        return self._time(super().extend, frontier, plan)

    def select(self, forest: Forest, plan: SpecPlan) -> Selection:
        return self._time(super().select, forest, plan)

    def observe(self, report: StepReport) -> None:
        self._time(super().observe, report)

    def _time(self, method: Callable[..., T], *arguments: object) -> T:
        begin = time.perf_counter()
        try:
            return method(*arguments)
        finally:
            self.seconds += time.perf_counter() - begin
