"""Every controller, tuned on one part of the recorded prompts and ranked on the other, in simulated time; ECHO's gates.

Needs a trace: ``echo-rl record --width 10 --out benchmarks/results/work/trace``. Interrupted, the same command goes on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from benchmarks.common import CONSOLE, RESULTS, Place, main
from echo_rl.controllers import registry
from echo_rl.costs.batched_profile import BatchedCostProfile
from echo_rl.costs.profile import CostProfile
from echo_rl.experiments.evaluate import EvalConfig, evaluate
from echo_rl.experiments.report import tables
from echo_rl.experiments.tune import TuneConfig, load_tuned, tune
from echo_rl.replay.trace import Trace
from echo_rl.utils.result_store import write_json

TUNED_ELSEWHERE = ("none", "static", "fixed", "ppo")
"""Not tuned here: no options, a topology, the search for the best fixed plan, a trained policy."""
GATES = (
    *(f"echo_fixed:tau={tau}" for tau in (0.0, 0.1, 0.2, 0.3, 0.5)),
    *(f"echo_fixed:tau={tau},everywhere=true" for tau in (0.1, 0.2, 0.3, 0.5)),
    "echo_dense", "echo_unscheduled",
)  # fmt: skip
"""ECHO with one threshold at the calibrated depths (0: no gates), or at all; calibrated ones at all; no scheduler."""


@dataclass(frozen=True)
class Args:
    """Tune and rank all controllers."""

    quick: bool = False
    """Four controllers, two loads, few blocks."""
    trace: Path = RESULTS / "work" / "trace" / "trace.safetensors"
    held_out: float = 0.3
    """Share of the prompts for the ranking."""
    blocks: int = 8


def script() -> None:
    args = tyro.cli(Args)
    place = Place("rivals", args.quick)
    train, test = Trace.load(args.trace).split(args.held_out)
    costs = BatchedCostProfile(CostProfile.default())
    names = ("chain", "evict", "echo", "none") if args.quick else registry.names()
    searched = tuple(name for name in names if name not in TUNED_ELSEWHERE)
    tuning = TuneConfig(searched, concurrency=(1, 8), blocks=2) if args.quick else TuneConfig(searched)
    tune(tuning, train, costs, registry.make, place.work / "tune", CONSOLE)
    tuned = load_tuned(place.work / "tune" / "tuned.json")
    arms = tuple(tuned.get(name, name) for name in names)
    sizes = (1, 8) if args.quick else (1, 2, 4, 8, 16, 32)
    config = EvalConfig(arms, concurrency=sizes, blocks=2 if args.quick else args.blocks, hindsight=not args.quick)
    result = evaluate(config, test, costs, registry.make, place.work / "eval", CONSOLE)
    ablations = replace(config, arms=GATES[:2] if args.quick else GATES, hindsight=False)
    gates = evaluate(ablations, test, costs, registry.make, place.work / "gates", CONSOLE)
    write_json(place.result, {"trace": test.provenance, **result, "gates": gates})
    width = CONSOLE.width
    CONSOLE.print(tables.ranking(result, width), tables.by_load(result, width), tables.ranking(gates, width))


if __name__ == "__main__":
    main(script)
