"""Trains policies (seeds and ablations) on replayed servers, and compares them with ECHO on prompts new to them.

Needs a trace of the benchmark's prompts: ``echo-rl record --width 10 --out benchmarks/results/work/trace``. Training
sees neither the prompts of the comparison here nor, but to choose its best policy, another part of the rest.
Interrupted, the same command goes on. ``--only`` trains these runs and stops, so that several processes share the work.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from benchmarks.common import CONSOLE, RESULTS, Ledger, Place, main
from benchmarks.intervals import geometric_mean
from echo_rl.contracts import Controller
from echo_rl.controllers import registry
from echo_rl.controllers.arm import Arm
from echo_rl.controllers.policy.ppo import Ppo, PpoOptions
from echo_rl.controllers.wrappers.timed import TimedController
from echo_rl.costs.batched_profile import BatchedCostProfile
from echo_rl.costs.profile import CostProfile
from echo_rl.env.reward import RewardOptions
from echo_rl.learning.clone import CloneOptions
from echo_rl.learning.learner import LearnerOptions
from echo_rl.learning.play import World, measure
from echo_rl.learning.train import TrainConfig, train
from echo_rl.replay.backend import ReplayBackend
from echo_rl.replay.machines import another
from echo_rl.replay.trace import Trace
from echo_rl.utils.result_store import digest_of, write_json
from echo_rl.workloads.driver import serve

WORKLOADS = (
    *(f"closed:{c}" for c in (1, 2, 4, 8, 16, 32)),
    "bursty:0.5,8,5,5", "bursty:0.3,3,10,10", "shift:5,4", "ramp:0.3,6,40", "poisson:2",
)  # fmt: skip
FIXED = (
    "none",
    *(f"fixed:nodes={n},depth={d},width={w}" for n, d, w in (
        (1, 1, 1), (1, 1, 2), (1, 2, 2), (2, 2, 2), (2, 3, 2), (3, 3, 2), (3, 3, 3), (5, 4, 2), (5, 4, 4), (9, 4, 4),
    )),
)  # fmt: skip
"""Fixed plans whose best, workload by workload, is the plan to have had in hindsight."""
TIMED = ("fixed:nodes=5,depth=4,width=2", "echo", "ppo")
"""Controllers whose deciding is timed; the fixed plan's is what selecting nodes takes anyway."""
OTHERS = 4
"""Other machines to serve on, while all controllers start out from this one's profile."""
BASE = TrainConfig(evaluation_steps=400)
SEEDS = {f"seed{s}": replace(BASE, learner=replace(BASE.learner, seed=s)) for s in range(5)}

SHORT = replace(BASE, learner=replace(BASE.learner, steps=150_000))
ABLATIONS = {
    "150,000 steps, as all that follow": SHORT,
    "on the profile's own machine alone": replace(SHORT, randomise=0.0),
    "on another machine each episode": replace(SHORT, randomise=1.0),
    "no reference plan in the reward": replace(SHORT, reference=False),
    "nor exact step times": replace(SHORT, reference=False, noise=True),
    "reward tokens": replace(SHORT, reward=RewardOptions(form="tokens")),
    "reward time": replace(SHORT, reward=RewardOptions(form="time")),
    "load unseen": replace(SHORT, hidden=("load",)),
    "speculation unseen": replace(SHORT, hidden=("speculation",)),
    "cost unseen": replace(SHORT, hidden=("cost",)),
    "a decision for one step": replace(SHORT, repeat=1),
    "a decision for 16 steps": replace(SHORT, repeat=16),
}


@dataclass(frozen=True)
class Args:
    """Train and compare policies."""

    quick: bool = False
    """One seed, one ablation, few steps."""
    trace: Path = RESULTS / "work" / "trace" / "trace.safetensors"
    only: tuple[str, ...] = ()
    """Train these and stop."""
    steps: int = 250
    """Serving steps a workload and seed of the comparison."""
    seeds: int = 6
    """Seeds of arrivals and times in the comparison."""
    workloads: tuple[str, ...] = WORKLOADS
    """Workloads of the comparison."""
    ablations: tuple[str, ...] = tuple(ABLATIONS)
    """The ablations to train; each takes a sixth of a seed's time."""


