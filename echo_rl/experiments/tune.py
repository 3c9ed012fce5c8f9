"""Chooses the options of controllers on replay, so that none is compared at another model's settings.

An options dataclass names what is worth trying in ``TUNABLE: ClassVar[Mapping[str, tuple]]``; a controller
without one keeps its defaults. Candidates are the whole grid, or a seeded sample of it, and always the
defaults. Tune on one part of a trace (`Trace.split`) and compare on the other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from echo_rl.contracts import MakeController
from echo_rl.controllers import registry
from echo_rl.controllers.arm import Arm
from echo_rl.costs.batched_profile import BatchedCostProfile
from echo_rl.errors import ConfigError, TraceError, UnknownController
from echo_rl.experiments.evaluate import EvalConfig, Replayer, halving
from echo_rl.experiments.rank import BASELINE, Block, mean_speedup
from echo_rl.experiments.run import shown
from echo_rl.replay.trace import Trace
from echo_rl.utils.result_store import write_json
from echo_rl.workloads.datasets import refuse_held_out

Options = dict[str, Any]


@dataclass(frozen=True)
class TuneConfig:
    """The controllers that are tuned, and the blocks that decide it."""

    controllers: tuple[str, ...] = ()
    """Names without options; all when empty."""
    concurrency: tuple[int, ...] = (1, 4, 16, 32)
    """Closed loads whose geometric mean of speed-ups over `none` is the score."""
    blocks: int = 4
    """Blocks a load that the finalists serve; each half of the candidates that is dropped serves half as many."""
    requests: int = 8
    """Requests a block; twice the concurrency where that is more."""
    cap: int = 24
    """Most candidates of one controller; a larger grid is sampled."""
    seed: int = 0
    """The seed of the sample, of the requests' order and of the noise."""

    def __post_init__(self) -> None:
        if self.cap < 1:
            raise ConfigError(f"cap is {self.cap}; give at least 1")

    def replay(self) -> EvalConfig:
        """Raises `ConfigError`."""
        return EvalConfig(concurrency=self.concurrency, blocks=self.blocks, requests=self.requests, seed=self.seed)


def tune(
    config: TuneConfig,
    trace: Trace,
    costs: BatchedCostProfile,
    make: MakeController = registry.make,
    out: Path | None = None,
    console: Console | None = None,
    families: Mapping[str, registry.Family] = registry.CONTROLLERS,
) -> dict[str, Any]:
    """Best options by controller: {name: {"options", "score", "default_score", "tried"}}, also in ``out/tuned.json``.

    ``options`` is empty where the defaults are best; a score is None where the trace can't replay it (it
    was recorded narrower or shallower). Rerun to go on: ``out/tune.jsonl`` holds what has been measured.
    Raises `UnknownController`, `HeldOutError` for a trace of suites that are held out, and `ConfigError` where `out`
    belongs to another trace or profile.
    """
    refuse_held_out(trace.suites, "tune")
    names = config.controllers or tuple(families)
    for name in names:
        if name not in families:
            raise UnknownController(f"no controller is called '{name}' (known: {', '.join(families)})")
    replayer = Replayer(config.replay(), trace, costs, make, out / "tune.jsonl" if out else None)
    tuned = {}
    with shown(names, console) as searched:
        for name in searched:
            arms = {arm_text(name, options): options for options in candidates(families[name], config.cap, config.seed)}
            tuned[name] = _Search(replayer).best(name, arms)
    if out:
        write_json(out / "tuned.json", tuned)
    return tuned


@dataclass
class _Search:
    """One controller's candidates, and the blocks that each has served so far."""

    replayer: Replayer
    served: dict[str, dict[int, list[Block]]] = field(default_factory=dict)

    def best(self, name: str, arms: Mapping[str, Options]) -> dict[str, Any]:
        """`name` itself stands for the defaults, which stay to the end."""
        ranked = halving(tuple(arms), self.replayer.config.blocks, self.serve, self.score, always=(name,))
        return {
            "options": arms[ranked[0]] if ranked else {},
            "score": self.score(ranked[0]) if ranked else None,
            "default_score": self.score(name) if name in ranked else None,
            "tried": len(arms),
        }

    def serve(self, arm: str, blocks: range) -> bool:
        """False where the candidate's options don't go together, or plan what the trace doesn't hold."""
        loads = self.replayer.config.concurrency
        try:
            new = {c: self.replayer.measure(arm, c, blocks) for c in loads}
        except (TraceError, ConfigError):
            return False
        old = self.served.setdefault(arm, {c: [] for c in loads})
        for concurrency, more in new.items():
            old[concurrency] += more
        return True

    def score(self, arm: str) -> float:
        """Geometric mean over loads of the speed-up over plain decoding, on the blocks that `arm` has served."""
        blocks = self.served[arm]
        return mean_speedup(blocks, self._plain(len(next(iter(blocks.values())))))

    def _plain(self, blocks: int) -> dict[int, list[Block]]:
        """The baseline's; once measured, the store holds them."""
        config = self.replayer.config
        return {c: self.replayer.measure(BASELINE, c, range(config.blocks))[:blocks] for c in config.concurrency}


def candidates(family: registry.Family, cap: int, seed: int = 0) -> list[Options]:
    """The defaults ({}) and the rest of the grid, at most `cap` in all. Raises `ConfigError` on an unknown field."""
    tunable: Mapping[str, tuple[Any, ...]] = getattr(family.options, "TUNABLE", {})
    unknown = set(tunable) - {item.name for item in fields(family.options)}
    if unknown:
        raise ConfigError(f"{family.options.__name__}.TUNABLE names no field of its class: {', '.join(unknown)}")
    defaults = family.options()
    grid = [dict(zip(tunable, values, strict=True)) for values in product(*tunable.values())]
    grid = [options for options in grid if any(getattr(defaults, name) != x for name, x in options.items())]
    if len(grid) >= cap:
        kept = np.random.default_rng(seed).choice(len(grid), size=cap - 1, replace=False)
        grid = [grid[place] for place in sorted(kept)]
    return [{}, *grid]


def arm_text(name: str, options: Mapping[str, Any]) -> str:
    """``ddd:tau=-2.0,top_k=4``, as `Arm.parse` reads it. Raises `ConfigError` for a value that it can't express."""
    values = {key: value if isinstance(value, str) else json.dumps(value) for key, value in options.items()}
    text = ":".join(filter(None, (name, ",".join(f"{key}={value}" for key, value in values.items()))))
    if Arm.parse(text).options != options:
        raise ConfigError(
            f"the options {dict(options)} of '{name}' cannot be written as an arm; tune plain values only"
        )
    return text


def load_tuned(path: Path) -> dict[str, str]:
    """Arm text by controller from a ``tuned.json``. Raises `ConfigError` where it is missing or damaged."""
    try:
        found = json.loads(path.read_text())
        return {name: arm_text(name, row["options"]) for name, row in found.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"cannot read tuned options from {path} ({error}); write it with `echo-rl tune`") from error
