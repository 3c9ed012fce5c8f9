"""What a learned controller sees and says: loads and reports to observations, actions to plans.

One module for training and for serving, so the two cannot drift apart; a policy is bound to
`CODEC_VERSION`. Everything works on *lanes* (parallel servers, [E] arrays); serving has one lane.
Knows nothing of rewards, networks or where steps come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from echo_rl.contracts import AUTOREGRESSIVE, LoadView, SpecPlan, StepReport
from echo_rl.costs import CostArrays, Scaling
from echo_rl.errors import ConfigError

CODEC_VERSION = 1
DEPTHS = 8
"""Deepest level that is observed and planned."""

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Gates = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class ActionTable:
    """The knobs' values; an action is one index a knob (MultiDiscrete). Zero nodes is plain decoding."""

    nodes: tuple[float, ...] = (0.0, 0.25, 0.5, 1.0, 2.0, 3.0, 5.0, 7.0, 9.0, 15.0, 23.0, 31.0, 47.0)
    """Verified nodes a request, averaged over the batch."""
    depths: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8)
    widths: tuple[int, ...] = (1, 2, 3, 4, 6, 8)
    gate_scales: tuple[float, ...] = (0.0, 0.5, 1.0, 1.5)
    """Multiplies the calibrated thresholds; 0 switches the gates off."""
    floors: tuple[float, ...] = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4)
    """Least calibrated path probability of a node that is verified."""

    def __post_init__(self) -> None:
        if self.nodes[0] != 0.0 or any(b <= a for a, b in zip(self.nodes, self.nodes[1:], strict=False)):
            raise ConfigError(f"action nodes {self.nodes} must begin with 0 and increase")
        if min(self.depths) < 1 or max(self.depths) > DEPTHS or min(self.widths) < 1 or min(self.gate_scales) < 0:
            raise ConfigError(f"action table needs depths in 1..{DEPTHS}, widths >= 1 and gate scales >= 0")
        if not 0.0 <= min(self.floors) <= max(self.floors) < 1.0:
            raise ConfigError(f"action floors {self.floors} must be probabilities below 1")

    @property
    def values(self) -> tuple[tuple[float, ...], ...]:
        """The knobs' values, knob by knob."""
        return self.nodes, self.depths, self.widths, self.gate_scales, self.floors

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(map(len, self.values))

    def knobs(self, actions: Ints) -> Knobs:
        """[E, 5] indices -> the values they stand for. Raises `ConfigError` on an index out of range."""
        actions = np.atleast_2d(np.asarray(actions))
        if actions.shape[1] != len(self.sizes) or (actions < 0).any() or (actions >= np.array(self.sizes)).any():
            raise ConfigError(f"action {actions.tolist()} is outside the table's {self.sizes}")
        nodes, depth, width, scale, floor = (np.asarray(t)[actions[:, i]] for i, t in enumerate(self.values))
        return Knobs(nodes.astype(np.float64), depth, width, scale.astype(np.float64), floor.astype(np.float64))

    def nearest(
        self, nodes: float, depth: int, width: int, gate_scale: float = 1.0, floor: float = 0.0
    ) -> tuple[int, ...]:
        """The action closest to a plan (nodes by ratio), for cloning another controller."""
        ladder = [abs(np.log((n or 0.1) / max(nodes, 0.1))) for n in self.nodes]
        wanted = (depth, width, gate_scale, floor)
        first = 0 if nodes <= 0 else max(1, int(np.argmin(ladder)))
        others = zip(self.values[1:], wanted, strict=True)
        return first, *(int(np.argmin([abs(v - x) for v in table])) for table, x in others)

    def plan(self, action: Sequence[int], load: LoadView, gates: Gates) -> SpecPlan:
        """One action as the plan of a step; `gates` are the calibrated sparse thresholds."""
        knobs = self.knobs(np.asarray(action))
        budget = int(knobs.budget(np.array([load.batch_size]))[0])
        if not budget:
            return AUTOREGRESSIVE
        depth, scale, floor = int(knobs.depth[0]), float(knobs.gate_scale[0]), float(knobs.floor[0])
        return SpecPlan(budget, depth, int(knobs.width[0]), scaled_gates(gates, depth, scale, floor), floor)


