"""Observations of many servers at once (lanes, [E] arrays): loads, outcomes and the running statistics behind them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from echo_rl.codec.features import CONFIDENCE, COST_NODES, DEPTHS, FEATURES, FIRST, RATE, SPARSE_RATE
from echo_rl.costs import CostArrays, Scaling

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Loads:
    """`LoadView` over lanes, [E] each."""

    batch: Floats
    prefill: Floats
    waiting: Floats
    context: Floats
    kv_used: Floats
    arrived: Floats


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


_ARRIVALS, _ACCEPTANCE, _CONFIDENCE = 0, slice(1, 1 + DEPTHS), slice(1 + DEPTHS, 4 + DEPTHS)
_YIELD, _USED, _PACE = 4 + DEPTHS, 5 + DEPTHS, slice(6 + DEPTHS, 8 + DEPTHS)
_SPECULATION = slice(1, 6 + DEPTHS)  # averages over speculative steps alone
_LOW = np.array([low for _, low, _ in FEATURES])
_HIGH = np.array([high for _, _, high in FEATURES])
_AT = np.array(CONFIDENCE)


class Tracker:
    """The running statistics behind an observation, for E lanes. `update` after a step, `observe` before one."""

    def __init__(self, costs: CostArrays, lanes: int = 1, scaling: Scaling | None = None) -> None:
        self._costs = costs
        self.scaling = scaling or Scaling.none(lanes)
        self._average = np.tile(FIRST, (lanes, 1))  # [E, len(FIRST)] running averages, columns as below
        self._last = np.zeros((lanes, 3))
        self._plain = np.zeros(lanes)

    def reset(self, lanes: NDArray[np.bool_]) -> None:
        """Forget everything about these lanes ([E] bool)."""
        self._average[lanes], self._last[lanes], self._plain[lanes] = FIRST, 0.0, 0.0

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
            *cost_features(self._costs, self.scaling, loads.batch, loads.context).T,
            *self._average[:, _PACE].T,
        ]
        return np.clip(np.stack(columns, axis=1), _LOW, _HIGH).astype(np.float32)

    def _paces(self, outcomes: Outcomes, clean: NDArray[np.bool_], spoken: NDArray[np.bool_]) -> tuple[Floats, Floats]:
        """[E, 2] log of measured over predicted seconds, and their weights.

        Read from steps without prefill, whose predicted time is known.
        """
        expected = self._expected(outcomes)
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


def cost_features(costs: CostArrays, scaling: Scaling, batch: Floats, context: Floats) -> Floats:
    """[E, len(COST_NODES) + 1] the cost entries of an observation."""
    batch = np.maximum(batch, 1.0)
    plain = costs.verify(batch, batch, context)
    base = scaling.fixed * plain + scaling.overhead * costs.overhead(batch, 0, False)
    nodes = batch[:, None] * np.asarray(COST_NODES)
    full = costs.verify(batch[:, None], batch[:, None] + nodes, context[:, None])
    seconds = scaling.fixed[:, None] * plain[:, None] + scaling.row[:, None] * (full - plain[:, None])
    seconds = seconds + scaling.overhead[:, None] * costs.overhead(batch[:, None], nodes, True)
    level = scaling.draft * (costs.draft(batch, 3, 3) - costs.draft(batch, 3, 2))
    return np.concatenate([np.log2(seconds / base[:, None]) / 4.0, (level / base)[:, None]], axis=1)


def quantiles(values: NDArray[np.floating[Any]], counts: NDArray[np.int64] | None = None) -> Floats:
    """[..., n] -> [..., len(CONFIDENCE)], `np.quantile(values, CONFIDENCE)` without its overhead.

    `counts` [...]: how many of the n each row really has (at least 1), the others being NaN; None for all.
    """
    ordered = np.sort(values).astype(np.float64)
    last = (np.asarray(values.shape[-1]) if counts is None else counts)[..., None] - 1
    place = _AT * last
    low = place.astype(np.int64)
    at, after = (np.take_along_axis(ordered, i, -1) for i in (low, np.minimum(low + 1, last)))
    result: Floats = at + (place - low) * (after - at)
    return result


def _log2(x: Floats) -> Floats:
    result: Floats = np.log2(x)
    return result
