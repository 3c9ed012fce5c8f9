"""A server under everything that goes wrong: does each accepted request end, is nothing lost or leaked?

Clients send mixed requests to a real ``echo-rl serve``: streams, whole answers, log-probabilities, several
completions at once, clients that leave, bodies that are broken, senseless or too large. Meanwhile
controllers are swapped, experiments start and stop, and the engine's process is paused, killed and
frozen; the end is a SIGTERM under load. Before that, `faulty_controllers` puts controllers in force that raise,
hang or plan NaN. In float32, so that every answer can be compared with the first to the same request.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import tyro

from benchmarks.common import CONSOLE, EngineOptions, Place, main
from benchmarks.server.process import Server, get, resident_mb
from benchmarks.soak.checks import Sample, Totals, compare_counters, compare_texts, ends, growth, too_much
from benchmarks.soak.clients import DISRUPTED, WEIGHTS, ClientRequest, Size, SoakClient
from benchmarks.soak.faulty_controllers import under_faulty_controllers
from benchmarks.soak.plot import draw
from echo_rl.config import EngineConfig
from echo_rl.experiments.targets.http.connection import Endpoint
from echo_rl.utils.result_store import write_json

QUEUE = 14
"""The most completions at once: fewer than the clients may ask for, so that some are refused."""
BODY = 65_536
DRAIN_SECONDS = 60
RETRY_SECONDS = 0.3
"""Seconds that a client waits that was told to come later."""
REST_SECONDS, EMPTY_SECONDS, BACK_SECONDS, REPEAT_SECONDS = 240.0, 15.0, 300.0, 240.0
"""The most seconds until every client has ended, until the server then holds nothing, until an engine is back, and
that a run goes on past its plan until enough answers were compared."""


@dataclass(frozen=True)
class Plan:
    """How long, how many clients, and what happens to the engine's process."""

    seconds: float = 1200.0
    clients: int = 10
    kills: int = 3
    pauses: int = 3
    """SIGSTOP for `pause_seconds`, which must cost nothing but time."""
    freezes: int = 1
    """SIGSTOP for good: the server must notice and replace the process, after a minute without a step."""
    rests: int = 3
    """How often the load stops and the server must be found empty, beside the time at the end."""
    pause_seconds: float = 3.0
    swap_every: float = 5.0
    experiment_every: float = 20.0
    sample_every: float = 2.0
    repeats: float = 0.0
    """The run goes on past `seconds` until the answers to repeated requests are more than so many times the different
    requests, and every client has sent each kind of request."""
    seed: int = 0

    @property
    def events(self) -> list[tuple[float, str]]:
        """When what happens: all in the first 60 %, so that one engine lives long enough to show a leak."""
        counts = {"pause": self.pauses, "kill": self.kills, "rest": self.rests, "freeze": self.freezes}
        rows = [[name] * count for name, count in counts.items()]
        names = [name for name in chain.from_iterable(zip_longest(*rows)) if name is not None]
        return [(self.seconds * (0.1 + 0.5 * i / max(1, len(names))), name) for i, name in enumerate(names)]


@dataclass(frozen=True)
class Args:
    """Soak a server."""

    quick: bool = False
    """Forty seconds, without the freeze."""
    minutes: float = 20.0
    plan: Plan = field(default_factory=Plan)
    """``--plan.seconds`` follows from `minutes`."""
    engine: EngineOptions = field(
        default_factory=lambda: EngineConfig(dtype="float32", kv_tokens=8192, max_context=1024)
    )

    def sized(self) -> Args:
        if self.quick:
            return replace(self, plan=replace(self.plan, seconds=40.0, kills=1, pauses=1, freezes=0, rests=1))
        return replace(self, plan=replace(self.plan, seconds=60.0 * self.minutes))