def scaled_gates(gates: Gates, depth: int, scale: float, floor: float) -> Gates:
    """The thresholds of a plan of `depth` levels, in order of depth.

    Nodes below the floor are never verified and nothing below them is likelier, so with a floor every
    depth has a gate of at least that: it saves drafting and costs nothing.
    """
    scaled = {d: min(1.0, tau * scale) for d, tau in gates if scale and d < depth - 1}
    if floor:
        scaled = {d: max(scaled.get(d, 0.0), floor) for d in range(depth - 1)}
    return tuple(sorted(scaled.items()))


def gates_asked(gates: Gates, depth: int, drafting: Sequence[int] | Ints) -> int:
    """Gates of a plan of `depth` levels that were asked, where so many requests drafted each level."""
    return sum(d < depth - 1 and d < len(drafting) and bool(drafting[d] > 0) for d, _ in gates)


@dataclass(frozen=True)
class Knobs:
    """Decoded actions, [E] each."""

    nodes: Floats
    depth: Ints
    width: Ints
    gate_scale: Floats
    floor: Floats

    def budget(self, batch: Ints) -> Ints:
        """[E] nodes over the whole batch: rounded, at least one where speculation is on."""
        wanted = np.rint(self.nodes * batch).astype(np.int64)
        return np.where((self.nodes > 0) & (batch > 0), np.maximum(wanted, 1), 0)


@dataclass(frozen=True)
class Loads:
    """`LoadView` over lanes, [E] each."""

    batch: Floats
    prefill: Floats
    waiting: Floats
    context: Floats
    kv_used: Floats
    arrived: Floats

    @classmethod
    def of(cls, load: LoadView) -> Loads:
        values = (load.batch_size, load.prefill_tokens, load.waiting, load.mean_context, load.kv_used, load.arrived)
        return cls(*(np.array([float(v)]) for v in values))


@dataclass(frozen=True)
class Outcomes:
    """What a step did, over lanes: the part of `StepReport` that observations are made of."""

    loads: Loads
    budget: Floats  # [E]
    depth: Floats  # [E]
    width: Floats  # [E]
    verified: Floats  # [E] nodes
    committed: Floats  # [E] tokens of decoding requests
    reached: Floats  # [E, DEPTHS]
    accepted: Floats  # [E, DEPTHS]
    confidence: Floats  # [E, 3] quantiles .1 .5 .9 over requests, NaN where nothing was drafted
    verify_seconds: Floats  # [E]
    draft_seconds: Floats  # [E]

    @classmethod
    def of(cls, report: StepReport) -> Outcomes:
        plan, on, first = report.plan, report.plan.speculates, report.confidence
        return cls(
            loads=Loads.of(report.load),
            budget=np.array([float(plan.budget)]),
            depth=np.array([float(plan.max_depth if on else 0)]),
            width=np.array([float(plan.width if on else 0)]),
            verified=np.array([float(report.verified)]),
            committed=np.array([float(report.committed)]),
            reached=_levels(report.reached_by_depth),
            accepted=_levels(report.accepted_by_depth),
            confidence=quantiles(np.array(first))[None] if first else np.full((1, 3), np.nan),
            verify_seconds=np.array([report.times.verify]),
            draft_seconds=np.array([report.times.draft]),
        )


CONFIDENCE = (0.1, 0.5, 0.9)
COST_NODES = (0.5, 1.0, 3.0, 7.0, 15.0, 31.0)
RATE = 0.1
"""Share of a new measurement in the running averages."""
SPARSE_RATE = 0.05

FEATURES: tuple[tuple[str, float, float], ...] = (
    ("batch (log2 / 6)", 0.0, 1.5),
    ("prefill tokens (/ 256)", 0.0, 2.0),
    ("waiting (log2(1 + n) / 6)", 0.0, 2.0),
    ("mean context (log2(1 + n) / 11)", 0.0, 1.5),
    ("KV used", 0.0, 1.0),
    ("arrivals a step, running (log2(1 + n) / 6)", 0.0, 2.0),
    *((f"acceptance at depth {d}, running", 0.0, 1.0) for d in range(DEPTHS)),
    *((f"first-token confidence, quantile {q}", 0.0, 1.0) for q in CONFIDENCE),
    ("last budget a request (log2(1 + n) / 6)", 0.0, 1.5),
    ("last depth (/ 8)", 0.0, 1.5),
    ("last width (/ 8)", 0.0, 2.0),
    ("tokens a request and step while speculating, running (/ 9)", 0.0, 1.0),
    ("share of the budget used, running", 0.0, 1.0),
    ("plain steps since speculating (log2(1 + n) / 10)", 0.0, 1.5),
    *((f"predicted step time at {n:g} nodes a request over plain (log2 / 4)", -1.0, 2.0) for n in COST_NODES),
    ("predicted time of one drafted level over a plain step", 0.0, 2.0),
    ("verify pace: log of measured over predicted, running", -2.0, 2.0),
    ("draft pace: log of measured over predicted, running", -2.0, 2.0),
)
"""Every entry of an observation: meaning, least and greatest value (clipped)."""

