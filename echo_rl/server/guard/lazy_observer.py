"""A controller that is rarely asked, and the steps that it observes late."""

from __future__ import annotations

from collections import deque

from echo_rl.contracts import Controller, LoadView, SpecPlan, StepReport
from echo_rl.controllers.wrappers.base import ControllerWrapper

MOST_REPORTS = 128
"""Most steps that are kept for a controller that observes late."""


class LazyObserver(ControllerWrapper):
    """A controller that observes the last `MOST_REPORTS` steps just before it plans, not one by one.

    Observing every step costs more than all checks of a guard together, and what lies further back has no weight in a
    running estimate.
    """

    def __init__(self, controller: Controller) -> None:
        super().__init__(controller)
        self._reports: deque[StepReport] = deque(maxlen=MOST_REPORTS)

    def plan(self, load: LoadView) -> SpecPlan:
        show_reports(self._reports, self._controller)
        return self._controller.plan(load)

    def observe(self, report: StepReport) -> None:
        self._reports.append(report)


def show_reports(reports: deque[StepReport], controller: Controller) -> Controller:
    """Lets the controller observe the reports, oldest first; one that raises is dropped all the same."""
    while reports:
        controller.observe(reports.popleft())
    return controller
