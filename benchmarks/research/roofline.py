"""What speculation would cost on GPUs that were not measured: modelled profiles under the forests of the shipped trace.

MODELLED, in two ways. Seconds come from a roofline (`costs.roofline`), not from a GPU; and what is accepted is what
the drafter of this project's small default model got accepted, not an EAGLE-3 head of Llama or Qwen. Shapes can be
compared with published results, tokens a second can not. Prompts cost nothing here (as where another server reads
them), so a step is decoding alone; up to 256 requests are served at once, each recorded response by several of them at
different positions.

Also works out, for any drafter, how many tokens a request and step the tree must bring to be as fast as plain decoding.
Interrupted, the same command goes on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import tyro
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.common import CONSOLE, Ledger, Place, main
from echo_rl.contracts import Controller, LoadView, Request, SpecPlan
from echo_rl.controllers import registry
from echo_rl.controllers.policy.ppo import Steered
from echo_rl.costs.batched_profile import BatchedCostProfile
from echo_rl.costs.files import packaged
from echo_rl.costs.profile import CostProfile
from echo_rl.costs.roofline.surface import modelled_profile, roofline
from echo_rl.replay.backend import ReplayBackend, ReplayOptions
from echo_rl.replay.scheduler import ReplaySchedulerOptions
from echo_rl.replay.trace import Trace
from echo_rl.utils import plotting, statistics
from echo_rl.utils.result_store import write_json
from echo_rl.workloads.arrivals import Arrivals, closed
from echo_rl.workloads.driver import drive
from echo_rl.workloads.records import RunRecord

MACHINES: Mapping[str, tuple[str, str, int]] = MappingProxyType(
    {
        "Llama-3.1-8B, 1 H100": ("h100", "llama-3.1-8b", 1),
        "Llama-3.3-70B, 4 H100": ("h100", "llama-3.3-70b", 4),
        "Qwen3-235B-A22B, 8 H100": ("h100", "qwen3-235b-a22b", 8),
    }
)
"""Machines that are replayed, as (hardware, model, GPUs)."""
MORE_MACHINES: Mapping[str, tuple[str, str, int]] = MappingProxyType(
    {
        "Llama-3.1-8B, 1 H200": ("h200", "llama-3.1-8b", 1),
        "Llama-3.1-8B, 1 MI300X": ("mi300x", "llama-3.1-8b", 1),
        "Qwen3-235B-A22B, 8 H200": ("h200", "qwen3-235b-a22b", 8),
        "Qwen3-235B-A22B, 8 MI300X": ("mi300x", "qwen3-235b-a22b", 8),
    }
)
"""Machines of which only the break-even points are worked out."""
LIGHT = (5, 3, 3)
"""ECHO's tree under high load: nodes a request, depth, width."""
GATES = packaged("gates.json")
BASELINE, EAGLE, WIDE = "none", "eagle3 5/3/3", "eagle3 31/5/8"
ARMS: Mapping[str, tuple[str, Mapping[str, Any]]] = MappingProxyType(
    {
        BASELINE: ("none", {}),
        EAGLE: ("eagle3", dict(zip(("total", "depth", "top_k"), LIGHT, strict=True))),
        WIDE: ("eagle3", {"total": 31, "depth": 5, "top_k": 8}),
        "echo_dense": ("echo_dense", {"calibration": GATES}),
        "echo_fixed": ("echo_fixed", {"calibration": GATES}),
        "echo": ("echo", {"calibration": GATES}),
    }
)
"""Controllers that choose by themselves, with their options. 31/5/8 is the tree of SGLang's own ECHO proposal."""
PINNED: Mapping[str, int] = MappingProxyType({"echo at 5 nodes": 5, "echo at 4": 4, "echo at 3": 3})
"""ECHO's gates and scheduler under a given budget, in nodes a request: no K_max and no plain decoding."""
PINNED_SHAPE = (5, 3)
"""Depth and width: two levels deeper than the light tree, where gates free the nodes for it."""
PAPER: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {
        "Llama-3.1-8B, 1 H100": {"eagle3": 10_703, "echo_dense": 10_978, "echo": 11_551},
        "Qwen3-235B-A22B, 8 H100": {"eagle3": 2_803, "echo_fixed": 3_046, "echo": 3_207},
    }
)
"""Tokens a second at batch 256 in arXiv 2604.09603; which GPUs they were taken on is not known here."""


@dataclass(frozen=True)
class Args:
    """Replay modelled GPUs."""

    quick: bool = False
    """One machine, three batch sizes, two blocks."""
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    blocks: int = 4
    warmup: int = 60
    """Steps of a block before the measured ones."""
    steps: int = 160
    """Measured steps a block."""


