"""Ranks controllers on replay: closed loads, the same requests for every arm, intervals over blocks.

Every arm serves blocks of a trace's requests in simulated time; a controller keeps what it learnt from
block to block. Speed-ups are paired by block. The intervals tell how much a result depends on which of the
trace's requests meet, not how it would be with other prompts or on another machine. Simulated steps take what the
costs say, whoever decides; what deciding takes, by this machine's clock, is told beside it.

``cells.jsonl`` in the output folder holds what has been measured: rerun to go on, or to add arms and loads.
It is bound to the trace, the costs and the release, not to a controller's code: delete it when that changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from echo_rl import __version__
from echo_rl.contracts import Controller, MakeController, Request
from echo_rl.controllers.arm import Arm
from echo_rl.controllers.wrappers.timed import TimedController
from echo_rl.costs.batched_profile import BatchedCostProfile
from echo_rl.errors import ConfigError, PolicyError, TraceError
from echo_rl.experiments.arms import made_of, make_arm
from echo_rl.experiments.rank import BASELINE, HINDSIGHT, REFERENCE, Block, Served, pooled, report
from echo_rl.experiments.report.plots_ranking import draw
from echo_rl.experiments.run import shown
from echo_rl.experiments.targets.replay import exact_replay
from echo_rl.replay.trace import Trace
from echo_rl.utils.result_store import ResultStore, digest_of, write_json

SHAPES: tuple[tuple[float, int, int], ...] = (
    (0, 1, 1), (0.25, 1, 1), (0.5, 1, 1), (0.5, 2, 2), (1, 1, 1), (1, 2, 2), (1.5, 2, 2), (2, 2, 1), (2, 3, 2),
    (3, 3, 1), (3, 3, 2), (3, 4, 3), (5, 4, 2), (5, 4, 3), (5, 6, 2), (7, 4, 3), (7, 5, 3), (7, 7, 2), (10, 5, 4),
    (10, 8, 3), (15, 5, 4), (15, 7, 4), (23, 6, 6), (31, 7, 6), (47, 8, 8),
)  # fmt: skip
"""(nodes a request, depth, width) of the fixed plans that `best_fixed` searches; no nodes is plain decoding."""


@dataclass(frozen=True)
class EvalConfig:
    """The arms and loads of a ranking. `none` and `echo` are measured whether named or not."""

    arms: tuple[str, ...] = ()
    """Controllers; options as ``echo:name=value,name=value``."""
    concurrency: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    """Requests in flight, one load each."""
    blocks: int = 8
    """Blocks a load; intervals come from resampling them."""
    requests: int = 8
    """Requests a block; twice the concurrency where that is more."""
    warmup: int = 1
    """Blocks that a controller serves before the measured ones, to learn from."""
    seed: int = 0
    """The seed of the requests' order and of the noise of step times."""
    hindsight: bool = False
    """Also search the best fixed plan of each load, as the arm ``hindsight``."""

    def __post_init__(self) -> None:
        if not self.concurrency or min(self.blocks, self.requests, *self.concurrency) < 1 or self.warmup < 0:
            raise ConfigError(f"{self}: give at least one load, and blocks, requests and concurrency of at least 1")
        if len(set(self.concurrency)) < len(self.concurrency):
            raise ConfigError(f"concurrency {self.concurrency} names a load twice; give each once")
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}; give a whole number >= 0")

    @property
    def all_arms(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((BASELINE, REFERENCE, *self.arms)))


