"""Controllers under workloads, in turn on the same requests: the machinery of `ab`.

In a block every arm meets the same requests in the same order, the same arrivals and, on replay, the
same noise, so that what differs is what the controllers decided.
"""

from __future__ import annotations

import logging
import random
import time
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from echo_rl import __version__
from echo_rl.contracts import Backend, Controller, LoadView, MakeController, Request, Restartable, SpecPlan
from echo_rl.controllers.arm import Arm
from echo_rl.errors import ConfigError
from echo_rl.experiments.bench import run_missing
from echo_rl.experiments.plan import Trial, TrialConfig, trials
from echo_rl.experiments.report.blocks import arms_made_of
from echo_rl.utils import statistics
from echo_rl.utils.result_store import ResultStore
from echo_rl.workloads.arrivals import SUITES, Arrivals, Workload, parse
from echo_rl.workloads.driver import drive
from echo_rl.workloads.records import RunRecord, StepRecord
from echo_rl.wrapping import Wrapping

if TYPE_CHECKING:
    from echo_rl.replay.trace import Trace

WARMUP_STEPS = 20
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Venue:
    """Where controllers serve: a backend and what it is asked. A request's suite is its id up to the first slash."""

    name: str
    backend: Backend
    requests: tuple[Request, ...]
    clock: Callable[[], float] = time.perf_counter
    idle: Callable[[float], None] | None = None
    """Lets the clock reach a time without work; None sleeps."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """What the results depend on; a folder of results belongs to one environment."""
    depth: int | None = None
    """Deepest plan that it can serve, None: any. Deeper plans are cut to it."""
    width: int | None = None

    def workload(self, text: str) -> Workload:
        """Raises `ConfigError` on a workload that cannot be read."""
        own = dict.fromkeys(request.id.split("/")[0] for request in self.requests)
        return parse(text, [suite for suite in SUITES if suite in own] or list(own))


def replay_venue(trace: Trace, noise: bool = True) -> Venue:
    """Simulated time over recorded responses, at this machine's measured costs."""
    from echo_rl.costs.batched_profile import BatchedCostProfile
    from echo_rl.costs.files import own_or_packaged
    from echo_rl.costs.profile import CostProfile
    from echo_rl.replay.backend import ReplayBackend, ReplayOptions
    from echo_rl.utils.result_store import digest

    profile = CostProfile.default()
    backend = ReplayBackend(trace, BatchedCostProfile(profile), ReplayOptions(noise=noise))
    environment = {"version": __version__, **_facts(trace), "profile": profile.provenance, "noise": str(noise)}
    environment["calibration"] = digest(own_or_packaged("profile.json"), own_or_packaged("gates.json"))
    requests, limits = trace.requests(), (trace.max_depth, trace.max_width)
    environment["plans are cut to"] = f"depth {limits[0]}, width {limits[1]}"
    return Venue("replay", backend, requests, backend.clock, backend.idle, environment, *limits)


def live_venue(engine: Backend, environment: Mapping[str, str], trace: Trace) -> Venue:
    """The live engine on the requests of a trace, which its model must have recorded."""
    return Venue("live", engine, trace.requests(), environment={**environment, **_facts(trace)})


def _facts(trace: Trace) -> dict[str, str]:
    from echo_rl.replay.trace import fingerprint

    return {"trace": f"{trace.provenance}, {len(trace.responses)} responses", "trace digest": fingerprint(trace)}


class Rotation:
    """The next request of a suite, from a shuffled order that starts again at its end.

    Ids are told apart by `tag` and by how often the request came: the same use of the same request
    has the same id in every arm.
    """

    def __init__(self, requests: Sequence[Request], seed: int, tag: str = "") -> None:
        self._requests, self._seed, self._tag = requests, seed, tag
        self._orders: dict[str, list[Request]] = {}
        self._given: Counter[str] = Counter()
        self._uses: Counter[str] = Counter()

    def __call__(self, suite: str) -> Request:
        """Raises `ConfigError` where there is no request of that suite ("" is any)."""
        if suite not in self._orders:
            self._orders[suite] = self._shuffled(suite)
        order = self._orders[suite]
        chosen = order[self._given[suite] % len(order)]
        self._given[suite] += 1
        self._uses[chosen.id] += 1
        return replace(chosen, id=f"{chosen.id}#{self._tag}{self._uses[chosen.id]}")

    def _shuffled(self, suite: str) -> list[Request]:
        chosen = [request for request in self._requests if suite in ("", request.id.split("/")[0])]
        if not chosen:
            raise ConfigError(f"there are no requests of the suite {suite!r}; choose another workload or other prompts")
        random.Random(f"{self._seed}/{suite}").shuffle(chosen)
        return chosen


class Fitted(Wrapping):
    """A controller whose plans are cut to what the venue can serve. Warns the first time."""

    def __init__(self, controller: Controller, depth: int | None, width: int | None) -> None:
        super().__init__(controller)
        self.cuts = 0
        self._depth, self._width = depth, width

    def plan(self, load: LoadView) -> SpecPlan:
        plan = self._controller.plan(load)
        cut = plan.within(self._depth or plan.max_depth, self._width or plan.width)
        if cut is plan:
            return plan
        if not self.cuts:
            words = "plans of %s are cut to depth %d and width %d; record a larger trace"
            log.warning(words, self.name, cut.max_depth, cut.width)
        self.cuts += 1
        return cut


