"""Cuts plans to what a backend can serve."""

from __future__ import annotations

import logging

from echo_rl.contracts import Controller, LoadView, SpecPlan
from echo_rl.controllers.wrappers.base import ControllerWrapper

log = logging.getLogger(__name__)


class FittedController(ControllerWrapper):
    """A controller whose plans are cut to what a backend can serve. Warns the first time."""

    def __init__(self, controller: Controller, depth: int | None, width: int | None) -> None:
        super().__init__(controller)
        self.cuts = 0
        self._depth, self._width = depth, width

    def plan(self, load: LoadView) -> SpecPlan:
        plan = self._controller.plan(load)
        cut = plan.within(self._depth or plan.max_depth, self._width or plan.width)
        if cut is plan:
            return plan
        if not self.cuts:
            words = "plans of %s are cut to depth %d and width %d; record a larger trace"
            log.warning(words, self.name, cut.max_depth, cut.width)
        self.cuts += 1
        return cut
