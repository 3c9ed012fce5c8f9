"""Controllers that raise, hang or plan NaN, against an engine client of this process.

A server offers none of them, so they come in where the engine's process makes its controllers.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NoReturn

from echo_rl.config import EngineConfig
from echo_rl.contracts import Controller, LoadView, Request, SamplingParams, SpecPlan
from echo_rl.controllers.wrappers.base import ControllerWrapper
from echo_rl.runtime.environment import load_engine
from echo_rl.server.client.engine_client import EngineClient, SupervisorConfig
from echo_rl.server.config import ControllerManagerOptions
from echo_rl.server.core.worker import LoadedEngine, build_controller, load_live_engine

SOUND_PLANS = 12
"""Plans before the fault: more than a dry run asks for."""
ROLL_BACK_SECONDS = 60.0
REQUESTS = 4
"""The number of requests in flight at any time, each always the same."""


def _raise(load: LoadView) -> NoReturn:
    raise ZeroDivisionError("this controller always fails")


def _hang(load: LoadView) -> NoReturn:
    while True:
        time.sleep(3600.0)


def _nan(load: LoadView) -> SpecPlan:
    return SpecPlan(load.batch_size, 2, 2, gates=((0, float("nan")),))


FAULTS: Mapping[str, tuple[Callable[[LoadView], SpecPlan], str]] = {
    "raises": (_raise, "exception"),
    "hangs": (_hang, "deadline"),
    "plans NaN": (_nan, "nan"),
}
"""What a fault does, and the cause under which the guard must count it."""


class Faulty(ControllerWrapper):
    """A controller that is sound in dry runs, and at fault ever after."""

    def __init__(self, name: str, inner: Controller) -> None:
        super().__init__(inner)
        self.name, self._fault, self._plans = name, FAULTS[name][0], 0

    def plan(self, load: LoadView) -> SpecPlan:
        self._plans += 1
        return super().plan(load) if self._plans <= SOUND_PLANS else self._fault(load)


def make(spec: str) -> Controller:
    return Faulty(spec, build_controller("chain")) if spec in FAULTS else build_controller(spec)


def served(config: EngineConfig, switch: ControllerManagerOptions) -> LoadedEngine:
    """Loads the engine in its own process, with controllers that may be faulty."""
    return replace(load_live_engine(load_engine, config, switch), make_controller=make)


@dataclass
class Log:
    """How the requests ended."""

    finished: int = 0
    failed: int = 0
    changed: int = 0
    """Answers other than the first to the same request."""


async def under_faulty_controllers(config: EngineConfig) -> dict[str, Any]:
    """Puts each in force while requests are served. Returns what was counted and what should not have happened."""
    client, log = EngineClient(SupervisorConfig(controller="echo"), partial(served, config)), Log()
    await client.start()
    over = asyncio.Event()
    tasks = [asyncio.create_task(_ask(client, number, log, over)) for number in range(REQUESTS)]
    try:
        faults = {name: await _survive(client, name, cause) for name, (_, cause) in FAULTS.items()}
        over.set()
        await asyncio.gather(*tasks)
        core = await client.inspect()
    finally:
        for task in tasks:
            task.cancel()
        await client.stop()
    found = {"faults": faults, "requests": vars(log), "core": core, "restarts": client.restarts}
    return {**found, "violations": list(_violations(found))}


async def _ask(client: EngineClient, number: int, log: Log, over: asyncio.Event) -> None:
    params = SamplingParams(0.8 * (number % 2), seed=number, max_new_tokens=24, ignore_eos=True)
    first, times = None, 0
    while not over.is_set():
        request = Request(f"{number}/{times}", tuple(range(65, 73 + number)), params)
        times += 1
        tokens: tuple[int, ...] = ()
        reason = None
        async with aclosing(client.submit(request)) as outputs:
            async for output in outputs:
                tokens += output.tokens
                reason = output.finish_reason
        first = first or tokens
        log.finished += reason == "length"
        log.failed += reason != "length"
        log.changed += tokens != first


async def _survive(client: EngineClient, name: str, cause: str) -> dict[str, Any]:
    """Puts the faulty controller in force and waits until the one before decides again."""
    before, rollbacks = Counter(client.fallbacks), (await client.inspect())["rollbacks"]
    began = time.monotonic()
    await client.set_controller(name)
    while (core := await client.inspect())["rollbacks"] == rollbacks and time.monotonic() < began + ROLL_BACK_SECONDS:
        await asyncio.sleep(0.05)
    taken_over = dict(Counter(core["fallbacks"]) - before)
    return {
        "seconds": time.monotonic() - began,
        "rolled_back": core["rollbacks"] - rollbacks,
        "controller": core["controller"],
        "taken_over": taken_over,
        "cause": cause,
    }


def _violations(found: Mapping[str, Any]) -> list[str]:
    bad = []
    for name, fault in found["faults"].items():
        if fault["rolled_back"] != 1 or fault["controller"] != "echo":
            bad.append(f"a controller that {name} was not replaced by the one before")
        if not fault["taken_over"].get(fault["cause"]):
            bad.append(f"a controller that {name}: no decision was taken over for '{fault['cause']}'")
    requests, core = found["requests"], found["core"]
    if requests["failed"] or requests["changed"] or not requests["finished"]:
        bad.append(f"faulty controllers touched requests: {requests}")
    if core["in_flight"] or core["kv"] != "conserved" or found["restarts"]:
        bad.append(f"faulty controllers touched the engine: {core}, {found['restarts']} restarts")
    return bad
