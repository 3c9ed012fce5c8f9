"""How much is left to gain for a controller that sees what the drafter thinks, and not what the target will say.

A bound, worked out rather than served: steps of so many requests at random positions of the held-out prompts, at the
profile's costs. Compared are the best fixed plan; the best fixed gate and floor, which each request's scores then act
through; and foresight, which sees all forests that *could* be drafted, of every width and depth, before it drafts any,
and chooses each step's width, every request's depth and the nodes to verify. That last one knows more than any
controller can, so nobody whose ranking of nodes is the drafter's gains more, but for what a change of load allows.

Then, whether nodes could be ranked better: a network learns from the training prompts which nodes are accepted, out of
the drafter's scores, their neighbours' and the request's past. Needs the trace that `policies.py` needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from numpy.typing import NDArray

from benchmarks.common import CONSOLE, RESULTS, Ledger, Place, main
from benchmarks.learning.ranker import accepted_nodes, ranked
from echo_rl.codec.actions import ActionTable
from echo_rl.controllers.echo.gates import GateCalibration
from echo_rl.costs.batched_profile import BatchedCostProfile
from echo_rl.costs.profile import CostProfile
from echo_rl.replay.trace import Trace
from echo_rl.utils import statistics
from echo_rl.utils.result_store import digest_of, write_json

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
TABLE = ActionTable()
CONTEXT = 256.0
"""Tokens before the drafted ones; costs hardly depend on it here."""
FLOORS = tuple(np.geomspace(0.02, 0.9, 24))
LEVEL_PRICES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4)
"""Accepted tokens that a level more must promise to be drafted for a request, as tried by foresight."""
ROUNDS = 3
"""Rounds of Dinkelbach's method: the best step is the one with most tokens over the price of its seconds."""


@dataclass(frozen=True)
class Args:
    """Bound what a controller can gain."""

    quick: bool = False
    """Two loads, two widths, few steps."""
    trace: Path = RESULTS / "work" / "trace" / "trace.safetensors"
    loads: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    widths: tuple[int, ...] = TABLE.widths
    blocks: int = 8
    """Parts of the prompts, for the intervals."""
    positions: int = 2000
    """Positions drawn for a load and block."""
    training: int = 2500
    """Training steps of the network that ranks."""


def script() -> None:
    args = tyro.cli(Args)
    place = Place("ceiling", args.quick)
    if args.quick:
        args = replace(args, loads=(1, 8), widths=(1, 2), blocks=2, positions=200, training=50)
    train, test = Trace.load(args.trace).split()
    profile, gates = CostProfile.default(), GateCalibration.of(None)
    sources = {"trace": test.digest, "costs": digest_of(repr((profile, gates)).encode())}
    ledger = Ledger(place.work, sources | {"widths": args.widths, "blocks": args.blocks, "positions": args.positions})
    bound = Bound(test, BatchedCostProfile(profile), gates, args)
    result = {
        "trace": test.provenance,
        "profile": profile.provenance,
        "loads": [ledger.cell({"load": load}, lambda load=load: bound.at(load)) for load in args.loads],  # type: ignore[misc]
        "ranking": ledger.cell({"ranking": args.training}, lambda: ranked(train, test, args.training)),
    }
    write_json(place.result, result)
    CONSOLE.print(result, highlight=False)


class Forests:
    """What trees of one width hold at every position, by levels drafted (0 to D) and floor: [P, D + 1, F] each."""

    def __init__(self, trace: Trace, width: int, gates: GateCalibration) -> None:
        forest, depth = trace.restricted(width), trace.max_depth
        powers = np.array(gates.score_power or (1.0,)).take(forest.depths, mode="clip")
        likely = np.exp(forest.scores * powers)  # [P, M]
        accepted = accepted_nodes(forest)
        starts = [forest.nodes(d) for d in range(depth)]
        self.likely, self.accepted, self.nodes = likely, accepted, [*starts, likely.shape[1]]
        self.best = np.maximum.reduceat(likely, starts, axis=1)  # [P, D] of each level's likeliest node
        self.counts, self.expected, self.kept = (
            np.stack([_by_levels(np.where(likely >= floor, what, 0.0), starts) for floor in FLOORS], axis=2)
            for what in (1.0, likely, accepted)
        )


