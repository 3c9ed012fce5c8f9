"""The front's view of an engine that runs elsewhere: requests in, outputs out, controllers swapped, deaths survived.

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
from echo_rl.server.client.streams import News, OutputStream, Subscription
from echo_rl.server.client.supervisor import EngineSupervisor, SupervisorConfig, Unavailable
from echo_rl.server.core.worker import Factory
from echo_rl.server.messages import (
    Cancel,
    Event,
    ExperimentReport,
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
    Watch,
)

log = logging.getLogger(__name__)


class EngineClient:
    """Runs an engine core and speaks with it. Create and use it within one event loop."""

    def __init__(self, config: SupervisorConfig, factory: Factory) -> None:
        """`factory` loads the engine where it will run, see `worker.live`."""
        self._config = config
        self._life = EngineSupervisor(config, factory, self)
        self._streams: dict[str, OutputStream] = {}
        self._replies: dict[int, asyncio.Future[Reply]] = {}
        self._tickets = itertools.count(1)
        self._subscriptions: list[Subscription] = []
        self._callbacks: list[Callable[[StepStats], None]] = []
        self._trees = self._draining = False
        self._good = LastGood(config.controller, config.switch.trial_steps)
        self._fallbacks, self._rollbacks, self._serving = (
            RestartSafeCounter(),
            RestartSafeCounter(),
            RestartSafeCounter(),
        )
        self.ready_info: Ready | None = None
        """What the engine said of itself when it was last loaded."""
        self.experiment: ExperimentReport | None = None
        """The running experiment, or the last one."""

    # ------------------------------------------------------------------------- state

    @property
    def ready(self) -> bool:
        """Loaded and taking requests."""
        return self._life.state == "ready" and not self._draining

    @property
    def alive(self) -> bool:
        """False before `start`, after `stop`, and once it has given up on an engine that keeps dying."""
        return self._life.state in ("loading", "ready")

    @property
    def dead(self) -> bool:
        """Whether it has given up on an engine that keeps dying."""
        return self._life.state == "dead"

    @property
    def in_flight(self) -> int:
        return len(self._streams)

    @property
    def restarts(self) -> int:
        """Times that the engine was loaded again after a death."""
        return self._life.restarts

    @property
    def controller(self) -> str:
        """Who decides; during an experiment its control."""
        return self._good.current

    @property
    def fallbacks(self) -> dict[str, int]:
        """Decisions that the fallback took over since the start, by cause, over restarts."""
        return self._fallbacks.total

    @property
    def rollbacks(self) -> int:
        """Times since the start that a new controller failed its trial and the one before it came back."""
        return sum(self._rollbacks.total.values())

    @property
    def serving(self) -> dict[str, int]:
        """How steps were served since the start, by way; empty where the engine counts nothing."""
        return self._serving.total

    # ------------------------------------------------------------------------- life

    async def start(self) -> None:
        """Loads the engine. Raises `EchoError` with what was wrong; nothing runs then."""
        await self._life.start(self._config.controller)

    async def drain(self, timeout: float) -> None:
        """Takes no more requests, waits for those in flight, and cancels what is left after `timeout` seconds."""
        self._draining = self._life.retiring = True
        end = time.monotonic() + timeout
        while self._streams and time.monotonic() < end:
            await asyncio.sleep(0.02)
        for request_id in tuple(self._streams):
            self._life.send(Cancel(request_id))
            self._finish(request_id, RequestOutput(request_id, (), finish_reason="cancelled"))

    async def stop(self) -> None:
        """Ends the core and everything that waits for it. Not to be started again."""
        await self._life.stop()
        for subscription in tuple(self._subscriptions):
            await subscription.aclose()

    # ------------------------------------------------------------------------- requests

    def submit(self, *requests: Request) -> OutputStream:
        """Sends requests; their outputs, of each the last with a finish reason. Raises `Unavailable`, or `RequestError`
        on an id in use; a request that the engine refuses raises `RequestError` from the stream."""
        if not self.ready:
            raise Unavailable("the server is shutting down" if self._draining else "the engine is not ready")
        ids = [request.id for request in requests]
        for request_id in ids:
            if request_id in self._streams or ids.count(request_id) > 1:
                raise RequestError(f"request id '{request_id}' is in use; give every request its own")
        if not self._streams:
            self._life.note_progress()
        stream = OutputStream(ids, self._leave)
        for request in requests:
            self._streams[request.id] = stream
            self._life.send(Submit(request))
        return stream

    def _leave(self, request_id: str) -> None:
        """The reader went; what comes after is nobody's."""
        if self._streams.pop(request_id, None) is not None:
            self._life.send(Cancel(request_id))

    # ------------------------------------------------------------------------- commands

    async def set_controller(self, spec: str) -> dict[str, Any]:
        """Swaps the controller between two steps. Raises `ConfigError` with what is wrong with it, or `Unavailable`."""
        value = await self._ask(lambda ticket: SetController(ticket, spec))
        self._good.swapped(spec)
        return value

    async def start_experiment(
        self,
        control: str,
        treatment: str,
        block_seconds: float = 20.0,
        blocks: int = 20,
        harm: float = 1.0,
        seed: int = 0,
    ) -> dict[str, Any]:
        """Alternates two controllers, see `experiment`. Raises `ConfigError` or `Unavailable`."""
        return await self._ask(
            lambda ticket: StartExperiment(ticket, control, treatment, block_seconds, blocks, harm, seed)
        )

    async def stop_experiment(self) -> dict[str, Any]:
        """Ends the experiment; its control stays in force. Raises `ConfigError` where none runs, or `Unavailable`."""
        return await self._ask(StopExperiment)

    async def inspect(self) -> dict[str, Any]:
        """What the core holds; ``kv`` is "conserved" or says what is not. Raises `Unavailable`."""
        return await self._ask(Inspect)

    async def watch(self, trees: bool) -> None:
        """Whether steps carry the verified trees."""
        self._trees = trees
        self._life.send(Watch(trees))

    def subscribe(self) -> Subscription:
        """Steps and experiment reports from now on, to the host's end."""
        subscription = Subscription(self._subscriptions_without)
        self._subscriptions.append(subscription)
        return subscription

    def on_stats(self, callback: Callable[[StepStats], None]) -> None:
        """Calls back after every step, in the event loop; it must be quick."""
        self._callbacks.append(callback)

    def _subscriptions_without(self, subscription: Subscription) -> None:
        with contextlib.suppress(ValueError):
            self._subscriptions.remove(subscription)

    async def _ask(self, command: Callable[[int], Any]) -> dict[str, Any]:
        if self._life.state != "ready":
            raise Unavailable("the engine is not ready")
        ticket = next(self._tickets)
        future = self._replies[ticket] = asyncio.get_running_loop().create_future()
        self._life.send(command(ticket))
        try:
            reply = await asyncio.wait_for(future, self._config.command_seconds)
        except TimeoutError:
            raise Unavailable(f"the engine did not answer within {self._config.command_seconds:g} s") from None
        finally:
            self._replies.pop(ticket, None)
        if reply.error is not None:
            raise ConfigError(reply.error)
        return reply.value

    # ------------------------------------------------------------------------- events

    def on_event(self, event: Event) -> None:
        match event:
            case Stepped(outputs, stats):
                self._life.note_progress()
                for output in outputs:
                    self._deliver(output)
                self._publish(stats)
            case Refused(request_id, message, unforeseen):
                failure = RequestOutput(request_id, (), finish_reason="error", error=message)
                self._finish(request_id, failure if unforeseen else RequestError(message))
            case Reply(ticket):
                future = self._replies.get(ticket)
                if future is not None and not future.done():
                    future.set_result(event)
            case ExperimentReport():
                self._report(event)

    def _deliver(self, output: RequestOutput) -> None:
        if output.finish_reason is not None:
            self._finish(output.id, output)
        elif (stream := self._streams.get(output.id)) is not None:
            stream.put(output)

    def _finish(self, request_id: str, last: RequestOutput | Exception) -> None:
        stream = self._streams.pop(request_id, None)
        if stream is not None:
            stream.put(last)

    def _publish(self, stats: StepStats) -> None:
        self._fallbacks.see(stats.fallbacks)
        self._rollbacks.see({"": stats.rollbacks})
        self._serving.see(stats.serving)
        if not self._experimenting and stats.step.batch_size:  # else it wasn't asked for anything
            self._good.stepped(stats.controller)
        for callback in self._callbacks:
            try:
                callback(stats)
            except Exception:
                log.exception("a callback on steps failed")
        self._spread(stats)

    @property
    def _experimenting(self) -> bool:
        return self.experiment is not None and self.experiment.state == "running"

    def _report(self, report: ExperimentReport) -> None:
        if report.state == "running" and not self._experimenting:
            log.info("experiment: '%s' against '%s'", report.value.get("treatment"), report.value.get("control"))
        if report.state != "running" or not self._experimenting:
            self._good.swapped(report.value["controller"])
        self.experiment = report
        self._spread(report)

    def _spread(self, news: News) -> None:
        for subscription in self._subscriptions:
            subscription.put(news)

    # ------------------------------------------------------------------------- death and restart

    @property
    def busy(self) -> bool:
        return bool(self._streams)

    def controller_for(self, deaths: int) -> str:
        return self._good.for_attempt(deaths)

    def on_ready(self, ready: Ready) -> None:
        self.ready_info = ready
        self._good.swapped(ready.controller)
        if self._trees:
            self._life.send(Watch(True))

    def on_death(self, why: str) -> None:
        """Everything that waits for the core ends with an error."""
        message = f"the engine died: {why}"
        for request_id in tuple(self._streams):
            self._finish(request_id, RequestOutput(request_id, (), finish_reason="error", error=message))
        for future in self._replies.values():
            if not future.done():
                future.set_exception(Unavailable(message))
        if self._experimenting and self.experiment is not None:
            value = {**self.experiment.value, "state": "stopped", "reason": message}
            self._report(ExperimentReport("stopped", value))
        for tally in (self._fallbacks, self._rollbacks, self._serving):
            tally.begin_anew()
