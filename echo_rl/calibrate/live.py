"""Calibrates on a live engine: gates from its own trees, the cost profile from its own passes.

The prompts are this package's own, not a benchmark's, so gates are never tuned on what they are
judged by later.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from echo_rl.calibrate.cost import Grid, Machine, measure
from echo_rl.calibrate.device_passes import passes, usual
from echo_rl.calibrate.gates import GateObservation, GateOptions, best_paths, calibrate
from echo_rl.calibrate.in_situ import correct, observe_steps
from echo_rl.contracts import Forest, LoadView, Request, SamplingParams, Selection, SpecPlan, StepReport
from echo_rl.controllers.base import BaseController
from echo_rl.controllers.echo.gates import GateCalibration
from echo_rl.costs.profile import CostProfile
from echo_rl.runtime.engine import Engine
from echo_rl.runtime.step.device.step import DeviceStep
from echo_rl.utils import terminal
from echo_rl.workloads.datasets import Prompt, PromptSet, refuse_held_out
from echo_rl.workloads.datasets.prompt import user
from echo_rl.workloads.driver import serve
from echo_rl.workloads.requests import chat_requests, fitting

DEPTH, WIDTH, NODES = 8, 10, 60  # ECHO's batch-1 set-up: depth 8, top-k 10, 60 nodes
LIVE_REQUESTS, LIVE_TOKENS, MOST_LIVE = 10, 64, 32  # of the live run that corrects the cost profile


class GateObserver(BaseController):
    """Drafts full trees without gates, every fourth step none at all, and records how the best paths fared."""

    name = "gate-observer"

    def __init__(self) -> None:
        super().__init__()
        self.observations: list[GateObservation] = []
        self._steps = 0
        self._forest: Forest | None = None

    def propose(self, load: LoadView) -> SpecPlan:
        self._steps += 1
        return SpecPlan(0 if self._steps % 4 == 0 else NODES * load.batch_size, DEPTH, WIDTH)

    def select(self, forest: Forest, plan: SpecPlan) -> Selection:
        self._forest = forest
        return super().select(forest, plan)

    def observe(self, report: StepReport) -> None:
        if self._forest is not None:
            tokens = [output.tokens for output in report.outputs[: report.load.batch_size]]
            self.observations.extend(best_paths(self._forest, tokens))
        self._forest = None


def calibration_prompts(limit: int | None = None) -> list[str]:
    """The package's own user turns (chat, code and arithmetic in turn)."""
    groups: dict[str, list[str]] = json.loads(
        files("echo_rl").joinpath("calibrate", "data", "prompts.json").read_text()
    )
    turns = [turn for row in zip(*groups.values(), strict=True) for turn in row]
    return turns[:limit]


def own_prompts(limit: int | None = None) -> PromptSet:
    """The package's own prompts, one for each of its turns."""
    turns = calibration_prompts(limit)
    return PromptSet("own", [Prompt("own", str(number), user(turn)) for number, turn in enumerate(turns)])


def observe(
    engine: Engine, prompts: Sequence[Prompt], max_new_tokens: int, console: Console | None
) -> list[GateObservation]:
    """Answers the prompts one at a time under a `GateObserver`; what it saw."""
    observer = GateObserver()
    requests = chat_requests(engine, prompts, lambda _: SamplingParams(max_new_tokens=max_new_tokens))
    with Progress(console=console, disable=console is None) as progress:
        task = progress.add_task("observing trees", total=len(requests))
        serve(engine, observer, requests, 1, lambda o: progress.advance(task, o.finish_reason is not None))
    return observer.observations


def calibrate_gates(
    engine: Engine, options: GateOptions, chosen: PromptSet, max_new_tokens: int, console: Console
) -> GateCalibration:
    """The drafter's gates. Says which prompts don't fit the engine's context. Raises `ConfigError` where the prompts
    give too few observations, or are of suites that are held out."""
    refuse_held_out([prompt.suite for prompt in chosen.prompts], "calibrate")
    chosen = fitting(engine, chosen, max_new_tokens)
    terminal.say(console, chosen.notes)
    observations = observe(engine, chosen.prompts, max_new_tokens, console)
    facts = "".join(f", {fact}" for fact in chosen.facts.values())
    seen = f"{len(chosen.prompts)} {chosen.suite} prompts{facts}, {len(observations)} best paths"
    provenance = f"{seen}, {engine.config.model_source}, greedy"
    return calibrate(observations, options, provenance)


def calibrate_cost(
    engine: Engine,
    machine: Machine,
    grid: Grid,
    samples: Path | None,
    console: Console | None,
    provenance: str,
    environment: Mapping[str, str] | None = None,
) -> CostProfile:
    """The machine's cost profile: single passes on the grid, corrected by what live steps took.

    `environment` is what else the passes depend on; see `measure`.

    Both are timed as the engine serves. Where that is on the device, so say the provenance and the name of the
    file of samples, which eager passes must not continue.
    """
    if isinstance(engine.serving, DeviceStep):
        provenance = f"{provenance}, device step"
        samples = samples and samples.with_stem(f"{samples.stem}-device")
    turns = calibration_prompts()

    def requests(concurrency: int) -> list[Request]:
        return _requests(
            engine, [turns[i % len(turns)] for i in range(max(LIVE_REQUESTS, 3 * concurrency))], LIVE_TOKENS
        )

    probe = passes(engine)
    profile = measure(probe.verify, probe.draft, machine, grid, samples, console, provenance, environment)
    concurrencies = [batch for batch in grid.batches if batch <= MOST_LIVE]
    with Progress(console=console, disable=console is None) as progress:
        task = progress.add_task("serving under random plans", total=len(concurrencies))
        steps = observe_steps(engine, requests, concurrencies, lambda: progress.advance(task), usual(engine))
    return correct(profile, steps)


def measured_profile(
    engine: Engine, environment: Mapping[str, str], grid: Grid, folder: Path, console: Console
) -> CostProfile:
    """This machine's costs, kept in `folder` with the samples so far. Raises `ConfigError` for samples of another
    machine, engine or grid."""
    machine = Machine(environment["device"], environment["dtype"], environment["model"], int(environment["threads"]))
    others = ("calibration", *vars(machine))  # passes don't read the first, and the rest is said already
    of = {name: value for name, value in environment.items() if name not in others}
    folder.mkdir(parents=True, exist_ok=True)
    provenance = f"{environment['cpu']}, torch {environment['torch']}"
    profile = calibrate_cost(engine, machine, grid, folder / "samples.json", console, provenance, of)
    profile.save(folder / "profile.json")
    return profile


def _requests(engine: Engine, turns: Sequence[str], max_new_tokens: int) -> list[Request]:
    params = SamplingParams(max_new_tokens=max_new_tokens)
    return [
        Request(f"own-{i}", engine.tokenizer.chat([{"role": "user", "content": turn}]), params)
        for i, turn in enumerate(turns)
    ]
