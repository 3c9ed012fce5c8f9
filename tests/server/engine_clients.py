"""Engine clients for tests of the server: in a thread, over the fake engine or a tiny real one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from echo_rl.config import EngineConfig
from echo_rl.contracts import Controller, Request, RequestOutput, SamplingParams, StepReport
from echo_rl.server.client.engine_client import EngineClient, SupervisorConfig
from echo_rl.server.config import ControllerManagerOptions
from echo_rl.server.core.engine_core import CoreOptions
from echo_rl.server.core.worker import LoadedEngine, build_controller, load_live_engine
from tests import tiny
from tests.conftest import FakeEngine


class ServedFake(FakeEngine):
    """The fake engine as a server sees it: steps take real time, and may be told to fail or to hang.

    A request whose prompt holds ``#`` makes the step that meets it raise, ``~`` makes it hang for a
    minute.
    """

    def __init__(self, step_seconds: float = 0.002) -> None:
        super().__init__(step_seconds=step_seconds)
        self.trace_trees = False
        self.checks = 0

    def cancel(self, request_id: str) -> None:
        if request_id in self.live:
            super().cancel(request_id)

    def check_integrity(self) -> None:
        self.checks += 1

    def step(self, controller: Controller) -> StepReport:  # type: ignore[override]
        prompts = [request.prompt for request in self.live.values()]
        if any(ord("#") in prompt for prompt in prompts):
            raise ZeroDivisionError("the prompt holds '#'")
        time.sleep(60.0 if any(ord("~") in prompt for prompt in prompts) else self.step_seconds)
        return super().step(controller)  # type: ignore[arg-type]


def serve_fake(switch: ControllerManagerOptions, step_seconds: float = 0.002) -> LoadedEngine:
    """A factory; picklable, so that a process can run it, too."""
    return LoadedEngine(
        ServedFake(step_seconds), build_controller, max_context=2048, vocab=256,
        options=CoreOptions(switch=switch), environment={"model": "fake"},
    )  # fmt: skip


def serve_tiny(root: Path, switch: ControllerManagerOptions, **settings: Any) -> LoadedEngine:
    """A factory of a tiny real engine, whose model files go to `root`."""
    return load_live_engine(
        partial(_tiny_engine, root=root, settings=settings), EngineConfig(**{**LIMITS, **settings}), switch
    )


LIMITS: dict[str, Any] = {"kv_tokens": 4096, "max_context": 256, "max_nodes": 24, "max_expanded": 40}


def _tiny_engine(config: EngineConfig, root: Path, settings: dict[str, Any]) -> Any:
    return tiny.engine(root, **settings), {"model": "tiny"}


def fake_client(step_seconds: float = 0.002, **config: Any) -> EngineClient:
    """Settings are `SupervisorConfig`'s; in a thread unless they say otherwise."""
    return EngineClient(
        SupervisorConfig(**{"controller": "none", "isolation": "thread", **config}),
        partial(serve_fake, step_seconds=step_seconds),
    )


def tiny_client(root: Path, engine: dict[str, Any] | None = None, **config: Any) -> EngineClient:
    """Over a tiny random model; `engine` are settings of `EngineConfig`, the others `SupervisorConfig`'s."""
    factory = partial(serve_tiny, root, **(engine or {}))
    return EngineClient(SupervisorConfig(**{"controller": "echo", "isolation": "thread", **config}), factory)


@asynccontextmanager
async def running(client: EngineClient) -> AsyncIterator[EngineClient]:
    """Started within, stopped after."""
    await client.start()
    try:
        yield client
    finally:
        await client.stop()


def request_of(text: str, name: str | None = None, max_new_tokens: int = 8, **sampling: Any) -> Request:
    """A request whose prompt is one id a character."""
    params = SamplingParams(max_new_tokens=max_new_tokens, **sampling)
    return Request(name or f"request {text}", tuple(map(ord, text)), params)


async def collect(client: EngineClient, request: Request) -> list[RequestOutput]:
    """All outputs of a request."""
    async with aclosing(client.submit(request)) as outputs:
        return [output async for output in outputs]


async def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        await asyncio.sleep(0.005)
