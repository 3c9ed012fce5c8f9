"""Holds a drafter's gates: the depths at which its confidence is checked, and the confidence asked for.

Holds the record and its file format; `echo_rl.calibrate.gates` measures one. A gate at depth d (0 = the
root's children) lets a request keep drafting iff its best path's probability is at least tau.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from echo_rl.contracts import Gates
from echo_rl.costs.files import own_or_packaged, read_record, write_record
from echo_rl.errors import ConfigError

GATES_VERSION = 1


@dataclass(frozen=True)
class Rate:
    """A measured share with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class DepthGate:
    """One depth's threshold and how well confidence tells accepted from rejected paths there.

    The measured fields are None (and `samples` 0) where a gate was given rather than measured.
    """

    depth: int
    tau: float
    samples: int = 0
    auc: Rate | None = None
    """Probability that an accepted best path was more confident than a rejected one."""
    false_truncation: Rate | None = None
    """Share of accepted best paths that the gate would have stopped."""
    false_extension: Rate | None = None
    """Share of rejected best paths that the gate would have let through."""

    def __post_init__(self) -> None:
        if self.depth < 0 or not 0.0 <= self.tau <= 1.0:
            raise ConfigError(f"gate at depth {self.depth} with tau {self.tau}: need depth >= 0 and tau in [0, 1]")


@dataclass(frozen=True)
class GateCalibration:
    """Every depth's gate and the sparse depths that ECHO evaluates. Raises `ConfigError`."""

    depths: tuple[DepthGate, ...]
    chosen: tuple[int, ...]
    """The sparse depths: near the root, one mid, one deep."""
    score_power: tuple[float, ...] = ()
    """The power that turns a path probability at depth d into a calibrated one, at index d.

    Empty takes probabilities as drafted. Must not fall with depth, so that a child stays no likelier than its parent.
    """
    provenance: str = ""

    def __post_init__(self) -> None:
        order = [gate.depth for gate in self.depths]
        if order != sorted(set(order)):
            raise ConfigError(f"gate depths {order} must be increasing")
        missing = set(self.chosen) - set(order)
        if missing:
            raise ConfigError(f"chosen gate depths {sorted(missing)} have no threshold")
        powers = self.score_power
        if any(not 0.0 < p < math.inf for p in powers) or any(b < a for a, b in pairwise(powers)):
            raise ConfigError(f"score_power {powers} must be positive, finite, and must not fall with depth")

    def sparse(self, max_depth: int) -> Gates:
        """Gates of a plan at the chosen depths; the last level needs none, nothing is drafted past it."""
        return tuple((g.depth, g.tau) for g in self.depths if g.depth in self.chosen and g.depth < max_depth - 1)

    def dense(self, max_depth: int) -> Gates:
        """Gates at every depth; a depth without its own threshold takes the nearest shallower one's."""
        known = {g.depth: g.tau for g in self.depths}
        gates, tau = [], self.depths[0].tau if self.depths else 0.0
        for depth in range(max_depth - 1):
            tau = known.get(depth, tau)
            gates.append((depth, tau))
        return tuple(gates)

    def save(self, path: str | Path) -> None:
        write_record(path, "gate calibration", GATES_VERSION, asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> GateCalibration:
        """Read a calibration. Raises `ConfigError` when the file is missing, corrupt or of another version."""
        body = read_record(path, "gate calibration", GATES_VERSION)
        try:
            return cls(
                depths=tuple(_depth_gate(gate) for gate in body["depths"]),
                chosen=tuple(body["chosen"]),
                score_power=tuple(body["score_power"]),
                provenance=body["provenance"],
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{path} is not a usable gate calibration ({error}); calibrate again") from error

    @classmethod
    def of(cls, given: GateCalibration | str | Path | None) -> GateCalibration:
        """A calibration, the one in a file, or for None the default. Raises `ConfigError`."""
        if given is None:
            return cls.default()
        return given if isinstance(given, GateCalibration) else cls.load(given)

    @classmethod
    def default(cls) -> GateCalibration:
        """The gates that `echo-rl calibrate` measured here, else the shipped ones; `provenance` says which."""
        return cls.load(own_or_packaged("gates.json"))


def _depth_gate(fields: Mapping[str, Any]) -> DepthGate:
    rates = {key: Rate(**value) for key, value in fields.items() if isinstance(value, Mapping)}
    return DepthGate(**{**fields, **rates})
