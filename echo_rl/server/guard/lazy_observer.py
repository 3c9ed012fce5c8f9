"""A controller that is rarely needed, and the steps that are kept for it until it is."""

from __future__ import annotations

from collections import deque

from echo_rl.contracts import Controller, LoadView, SpecPlan, StepReport
from echo_rl.wrapping import Wrapping

MOST_REPORTS = 128
"""Steps that are kept for a controller that observes later."""


class LazyObserver(Wrapping):
    """A controller that is rarely needed: it is shown the last `MOST_REPORTS` steps when it is, not one by one.

    Following every step costs it more than all checks of a guard together, and what lies further
    back has no weight in a running estimate.
    """

    def __init__(self, controller: Controller) -> None:
        super().__init__(controller)
        self._reports: deque[StepReport] = deque(maxlen=MOST_REPORTS)

    def plan(self, load: LoadView) -> SpecPlan:
        show(self._reports, self._controller)
        return self._controller.plan(load)

    def observe(self, report: StepReport) -> None:
        self._reports.append(report)


def show(reports: deque[StepReport], controller: Controller) -> Controller:
    """Lets it observe them, oldest first, and empties the queue; one that can't be observed is gone all the same."""
    while reports:
        controller.observe(reports.popleft())
    return controller