class Soak:
    """One run against one server."""

    def __init__(self, plan: Plan, engine: EngineConfig, server: Server, url: str) -> None:
        self.plan, self.server, self.url = plan, server, url
        self.size = Size(engine.max_context, BODY)
        self.requests: list[ClientRequest] = []
        self.samples: list[Sample] = []
        self.events: list[dict[str, Any]] = []
        self.open = asyncio.Event()
        """Whether clients may send."""
        self.busy = 0
        self.rounds = 0
        """How many clients have sent each kind of request."""
        self.stopping_at = float("inf")
        """When the server was told to end, by `time.monotonic`."""
        self.began = time.monotonic()
        self.violations: list[str] = []
        self.engine_losses = 0
        self.counters: dict[str, int] = {}
        self.environment: dict[str, str] = {}

    @property
    def now(self) -> float:
        return time.monotonic() - self.began

    async def run(self) -> dict[str, Any]:
        self.open.set()
        async with asyncio.TaskGroup() as group:
            work = [group.create_task(self._client(number)) for number in range(self.plan.clients)]
            work += [
                group.create_task(self._every(self.plan.swap_every, "swap", "bad swap", "swap")),
                group.create_task(self._every(self.plan.experiment_every / 2, "experiment", "stop experiment")),
                group.create_task(self._sample()),
            ]
            try:
                for at, name in self.plan.events:
                    await asyncio.sleep(max(0.0, at - self.now))
                    await self._happen(name)
                await asyncio.sleep(max(0.0, self.plan.seconds - self.now))
                await self._repeat()
                await self._rest(last=True)
                code = await self._end()
            finally:
                for task in work:
                    task.cancel()
        return self._found(code)

    # ------------------------------------------------------------------------- clients

    async def _client(self, number: int) -> None:
        """Sends every kind of request once, in an order of its own, then by weight."""
        rng = random.Random(f"{self.plan.seed}/{number}")
        client, kinds = SoakClient(self.url, self.size, rng), [*WEIGHTS]
        for kind in rng.sample(kinds, len(kinds)):
            await self._send(client, kind)
        self.rounds += 1
        while True:
            await self._send(client, rng.choices(kinds, list(WEIGHTS.values()))[0])

    async def _every(self, seconds: float, *kinds: str) -> None:
        """Sends these kinds in turn."""
        client = SoakClient(self.url, self.size, random.Random(f"{self.plan.seed}/{kinds}"))
        while True:
            for kind in kinds:
                await asyncio.sleep(seconds)
                await self._send(client, kind)

    async def _send(self, client: SoakClient, kind: str) -> None:
        await self.open.wait()
        self.busy += 1
        try:
            request = await client.send(kind)
        finally:
            self.busy -= 1
        self.requests.append(request)
        if request.began > self.stopping_at and request.outcome == "broken" and not request.status:
            request.outcome = "no connection"  # it came too late: the server had closed
        elif not request.fair and not (request.ended > self.stopping_at and request.outcome in DISRUPTED):
            self.violations.append(
                f"at {self.now:.1f} s: {request.kind} ended as '{request.outcome}': {request.detail}"
            )
        if request.outcome.startswith("busy") or request.outcome == "no connection":
            await asyncio.sleep(RETRY_SECONDS)

    # ------------------------------------------------------------------------- events

    async def _happen(self, name: str) -> None:
        began = self.now
        match name:
            case "rest":
                await self._rest()
            case "pause":
                self._signal(signal.SIGSTOP)
                await asyncio.sleep(self.plan.pause_seconds)
                self._signal(signal.SIGCONT)
            case "kill":
                self._signal(signal.SIGKILL)
                await self._back()
            case "freeze":
                self._signal(signal.SIGSTOP)
                await self._back()
        self.events.append({"what": name, "at": began, "seconds": self.now - began})

    def _signal(self, number: signal.Signals) -> None:
        engine = self.server.engine()
        if engine is None:
            self.violations.append(f"at {self.now:.1f} s there is no engine process")
        else:
            os.kill(engine, number)

    async def _back(self) -> None:
        """Waits until the server has an engine again, with one restart more."""
        self.engine_losses += 1
        end = self.now + BACK_SECONDS
        while self.now < end:
            with suppress(Exception):
                totals = await self._totals()
                if totals.stats["restarts"] == self.engine_losses and totals.stats["ready"]:
                    return
            await asyncio.sleep(0.1)
        self.violations.append(f"at {self.now:.1f} s: no engine again after {BACK_SECONDS:g} s")

    async def _rest(self, last: bool = False) -> None:
        """Lets everything end and checks that the server holds nothing; the load goes on afterwards."""
        self.open.clear()
        end = self.now + REST_SECONDS
        while self.busy and self.now < end:
            await asyncio.sleep(0.05)
        end, totals = self.now + EMPTY_SECONDS, await self._totals()
        while not totals.empty and self.now < end:
            await asyncio.sleep(0.1)
            totals = await self._totals()
        if self.busy or not totals.empty:
            self.violations.append(f"at {self.now:.1f} s, at rest: {self.busy} clients wait, {totals.stats}")
        self.violations += totals.leaks()
        if last:
            self.environment = totals.stats["environment"]
            log = self.server.lines("request")
            self.counters, wrong = compare_counters(self.requests, totals, log, self.engine_losses)
            self.violations += wrong
        self.open.set()

    async def _repeat(self) -> None:
        """Lets the load go on until `Plan.repeats` holds, which takes a busy machine longer."""
        end = self.now + REPEAT_SECONDS
        while self.plan.repeats and self.now < end:
            texts = compare_texts(self.requests)
            if texts["compared"] > self.plan.repeats * texts["requests"] and self.rounds == self.plan.clients:
                return
            await asyncio.sleep(0.1)

    async def _totals(self) -> Totals:
        endpoint = Endpoint(self.url)
        try:
            async with asyncio.timeout(REST_SECONDS):
                return Totals.of(await get(endpoint, "/admin/stats"), await get(endpoint, "/metrics"))
        finally:
            await endpoint.close()

    async def _sample(self) -> None:
        while True:
            engine, front = self.server.engine(), resident_mb(self.server.process.pid)
            core = None if engine is None else resident_mb(engine)
            self.samples.append(Sample(self.now, front, engine, core))
            await asyncio.sleep(self.plan.sample_every)

    async def _end(self) -> int:
        """Sends SIGTERM under load; returns the exit code."""
        end = self.now + 20.0
        while self.busy < self.plan.clients // 2 and self.now < end:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.5)  # requests are well under way
        self.events.append({"what": "SIGTERM", "at": self.now, "seconds": 0.0, "clients": self.busy})
        self.stopping_at = time.monotonic()
        code = await asyncio.to_thread(self.server.end, DRAIN_SECONDS + 30.0)
        self.events[-1]["seconds"] = self.now - self.events[-1]["at"]
        self.open.clear()
        while self.busy:
            await asyncio.sleep(0.05)
        return code

    # ------------------------------------------------------------------------- results

    def _found(self, code: int) -> dict[str, Any]:
        texts, memory = compare_texts(self.requests), growth(self.samples, self.plan.seconds)
        if code:
            self.violations.append(f"the server ended with exit code {code}")
        if texts["changed"]:
            self.violations.append(f"{texts['changed']} answers are not the first one to the same request")
        kinds = sorted({request.kind for request in self.requests})
        return {
            "plan": asdict(self.plan),
            "environment": self.environment,
            "seconds": self.now,
            "visits": {k: Counter(v.outcome for v in self.requests if v.kind == k) for k in kinds},
            "events": self.events,
            "texts": texts,
            "counters": self.counters,
            "memory": memory,
            "exit_code": code,
            "violations": [*self.violations, *too_much(memory)],
            "samples": [asdict(sample) for sample in self.samples],
            "ends": ends(self.requests, self.began, self.now),
        }


