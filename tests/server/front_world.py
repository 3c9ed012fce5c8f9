"""An engine client that does exactly what a test says, and ways to reach an app over it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from dataclasses import replace

import uvicorn
from starlette.testclient import TestClient

from echo_rl.contracts import PhaseTimes, RequestOutput, TokenLogprob
from echo_rl.errors import ConfigError, RequestError
from echo_rl.server.api.app import create_app
from echo_rl.server.api.auth import Keys
from echo_rl.server.client.streams import OutputStream
from echo_rl.server.config import ServerConfig
from echo_rl.server.messages import ExperimentReport, Ready, StepStats
from echo_rl.workloads.records import StepRecord
from tests.conftest import FakeTokenizer
from tests.server.engine_clients import running

LOCAL = "http://127.0.0.1"
BUILDS = ("echo", "none", "chain", "ppo")


class FakeEngineClient:
    """Looks like `EngineClient`. Token i of a completion is the i-th letter; one output a token."""

    def __init__(self, context: int = 64, vocab: int = 1_114_112) -> None:
        self.ready, self.alive, self.dead, self.restarts, self.controller = True, True, False, 0, "echo"
        self.ready_info = Ready("echo", context, vocab, {"model": "fake"})
        self.fallbacks: dict[str, int] = {}
        self.rollbacks, self.serving = 0, {"device": 4}
        self.experiment: ExperimentReport | None = None
        self.requests: dict = {}
        self.tasks: dict = {}
        """Of the requests that are in flight."""
        self.cancelled: list[str] = []
        self.callbacks: list = []
        self.pause = 0.0
        """Seconds before every token."""
        self.fail_at: int | None = None
        """Token at which a completion ends with an engine error."""

    def submit(self, *requests):
        stream = OutputStream([request.id for request in requests], self._leave)
        for request in requests:
            self.requests[request.id] = request
            self.tasks[request.id] = asyncio.create_task(self._serve(request, stream))
        return stream

    @property
    def in_flight(self) -> int:
        return len(self.tasks)

    def _leave(self, request_id: str) -> None:
        if (task := self.tasks.pop(request_id, None)) is not None:
            task.cancel()
            self.cancelled.append(request_id)

    async def _serve(self, request, stream) -> None:
        count = request.params.max_new_tokens
        for i in range(count):
            await asyncio.sleep(self.pause)
            if i in (count - 1, self.fail_at) or ord("!") in request.prompt:
                del self.tasks[request.id]
            if ord("!") in request.prompt:
                stream.fail(RequestError("the prompt holds '!'; take it out"))
                return
            if i == self.fail_at:
                stream.put(RequestOutput(request.id, (), finish_reason="error", error="the weights are cursed"))
                return
            stream.put(self._output(request, i, "length" if i == count - 1 else None))

    def _output(self, request, i: int, reason: str | None) -> RequestOutput:
        token = ord("a") + i % 26
        logprobs = ()
        if request.logprobs is not None:
            top = tuple((token + j, -0.5 - j) for j in range(request.logprobs))
            logprobs = (TokenLogprob(token, float("-inf") if i else -0.5, top),)
        return RequestOutput(request.id, (token,), chr(token), reason, logprobs=logprobs)

    async def set_controller(self, spec: str) -> dict:
        if spec.partition(":")[0] not in BUILDS or "=nan" in spec.lower():
            raise ConfigError("that controller is unsound")
        previous, self.controller = self.controller, spec
        return {"controller": spec, "previous": previous}

    async def start_experiment(self, options) -> dict:
        value = {"control": options.control, "treatment": options.treatment, "blocks": options.blocks}
        self.experiment = ExperimentReport("running", value)
        return value

    async def stop_experiment(self) -> dict:
        self.experiment = ExperimentReport("stopped", self.experiment.value)
        return self.experiment.value

    async def inspect(self) -> dict:
        return {"running": self.in_flight}

    def on_stats(self, callback) -> None:
        self.callbacks.append(callback)

    def step(self, **changes) -> None:
        for callback in self.callbacks:
            callback(stats(**changes))


def stats(**changes) -> StepStats:
    values = {
        "end": time.time(), "seconds": 0.02, "batch_size": 2, "prefill_tokens": 0, "waiting": 3, "context": 40.0,
        "budget": 8, "depth": 3, "width": 2, "drafted": 10, "verified": 8, "accepted": 4, "committed": 6,
        "reached_by_depth": (2, 2), "accepted_by_depth": (2, 2), "times": PhaseTimes(verify=0.015),
    }  # fmt: skip
    step = StepStats(StepRecord(**values), "echo", plain=0, running=2, tokens=7, kv_used=0.25, knee=12, fallbacks={})
    return changed(step, **changes)


def changed(stats: StepStats, **changes) -> StepStats:
    """With other values, of its own or of the step's record."""
    own = {name: changes.pop(name) for name in [*changes] if name in vars(stats)}
    return replace(stats, step=replace(stats.step, **changes), **own)


def make_app(engine_client, /, keys: Keys | None = None, tokenizer=None, model: str = "fake", **settings):
    return create_app(engine_client, tokenizer or FakeTokenizer(), ServerConfig(**settings), keys or Keys(), model)


@contextlib.contextmanager
def client_of(app, peer: str = "127.0.0.1", url: str = LOCAL):
    """A client without a socket, which seems to call from `peer`."""
    with TestClient(app, base_url=url, client=(peer, 50_000)) as client:
        yield client


@contextlib.contextmanager
def listening(app):
    """The app behind a real socket, in a thread with a loop of its own; yields its URL."""
    with _thread(lambda server: server.serve(), lambda: app) as url:
        yield url


@contextlib.contextmanager
def serving(make_client, tokenizer, **settings):
    """An app over a real engine client, which lives in the same loop; yields its URL."""
    engine_client = make_client()

    async def serve(server) -> None:
        async with running(engine_client):
            await server.serve()

    with _thread(serve, lambda: make_app(engine_client, tokenizer=tokenizer, **settings)) as url:
        yield url


@contextlib.contextmanager
def _thread(serve, app):
    config = uvicorn.Config(app, factory=True, port=0, ws="none", lifespan="off", log_config=None, access_log=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(serve(server)), daemon=True)
    thread.start()
    wait_until(lambda: server.started, 30.0)
    try:
        yield f"{LOCAL}:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = server.force_exit = True
        thread.join(10)
        assert not thread.is_alive()


def wait_until(true, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)
