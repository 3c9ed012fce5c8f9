"""Serving steps that wait for their plan: so that the load can be seen before it is decided on.

A backend tells a step's load to the controller alone, in the middle of `step`. So the step runs in
a thread of its own, which stops when it asks for the plan and goes on once it is given. Exactly one
of the two threads runs at any time, so nothing depends on their timing.

A step's seconds are those of its two parts; how long the plan took to come is left out, of the report's times too.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import Protocol

from echo_rl.contracts import AUTOREGRESSIVE, Backend, Controller, LoadView, SpecPlan, StepReport
from echo_rl.wrapping import Wrapping

Clock = Callable[[], float]


class Steerable(Controller, Protocol):
    """A controller whose next plan is set from outside."""

    def steer(self, plan: SpecPlan) -> None: ...


@dataclass(frozen=True)
class Served:
    """A finished step and the seconds it took."""

    report: StepReport
    seconds: float


class Stepper:
    """Runs a backend step by step: `begin`, look at the load, `finish` with a plan. Not thread-safe."""

    def __init__(self, backend: Backend, controller: Steerable, clock: Clock) -> None:
        self._backend, self._controller, self._clock = backend, controller, clock
        self._link: _Link | None = None
        self._thread: threading.Thread | None = None
        self._waiting = False  # the step under way waits for its plan
        self._running = False  # a step was begun and its end not yet seen

    def begin(self) -> LoadView | Served:
        """Begin a step: its load, or the whole step where no request decodes. Raises what the backend raises."""
        assert not self._running, "finish the step under way first"
        if self._link is None:
            self._link = _Link()
            work = (self._backend, self._controller, self._clock, self._link)
            self._thread = threading.Thread(target=_serve, args=work, daemon=True, name="echo-rl-steps")
            self._thread.start()
        self._running = True
        self._link.orders.put(True)
        return self._reply()

    def finish(self, plan: SpecPlan) -> Served:
        """Let the step under way go on with this plan. Raises what the backend raises."""
        assert self._waiting, "begin a step first"
        self._give(plan)
        served = self._reply()
        assert isinstance(served, Served), "a backend must ask for one plan a step"
        return served

    def settle(self) -> None:
        """Bring a step under way to its end by plain decoding, also one that an interrupt has cut off from here."""
        while self._running:
            if self._waiting:
                self._give(AUTOREGRESSIVE)
            self._reply()

    def stop(self) -> None:
        """End the thread; a step under way ends by plain decoding, without being waited for. `begin` starts another."""
        if self._link is not None and self._thread is not None:
            self._link.orders.put(False)
            if not self._running and self._thread is not threading.current_thread():
                self._thread.join()  # a thread that ends while the interpreter does aborts the process
        self._link, self._waiting, self._running = None, False, False

    def _give(self, plan: SpecPlan) -> None:
        assert self._link is not None
        self._waiting = False
        self._link.orders.put(plan)

    def _reply(self) -> LoadView | Served:
        assert self._link is not None
        reply = self._link.replies.get()
        self._waiting = self._running = isinstance(reply, LoadView)
        if isinstance(reply, BaseException):
            raise reply
        return reply


class _Link:
    """The two ways between the caller's thread and the steps'."""

    def __init__(self) -> None:
        self.orders: SimpleQueue[SpecPlan | bool] = SimpleQueue()  # True: begin a step; False: end the thread
        self.replies: SimpleQueue[LoadView | Served | BaseException] = SimpleQueue()


def _serve(backend: Backend, controller: Steerable, clock: Clock, link: _Link) -> None:
    """The thread: steps on demand until told to end."""
    seat = _Seat(controller, clock, link)
    while link.orders.get():
        seat.waited, begin = 0.0, clock()
        try:
            report = backend.step(seat)
            seconds = clock() - begin - seat.waited
            times = replace(report.times, plan=max(0.0, report.times.plan - seat.waited))
            link.replies.put(Served(replace(report, times=times), seconds))
        except BaseException as error:
            link.replies.put(error)


class _Seat(Wrapping):
    """The controller that the backend sees: plans come through the queues, all else from the steered one."""

    def __init__(self, controller: Steerable, clock: Clock, link: _Link) -> None:
        super().__init__(controller)
        self.waited = 0.0  # seconds between asking for the step's plan and getting it
        self._steered, self._clock, self._link = controller, clock, link

    def plan(self, load: LoadView) -> SpecPlan:
        begin = self._clock()
        self._link.replies.put(load)
        plan = self._link.orders.get()
        self.waited += self._clock() - begin
        if not isinstance(plan, SpecPlan):  # told to end: bring the step to its own end first
            self._link.orders.put(plan)
            plan = AUTOREGRESSIVE
        self._steered.steer(plan)
        return self._steered.plan(load)