def script() -> None:
    args = tyro.cli(Args)
    place = Place("policies", args.quick)
    runs: dict[str, TrainConfig] = {**SEEDS, **{name: ABLATIONS[name] for name in args.ablations}}
    if args.quick:
        args = replace(args, steps=60, seeds=2, workloads=("closed:1", "closed:8"))
        small, few = LearnerOptions(steps=4_096), CloneOptions(2_000, epochs=4)
        runs = {
            name: replace((SEEDS | ABLATIONS)[name], learner=small, clone=few, evaluation_steps=60)
            for name in ("seed0", "reward tokens")
        }
    place.work.mkdir(parents=True, exist_ok=True)
    profile, test = CostProfile.default(), Trace.load(args.trace).split(BASE.held_out)[1]
    ledger = Ledger(place.work, {"trace": test.digest, "profile": digest_of(repr(profile).encode())})
    if args.only:
        runs = {name: runs[name] for name in args.only}
    folders = {name: place.work / name.replace(" ", "_") for name in runs}
    trained = {name: fit(ledger, name, config, args.trace, folders[name]) for name, config in runs.items()}
    if args.only:
        return
    world = World(test, BatchedCostProfile(profile))
    arms = ["none", "echo", *FIXED[1:]] if not args.quick else ["none", "echo", FIXED[5]]
    worth = {arm: scores(ledger, world, arm, args) for arm in arms}
    worth |= {name: scores(ledger, world, name, args, run["policy"]) for name, run in trained.items()}
    seeds, ablations = ([name for name in trained if name in group] for group in (SEEDS, ABLATIONS))
    closed = replace(args, workloads=tuple(w for w in args.workloads if w.startswith("closed")))
    result = {
        "profile": profile.provenance,
        "trace": test.provenance,
        "workloads": list(args.workloads),
        "training": {name: {key: run[key] for key in ("steps", "seconds")} for name, run in trained.items()},
        **compare(worth, seeds, ablations),
        "elsewhere": elsewhere(ledger, test, profile, closed, {name: trained[name]["policy"] for name in trained}),
        "deciding": ledger.cell({"part": "deciding"}, lambda: deciding(test, profile)),
    }
    write_json(place.result, result)
    CONSOLE.print({key: result[key] for key in ("over_echo", "elsewhere", "gap_closed", "deciding")})


def fit(ledger: Ledger, name: str, config: TrainConfig, trace: Path, out: Path) -> dict[str, Any]:
    """Train one policy, or go on; where it lies and how long it took."""

    def run() -> dict[str, Any]:
        begin = time.perf_counter()
        done = train(replace(config, trace=trace, out=out), CONSOLE)
        return {"policy": str(done.policy), "steps": done.steps, "seconds": time.perf_counter() - begin}

    cell: dict[str, Any] = ledger.cell({"train": name}, run)
    return cell


def scores(
    ledger: Ledger, world: World, name: str, args: Args, policy: str | None = None, machine: int | None = None
) -> list[list[float]]:
    """[workloads][seeds] speed-ups over plain serving of the same work; `machine` is which other one the world's is."""

    def make() -> Controller:
        if policy is not None:
            return Ppo(PpoOptions(policy))
        arm = Arm.parse(name)
        return registry.make(arm.controller, **arm.options)

    def run() -> list[list[float]]:
        seeds = range(100, 100 + args.seeds)
        return [[measure(world, make(), w, args.steps, seed).speedup for seed in seeds] for w in args.workloads]

    place = {"steps": args.steps, "seeds": args.seeds} | ({} if machine is None else {"machine": machine})
    cell: list[list[float]] = ledger.cell({"score": name, **place}, run)
    return cell


