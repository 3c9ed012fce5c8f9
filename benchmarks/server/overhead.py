"""What HTTP adds: an engine's throughput in this process against the same requests through a server, in turn.

Goes on where it stopped.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from typing import Annotated, Any

import tyro

from benchmarks.common import CONSOLE, EngineOptions, Ledger, Place, main
from benchmarks.server.client import NOWHERE, Visitor, load_of, tokenised
from benchmarks.server.process import Server, cpu_seconds, total
from echo_rl.config import EngineConfig
from echo_rl.contracts import Controller
from echo_rl.controllers import registry
from echo_rl.experiments.plan import arm_order
from echo_rl.experiments.targets.http.client import Client
from echo_rl.experiments.targets.http.config import LoadConfig
from echo_rl.experiments.targets.http.connection import run_async
from echo_rl.runtime.engine import Engine
from echo_rl.runtime.environment import environment_of, load_engine
from echo_rl.utils import statistics
from echo_rl.utils.result_store import write_json
from echo_rl.workloads.datasets import Prompt, load_prompts
from echo_rl.workloads.driver import serve
from echo_rl.workloads.requests import Rotation

ENGINE, HTTP = "engine", "http"


@dataclass(frozen=True)
class Overhead:
    """The load that both sides serve."""

    controllers: tuple[str, ...] = ("none", "echo")
    concurrency: int = 16
    requests: int = 32
    """Requests in a block, the same ones on both sides."""
    max_tokens: int = 48
    """The tokens of every request; end-of-sequence is ignored, so that both sides make the same number."""
    blocks: int = 8
    seed: int = 0


@dataclass(frozen=True)
class Args:
    """Measure what HTTP adds to the engine."""

    quick: bool = False
    """Plain decoding alone, in three short blocks."""
    overhead: Annotated[Overhead, tyro.conf.arg(name="")] = field(default_factory=Overhead)
    engine: EngineOptions = field(default_factory=EngineConfig)

    def sized(self) -> Overhead:
        if not self.quick:
            return self.overhead
        return replace(self.overhead, controllers=("none",), requests=16, max_tokens=16, blocks=3)


class Sides:
    """The same load on an engine in this process and on a server; both are loaded when first needed."""

    def __init__(self, setting: Overhead, config: EngineConfig, place: Place, stack: ExitStack) -> None:
        self.setting, self.config, self.place, self.stack = setting, config, place, stack
        self.prompts = load_prompts("all", limit=setting.requests * setting.blocks, seed=setting.seed)
        self.ready: dict[tuple[str, str], Controller | None] = {}

    @cached_property
    def engine(self) -> Engine:
        return load_engine(self.config)[0]

    @cached_property
    def server(self) -> Server:
        return self.stack.enter_context(Server(self.config, self.place.work / "server.log"))

    @cached_property
    def url(self) -> str:
        return self.server.ready()

    def measured(self, controller: str, side: str, block: int) -> dict[str, Any]:
        """One block; the first of a controller on a side comes after a short one that doesn't count."""
        if (controller, side) not in self.ready:
            self.ready[controller, side] = self._prepared(controller, side)
            self._run(controller, side, block, max_tokens=8)
        return self._run(controller, side, block, self.setting.max_tokens)

    def _prepared(self, controller: str, side: str) -> Controller | None:
        if side == ENGINE:
            return registry.make(controller)
        run_async(self._choose(controller))
        return None

    async def _choose(self, controller: str) -> None:
        client = Client(self.url)
        await client.set_controller(controller, None)
        await client.close()

    def _run(self, controller: str, side: str, block: int, max_tokens: int) -> dict[str, Any]:
        first, count = block * self.setting.requests, self.setting.requests
        prompts = [self.prompts[number % len(self.prompts)] for number in range(first, first + count)]
        url = self.url if side == HTTP else NOWHERE
        more = {"max_tokens": max_tokens, "seed": self.setting.seed + first, "extra": {"ignore_eos": True}}
        config = load_of(url, self.setting.concurrency, count, **more)
        if side == HTTP:
            return run_async(self._through_http(config, prompts))
        return self._in_process(self.ready[controller, side], config, prompts)

    def _in_process(
        self, controller: Controller | None, config: LoadConfig, prompts: Sequence[Prompt]
    ) -> dict[str, Any]:
        assert controller is not None
        source = Rotation(tokenised(self.engine, config.requests_for(prompts), prompts), config.seed)
        requests = [source("") for _ in prompts]
        requests = [replace(r, params=replace(r.params, ignore_eos=True)) for r in requests]
        run = serve(self.engine, controller, requests, self.setting.concurrency)
        busy = sum(step.seconds for step in run.steps)
        return {"tokens": run.output_tokens, "seconds": run.seconds, "steps": len(run.steps), "busy": busy}

    async def _through_http(self, config: LoadConfig, prompts: Sequence[Prompt]) -> dict[str, Any]:
        visitor = Visitor(self.url, prompts)
        before, front = (await visitor.ask("/metrics")).decode(), cpu_seconds(self.server.process.pid)
        record = await visitor.serve(config, self.setting.concurrency)
        front = cpu_seconds(self.server.process.pid) - front
        after = (await visitor.ask("/metrics")).decode()
        await visitor.close()
        steps, busy = (
            total(after, f"echo_rl:step_seconds_{part}") - total(before, f"echo_rl:step_seconds_{part}")
            for part in ("count", "sum")
        )
        return {
            "tokens": record.served.output_tokens,
            "seconds": record.run.seconds,
            "steps": int(steps),
            "busy": busy,
            "front_cpu": front,
            "client_cpu": record.client_cpu_seconds,
            "failed": sum(request.error is not None for request in record.run.requests),
        }


