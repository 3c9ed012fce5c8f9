"""Chooses who decides: the active controller, its replacement while the engine serves, the roll-back, the experiment.

Everything changes between two steps. A new controller is built and dry-run in a thread of its own, so that no step
waits for it. Knows nothing of engines, requests or transports.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from echo_rl.contracts import Controller
from echo_rl.errors import ConfigError, explain
from echo_rl.server.config import ControllerManagerOptions
from echo_rl.server.core.experiment import CONTROL, HARM, TREATMENT, Switchback
from echo_rl.server.guard.background_caller import Answer, BackgroundCaller
from echo_rl.server.guard.dry_run import dry_run
from echo_rl.server.guard.guarded import CAUSES, Guarded
from echo_rl.server.guard.lazy_observer import LazyObserver
from echo_rl.server.guard.validation import Limits
from echo_rl.server.messages import Event, ExperimentReport, Reply, SetController, StartExperiment, StopExperiment

MakeController = Callable[[str], Controller]
"""Returns the controller of a specification: ``echo``, ``chain:steps=2``. Raises `ConfigError`."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ActiveController:
    """A controller under its guard, and the specification that asked for it."""

    spec: str
    guard: Guarded


class ControllerManager:
    """Holds the active controller and carries out the commands that change it."""

    def __init__(self, make: MakeController, spec: str, limits: Limits, options: ControllerManagerOptions) -> None:
        """Raises `ConfigError` where the first controller is not usable."""
        self._make, self._limits, self._options = make, limits, options
        self._fallback = LazyObserver(make(self._options.fallback))
        self._main = self._guard(spec, self._build(spec))
        self._previous: ActiveController | None = None  # what a roll-back goes back to
        self._trial_steps = 0  # steps left in which to roll back
        self._arms: dict[str, ActiveController] = {}
        self._experiment: Switchback | None = None
        self._jobs: deque[SetController | StartExperiment] = deque()  # the first is being built
        self._builder = BackgroundCaller("controller builder")
        self._build_deadline = 0.0
        self._dropped_fallbacks: Counter[str] = Counter()  # of controllers that were dropped
        self.swaps = 0
        self.rollbacks = 0

    # ------------------------------------------------------------------------- state

    @property
    def active(self) -> ActiveController:
        """Returns the controller of the next step."""
        return self._arms[self._experiment.arm] if self._experiment is not None else self._main

    def is_active(self, controller: ActiveController) -> bool:
        """Returns whether this one may still decide, since it was not dropped."""
        return controller is self._main or controller in self._arms.values()

    @property
    def building(self) -> bool:
        return bool(self._jobs)

    @property
    def fallbacks(self) -> dict[str, int]:
        """Returns the decisions that the fallback took over since the start, by cause."""
        held = [self._main, self._previous, *self._arms.values()]
        return {
            cause: self._dropped_fallbacks[cause] + sum(each.guard.fallbacks[cause] for each in held if each)
            for cause in CAUSES
        }

    def describe(self) -> dict[str, object]:
        return {
            "controller": self._main.spec,
            "retired": self._main.guard.retired,
            "previous": self._previous.spec if self._previous is not None else None,
            "experiment": self._experiment.report() if self._experiment is not None else None,
            "fallbacks": self.fallbacks,
            "swaps": self.swaps,
            "rollbacks": self.rollbacks,
        }

    # ------------------------------------------------------------------------- commands

    def handle(self, command: SetController | StartExperiment | StopExperiment) -> list[Event]:
        """Returns what can be answered at once; `poll` returns the rest."""
        if isinstance(command, StopExperiment):
            if self._experiment is None:
                return [Reply(command.ticket, error="no experiment is running")]
            report = self._end_experiment("stopped by hand")
            return [report, Reply(command.ticket, report.value)]
        self._jobs.append(command)
        return self._begin_build() if len(self._jobs) == 1 else []

    def poll(self) -> list[Event]:
        """Puts in force what has been built, and begins the next job."""
        if not self._jobs:
            return []
        answer = self._builder.wait(0.0)
        if answer is None and time.monotonic() > self._build_deadline:
            self._builder.close()
            self._builder = BackgroundCaller("controller builder")
            answer = Answer(error=ConfigError(f"it was not built within {self._options.build_seconds:g} s"))
        if answer is None:
            return []
        events = self._finish_build(self._jobs.popleft(), answer)
        return events + self._begin_build()

    def on_step(self, tokens: int, seconds: float, running: int, decided: bool) -> list[Event]:
        """Counts a step of `active`, ends blocks of an experiment and rolls back a bad controller.

        `running` is the number of requests in the batch. `decided` says whether the controller was asked for a plan;
        else the step proved nothing.
        """
        if self._experiment is not None:
            return self._count_step(self._experiment, tokens, seconds, running)
        if self._trial_steps and decided:
            if self._main.guard.retired is not None and self._previous is not None:
                self._roll_back(self._previous)
            elif not self._main.guard.overdue:  # else it is not known yet whether the controller hangs
                self._trial_steps -= 1
        return []

    def close(self) -> None:
        for controller in (self._main, self._previous, *self._arms.values()):
            self._drop(controller)
        self._builder.close()

    # ------------------------------------------------------------------------- building

    def _begin_build(self) -> list[Event]:
        """Starts to build for the first job that can be done, and refuses those before it."""
        refused: list[Event] = []
        while self._jobs:
            if self._experiment is None:
                self._builder.post(partial(_build_all, self._build, _specs_of(self._jobs[0])))
                self._build_deadline = time.monotonic() + self._options.build_seconds
                break
            refused.append(Reply(self._jobs.popleft().ticket, error="an experiment is running; stop it first"))
        return refused

    def _build(self, spec: str) -> Controller:
        dry_run(self._make(spec), self._limits)
        return self._make(spec)

    def _guard(self, spec: str, controller: Controller) -> ActiveController:
        return ActiveController(spec, Guarded(controller, self._fallback, self._options.deadline, self._limits))

    def _finish_build(self, job: SetController | StartExperiment, answer: Answer) -> list[Event]:
        if answer.error is not None:
            log.warning("the controller stays '%s': %s", self._main.spec, answer.error)
            return [Reply(job.ticket, error=explain(answer.error))]
        if isinstance(job, SetController):
            return [self._replace(job, answer.value[0])]
        return self._start_experiment(job, answer.value)

    # ------------------------------------------------------------------------- swapping

    def _replace(self, job: SetController, controller: Controller) -> Reply:
        old = self._main
        if old.guard.retired is None:
            self._drop(self._previous)
            self._previous = old
        else:
            self._drop(old)
        self._main, self._trial_steps = self._guard(job.spec, controller), self._options.trial_steps
        self.swaps += 1
        log.info("controller '%s' replaces '%s'", job.spec, old.spec)
        return Reply(job.ticket, {"controller": job.spec, "previous": old.spec, "swaps": self.swaps})

    def _roll_back(self, previous: ActiveController) -> None:
        failed = self._main
        log.warning("controller '%s' failed its trial; '%s' decides again", failed.spec, previous.spec)
        self._drop(failed)
        self._main, self._previous, self._trial_steps = previous, None, 0
        self.rollbacks += 1

    def _drop(self, controller: ActiveController | None) -> None:
        if controller is not None:
            self._dropped_fallbacks.update(controller.guard.fallbacks)
            controller.guard.close()

    # ------------------------------------------------------------------------- experiments

    def _start_experiment(self, job: StartExperiment, controllers: list[Controller]) -> list[Event]:
        built = zip((CONTROL, TREATMENT), _specs_of(job), controllers, strict=True)
        self._arms = {arm: self._guard(spec, controller) for arm, spec, controller in built}
        self._experiment = Switchback(job.options)
        report = _report(self._experiment, self._arms[CONTROL])
        return [report, Reply(job.ticket, report.value)]

    def _count_step(self, experiment: Switchback, tokens: int, seconds: float, running: int) -> list[Event]:
        for arm, controller in self._arms.items():
            if controller.guard.retired is not None:
                state = {"state": HARM} if arm == TREATMENT else {}
                return [self._end_experiment(f"{arm} is retired: {controller.guard.retired}", **state)]
        if not experiment.step(tokens, seconds, running):
            return []
        if experiment.reason is not None:
            return [self._end_experiment(experiment.reason)]
        return [_report(experiment, self._arms[CONTROL])]

    def _end_experiment(self, reason: str, **state: str) -> ExperimentReport:
        """Leaves the control active; where that is retired, the controller from before the experiment."""
        assert self._experiment is not None
        self._experiment.stop(reason, **state)
        control = self._arms[CONTROL]
        self._drop(self._arms[TREATMENT])
        if control.guard.retired is None:
            self._drop(self._main)
            self._main, self._trial_steps = control, 0
        else:
            self._drop(control)
        report = _report(self._experiment, self._main)
        self._arms, self._experiment = {}, None
        return report


def _specs_of(job: SetController | StartExperiment) -> tuple[str, ...]:
    """Returns the controllers that a job needs."""
    return (job.spec,) if isinstance(job, SetController) else (job.options.control, job.options.treatment)


def _build_all(build: MakeController, specs: tuple[str, ...]) -> list[Controller]:
    return [build(spec) for spec in specs]


def _report(experiment: Switchback, active: ActiveController) -> ExperimentReport:
    return ExperimentReport(experiment.state, {**experiment.report(), "controller": active.spec})
