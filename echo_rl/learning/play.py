"""Plays any controller on replayed servers: its steps one by one, and how fast they were.

The one way in which learned and analytic controllers are measured against each other during
training: same requests, arrivals and seeds, the serving interface, simulated time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from echo_rl.contracts import Controller, LoadView, SpecPlan, StepReport
from echo_rl.controllers.policy.network import Policy
from echo_rl.costs.batched_profile import BatchedCostProfile
from echo_rl.env.session import TimedStep, WorkloadSession
from echo_rl.replay.backend import ReplayBackend, ReplayOptions
from echo_rl.replay.timing import plain_step
from echo_rl.replay.trace import Trace
from echo_rl.workloads.arrivals import parse

MakeController = Callable[[], Controller]


@dataclass(frozen=True)
class World:
    """A replay of these responses on this machine."""

    trace: Trace
    costs: BatchedCostProfile
    noise: bool = True


@dataclass(frozen=True)
class Speed:
    """The tokens that some steps brought and the time they took.

    `plain_seconds` is the time of plain serving that the steps replaced, see `timing.Plain`; the first tokens of
    prompts, which nobody speculates for, are in `tokens` alone.
    """

    tokens: float
    seconds: float
    plain_seconds: float

    @property
    def throughput(self) -> float:
        return self.tokens / self.seconds

    @property
    def speedup(self) -> float:
        """Over predicted plain decoding at the same loads."""
        return self.plain_seconds / self.seconds


def play(
    world: World,
    controller: Controller,
    workload: str,
    steps: int,
    seed: int,
    learn: Callable[[StepReport], None] = lambda report: None,
    change: Callable[[LoadView, SpecPlan], SpecPlan] = lambda load, plan: plan,
) -> Iterator[tuple[LoadView, SpecPlan, TimedStep]]:
    """Serve a workload; yields each of `steps` steps with decoding requests, and the controller's plan for it.

    `learn` sees the other steps; `change` may put another plan in place of the controller's. Plans deeper or
    wider than the trace are cut to it. Raises what the backend and `arrivals.parse` raise.
    """
    backend = ReplayBackend(world.trace, world.costs, ReplayOptions(noise=world.noise), seed)
    server = WorkloadSession(backend, controller, world.trace.requests(), backend.clock, backend.idle)
    drawn = parse(workload)
    server.check(drawn)
    try:
        server.open(drawn, np.random.default_rng(seed))
        for _ in range(steps):
            load = server.advance(learn)
            plan = controller.plan(load).within(world.trace.max_depth, world.trace.max_width)
            yield load, plan, server.serve(change(load, plan))
    finally:
        server.clear()


def measure(world: World, controller: Controller, workload: str, steps: int, seed: int) -> Speed:
    """The speed of a controller under a workload."""
    tokens = seconds = plain = 0.0
    for load, _, served in play(world, controller, workload, steps, seed):
        tokens += served.tokens
        seconds += served.seconds
        at = [np.array([float(x)]) for x in (load.batch_size, load.mean_context, load.prefill_tokens)]
        replaced = plain_step(world.costs, *at).worth(np.array([float(sum(served.gains))]), at[0])
        plain += float(replaced[0])
    return Speed(tokens, seconds, plain)


class HeldOut:
    """Scores a policy on responses that it was not trained on, workload by workload, against named controllers.

    ``speedup`` (geometric mean over the workloads) and ``speedup/WORKLOAD`` are over predicted plain
    decoding; ``over_NAME`` and ``over_NAME/WORKLOAD`` are tokens a plain second over those of the
    baseline in the same workload and seed. The second world's are called ``WORKLOAD@1``, and so on.
    Deterministic; baselines are measured once.
    """

    def __init__(
        self,
        worlds: Sequence[World],
        serve: Callable[[Policy], Controller],
        workloads: Sequence[str],
        steps: int,
        seed: int,
        baselines: Mapping[str, MakeController],
    ) -> None:
        self._serve = serve
        self._scenes = {
            f"{workload}@{number}" if number else workload: (world, workload, seed + place)
            for number, world in enumerate(worlds)
            for place, workload in enumerate(workloads)
        }
        self._steps, self._baselines = steps, dict(baselines)
        self._known: dict[str, list[float]] = {}

    def __call__(self, policy: Policy) -> dict[str, float]:
        ours = self._speedups(lambda: self._serve(policy))
        scores = _spread("speedup", self._scenes, ours)
        for name, make in self._baselines.items():
            if name not in self._known:
                self._known[name] = self._speedups(make)
            ratios = [a / b for a, b in zip(ours, self._known[name], strict=True)]
            scores |= _spread(f"over_{name}", self._scenes, ratios)
        return scores

    def _speedups(self, make: MakeController) -> list[float]:
        scenes = self._scenes.values()
        return [measure(world, make(), workload, self._steps, seed).speedup for world, workload, seed in scenes]


def _spread(name: str, workloads: Iterable[str], values: Sequence[float]) -> dict[str, float]:
    mean = math.exp(sum(math.log(v) for v in values) / len(values))
    return {name: mean} | {f"{name}/{w}": v for w, v in zip(workloads, values, strict=True)}
