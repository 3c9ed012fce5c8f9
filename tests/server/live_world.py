"""A server that only seems to decode: requests come and go and trees are drawn, but nothing is computed.

`LiveWorld` makes steps with the proportions of the real ones; `LiveWorldClient` gives them to the HTTP front as
an engine client does.
"""

from __future__ import annotations

import asyncio
import heapq
import math
import random
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from echo_rl.contracts import PhaseTimes, RequestTree
from echo_rl.errors import ConfigError
from echo_rl.server.config import ExperimentOptions
from echo_rl.server.core.experiment import CONTROL, RUNNING, Switchback
from echo_rl.server.messages import ExperimentReport, Ready, StepStats
from echo_rl.server.ui.feed import add_ragged
from echo_rl.workloads.records import StepRecord

FALLBACKS = {"exception": 0, "nan": 0, "deadline": 0, "invalid": 0}


@dataclass
class Answer:
    """One request under way."""

    id: str
    ease: float
    """How often the drafter's first choice is the target's."""
    left: int
    """Tokens to come."""


@dataclass
class LiveWorld:
    """Closed loop of `requests`; each `step` returns what the core would report. The same seed, the same steps."""

    requests: int = 8
    seed: int = 0
    controller: str = "echo"
    answers: list[Answer] = field(default_factory=list)
    clock: float = 0.0
    steps: int = 0

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    def step(self) -> StepStats:
        arrived = self._arrive()
        batch, self.steps = len(self.answers), self.steps + 1
        knee = round(72 / (1 + batch / 7))
        depth = 2 + round(5 / math.sqrt(batch))
        budget = 0 if self.controller == "none" else max(batch, round(knee * self.random.uniform(0.8, 1.0)))
        trees = self._trees(budget, depth)
        verified = sum(len(tree.parents) for tree in trees)
        accepted = sum(len(tree.accepted) for tree in trees)
        times = self._times(batch, verified, depth if budget else 0)
        self.clock += times.total + 0.0004
        kv = (40 * batch + sum(500 - a.left for a in self.answers)) / 16384
        step = StepRecord(
            *(self.clock, times.total + 0.0004, batch, 24 * arrived, max(0, self.requests - 14), 100.0),
            *(budget, depth, 3, verified + 2 * batch, verified, accepted, accepted + batch),
            *by_depth(trees, depth if budget else 0),
            times=times,
        )
        stats = StepStats(step, self.controller, 0, batch, step.committed, kv, knee, FALLBACKS, trees=tuple(trees))
        self._finish(trees)
        return stats

    def _arrive(self) -> int:
        missing = min(14, self.requests) - len(self.answers)
        for _ in range(missing):
            name = f"cmpl-{self.random.getrandbits(64):016x}"
            self.answers.append(Answer(name, self.random.uniform(0.5, 0.92), self.random.randint(150, 500)))
        return max(0, missing)

    def _trees(self, budget: int, depth: int) -> list[RequestTree]:
        """The best `budget` candidates over all requests, and the way that each target takes."""
        queue: list[tuple[float, int, int, int]] = []  # (-probability, request, parent, depth)
        picked: list[list[tuple[int, int, float]]] = [[] for _ in self.answers]

        def offer(request: int, parent: int, at: int, base: float) -> None:
            ease = min(0.97, self.answers[request].ease * self.random.uniform(0.75, 1.1))
            for chance in (ease, (1 - ease) * 0.5, (1 - ease) * 0.25):
                heapq.heappush(queue, (-base * chance, request, parent, at))

        for request in range(len(self.answers)):
            offer(request, -1, 0, 1.0)
        while queue and sum(map(len, picked)) < budget:
            score, request, parent, at = heapq.heappop(queue)
            picked[request].append((parent, at, -score))
            if at + 1 < depth:
                offer(request, len(picked[request]) - 1, at + 1, -score)
        return [self._walk(answer.id, nodes) for answer, nodes in zip(self.answers, picked, strict=True)]

    def _walk(self, name: str, nodes: list[tuple[int, int, float]]) -> RequestTree:
        path: list[int] = []
        at, reached = -1, 1.0
        while True:
            luck = self.random.random() * reached
            for i, (parent, _, chance) in enumerate(nodes):
                if parent == at:
                    luck -= chance
                    if luck < 0:
                        at, reached = i, chance
                        path.append(i)
                        break
            else:
                break
        depths = tuple(depth for _, depth, _ in nodes)
        return RequestTree(
            name, tuple(parent for parent, _, _ in nodes), depths, tuple(path), max(depths, default=-1) + 1
        )

    def _times(self, batch: int, verified: int, depth: int) -> PhaseTimes:
        jitter = self.random.lognormvariate(0, 0.08)
        return PhaseTimes(
            *(0.0002, 0.0003, 0.0011 * depth * jitter, 0.0004 if depth else 0.0),
            *((0.0072 + 0.00035 * (batch + verified)) * jitter, 0.0006, 0.0003 + 0.00004 * batch),
        )

    def _finish(self, trees: list[RequestTree]) -> None:
        for answer, tree in zip(self.answers, trees, strict=True):
            answer.left -= len(tree.accepted) + 1
        self.answers = [answer for answer in self.answers if answer.left > 0]