def soak(plan: Plan, engine: EngineConfig, log: Path) -> dict[str, Any]:
    """Starts a server, soaks it, ends it. The server's log goes to `log`."""
    options = ("--max-queue", str(QUEUE), "--max-body-bytes", str(BODY), "--drain-seconds", str(DRAIN_SECONDS))
    with Server(engine, log, options) as server:
        url = server.ready()

        async def run() -> dict[str, Any]:
            return await Soak(plan, engine, server, url).run()

        return asyncio.run(run())


def summary(result: Mapping[str, Any]) -> str:
    requests: Counter[str] = Counter()
    for outcomes in result["visits"].values():
        requests.update(outcomes)
    counts = ", ".join(f"{count} {outcome}" for outcome, count in requests.most_common())
    return f"{sum(requests.values())} requests in {result['seconds']:.0f} s: {counts}"


def script() -> None:
    args = tyro.cli(Args).sized()
    place = Place("soak", args.quick)
    guard = asyncio.run(under_faulty_controllers(args.engine))
    result = soak(args.plan, args.engine, place.work / "server.log")
    result = {**result, "guard": guard, "violations": [*guard["violations"], *result["violations"]]}
    write_json(place.result, result)
    draw(result, place.result.with_suffix(".png"))
    CONSOLE.print(summary(result), highlight=False)
    if result["violations"]:
        sys.exit("\n".join(["violations:", *result["violations"][:20]]))


if __name__ == "__main__":
    main(script)
