"""A backend under a workload, halted before every step that has decoding requests. Knows no observation or reward.

Time on the server is served time: it passes in the two phases of steps and while the server waits for an
arrival, not while a prepared step waits for its plan.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from echo_rl.contracts import AUTOREGRESSIVE, Backend, Controller, LoadView, Request, Restartable, SpecPlan, StepReport
from echo_rl.errors import ConfigError
from echo_rl.workloads.arrivals import Arrivals, Workload

Clock = Callable[[], float]
IDLE_STEPS = 10_000
"""Steps and waits without a decoding request after which a workload counts as broken."""


@dataclass(frozen=True)
class TimedStep:
    """A served step."""

    report: StepReport
    seconds: float
    """The time that its two phases took together."""
    gains: tuple[int, ...]
    """Tokens of each decoding request."""

    @property
    def tokens(self) -> int:
        """The tokens that requests got, the first tokens of prompts included."""
        return sum(len(output.tokens) for output in self.report.outputs)


class WorkloadSession:
    """`open` a workload, then `serve` and `advance` in turn. `load` is that of the step that waits for its plan."""

    def __init__(
        self,
        backend: Backend,
        controller: Controller,
        requests: Sequence[Request],
        clock: Clock,
        idle: Callable[[float], None] | None,
    ) -> None:
        """`controller` extends, selects and observes by the plans that `serve` is given; nobody asks it for one."""
        self._backend, self._controller, self._clock, self._idle = backend, controller, clock, idle
        self._pools = _pools(requests)
        self._decoding: dict[str, bool] = {}  # requests in flight: whether they have got their first token
        self._added = 0  # over the server's life, so that no request id comes twice
        self._preparing = 0.0  # seconds that the waiting step's first phase took
        self.load: LoadView | None = None

    def check(self, workload: Workload) -> None:
        """Raises `ConfigError` where the workload names a suite of which there are no requests."""
        workload.check(self._pools)

    def open(self, workload: Workload, generator: np.random.Generator) -> None:
        """Drop everything and begin this workload at time 0; requests are drawn by the generator.

        Raises `ConfigError` where the backend holds requests of somebody else.
        """
        self.clear()
        if self._backend.has_work:
            raise ConfigError("the backend still holds requests of another run; finish or cancel them first")
        self._generator = generator
        self._arrivals = Arrivals(workload, int(generator.integers(2**31)))
        self._now = 0.0
        if isinstance(self._backend, Restartable):
            self._backend.restart(int(generator.integers(2**31)))

    def advance(self, learn: Callable[[StepReport], None]) -> LoadView:
        """Take arrivals and serve prompts alone until a step has decoding requests; its load. `learn` sees the rest."""
        for _ in range(IDLE_STEPS):
            for suite in self._arrivals.due(self._now, len(self._decoding)):
                self._add(suite)
            if not self._decoding:
                self._wait()
                continue
            begin = self._clock()
            load = self._backend.prepare()
            self._preparing = self._clock() - begin
            if load.batch_size:
                self.load = load
                return load
            learn(self.serve(AUTOREGRESSIVE).report)
        raise ConfigError("no request decodes; give the workload higher rates, unless the backend serves none at all")

    def serve(self, plan: SpecPlan) -> TimedStep:
        """Execute the waiting step by this plan. Raises what the backend raises; only `open` helps then."""
        self.load, begin = None, self._clock()
        report = self._backend.execute(plan, self._controller)
        seconds = self._preparing + (self._clock() - begin)
        gains = tuple(len(output.tokens) for output in report.outputs if self._decoding[output.id])
        self._take(report, seconds)
        return TimedStep(report, seconds, gains)

    def clear(self) -> None:
        """Cancel every request in flight; a step that waits for its plan is never served."""
        self.load = None
        for request_id in self._decoding:
            self._backend.cancel(request_id)
        self._decoding.clear()

    def _add(self, suite: str) -> None:
        pool = self._pools[suite]
        chosen = pool[int(self._generator.integers(len(pool)))]
        self._added += 1
        request = replace(chosen, id=f"{chosen.id}#{self._added}")
        self._decoding[request.id] = False  # known before it is added: an interrupt between must not lose it
        self._backend.add(request)

    def _wait(self) -> None:
        """Time passes until the workload brings something."""
        upcoming = self._arrivals.next_time(self._now)
        assert upcoming is not None, "a workload must go on"
        until = self._clock() + upcoming - self._now
        if self._idle is not None:
            self._idle(until)
        else:
            time.sleep(max(0.0, until - self._clock()))
        self._now = upcoming

    def _take(self, report: StepReport, seconds: float) -> None:
        """Let time pass; requests go on or leave."""
        self._now += seconds
        for output in report.outputs:
            self._decoding[output.id] = True
            if output.finish_reason is not None:
                del self._decoding[output.id]


def _pools(requests: Sequence[Request]) -> dict[str, tuple[Request, ...]]:
    """Requests by suite (the id up to the first slash), all of them under the empty name."""
    if not requests:
        raise ConfigError("there are no requests to serve")
    suites = [request.id.split("/")[0] for request in requests]
    by_suite = {suite: tuple(r for r, s in zip(requests, suites, strict=True) if s == suite) for suite in set(suites)}
    return {**by_suite, "": tuple(requests)}