_ARRIVALS, _ACCEPTANCE, _CONFIDENCE = 0, slice(1, 1 + DEPTHS), slice(1 + DEPTHS, 4 + DEPTHS)
_YIELD, _USED, _PACE = 4 + DEPTHS, 5 + DEPTHS, slice(6 + DEPTHS, 8 + DEPTHS)
_SPECULATION = slice(1, 6 + DEPTHS)  # averages over speculative steps alone
_FIRST = np.concatenate([[0.0], np.full(DEPTHS + 3, 0.5), [1.0, 0.0, 0.0, 0.0]])

GROUPS: dict[str, tuple[int, int]] = {"load": (0, 6), "speculation": (6, 23), "cost": (23, 32)}
"""Observation entries by group, [begin, end): what the ablations switch off."""


class Tracker:
    """The running statistics behind an observation, for E lanes. `update` after a step, `observe` before one."""

    def __init__(self, costs: CostArrays, lanes: int = 1, scaling: Scaling | None = None) -> None:
        self._costs = costs
        self.scaling = scaling or Scaling.none(lanes)
        self._cached: dict[tuple[int, int], Floats] = {}  # serving: cost features by (batch, context octave half)
        self._one = lanes == 1 and scaling is None
        self._average = np.tile(_FIRST, (lanes, 1))  # [E, len(_FIRST)] running averages, columns as below
        self._last = np.zeros((lanes, 3))
        self._plain = np.zeros(lanes)

    def reset(self, lanes: NDArray[np.bool_]) -> None:
        """Forget everything about these lanes ([E] bool)."""
        self._average[lanes], self._last[lanes], self._plain[lanes] = _FIRST, 0.0, 0.0

    def update(self, outcomes: Outcomes) -> None:
        """Learn from a step. Lanes that had no decoding request change nothing but their arrivals."""
        loads, on = outcomes.loads, outcomes.budget > 0
        live, batch = loads.batch > 0, np.maximum(loads.batch, 1.0)
        spoken = on & live
        measured = np.zeros_like(self._average)
        rate = np.full_like(measured, RATE)
        reached = outcomes.reached
        measured[:, _ARRIVALS] = loads.arrived
        measured[:, _ACCEPTANCE] = outcomes.accepted / np.maximum(reached, 1.0)
        rate[:, _ACCEPTANCE] = SPARSE_RATE * np.minimum(1.0, reached / 4.0)
        measured[:, _CONFIDENCE] = outcomes.confidence
        measured[:, _YIELD] = outcomes.committed / batch
        measured[:, _USED] = outcomes.verified / np.maximum(outcomes.budget, 1.0)
        rate[:, _SPECULATION] *= spoken[:, None]
        measured[:, _PACE], rate[:, _PACE] = self._paces(outcomes, live & (loads.prefill == 0), spoken)
        unknown = np.isnan(measured)
        measured[unknown] = rate[unknown] = 0.0
        self._average += rate * (measured - self._average)
        last = np.stack([outcomes.budget / batch, outcomes.depth, outcomes.width], axis=1)
        self._last[live] = last[live]
        self._plain = np.where(live, np.where(on, 0.0, self._plain + 1.0), self._plain)

    def observe(self, loads: Loads) -> NDArray[np.float32]:
        """[E, len(FEATURES)], each entry clipped to its range."""
        columns = [
            _log2(np.maximum(loads.batch, 1.0)) / 6.0,
            loads.prefill / 256.0,
            _log2(1.0 + loads.waiting) / 6.0,
            _log2(1.0 + loads.context) / 11.0,
            loads.kv_used,
            _log2(1.0 + self._average[:, _ARRIVALS]) / 6.0,
            *self._average[:, _ACCEPTANCE].T,
            *self._average[:, _CONFIDENCE].T,
            _log2(1.0 + self._last[:, 0]) / 6.0,
            self._last[:, 1] / 8.0,
            self._last[:, 2] / 8.0,
            self._average[:, _YIELD] / 9.0,
            self._average[:, _USED],
            _log2(1.0 + self._plain) / 10.0,
            *self._cost_features(loads).T,
            *self._average[:, _PACE].T,
        ]
        return np.clip(np.stack(columns, axis=1), _LOW, _HIGH).astype(np.float32)

    def _paces(self, outcomes: Outcomes, clean: NDArray[np.bool_], spoken: NDArray[np.bool_]) -> tuple[Floats, Floats]:
        """[E, 2] log of measured over predicted seconds, and their weights.

        Read from steps without prefill, whose predicted time is known.
        """
        expected = self._expected_one(outcomes) if self._one else self._expected(outcomes)
        taken = np.stack([outcomes.verify_seconds, outcomes.draft_seconds], axis=1)
        ratio: Floats = np.log(np.maximum(taken, 1e-9) / np.maximum(np.stack(expected, axis=1), 1e-9))
        counts = np.stack([clean, clean & spoken], axis=1) & (taken > 0)
        pace: Floats = np.clip(ratio, -2.0, 2.0)
        rate: Floats = np.where(counts, RATE, 0.0)
        return pace, rate

    def _expected(self, outcomes: Outcomes) -> tuple[Floats, Floats]:
        """[E] predicted seconds of the verify pass and of drafting."""
        loads, scaling = outcomes.loads, self.scaling
        batch = np.maximum(loads.batch, 1.0)
        plain = self._costs.verify(batch, batch, loads.context)
        full = self._costs.verify(batch, batch + outcomes.verified, loads.context)
        drafted = self._costs.draft(batch, np.maximum(outcomes.width, 1), outcomes.depth)
        return scaling.fixed * plain + scaling.row * (full - plain), scaling.draft * drafted

    def _expected_one(self, outcomes: Outcomes) -> tuple[Floats, Floats]:
        """The same for serving's one lane, without the arrays' overhead."""
        profile, loads = self._costs.profile, outcomes.loads
        batch = max(1, int(loads.batch[0]))
        verify = profile.verify_seconds(batch, batch + float(outcomes.verified[0]), float(loads.context[0]))
        draft = profile.draft_seconds(batch, max(1, int(outcomes.width[0])), int(outcomes.depth[0]))
        return np.array([verify]), np.array([draft])

    def _cost_features(self, loads: Loads) -> Floats:
        if not self._one:
            return self._predicted(loads.batch, loads.context)
        octave = round(2.0 * float(np.log2(loads.context[0] + 1.0)))
        key = (int(loads.batch[0]), octave)
        if key not in self._cached:
            self._cached[key] = self._predicted(loads.batch, np.array([2.0 ** (octave / 2.0) - 1.0]))
        return self._cached[key]

    def _predicted(self, batch: Floats, context: Floats) -> Floats:
        """[E, len(COST_NODES) + 1] the cost entries of an observation."""
        costs, scaling, batch = self._costs, self.scaling, np.maximum(batch, 1.0)
        plain = costs.verify(batch, batch, context)
        base = scaling.fixed * plain + scaling.overhead * costs.overhead(batch, 0, False)
        nodes = batch[:, None] * np.asarray(COST_NODES)
        full = costs.verify(batch[:, None], batch[:, None] + nodes, context[:, None])
        seconds = scaling.fixed[:, None] * plain[:, None] + scaling.row[:, None] * (full - plain[:, None])
        seconds = seconds + scaling.overhead[:, None] * costs.overhead(batch[:, None], nodes, True)
        level = scaling.draft * (costs.draft(batch, 3, 3) - costs.draft(batch, 3, 2))
        return np.concatenate([_log2(seconds / base[:, None]) / 4.0, (level / base)[:, None]], axis=1)


_LOW = np.array([low for _, low, _ in FEATURES])
_HIGH = np.array([high for _, _, high in FEATURES])


_AT = np.array(CONFIDENCE)


def quantiles(values: NDArray[np.floating[Any]]) -> Floats:
    """`np.quantile(values, CONFIDENCE)` without its overhead."""
    ordered = np.sort(values).astype(np.float64)
    place = _AT * (len(ordered) - 1)
    low = place.astype(np.int64)
    high = np.minimum(low + 1, len(ordered) - 1)
    result: Floats = ordered[low] + (place - low) * (ordered[high] - ordered[low])
    return result


def _levels(counts: Sequence[int]) -> Floats:
    """[1, DEPTHS], zeros where the step had no such depth."""
    row = np.zeros((1, DEPTHS))
    row[0, : min(len(counts), DEPTHS)] = counts[:DEPTHS]
    return row


def _log2(x: ArrayLike) -> Floats:
    result: Floats = np.log2(x)
    return result