def overhead(setting: Overhead, engine: EngineConfig, place: Place) -> dict[str, Any]:
    """Both sides are measured in blocks that alternate, so that the machine's drift falls on both alike."""
    environment = environment_of(engine)
    ledger = Ledger(place.work, {**asdict(setting), "engine": asdict(engine), "environment": environment})
    cells: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    with ExitStack() as stack:
        sides = Sides(setting, engine, place, stack)
        for controller in setting.controllers:
            for block in range(setting.blocks):
                for side in arm_order((ENGINE, HTTP), block):
                    key = {"controller": controller, "block": block, "side": side}
                    cells[controller, side].append(ledger.cell(key, partial(sides.measured, controller, side, block)))
    entries = [overhead_of(name, cells[name, ENGINE], cells[name, HTTP]) for name in setting.controllers]
    return {"settings": asdict(setting), "environment": environment, "entries": entries}


def overhead_of(controller: str, engine: Sequence[dict[str, Any]], http: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Throughput of both sides, theirs over the engine's, and where the difference comes from.

    Shares are of one core's time. The client's is no part of the server, though it takes it from the same cores.
    """
    alone, through = ([statistics.Rate(cell["tokens"], cell["seconds"]) for cell in side] for side in (engine, http))
    seconds = sum(cell["seconds"] for cell in http)
    step = [sum(cell["busy"] for cell in side) / sum(cell["steps"] for cell in side) for side in (engine, http)]
    return {
        "controller": controller,
        "engine": asdict(statistics.rate(alone)),
        "http": asdict(statistics.rate(through)),
        "http_over_engine": asdict(statistics.rate_ratio(through, alone)),
        "step_seconds": {"engine": step[0], "http": step[1]},
        "engine_busy": sum(cell["busy"] for cell in http) / seconds,
        "steps": {"engine": sum(cell["steps"] for cell in engine), "http": sum(cell["steps"] for cell in http)},
        "front_cpu_share": sum(cell["front_cpu"] for cell in http) / seconds,
        "client_cpu_share": sum(cell["client_cpu"] for cell in http) / seconds,
        "failed": sum(cell["failed"] for cell in http),
    }


def script() -> None:
    args = tyro.cli(Args)
    place = Place("server_overhead", args.quick)
    result = overhead(args.sized(), args.engine, place)
    write_json(place.result, result)
    for entry in result["entries"]:
        ratio = statistics.Interval(**entry["http_over_engine"]).text(3, "x")
        CONSOLE.print(f"{entry['controller']}: HTTP over engine {ratio}", highlight=False)


if __name__ == "__main__":
    main(script)
