"""Who decides: the controller in force, its replacement while the engine serves, the way back, the A/B.

Everything changes between two steps. What is new is built and tried out in a thread of its own, so no step
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
from echo_rl.server.core.experiment import CONTROL, HARM, TREATMENT, ExperimentOptions, Switchback
from echo_rl.server.core.options import ControllerManagerOptions
from echo_rl.server.guard.background_caller import Answer, BackgroundCaller
from echo_rl.server.guard.dry_run import dry_run
from echo_rl.server.guard.guarded import CAUSES, Guarded
from echo_rl.server.guard.lazy_observer import LazyObserver
from echo_rl.server.guard.validation import Limits
from echo_rl.server.messages import Event, ExperimentReport, Reply, SetController, StartExperiment, StopExperiment

MakeController = Callable[[str], Controller]
"""A controller of its specification, as written: ``echo``, ``chain:steps=2``. Raises `ConfigError`."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ActiveController:
    """A controller under its guard, and how it was asked for."""

    spec: str
    guard: Guarded


class ControllerManager:
    """The controller in force (`seat`) and the commands that change it."""

    def __init__(
        self, make: MakeController, spec: str, limits: Limits, options: ControllerManagerOptions | None = None
    ) -> None:
        """Raises `ConfigError` where the first controller is not usable."""
        self._make, self._limits, self._options = make, limits, options or ControllerManagerOptions()
        self._fallback = LazyObserver(make(self._options.fallback))
        self._main = self._guard(spec, self._build(spec))
        self._previous: ActiveController | None = None  # the way back
        self._trial = 0  # steps left in which to take it
        self._arms: dict[str, ActiveController] = {}
        self._experiment: Switchback | None = None
        self._jobs: deque[SetController | StartExperiment] = deque()  # the first is being built
        self._builder = BackgroundCaller("controller builder")
        self._give_up = 0.0  # when the build under way has taken too long
        self._past: Counter[str] = Counter()  # fallbacks of controllers that are gone
        self.swaps = 0
        self.rollbacks = 0

    # ------------------------------------------------------------------------- state

    @property
    def seat(self) -> ActiveController:
        """Who decides the next step."""
        return self._arms[self._experiment.arm] if self._experiment is not None else self._main

    def holds(self, seat: ActiveController) -> bool:
        """Whether this one may still decide: it has not just been thrown out."""
        return seat is self._main or seat in self._arms.values()

    @property
    def building(self) -> bool:
        return bool(self._jobs)

    @property
    def fallbacks(self) -> dict[str, int]:
        """Decisions that the fallback took over since the start, by cause."""
        seats = [self._main, self._previous, *self._arms.values()]
        return {
            cause: self._past[cause] + sum(seat.guard.fallbacks[cause] for seat in seats if seat is not None)
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

    def obey(self, command: SetController | StartExperiment | StopExperiment) -> list[Event]:
        """What can be answered at once; the rest is answered by `poll`."""
        if isinstance(command, StopExperiment):
            if self._experiment is None:
                return [Reply(command.ticket, error="no experiment is running")]
            ending = self._end("stopped by hand")
            return [ending, Reply(command.ticket, ending.value)]
        self._jobs.append(command)
        return self._begin() if len(self._jobs) == 1 else []

    def poll(self) -> list[Event]:
        """Takes what has been built, and begins the next job."""
        if not self._jobs:
            return []
        answer = self._builder.wait(0.0)
        if answer is None and time.monotonic() > self._give_up:
            self._builder.close()
            self._builder = BackgroundCaller("controller builder")
            answer = Answer(error=ConfigError(f"it was not built within {self._options.build_seconds:g} s"))
        if answer is None:
            return []
        events = self._finish(self._jobs.popleft(), answer)
        return events + self._begin()

    def stepped(self, tokens: int, seconds: float, running: int, decided: bool) -> list[Event]:
        """A step of `seat` is over: counts it, ends blocks, takes the way back from a bad controller.

        `running`: requests in the batch. `decided`: whether the seat was asked for a plan; else it proved nothing.
        """
        if self._experiment is not None:
            return self._count(self._experiment, tokens, seconds, running)
        if self._trial and decided:
            if self._main.guard.retired is not None and self._previous is not None:
                self._roll_back(self._previous)
            elif not self._main.guard.overdue:  # else the verdict is still out
                self._trial -= 1
        return []

    def close(self) -> None:
        for seat in (self._main, self._previous, *self._arms.values()):
            self._drop(seat)
        self._builder.close()

    # ------------------------------------------------------------------------- building

    def _begin(self) -> list[Event]:
        """Starts building for the first job that can be done, and refuses those before it."""
        refused: list[Event] = []
        while self._jobs:
            job = self._jobs[0]
            try:
                self._builder.post(partial(_all, self._build, self._wanted(job)))
                self._give_up = time.monotonic() + self._options.build_seconds
                break
            except ConfigError as error:
                refused.append(Reply(self._jobs.popleft().ticket, error=str(error)))
        return refused

    def _wanted(self, job: SetController | StartExperiment) -> tuple[str, ...]:
        """The controllers that a job needs. Raises `ConfigError` where it can't be done now."""
        if self._experiment is not None:
            raise ConfigError("an experiment is running; stop it first")
        if isinstance(job, SetController):
            return (job.spec,)
        options_of(job)
        return (job.control, job.treatment)

    def _build(self, spec: str) -> Controller:
        dry_run(self._make(spec), self._limits)
        return self._make(spec)

    def _guard(self, spec: str, controller: Controller) -> ActiveController:
        return ActiveController(spec, Guarded(controller, self._fallback, self._options.deadline, self._limits))

    def _finish(self, job: SetController | StartExperiment, answer: Answer) -> list[Event]:
        if answer.error is not None:
            log.warning("the controller stays '%s': %s", self._main.spec, answer.error)
            return [Reply(job.ticket, error=explain(answer.error))]
        if isinstance(job, SetController):
            return [self._replace(job, answer.value[0])]
        return self._start(job, answer.value)

    # ------------------------------------------------------------------------- swapping

    def _replace(self, job: SetController, controller: Controller) -> Reply:
        old = self._main
        if old.guard.retired is None:  # a good one: the way back
            self._drop(self._previous)
            self._previous = old
        else:
            self._drop(old)
        self._main, self._trial = self._guard(job.spec, controller), self._options.trial_steps
        self.swaps += 1
        log.info("controller '%s' replaces '%s'", job.spec, old.spec)
        return Reply(job.ticket, {"controller": job.spec, "previous": old.spec, "swaps": self.swaps})

    def _roll_back(self, previous: ActiveController) -> None:
        bad = self._main
        log.warning("controller '%s' failed its trial; '%s' decides again", bad.spec, previous.spec)
        self._drop(bad)
        self._main, self._previous, self._trial = previous, None, 0
        self.rollbacks += 1

    def _drop(self, seat: ActiveController | None) -> None:
        if seat is not None:
            self._past.update(seat.guard.fallbacks)
            seat.guard.close()

    # ------------------------------------------------------------------------- experiments

    def _start(self, job: StartExperiment, controllers: list[Controller]) -> list[Event]:
        specs = {CONTROL: job.control, TREATMENT: job.treatment}
        built = zip(specs.items(), controllers, strict=True)
        self._arms = {arm: self._guard(spec, controller) for (arm, spec), controller in built}
        self._experiment = Switchback(options_of(job))
        report = _told(self._experiment, self._arms[CONTROL])
        return [report, Reply(job.ticket, report.value)]

    def _count(self, experiment: Switchback, tokens: int, seconds: float, running: int) -> list[Event]:
        for arm, seat in self._arms.items():
            if seat.guard.retired is not None:
                state = {"state": HARM} if arm == TREATMENT else {}
                return [self._end(f"{arm} is retired: {seat.guard.retired}", **state)]
        if not experiment.step(tokens, seconds, running):
            return []
        if experiment.reason is not None:
            return [self._end(experiment.reason)]
        return [_told(experiment, self._arms[CONTROL])]

    def _end(self, reason: str, **state: str) -> ExperimentReport:
        """The control stays in force; where it is retired, who decided before comes back."""
        assert self._experiment is not None
        self._experiment.stop(reason, **state)
        control = self._arms[CONTROL]
        self._drop(self._arms[TREATMENT])
        if control.guard.retired is None:
            self._drop(self._main)
            self._main, self._trial = control, 0
        else:
            self._drop(control)
        report = _told(self._experiment, self._main)
        self._arms, self._experiment = {}, None
        return report


def options_of(job: StartExperiment) -> ExperimentOptions:
    """Raises `ConfigError` on values out of range."""
    return ExperimentOptions(job.control, job.treatment, job.block_seconds, job.blocks, job.harm, job.seed)


def _told(experiment: Switchback, in_force: ActiveController) -> ExperimentReport:
    return ExperimentReport(experiment.state, {**experiment.report(), "controller": in_force.spec})


def _all(build: MakeController, specs: tuple[str, ...]) -> list[Controller]:
    return [build(spec) for spec in specs]