def _by_levels(nodes: Floats, starts: Sequence[int]) -> NDArray[np.float32]:
    """[P, D + 1] sums over the nodes of the first d levels."""
    sums = np.add.reduceat(nodes, starts, axis=1).cumsum(1)
    return np.concatenate([np.zeros((len(sums), 1)), sums], axis=1).astype(np.float32)


@dataclass(frozen=True)
class Steps:
    """Steps of one kind of plan, [N] each: tokens by the drafter's word, tokens really kept, seconds."""

    expected: Floats
    kept: Floats
    seconds: Floats

    @property
    def rate(self) -> float:
        return float(self.kept.sum() / self.seconds.sum())


class Prices:
    """Seconds of a step at one load, out of tables."""

    def __init__(self, costs: BatchedCostProfile, load: int, most: int, widths: Sequence[int], depth: int) -> None:
        nodes, alive, levels = np.arange(most + 1), np.arange(load + 1), np.arange(depth)
        self.plain = float(costs.verify(load, load, CONTEXT) + costs.overhead(load, 0, False))
        self._verify = costs.verify(load, load + nodes, CONTEXT) + costs.overhead(load, nodes, True)
        self._level = {}
        for width in widths:
            at = np.maximum(alive, 1)[:, None], width
            level = costs.draft(*at, levels + 1) - costs.draft(*at, levels)
            self._level[width] = np.where(alive[:, None] > 0, level, 0.0)  # [alive, level]
        self._gate = float(costs.scalar("gate_overhead"))

    def seconds(self, nodes: Ints, width: int, depths: Ints, gated: bool = False) -> Floats:
        """[N] of steps that verify `nodes` [N], with each request's levels `depths` [N, B] (all 0: plain)."""
        alive = (depths[:, :, None] > np.arange(self._level[width].shape[1])).sum(1)  # [N, D]
        levels = self._level[width][alive, np.arange(alive.shape[1])]
        asked = (alive > 0).sum(1) - 1 if gated else 0
        speculative = self._verify[nodes.clip(max=len(self._verify) - 1)] + levels.sum(1) + self._gate * asked
        return np.where(alive[:, 0] > 0, speculative, self.plain)


