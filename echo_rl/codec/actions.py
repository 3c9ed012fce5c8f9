"""Turns actions into the plans that they stand for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from echo_rl.codec.features import DEPTHS
from echo_rl.contracts import AUTOREGRESSIVE, Gates, LoadView, SpecPlan
from echo_rl.errors import ConfigError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
CALIBRATED = -1.0
"""Stands for ECHO's gates: the calibrated thresholds, at the few depths that were chosen for them."""


@dataclass(frozen=True)
class ActionTable:
    """The knobs' values; an action is one index a knob (MultiDiscrete). Zero nodes is plain decoding."""

    nodes: tuple[float, ...] = (0.0, 0.25, 0.5, 1.0, 2.0, 3.0, 5.0, 7.0, 9.0, 15.0, 23.0, 31.0, 47.0)
    """Verified nodes a request, averaged over the batch."""
    depths: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8)
    widths: tuple[int, ...] = (1, 2, 3, 4, 6, 8)
    gates: tuple[float, ...] = (CALIBRATED, 0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
    """Least probability of a request's best path at which it drafts on, asked at every level; 0: no gates."""
    floors: tuple[float, ...] = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5)
    """Least calibrated path probability of a node that is verified."""

    def __post_init__(self) -> None:
        if self.nodes[0] != 0.0 or any(b <= a for a, b in zip(self.nodes, self.nodes[1:], strict=False)):
            raise ConfigError(f"action nodes {self.nodes} must begin with 0 and increase")
        if min(self.depths) < 1 or max(self.depths) > DEPTHS or min(self.widths) < 1:
            raise ConfigError(f"action table needs depths in 1..{DEPTHS} and widths >= 1")
        if not all(gate == CALIBRATED or 0.0 <= gate <= 1.0 for gate in self.gates):
            raise ConfigError(
                f"action gates {self.gates} must be probabilities, or {CALIBRATED} for the calibrated ones"
            )
        if not 0.0 <= min(self.floors) <= max(self.floors) < 1.0:
            raise ConfigError(f"action floors {self.floors} must be probabilities below 1")

    @property
    def values(self) -> tuple[tuple[float, ...], ...]:
        """The knobs' values, knob by knob."""
        return self.nodes, self.depths, self.widths, self.gates, self.floors

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(map(len, self.values))

    def knobs(self, actions: Ints) -> Knobs:
        """[E, 5] indices -> the values they stand for. Raises `ConfigError` on an index out of range."""
        actions = np.atleast_2d(np.asarray(actions))
        if actions.shape[1] != len(self.sizes) or (actions < 0).any() or (actions >= np.array(self.sizes)).any():
            raise ConfigError(f"action {actions.tolist()} is outside the table's {self.sizes}")
        nodes, depth, width, gate, floor = (np.asarray(t)[actions[:, i]] for i, t in enumerate(self.values))
        return Knobs(nodes.astype(np.float64), depth, width, gate.astype(np.float64), floor.astype(np.float64))

    def nearest(
        self, nodes: float, depth: int, width: int, gate: float = CALIBRATED, floor: float = 0.0
    ) -> tuple[int, ...]:
        """The action closest to a plan (nodes by ratio), for cloning another controller."""
        ladder = [abs(np.log((n or 0.1) / max(nodes, 0.1))) for n in self.nodes]
        wanted = (depth, width, gate, floor)
        first = 0 if nodes <= 0 else max(1, int(np.argmin(ladder)))
        others = zip(self.values[1:], wanted, strict=True)
        return first, *(int(np.argmin([abs(v - x) for v in table])) for table, x in others)

    def plan(self, action: Sequence[int], load: LoadView, gates: Gates) -> SpecPlan:
        """One action as the plan of a step; `gates` are the calibrated thresholds at the chosen depths."""
        nodes, depth, width, gate, floor = self._values(action)
        if not nodes or not load.batch_size:
            return AUTOREGRESSIVE
        budget, levels = max(1, round(nodes * load.batch_size)), int(depth)
        return SpecPlan(budget, levels, int(width), planned_gates(gates, levels, gate, floor), floor)

    def _values(self, action: Sequence[int]) -> tuple[float, ...]:
        """The values of one action. Raises `ConfigError` on an index out of range."""
        tables = self.values
        if len(action) != len(tables) or not all(0 <= index < len(t) for index, t in zip(action, tables, strict=True)):
            raise ConfigError(f"action {list(action)} is outside the table's {self.sizes}")
        return tuple(table[index] for index, table in zip(action, tables, strict=True))


def planned_gates(gates: Gates, depth: int, gate: float, floor: float) -> Gates:
    """The thresholds of a plan of `depth` levels, in order of depth; `gates` are the calibrated ones.

    Nodes below the floor are never verified and nothing below them is likelier, so with a floor every
    depth has a gate of at least that, which saves drafting. (Floors are of calibrated probabilities, gates of drafted
    ones: where the two differ, a node just above the floor may not be drafted on.)
    """
    asked = {d: tau for d, tau in gates if d < depth - 1} if gate == CALIBRATED else {}
    least = max(gate, floor)
    if least > 0:
        asked = {d: max(asked.get(d, 0.0), least) for d in range(depth - 1)}
    return tuple(sorted(asked.items()))


def gates_asked(gates: Gates, depth: int, drafting: Sequence[int] | Ints) -> int:
    """Gates of a plan of `depth` levels that were asked, where so many requests drafted each level."""
    return sum(d < depth - 1 and d < len(drafting) and bool(drafting[d] > 0) for d, _ in gates)


@dataclass(frozen=True)
class Knobs:
    """Decoded actions, [E] each."""

    nodes: Floats
    depth: Ints
    width: Ints
    gate: Floats
    floor: Floats

    def budget(self, batch: Ints) -> Ints:
        """[E] nodes over the whole batch: rounded, at least one where speculation is on."""
        wanted = np.rint(self.nodes * batch).astype(np.int64)
        return np.where((self.nodes > 0) & (batch > 0), np.maximum(wanted, 1), 0)
