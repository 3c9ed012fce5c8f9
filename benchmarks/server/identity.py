"""Are answers through HTTP the engine's own, whatever happens to the controller meanwhile?

With 32 requests in flight and a change of controller under way every moment, against what the engine gives by itself,
one plain request at a time, in float32. Goes on where it stopped.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Annotated, Any

import tyro

from benchmarks.common import CONSOLE, EngineOptions, Ledger, Place, main
from benchmarks.server.client import NOWHERE, Visitor, load_of, name, tokenised
from benchmarks.server.process import Server
from echo_rl.config import EngineConfig
from echo_rl.contracts import RequestOutput
from echo_rl.controllers import registry
from echo_rl.experiments.targets.http.config import LoadConfig
from echo_rl.runtime.environment import environment_of, load_engine
from echo_rl.utils.result_store import write_json
from echo_rl.workloads.datasets import Prompt, load_prompts
from echo_rl.workloads.driver import serve

SWAPPED = ("none", "eagle3", "echo", "chain", "ppo")


@dataclass(frozen=True)
class Identity:
    """The load whose answers are compared."""

    requests: int = 40
    """Different requests; each is asked for several times."""
    times: int = 4
    max_tokens: int = 40
    temperatures: tuple[float, ...] = (0.0, 0.8)
    concurrency: int = 32
    swaps: int = 20
    """Changes of the controller at each temperature, all with requests in flight."""
    seed: int = 0


@dataclass(frozen=True)
class Args:
    """Compare the server's answers with the engine's own."""

    quick: bool = False
    """A few short requests and five changes of the controller."""
    identity: Annotated[Identity, tyro.conf.arg(name="")] = field(default_factory=Identity)
    engine: EngineOptions = field(default_factory=EngineConfig)

    def sized(self) -> Identity:
        if not self.quick:
            return self.identity
        return replace(self.identity, requests=6, times=4, max_tokens=12, concurrency=6, swaps=5)


def identity(setting: Identity, engine: EngineConfig, place: Place) -> dict[str, Any]:
    """Compares in float32, in which the engine gives the same tokens in every batch."""
    engine = replace(engine, dtype="float32")
    prompts = load_prompts("all", limit=setting.requests, seed=setting.seed)
    ledger = Ledger(place.work, {**asdict(setting), "engine": asdict(engine), "environment": environment_of(engine)})
    expected = ledger.cell({"part": "engine"}, partial(by_itself, setting, engine, prompts))

    def served() -> list[dict[str, Any]]:
        with Server(engine, place.work / "server.log") as server:
            url = server.ready()
            return [asyncio.run(under_swaps(url, setting, t, prompts)) for t in setting.temperatures]

    found = ledger.cell({"part": "server"}, served)
    cells = [
        {key: value for key, value in cell.items() if key not in ("answers", "environment")}
        | compare(cell["answers"], expected[str(cell["temperature"])])
        for cell in found
    ]
    return {"settings": asdict(setting), "environment": found[0]["environment"], "cells": cells}


def asked(setting: Identity, temperature: float, url: str = NOWHERE) -> LoadConfig:
    requests = setting.requests * setting.times
    return load_of(
        url, setting.concurrency, requests, temperature=temperature, seed=setting.seed, max_tokens=setting.max_tokens
    )


def by_itself(setting: Identity, config: EngineConfig, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """What plain decoding gives, by temperature and request id: [text, number of tokens, finish reason]."""
    engine, _ = load_engine(config)
    found: dict[str, Any] = {}
    for temperature in setting.temperatures:
        texts: dict[str, str] = defaultdict(str)

        def hear(output: RequestOutput, texts: dict[str, str] = texts) -> None:
            texts[output.id] += output.text

        requests = tokenised(engine, asked(setting, temperature).requests_for(prompts), prompts)
        run = serve(engine, registry.make("none"), requests, 1, on_output=hear)
        found[str(temperature)] = {r.id: [texts[r.id], len(r.tokens), r.finish_reason] for r in run.requests}
    return found


async def under_swaps(url: str, setting: Identity, temperature: float, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Serves the load while controllers are swapped; returns the answers, and how the swaps went."""
    config, visitor = asked(setting, temperature, url), Visitor(url, prompts)
    swapping = asyncio.create_task(swap(visitor, setting))
    record = await visitor.serve(config, setting.concurrency)
    in_flight = await swapping
    stats = json.loads(await visitor.ask("/admin/stats"))
    await visitor.close()
    pairs = zip(record.run.requests, record.texts, strict=True)
    return {
        "temperature": temperature,
        "answers": [[name(r.id), [text, len(r.tokens), r.finish_reason], r.error] for r, text in pairs],
        "in_flight_at_swaps": in_flight,
        "swaps_so_far": stats["core"]["swaps"],
        "fallbacks_so_far": stats["fallbacks"],
        "restarts": stats["restarts"],
        "kv": stats["core"]["kv"],
        "environment": stats["environment"],
    }


async def swap(visitor: Visitor, setting: Identity) -> list[int]:
    """Changes the controller evenly over the load; returns how many requests were in flight each time."""
    rest = setting.requests * setting.times - setting.concurrency
    in_flight = []
    for number in range(setting.swaps):
        while visitor.begun < setting.concurrency + number * rest // setting.swaps:
            await asyncio.sleep(0.01)
        before = visitor.in_flight
        await visitor.set_controller(SWAPPED[number % len(SWAPPED)], None)
        in_flight.append(min(before, visitor.in_flight))
    return in_flight


def compare(answers: Sequence[Any], expected: dict[str, Any]) -> dict[str, Any]:
    """How many answers came, were lost, or are not the engine's own (text, number of tokens and finish reason)."""
    whole = [(request, answer) for request, answer, error in answers if error is None]
    return {
        "requests": len(answers),
        "distinct": len(expected),
        "lost": len(answers) - len(whole),
        "differing": sum(answer != expected[request] for request, answer in whole),
        "tokens": sum(tokens for _, (_, tokens, _) in whole),
        "finish_reasons": Counter(reason for _, (_, _, reason) in whole),
        "errors": sorted({error for _, _, error in answers if error is not None}),
    }


def script() -> None:
    args = tyro.cli(Args)
    place = Place("server_identity", args.quick)
    result = identity(args.sized(), args.engine, place)
    write_json(place.result, result)
    for cell in result["cells"]:
        counts = {key: cell[key] for key in ("temperature", "requests", "lost", "differing", "tokens")}
        CONSOLE.print(counts, f"{len(cell['in_flight_at_swaps'])} swaps", highlight=False)


if __name__ == "__main__":
    main(script)