def by_depth(trees: list[RequestTree], depth: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(reached, accepted): requests with a node there whose path was accepted so far, and where it was too."""
    reached: tuple[int, ...] = ()
    accepted: tuple[int, ...] = ()
    for tree in trees:
        deepest = max(tree.depths, default=-1) + 1
        reached = add_ragged(reached, (1,) * min(deepest, len(tree.accepted) + 1))
        accepted = add_ragged(accepted, (1,) * len(tree.accepted))
    return add_ragged(reached, (0,) * depth), add_ragged(accepted, (0,) * depth)


class LiveWorldClient:
    """An engine client over a `LiveWorld` that lives `speed` times as fast as the clock."""

    max_context = 2048

    def __init__(self, world: LiveWorld | None = None, speed: float = 1.0) -> None:
        self.world = world or LiveWorld()
        self.world.clock = time.time() - 3600
        self.speed = speed
        self.idle = False
        self.ready, self.alive, self.dead = True, True, False
        self.in_flight = self.restarts = self.rollbacks = 0
        self.serving: dict[str, int] = {}
        self.fallbacks = dict(FALLBACKS)
        self.traced: list[bool] = []
        self.controller = self.world.controller
        self.switchback: Switchback | None = None
        self.received: asyncio.Queue[ExperimentReport] = asyncio.Queue()
        environment = {"model": "smollm2", "device": "cpu", "dtype": "bfloat16", "threads": "2", "cpu": "AMD EPYC"}
        self.ready_info = Ready("echo", self.max_context, 49152, environment)

    @property
    def experiment(self) -> ExperimentReport | None:
        return None if self.switchback is None else ExperimentReport(self.switchback.state, self.switchback.report())

    async def subscribe(self) -> AsyncIterator[StepStats | ExperimentReport]:
        while self.alive:
            for _ in range(0 if self.idle else max(1, round(self.speed))):
                for event in self.advance():
                    yield event
            while not self.received.empty():
                yield self.received.get_nowait()
            await asyncio.sleep(0.025)

    def advance(self) -> list[StepStats | ExperimentReport]:
        """One step of the world under whoever decides now."""
        running = self.switchback is not None and self.switchback.state == RUNNING
        self.world.controller = self.controller
        if running:
            options = self.switchback.options
            self.world.controller = options.control if self.switchback.arm == CONTROL else options.treatment
        stats = self.world.step()
        if running and self.switchback.step(stats.committed, stats.step.seconds):
            return [stats, self.experiment]
        return [stats]

    def trace_trees(self, enabled: bool) -> None:
        self.traced.append(enabled)

    def on_stats(self, callback: Any) -> None:
        pass

    async def set_controller(self, spec: str) -> dict[str, Any]:
        if spec.startswith("ppo"):
            raise ConfigError("no policy of that name; the one in force stays")
        previous, self.controller = self.controller, spec
        return {"controller": spec, "previous": previous}

    async def start_experiment(self, options: ExperimentOptions) -> dict[str, Any]:
        self.switchback = Switchback(options)
        self.received.put_nowait(self.experiment)
        return self.switchback.report()

    async def stop_experiment(self) -> dict[str, Any]:
        self.switchback.stop("stopped by hand")
        self.received.put_nowait(self.experiment)
        return self.switchback.report()