def script() -> None:
    args = tyro.cli(Args)
    place, machines = Place("roofline", args.quick), dict(MACHINES)
    if args.quick:
        args = replace(args, batches=(1, 32, 256), blocks=2, steps=60)
        machines = dict(list(MACHINES.items())[:1])
    trace = Trace.packaged()
    profiles = {name: modelled_profile(roofline(*which)) for name, which in (machines | dict(MORE_MACHINES)).items()}
    settings = {"trace": trace.digest, "warmup": args.warmup, "steps": args.steps}
    settings |= {name: hashlib.sha256(repr(profiles[name]).encode()).hexdigest()[:12] for name in machines}
    ledger = Ledger(place.work, settings)
    found = {name: replayed(ledger, args, trace, name, profiles[name]) for name in machines}
    result = {
        "modelled": True,
        "trace": f"{trace.provenance}, {len(trace.responses)} responses",
        "baseline": BASELINE,
        "machines": found,
        "break_even": {name: break_even(profile, args.batches) for name, profile in profiles.items()},
        "paper": {name: dict(values) for name, values in PAPER.items() if name in machines},
    }
    write_json(place.result, result)
    draw(result, place.result.with_suffix(".png"))
    CONSOLE.print({name: machine["summary"] for name, machine in found.items()}, "MODELLED, nothing measured")


# ----------------------------------------------------------------------------- replay


def replayed(ledger: Ledger, args: Args, trace: Trace, machine: str, profile: CostProfile) -> dict[str, Any]:
    """Every arm at every batch size; throughput is of decoding alone."""
    decoding, every = replace(profile, prefill_weight=0.0, catch_up=0.0), (*ARMS, *PINNED)
    blocks = {
        (arm, batch): [
            ledger.cell(
                {"machine": machine, "arm": arm, "batch": batch, "block": block},
                lambda arm=arm, batch=batch, block=block: measured(args, trace, decoding, arm, batch, block),  # type: ignore[misc]
            )
            for block in range(args.blocks)
        ]
        for arm in every
        for batch in args.batches
    }
    cells = [_cell(blocks, arm, batch) for arm in every for batch in args.batches]
    return {
        "title": profile.title,
        "provenance": profile.provenance,
        "k_max": {str(batch): profile.knee(batch) for batch in args.batches},
        "cells": cells,
        "summary": summary(cells, max(args.batches)),
    }


def measured(args: Args, trace: Trace, profile: CostProfile, arm: str, batch: int, block: int) -> dict[str, float]:
    """One block: a closed load, its first steps left out. Tokens are those of decoding requests that they kept."""
    limits = ReplaySchedulerOptions(max_batch=batch, prefill_chunk=1 << 20, kv_tokens=1 << 24)
    backend = ReplayBackend(trace, BatchedCostProfile(profile), ReplayOptions(limits, noise=False), seed=block)
    controller, source = _Within(make(arm, profile), trace), _Shuffled(trace.requests(), block)
    arrivals, steps = Arrivals(closed(batch), block), args.warmup + args.steps
    run = drive(backend, controller, arrivals, source, steps=steps, clock=backend.clock, idle=backend.idle)
    return _counted(run, args.warmup)


def make(arm: str, profile: CostProfile) -> Controller:
    """The controller of an arm, which plans by this profile if it plans by any."""
    if arm in PINNED:
        return _Pinned(PINNED[arm])
    name, options = ARMS[arm]
    return registry.planning_by(profile)(name, **options)


class _Pinned(Steered):
    def __init__(self, nodes: int) -> None:
        super().__init__(GATES)
        self._nodes = nodes

    def propose(self, load: LoadView) -> SpecPlan:
        depth, width = PINNED_SHAPE
        return SpecPlan(self._nodes * load.batch_size, depth, width, self.calibration.sparse(depth))


class _Within:
    """A controller whose plans are cut to what was recorded: ECHO would draft a little wider on an idle GPU."""

    def __init__(self, controller: Controller, trace: Trace) -> None:
        self.name, self.extend, self.select = controller.name, controller.extend, controller.select
        self.observe = controller.observe
        self._plan, self._trace = controller.plan, trace

    def plan(self, load: LoadView) -> SpecPlan:
        return self._plan(load).within(self._trace.max_depth, self._trace.max_width)


class _Shuffled:
    """Requests of the trace in one shuffled order after another, each under an id of its own."""

    def __init__(self, requests: Sequence[Request], seed: int) -> None:
        self._requests, self._given, self._seed = requests, 0, seed

    def __call__(self, suite: str) -> Request:
        lap, place = divmod(self._given, len(self._requests))
        ranks = [hashlib.sha256(f"{self._seed}/{lap}/{i}".encode()).digest() for i in range(len(self._requests))]
        chosen = self._requests[sorted(range(len(ranks)), key=ranks.__getitem__)[place]]
        self._given += 1
        return replace(chosen, id=f"{chosen.id}#{self._given}")


def _counted(run: RunRecord, warmup: int) -> dict[str, float]:
    begin = run.steps[warmup - 1].end if warmup else 0.0
    steps = [step for step in run.steps[warmup:] if step.batch_size]  # at batch 1 a prompt has a step to itself
    tokens = sum(time > begin for request in run.requests for time in request.token_times[1:])
    rows = sum(step.batch_size for step in steps)
    return {
        "tokens": tokens,
        "seconds": sum(step.seconds for step in steps),
        "mat": sum(step.committed for step in steps) / rows,
        "verified": sum(step.verified for step in steps) / rows,
        "speculating": sum(step.budget > 0 for step in steps) / len(steps),
    }


