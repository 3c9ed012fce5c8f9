"""Ranks what controllers served: speed-ups paired by block, the winner of each load, and the order over all loads.

Knows blocks of work and the time they took; not how they were served.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from echo_rl.controllers.arm import Arm
from echo_rl.utils import statistics

BASELINE, REFERENCE, HINDSIGHT = "none", "echo", "hindsight"
BOUNDS = (HINDSIGHT, "oracle")
"""Arms that know the answer before they choose: shown, but neither ranked nor winners."""


@dataclass(frozen=True)
class Block:
    """One block that an arm served."""

    tokens: int
    seconds: float
    steps: int
    committed: int
    """Tokens of decoding requests."""
    rows: int
    """Decoding requests, summed over steps."""
    deciding: float = 0.0
    """Seconds that the controller took, of real time; not part of `seconds`."""

    @property
    def rate(self) -> statistics.Rate:
        return statistics.Rate(self.tokens, self.seconds)


Served = dict[int, list[Block]]
"""Blocks by concurrency."""
Measured = Mapping[str, Mapping[int, Sequence[Block]]]
"""Blocks by arm and concurrency."""


def pooled(blocks: Sequence[Block]) -> float:
    """Tokens a second of all blocks together."""
    return sum(block.tokens for block in blocks) / sum(block.seconds for block in blocks)


def report(loads: Sequence[int], measured: Measured) -> dict[str, Any]:
    """The result as plain JSON types: a cell per load and arm, the overall ranking, and the winner of each load.

    `BOUNDS` have cells but no rank.
    """
    cells = [_cell(measured, arm, load) for load in loads for arm in measured]
    winners = [_winner(measured, load) for load in loads]
    return {
        "baseline": BASELINE,
        "reference": REFERENCE,
        "cells": cells,
        "winners": winners,
        "ranking": _ranking(measured, [winner["arm"] for winner in winners]),
    }


def _cell(measured: Measured, arm: str, load: int) -> dict[str, Any]:
    ours = measured[arm][load]
    rows, seconds = sum(block.rows for block in ours), sum(block.seconds for block in ours)
    return {
        "arm": arm,
        "concurrency": load,
        "throughput": asdict(statistics.rate([block.rate for block in ours])),
        "speedup": asdict(_ratio(measured, arm, BASELINE, load)),
        "over_reference": asdict(_ratio(measured, arm, REFERENCE, load)),
        "mat": sum(block.committed for block in ours) / rows if rows else None,
        "steps": sum(block.steps for block in ours),
        "tokens": sum(block.tokens for block in ours),
        "seconds": seconds,
        "deciding": sum(block.deciding for block in ours) / seconds,
    }


def _ratio(measured: Measured, arm: str, against: str, load: int) -> statistics.Interval:
    ours, theirs = ([block.rate for block in measured[name][load]] for name in (arm, against))
    return statistics.rate_ratio(ours, theirs)


def _winner(measured: Measured, load: int) -> dict[str, Any]:
    """The fastest arm at a load, and the arms that can't be told from it: all of them where there is one block."""
    arms = sorted(filter(_competes, measured), key=lambda arm: -pooled(measured[arm][load]))
    ends = {arm: _ratio(measured, arm, arms[0], load).high for arm in arms[1:]}
    tied = [arm for arm, high in ends.items() if high is None or high >= 1.0]
    return {"concurrency": load, "arm": arms[0], "tied": tied}


def _ranking(measured: Measured, winners: Sequence[str]) -> list[dict[str, Any]]:
    overall = {arm: _overall(measured, arm, BASELINE) for arm in measured}
    order = sorted(measured, key=lambda arm: -overall[arm].estimate)
    places = list(filter(_competes, order))
    return [
        {
            "rank": places.index(arm) + 1 if arm in places else None,
            "arm": arm,
            "speedup": asdict(overall[arm]),
            "over_reference": asdict(_overall(measured, arm, REFERENCE)),
            "wins": winners.count(arm),
        }
        for arm in order
    ]


def _competes(arm: str) -> bool:
    return Arm.parse(arm).controller not in BOUNDS


def mean_speedup(ours: Mapping[int, Sequence[Block]], theirs: Mapping[int, Sequence[Block]]) -> float:
    """Geometric mean over loads of the ratio of pooled rates."""
    return float(np.exp(np.mean([np.log(pooled(blocks) / pooled(theirs[load])) for load, blocks in ours.items()])))


def _overall(measured: Measured, arm: str, against: str) -> statistics.Interval:
    """`mean_speedup` over an arm, with its interval: a block's prompts are the same at small loads."""
    ours, theirs = ([[block.rate for block in row] for row in measured[name].values()] for name in (arm, against))
    return statistics.mean_ratio(ours, theirs)