def play(
    venue: Venue,
    controller: Controller,
    workload: Workload,
    seed: int,
    steps: int | None = None,
    seconds: float | None = None,
    tag: str = "",
) -> RunRecord:
    """One run; the seed decides its arrivals, its requests and, on replay, its noise. Raises what `drive` raises."""
    if isinstance(venue.backend, Restartable):
        venue.backend.restart(seed)
    arrivals, source = Arrivals(workload, seed), Rotation(venue.requests, seed, tag)
    clock, idle = venue.clock, venue.idle
    return drive(venue.backend, controller, arrivals, source, steps=steps, seconds=seconds, clock=clock, idle=idle)


def warmed(venue: Venue, controller: Controller, workload: Workload, seed: int) -> Fitted:
    """The controller, fitted to the venue, after a few steps of this workload that do not count."""
    fitted = Fitted(controller, venue.depth, venue.width)
    play(venue, fitted, workload, seed, steps=WARMUP_STEPS)
    return fitted


def seed_of(*parts: object) -> int:
    """A seed of its own for each combination of parts."""
    return zlib.crc32("/".join(map(str, parts)).encode())


class Stage:
    """Runs trials. An arm keeps one controller a workload, so that it goes on with what it has learnt.

    Not over an interruption: then it is a new one, warmed up as at first.
    """

    def __init__(self, venue: Venue, config: TrialConfig, make: MakeController) -> None:
        self._venue, self._config, self._make = venue, config, make
        self._workloads = {text: venue.workload(text) for text in config.workloads}
        self._ready: dict[tuple[str, str], Fitted] = {}
        for label in config.arms:
            self.made(label)  # a bad arm is an error now, not hours later

    def run(self, trial: Trial) -> RunRecord:
        config, workload = self._config, self._workloads[trial.workload]
        key = (trial.arm, trial.workload)
        if key not in self._ready:
            seed = seed_of(config.seed, trial.workload, "warm-up")
            self._ready[key] = warmed(self._venue, self.made(trial.arm), workload, seed)
        seed = seed_of(config.seed, trial.workload, trial.block)
        tag = f"{trial.block}."
        run = play(self._venue, self._ready[key], workload, seed, config.steps, config.seconds, tag)
        if not run.output_tokens:
            raise ConfigError(f"no token came in {trial} within {run.seconds:.1f} s; give blocks more seconds or steps")
        return run

    def made(self, label: str) -> Controller:
        """A new controller of that arm. Raises `UnknownController` and `ConfigError`."""
        arm = Arm.parse(label)
        return self._make(arm.controller, **arm.options)


def run_trials(
    venue: Venue, config: TrialConfig, make: MakeController, out: Path, console: Console | None = None
) -> dict[Trial, RunRecord]:
    """Every trial of the config; those that `out` lacks are run now and stored there.

    Raises `ConfigError` where `out` holds another comparison, or an arm or a workload can't be made.
    """
    stage = Stage(venue, config, make)
    made = arms_made_of({arm: stage.made(arm) for arm in config.arms})
    environment = {**venue.environment, **made}
    store: ResultStore[Trial, RunRecord] = ResultStore.in_folder(out, config, environment, RunRecord)
    return run_missing(list(trials(config)), store, stage.run, console)


# ----------------------------------------------------------------------------- what is read off


@dataclass(frozen=True)
class Decisions:
    """What was decided, as means over steps with decoding requests."""

    steps: int
    batch: float
    budget: float
    """Nodes a step, over the whole batch."""
    nodes: float
    """Nodes a request."""
    plain: float
    """Share of steps that did not speculate."""
    depth: float | None
    """Mean over the speculating steps; None where there are none."""
    width: float | None

    @classmethod
    def of(cls, steps: Sequence[StepRecord]) -> Decisions | None:
        """None where nothing was decoded."""
        own = [step for step in steps if step.batch_size]
        on = [step for step in own if step.budget]
        if not own:
            return None
        return cls(
            steps=len(own),
            batch=sum(step.batch_size for step in own) / len(own),
            budget=sum(step.budget for step in own) / len(own),
            nodes=sum(step.budget / step.batch_size for step in own) / len(own),
            plain=1.0 - len(on) / len(own),
            depth=sum(step.depth for step in on) / len(on) if on else None,
            width=sum(step.width for step in on) / len(on) if on else None,
        )


RATES: Mapping[str, Callable[[RunRecord], float]] = {
    "tokens_per_second": lambda run: run.seconds,
    "tokens_per_busy_second": lambda run: run.busy_seconds,
    "tokens_per_request_second": lambda run: run.request_seconds,
}
"""Three rates of the same tokens. A second of the clock measures a saturated server; under open arrivals
it measures the arrivals. A busy second measures the server's effort, idle time left out (a fast one
meets smaller batches there). A request-second is the speed that a user sees, queueing included; at a
fixed concurrency it ranks as the first does."""


def rates(runs: Sequence[RunRecord], kind: str) -> list[statistics.Rate]:
    """One rate a run; `kind` is one of `RATES`."""
    return [statistics.Rate(run.output_tokens, RATES[kind](run)) for run in runs]


def headline(workload: Workload) -> str:
    """The rate to judge a workload by: the clock's where the load is closed, else what users see."""
    closed = all(phase.concurrency is not None for phase in workload.phases)
    return "tokens_per_second" if closed else "tokens_per_request_second"
