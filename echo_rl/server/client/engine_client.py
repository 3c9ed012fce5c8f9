"""The API's view of an engine that runs elsewhere: requests in, outputs out, controllers swapped, restarts survived.

An `EngineClient` belongs to one asyncio event loop and never blocks it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Callable
from typing import Any

from echo_rl.contracts import Request, RequestOutput
from echo_rl.errors import ConfigError, RequestError
from echo_rl.server.client.counters import RestartSafeCounter
from echo_rl.server.client.last_good import LastGood
from echo_rl.server.client.streams import OutputStream, Subscription, Update
from echo_rl.server.client.supervisor import EngineSupervisor, SupervisorConfig, Unavailable
from echo_rl.server.config import ExperimentOptions
from echo_rl.server.core.worker import Factory
from echo_rl.server.ipc import ClientChannel
from echo_rl.server.messages import (
    Cancel,
    Command,
    Event,
    ExperimentReport,
    Failed,
    Inspect,
    Ready,
    Refused,
    Reply,
    SetController,
    StartExperiment,
    Stepped,
    StepStats,
    StopExperiment,
    Submit,
    TraceTrees,
)

log = logging.getLogger(__name__)


class EngineClient:
    """Runs an engine core and talks to it. It is created and used within one event loop."""

    def __init__(self, config: SupervisorConfig, factory: Factory) -> None:
        """`factory` loads the engine where it will run, see `worker.load_live_engine`."""
        self._config = config
        self._supervisor = EngineSupervisor(config, factory, self)
        self._channel: ClientChannel | None = None
        self._streams: dict[str, OutputStream] = {}
        self._replies: dict[int, asyncio.Future[Reply]] = {}
        self._tickets = itertools.count(1)
        self._subscriptions: list[Subscription] = []
        self._callbacks: list[Callable[[StepStats], None]] = []
        self._tracing_trees = self._draining = False
        self._last_good = LastGood(config.controller, config.switch.trial_steps)
        self._fallbacks, self._rollbacks, self._serving = (RestartSafeCounter() for _ in range(3))
        self.ready_info: Ready | None = None
        """The core's description of the engine that it loaded last."""
        self.experiment: ExperimentReport | None = None
        """The running experiment, or the last one."""

    # ------------------------------------------------------------------------- state

    @property
    def ready(self) -> bool:
        """Returns whether the engine is loaded and takes requests."""
        return self._supervisor.state == "ready" and not self._draining

    @property
    def alive(self) -> bool:
        """Returns whether the engine is loading or serving: not before `start`, after `stop` or once it is given up."""
        return self._supervisor.state in ("loading", "ready")

    @property
    def dead(self) -> bool:
        """Returns whether the engine exited so often that it is given up."""
        return self._supervisor.state == "dead"

    @property
    def in_flight(self) -> int:
        """Returns how many requests are unfinished."""
        return len(self._streams)

    @property
    def restarts(self) -> int:
        """Returns how often the engine was loaded again after an exit."""
        return self._supervisor.restarts

    @property
    def controller(self) -> str:
        """Returns the specification of the active controller; during an experiment that of its control."""
        return self._last_good.current

    @property
    def fallbacks(self) -> dict[str, int]:
        """Returns the decisions that the fallback took over since the start, by cause."""
        return self._fallbacks.total

    @property
    def rollbacks(self) -> int:
        """Returns how often since the start a new controller failed its trial and the one before it came back."""
        return sum(self._rollbacks.total.values())

    @property
    def serving(self) -> dict[str, int]:
        """Returns the steps since the start by how they were served; empty where the engine counts nothing."""
        return self._serving.total

    # ------------------------------------------------------------------------- lifecycle

    async def start(self) -> None:
        """Loads the engine. Raises `EchoError` with what was wrong; nothing runs then."""
        await self._supervisor.start(self._config.controller)

    async def drain(self, timeout: float) -> None:
        """Takes no more requests, waits for those in flight, and cancels what is left after `timeout` seconds."""
        self._draining = self._supervisor.draining = True
        end = time.monotonic() + timeout
        while self._streams and time.monotonic() < end:
            await asyncio.sleep(0.02)
        for request_id in tuple(self._streams):
            self._send(Cancel(request_id))
            self._finish(RequestOutput(request_id, (), finish_reason="cancelled"))

    async def stop(self) -> None:
        """Ends the core and everything that waits for it. Not to be started again."""
        await self._supervisor.stop()
        for subscription in tuple(self._subscriptions):
            await subscription.aclose()

    # ------------------------------------------------------------------------- requests

    def submit(self, *requests: Request) -> OutputStream:
        """Sends requests and returns their outputs; each request's last one has a finish reason.

        Raises `Unavailable`, or `RequestError` on an id in use. A request that the engine refuses raises `RequestError`
        from the stream.
        """
        if not self.ready:
            raise Unavailable("the server is shutting down" if self._draining else "the engine is not ready")
        ids = [request.id for request in requests]
        for request_id in ids:
            if request_id in self._streams or ids.count(request_id) > 1:
                raise RequestError(f"request id '{request_id}' is in use; give every request its own")
        if not self._streams:
            self._supervisor.note_progress()
        stream = OutputStream(ids, self._cancel)
        for request in requests:
            self._streams[request.id] = stream
            self._send(Submit(request))
        return stream

    def _cancel(self, request_id: str) -> None:
        """Cancels a request whose reader is gone; outputs that still come are dropped."""
        if self._streams.pop(request_id, None) is not None:
            self._send(Cancel(request_id))

    # ------------------------------------------------------------------------- commands

    async def set_controller(self, spec: str) -> dict[str, Any]:
        """Swaps the controller between two steps. Raises `ConfigError` with what is wrong with it, or `Unavailable`."""
        value = await self._call(lambda ticket: SetController(ticket, spec))
        self._last_good.replaced_by(spec)
        return value

    async def start_experiment(self, options: ExperimentOptions) -> dict[str, Any]:
        """Starts to alternate two controllers, see `experiment`. Raises `ConfigError` or `Unavailable`."""
        return await self._call(lambda ticket: StartExperiment(ticket, options))

    async def stop_experiment(self) -> dict[str, Any]:
        """Ends the experiment; its control stays active. Raises `ConfigError` where none runs, or `Unavailable`."""
        return await self._call(StopExperiment)

    async def inspect(self) -> dict[str, Any]:
        """Returns what the core holds; ``kv`` is "conserved" or says what is not. Raises `Unavailable`."""
        return await self._call(Inspect)

    def trace_trees(self, enabled: bool) -> None:
        """Lets steps carry the verified trees, or no longer."""
        self._tracing_trees = enabled
        self._send(TraceTrees(enabled))

    def subscribe(self) -> Subscription:
        """Returns the steps and experiment reports from now on, until `stop`."""
        subscription = Subscription(self._unsubscribe)
        self._subscriptions.append(subscription)
        return subscription

    def on_stats(self, callback: Callable[[StepStats], None]) -> None:
        """Registers a callback for every step; it runs in the event loop and must be quick."""
        self._callbacks.append(callback)

    def _unsubscribe(self, subscription: Subscription) -> None:
        with contextlib.suppress(ValueError):
            self._subscriptions.remove(subscription)

    async def _call(self, command: Callable[[int], Command]) -> dict[str, Any]:
        if self._supervisor.state != "ready":
            raise Unavailable("the engine is not ready")
        ticket = next(self._tickets)
        future = self._replies[ticket] = asyncio.get_running_loop().create_future()
        self._send(command(ticket))
        try:
            reply = await asyncio.wait_for(future, self._config.command_seconds)
        except TimeoutError:
            raise Unavailable(f"the engine did not answer within {self._config.command_seconds:g} s") from None
        finally:
            self._replies.pop(ticket, None)
        if reply.error is not None:
            raise ConfigError(reply.error)
        return reply.value

    def _send(self, command: Command) -> None:
        """Sends a command; it is dropped where no core is ready."""
        if self._channel is not None:
            self._channel.send(command)

    # ------------------------------------------------------------------------- events

    def on_event(self, event: Event) -> None:
        match event:
            case Stepped(outputs, stats):
                self._supervisor.note_progress()
                for output in outputs:
                    if output.finish_reason is not None:
                        self._finish(output)
                    elif (stream := self._streams.get(output.id)) is not None:
                        stream.put(output)
                self._publish(stats)
            case Refused(request_id, message, unforeseen):
                if unforeseen:
                    self._finish(RequestOutput(request_id, (), finish_reason="error", error=message))
                elif (stream := self._streams.pop(request_id, None)) is not None:
                    stream.fail(RequestError(message))
            case Reply(ticket):
                future = self._replies.get(ticket)
                if future is not None and not future.done():
                    future.set_result(event)
            case ExperimentReport():
                self._report(event)
            case Ready() | Failed():
                self._supervisor.on_event(event)

    def _finish(self, output: RequestOutput) -> None:
        stream = self._streams.pop(output.id, None)
        if stream is not None:
            stream.put(output)

    def _publish(self, stats: StepStats) -> None:
        self._fallbacks.current = stats.fallbacks
        self._rollbacks.current = {"": stats.rollbacks}
        self._serving.current = stats.serving
        if not self._experimenting and stats.step.batch_size:  # else the controller was not asked for anything
            self._last_good.on_step(stats.controller)
        for callback in self._callbacks:
            try:
                callback(stats)
            except Exception:
                log.exception("a callback on steps failed")
        self._notify(stats)

    @property
    def _experimenting(self) -> bool:
        return self.experiment is not None and self.experiment.state == "running"

    def _report(self, report: ExperimentReport) -> None:
        if report.state == "running" and not self._experimenting:
            log.info("experiment: '%s' against '%s'", report.value.get("treatment"), report.value.get("control"))
        if report.state != "running" or not self._experimenting:
            self._last_good.replaced_by(report.value["controller"])
        self.experiment = report
        self._notify(report)

    def _notify(self, update: Update) -> None:
        for subscription in self._subscriptions:
            subscription.put(update)

    # ------------------------------------------------------------------------- exits and restarts

    def controller_for(self, exits: int) -> str:
        return self._last_good.for_attempt(exits)

    def on_ready(self, ready: Ready, channel: ClientChannel) -> None:
        self.ready_info, self._channel = ready, channel
        self._last_good.replaced_by(ready.controller)
        if self._tracing_trees:
            self._send(TraceTrees(True))

    def on_exit(self, reason: str) -> None:
        """Ends everything that waits for the core with an error."""
        self._channel, message = None, f"the engine died: {reason}"
        for request_id in tuple(self._streams):
            self._finish(RequestOutput(request_id, (), finish_reason="error", error=message))
        for future in self._replies.values():
            if not future.done():
                future.set_exception(Unavailable(message))
        if self._experimenting and self.experiment is not None:
            value = {**self.experiment.value, "state": "stopped", "reason": message}
            self._report(ExperimentReport("stopped", value))
        for counter in (self._fallbacks, self._rollbacks, self._serving):
            counter.restart()