# ----------------------------------------------------------------------------- results


def _cell(blocks: Mapping[tuple[str, int], Sequence[Mapping[str, float]]], arm: str, batch: int) -> dict[str, Any]:
    ours = blocks[arm, batch]
    rates = {n: [statistics.Rate(b["tokens"], b["seconds"]) for b in blocks[n, batch]] for n in (arm, BASELINE, EAGLE)}
    means = {key: sum(block[key] for block in ours) / len(ours) for key in ("mat", "verified", "speculating")}
    ratios = {"speedup": BASELINE, "over_eagle3": EAGLE}
    return {
        "arm": arm,
        "concurrency": batch,
        "throughput": vars(statistics.rate(rates[arm])),
        **{key: vars(statistics.rate_ratio(rates[arm], rates[other])) for key, other in ratios.items()},
        **means,
    }


def summary(cells: Sequence[Mapping[str, Any]], batch: int) -> dict[str, Any]:
    """What the paper's claims come down to."""
    at = {(cell["arm"], cell["concurrency"]): cell for cell in cells}
    return {
        "eagle3_loses_to_plain_from": losing_from(cells, EAGLE),
        "wide_eagle3_loses_to_plain_from": losing_from(cells, WIDE),
        "batch": batch,
        "echo_over_eagle3": at["echo", batch]["over_eagle3"]["estimate"],
        **{f"{arm}, over_eagle3": at[arm, batch]["over_eagle3"]["estimate"] for arm in PINNED},
        "echo_over_plain": at["echo", batch]["speedup"]["estimate"],
    }


def losing_from(cells: Sequence[Mapping[str, Any]], arm: str) -> int | None:
    """The smallest batch size from which on an arm is slower than plain decoding at every larger one; None: never."""
    ordered = sorted((c for c in cells if c["arm"] == arm), key=lambda cell: -int(cell["concurrency"]))
    losing = None
    for cell in ordered:
        if cell["speedup"]["estimate"] >= 1.0:
            break
        losing = int(cell["concurrency"])
    return losing


def break_even(profile: CostProfile, batches: Sequence[int], context: float = 256.0) -> dict[str, float]:
    """The tokens a request and step, by batch size, that make EAGLE-3's light tree as fast as plain decoding."""
    nodes, depth, width = LIGHT
    return {
        str(b): profile.step_seconds(b, nodes * b, width, depth, context) / profile.step_seconds(b, 0, 0, 0, context)
        for b in batches
    }


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Speed-up over plain decoding against the batch size, a panel a machine, and the break-even points."""
    with rc_context(plotting.STYLE):
        figure = Figure(figsize=(4.2 * (len(result["machines"]) + 1), 4.4), layout="constrained")
        *panels, last = figure.subplots(1, len(result["machines"]) + 1)
        for axes, (name, machine) in zip(panels, result["machines"].items(), strict=True):
            _panel(axes, name, machine["cells"])
        panels[0].set_ylabel("modelled speed-up over plain decoding")
        handles, labels = panels[0].get_legend_handles_labels()
        _break_even(last, result["break_even"])
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
        figure.suptitle("MODELLED, not measured: roofline costs, acceptance of this project's small drafter")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, bbox_inches="tight")


def _panel(axes: Axes, name: str, cells: Sequence[Mapping[str, Any]]) -> None:
    for place, arm in enumerate(arm for arm in (*ARMS, *PINNED) if arm != BASELINE):
        ours = [cell for cell in cells if cell["arm"] == arm]
        loads = [cell["concurrency"] for cell in ours]
        style: Any = {"color": plotting.COLOURS[place % 8], "marker": plotting.MARKERS[place % 8], "markersize": 4}
        axes.plot(loads, [cell["speedup"]["estimate"] for cell in ours], label=arm, **style)
    axes.axhline(1.0, color="#777777", linewidth=1)
    plotting.concurrency_axis(axes, [cell["concurrency"] for cell in cells])
    axes.set_title(name)
    axes.set_ylim(bottom=0)


def _break_even(axes: Axes, machines: Mapping[str, Mapping[str, float]]) -> None:
    for place, (name, points) in enumerate(machines.items()):
        style: Any = {"color": plotting.COLOURS[place % 8], "marker": plotting.MARKERS[place % 8], "markersize": 4}
        axes.plot([int(batch) for batch in points], list(points.values()), label=name, **style)
    most = LIGHT[1] + 1
    axes.axhline(most, color="#777777", linewidth=1, linestyle="--", label=f"all {LIGHT[1]} levels accepted")
    plotting.concurrency_axis(axes, [int(batch) for batch in next(iter(machines.values()))])
    axes.set_title(f"MAT at which {EAGLE} breaks even")
    axes.legend(fontsize="x-small")


if __name__ == "__main__":
    main(script)