def elsewhere(
    ledger: Ledger, test: Trace, profile: CostProfile, args: Args, policies: Mapping[str, str]
) -> dict[str, Any]:
    """What the policies reach over ECHO on machines that neither knows: all start out from this profile."""
    logs: dict[str, list[np.ndarray]] = {}  # [S] of each machine
    for number in range(OTHERS):
        world = World(test, BatchedCostProfile(another(profile, np.random.default_rng(100 + number))))
        for name, policy in {"echo": None, **policies}.items():
            worth = np.asarray(scores(ledger, world, name, args, policy, number))
            logs.setdefault(name, []).append(np.log(worth).mean(0))
    ratios = {name: np.stack(logs[name]) - np.stack(logs["echo"]) for name in policies}  # [M, S]
    ours = np.stack([ratios[name] for name in policies if name in SEEDS])  # [T, M, S]
    return {
        "workloads": list(args.workloads),
        "over_echo": _interval(ours.mean(1)),
        "over_echo_by_machine": [_interval(ours[:, number]) for number in range(OTHERS)],
        "runs": {name: _interval(ratio.mean(0)) for name, ratio in ratios.items()},
    }


def compare(worth: Mapping[str, Any], seeds: Sequence[str], ablations: Sequence[str]) -> dict[str, Any]:
    """Ratios to ECHO with 95 % intervals over training and workload seeds, and the share of the gap to hindsight."""
    logs = {name: np.log(np.asarray(values)) for name, values in worth.items()}  # [W, S]
    echo = logs["echo"]
    fixed = np.stack([logs[name] for name in worth if name == "none" or name.startswith("fixed")])  # [F, W, S]
    best = fixed[fixed.mean(2).argmax(0), np.arange(echo.shape[0])]  # [W, S]
    ours = np.stack([logs[name] for name in seeds])  # [T, W, S]
    gap, gain = (best - echo).mean(1), (ours - echo).mean((0, 2))  # [W]
    open_ = gap > 0  # where ECHO is behind the best fixed plan
    return {
        "over_echo": _interval((ours - echo).mean(1)),
        "over_echo_by_workload": [_interval((ours - echo)[:, i]) for i in range(len(echo))],
        "over_none_by_workload": [_interval((ours - logs["none"])[:, i]) for i in range(len(echo))],
        "echo_over_none": [_interval((echo - logs["none"])[i]) for i in range(len(echo))],
        "hindsight_over_echo": [_interval((best - echo)[i]) for i in range(len(echo))],
        "gap": float(gap[open_].sum()),
        "gap_closed": float(np.minimum(gain, gap)[open_].sum() / gap[open_].sum()) if open_.any() else None,
        "ablations": {name: _interval((logs[name] - echo).mean(0)) for name in ablations},
        "seeds": {name: _interval((logs[name] - echo).mean(0)) for name in seeds},
    }


def _interval(logs: np.ndarray) -> dict[str, Any]:
    """The geometric mean of log ratios by the seed of the workload [S], or by policy and that [T, S]."""
    return asdict(geometric_mean(np.exp(logs)))


def deciding(test: Trace, profile: CostProfile) -> dict[str, dict[str, Any]]:
    """Microseconds a step in a controller's four methods, and as a share of the step's predicted time."""
    found: dict[str, dict[str, Any]] = {}
    for batch in (1, 32):
        for name in TIMED:
            arm = Arm.parse(name)
            timed = TimedController(registry.make(arm.controller, **arm.options))
            backend = ReplayBackend(test, BatchedCostProfile(profile))
            run = serve(backend, timed, test.requests(), batch, clock=backend.clock)
            took = {"microseconds": 1e6 * timed.seconds / len(run.steps), "share_of_step": timed.seconds / run.seconds}
            found.setdefault(name, {})[str(batch)] = took
    return found


if __name__ == "__main__":
    main(script)