class Replayer:
    """Serves blocks of a trace's requests: block b at one concurrency is the same for every arm."""

    def __init__(
        self,
        config: EvalConfig,
        trace: Trace,
        costs: BatchedCostProfile,
        make: MakeController,
        store: Path | None = None,
    ) -> None:
        self.config, self.trace, self.make = config, trace, make
        self._target = exact_replay(trace, costs, max(config.concurrency))
        settings = {name: getattr(config, name) for name in ("requests", "warmup", "seed")}
        self.settings = settings | {
            "version": __version__, "trace": trace.digest, "costs": digest_of(repr(costs.profile).encode())
        }  # fmt: skip
        self._store = ResultStore.in_file(store, self.settings)
        self._made_of = lru_cache(maxsize=None)(lambda arm: made_of(make_arm(make, arm)))

    def measure(self, arm: str, concurrency: int, blocks: range, warm: bool = True) -> list[Block]:
        """These blocks under one controller, after its warm-up unless `warm` is False (it learns nothing).

        Raises `TraceError` where it plans what wasn't recorded, and what `make_arm` raises.
        """
        key = {"arm": arm, "concurrency": concurrency, "blocks": [blocks.start, blocks.stop], "warm": warm}
        key |= self._made_of(arm)
        rows = self._store.get(key, lambda: [asdict(block) for block in self._serve(arm, concurrency, blocks, warm)])
        return [Block(**row) for row in rows]

    def _serve(self, arm: str, concurrency: int, blocks: range, warm: bool) -> list[Block]:
        controller, first = make_arm(self.make, arm), self.config.warmup  # measured blocks follow the warm-up's
        for number in range(first if warm else 0):
            self._block(controller, concurrency, number)
        return [self._block(controller, concurrency, first + number) for number in blocks]

    def _block(self, controller: Controller, concurrency: int, number: int) -> Block:
        timed = TimedController(controller)
        requests = self.requests(concurrency, number)
        run = self._target.serve(timed, requests, concurrency, seed=self.config.seed + number)
        committed, rows = (sum(getattr(step, name) for step in run.steps) for name in ("committed", "batch_size"))
        return Block(run.output_tokens, run.seconds, len(run.steps), committed, rows, timed.seconds)

    def requests(self, concurrency: int, number: int) -> list[Request]:
        """Those of one block: the trace in one shuffled order after another, cut into blocks."""
        count = max(self.config.requests, 2 * concurrency)
        wanted, size = range(number * count, (number + 1) * count), len(self._target.requests)
        laps = range(wanted.start // size, wanted.stop // size + 1)
        orders = {lap: np.random.default_rng((self.config.seed, lap)).permutation(size) for lap in laps}
        chosen = ((n, self._target.requests[orders[n // size][n % size]]) for n in wanted)
        return [replace(request, id=f"{request.id}#{n}") for n, request in chosen]


def evaluate(
    config: EvalConfig,
    trace: Trace,
    costs: BatchedCostProfile,
    make: MakeController,
    out: Path | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Measures what ``out/cells.jsonl`` lacks; returns the result, and writes ``result.json`` and ``speedup.png``.

    `make(name, **options)` makes a controller. An arm that plans wider or deeper than the trace was recorded,
    or whose policy can't be loaded, is left out and named under ``left_out``. Raises `UnknownController` or
    `ConfigError` where an arm can't be made, `ConfigError` where `out` belongs to another trace or profile.
    """
    replayer = Replayer(config, trace, costs, make, out / "cells.jsonl" if out else None)
    measured, left_out = _measure(replayer, console)
    best = {}
    if config.hindsight:
        with shown(config.concurrency, console) as loads:
            found = {c: best_fixed(replayer, c) for c in loads}
        measured[HINDSIGHT] = {c: blocks for c, (_, blocks) in found.items()}
        best = {str(c): arm for c, (arm, _) in found.items()}
    result = report(config.concurrency, measured) | {
        "config": asdict(config),
        "hindsight": best,
        "left_out": left_out,
        "settings": replayer.settings,
    }
    result["machine"] = {"modelled": costs.profile.modelled, "title": costs.profile.title}
    if out:
        write_json(out / "result.json", result)
        draw(result, out)
    return result


def _measure(replayer: Replayer, console: Console | None) -> tuple[dict[str, Served], dict[str, str]]:
    config = replayer.config
    left_out: dict[str, str] = {}
    measured: dict[str, Served] = {}
    for arm in config.all_arms:
        try:
            make_arm(replayer.make, arm)  # before anything is measured: a misspelt name shall not cost minutes
        except PolicyError as error:
            left_out[arm] = str(error)
    with shown([arm for arm in config.all_arms if arm not in left_out], console) as arms:
        for arm in arms:
            try:
                measured[arm] = {c: replayer.measure(arm, c, range(config.blocks)) for c in config.concurrency}
            except TraceError as error:
                left_out[arm] = str(error)
    for arm in (BASELINE, REFERENCE):
        if arm in left_out:
            raise TraceError(f"'{arm}', which the others are compared with, cannot be replayed: {left_out[arm]}")
    return measured, left_out


# ----------------------------------------------------------------------------- search


def best_fixed(
    replayer: Replayer,
    concurrency: int,
    shapes: Sequence[tuple[float, int, int]] = SHAPES,
    keep: float = 0.5,
) -> tuple[str, list[Block]]:
    """The fixed plan that serves the measured blocks fastest, and those blocks.

    Chosen on the very blocks that it is then judged by: what a fixed plan of the grid could have reached, not
    a controller. Plans that the trace can't replay are not tried; `halving` says what `keep` means.
    """
    trace = replayer.trace
    arms = [f"fixed:nodes={n:g},depth={d},width={w}" for n, d, w in shapes if d <= trace.max_depth]
    arms = [arm for arm in arms if Arm.parse(arm).options["width"] <= trace.max_width]
    served: dict[str, list[Block]] = {arm: [] for arm in arms}

    def measure(arm: str, blocks: range) -> bool:
        served[arm] += replayer.measure(arm, concurrency, blocks, warm=False)
        return True

    best = halving(arms, replayer.config.blocks, measure, lambda arm: pooled(served[arm]), keep)[0]
    return best, served[best]


def halving(
    arms: Sequence[str],
    blocks: int,
    measure: Callable[[str, range], bool],
    score: Callable[[str], float],
    keep: float = 0.5,
    always: Sequence[str] = (),
) -> list[str]:
    """Successive halving over blocks (Jamieson and Talwalkar 2016): those that saw every block, best first.

    All arms serve the first block; then the share `keep` of them goes on to twice as many blocks, until the
    rest has served all. `measure` serves more blocks and says whether it could (False takes the arm out),
    `score` judges by the blocks so far; arms in `always` are kept whatever their score. On the blocks that it
    served, no arm that is taken out was ahead of a kept one (but `always`). `keep` 1 measures everything.
    """
    served, left = 0, list(arms)
    while served < blocks and left:
        part = range(served, min(blocks, max(1, 2 * served)))
        left = sorted((arm for arm in left if measure(arm, part)), key=score, reverse=True)
        served = part.stop
        if served < blocks:
            most = ceil(keep * len(left))
            left = [arm for place, arm in enumerate(left) if place < most or arm in always]
    return left