class Bound:
    """What each kind of plan reaches on one trace."""

    def __init__(self, trace: Trace, costs: BatchedCostProfile, gates: GateCalibration, args: Args) -> None:
        self._trace, self._costs, self._gates, self._args = trace, costs, gates, args

    @cached_property
    def _forests(self) -> Mapping[int, Forests]:
        return {width: Forests(self._trace, width, self._gates) for width in self._args.widths}

    def at(self, load: int) -> dict[str, Any]:
        """Speed-ups over plain decoding at one load, and over the best fixed plan."""
        chosen = self._draw(load)  # [N, B]
        prices = Prices(self._costs, load, int(TABLE.nodes[-1] * load), self._args.widths, self._trace.max_depth)
        plain = Steps(*(np.full(len(chosen), value) for value in (load, load, prices.plain)))
        fixed, plan = max(self._fixed(chosen, prices), key=lambda found: found[0].rate)
        gated, thresholds = max(self._gated(chosen, prices), key=lambda found: found[0].rate)
        foresight = self._foreseen(chosen, prices, plain, gated.rate)
        over = {"fixed": fixed, "gated": gated, "foresight": foresight}
        return {
            "load": load,
            "plan": plan,
            "thresholds": thresholds,
            "over_plain": {name: self._ratio(steps, plain) for name, steps in over.items()},
            "over_fixed": {name: self._ratio(over[name], fixed) for name in ("gated", "foresight")},
        }

    def _draw(self, load: int) -> Ints:
        """[N, B] positions, each step's from one block's responses, block after block."""
        random, parts = np.random.default_rng(load), np.arange(len(self._trace.responses)) % self._args.blocks
        part = np.repeat(parts, [response.positions for response in self._trace.responses])  # [P]
        shape = max(1, self._args.positions // load), load
        return np.concatenate([random.choice(np.flatnonzero(part == b), shape) for b in range(self._args.blocks)])

    def _fixed(self, chosen: Ints, prices: Prices) -> Iterator[tuple[Steps, dict[str, Any]]]:
        """Every fixed plan: the likeliest nodes of the batch, so many, of trees of one shape."""
        count, load = chosen.shape
        for width, depth in product(self._args.widths, range(1, self._trace.max_depth + 1)):
            forests, nodes = self._forests[width], self._forests[width].nodes[depth]
            likely = forests.likely[:, :nodes][chosen].reshape(count, -1)
            order = np.argsort(-likely, axis=1, kind="stable")
            accepted = forests.accepted[:, :nodes][chosen].reshape(count, -1)
            expected, kept = (np.take_along_axis(what, order, 1).cumsum(1) + load for what in (likely, accepted))
            depths = np.full((count, load), depth)
            for each in TABLE.nodes[1:]:
                budget = max(1, round(each * load))
                if budget > likely.shape[1]:
                    break
                seconds = prices.seconds(np.full(count, budget), width, depths)
                steps = Steps(expected[:, budget - 1], kept[:, budget - 1], seconds)
                yield steps, {"nodes": budget, "depth": depth, "width": width}

    def _gated(self, chosen: Ints, prices: Prices) -> Iterator[tuple[Steps, dict[str, Any]]]:
        """Every fixed gate and floor: a request drafts on while its likeliest path passes the gate."""
        for width, depth, gate in product(self._args.widths, range(1, self._trace.max_depth + 1), TABLE.gates[1:]):
            passed = np.cumprod(self._forests[width].best[:, : depth - 1] >= gate, axis=1).sum(1) + 1  # [P] levels
            for floor in range(len(FLOORS)):
                steps = self._steps(chosen, prices, width, passed, floor, gated=gate > 0)
                yield steps, {"floor": FLOORS[floor], "gate": gate, "depth": depth, "width": width}

    def _foreseen(self, chosen: Ints, prices: Prices, plain: Steps, rate: float) -> Steps:
        """The best plan of every single step, by the drafter's scores and with sight of all levels."""
        ways = tuple(product(self._args.widths, range(1, self._trace.max_depth + 1), range(len(FLOORS)), LEVEL_PRICES))
        for _ in range(ROUNDS):
            best = plain
            worth = best.expected - rate * best.seconds
            for width, depth, floor, price in ways:
                forests, levels = self._forests[width], slice(depth + 1)
                gain = forests.expected[:, levels, floor] - FLOORS[floor] * forests.counts[:, levels, floor]
                wanted = (gain - price * np.arange(depth + 1)).argmax(1)  # [P] levels
                steps = self._steps(chosen, prices, width, wanted, floor)
                better = steps.expected - rate * steps.seconds > worth
                columns = zip(vars(steps).values(), vars(best).values(), strict=True)
                best = Steps(*(np.where(better, ours, theirs) for ours, theirs in columns))
                worth = best.expected - rate * best.seconds
            rate = best.rate
        return best

    def _steps(self, chosen: Ints, prices: Prices, width: int, levels: Ints, floor: int, gated: bool = False) -> Steps:
        """All steps, where a position drafts `levels` [P] and verifies what is above the floor."""
        forests, everywhere, load = self._forests[width], np.arange(len(levels)), chosen.shape[1]
        nodes, expected, kept = (
            table[everywhere, levels, floor][chosen].sum(1)
            for table in (forests.counts, forests.expected, forests.kept)
        )
        seconds = prices.seconds(nodes.astype(np.int64), width, levels[chosen], gated)
        return Steps(expected + load, kept + load, seconds)

    def _ratio(self, ours: Steps, theirs: Steps) -> dict[str, Any]:
        """The ratio of tokens a second, with an interval over the blocks."""

        def blocks(steps: Steps) -> list[statistics.Rate]:
            parts = zip(*(np.split(column, self._args.blocks) for column in (steps.kept, steps.seconds)), strict=True)
            return [statistics.Rate(float(kept.sum()), float(seconds.sum())) for kept, seconds in parts]

        return vars(statistics.rate_ratio(blocks(ours), blocks(theirs)))


if __name__ == "__main__":
    main(script)
