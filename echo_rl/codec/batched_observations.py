"""Encodes observations of many servers at once ([E] arrays) and keeps the running statistics behind them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from echo_rl.codec.features import CONFIDENCE, COST_NODES, DEPTHS, FEATURES, FIRST, RATE, SPARSE_RATE
from echo_rl.costs.batched_correction import BatchedCostCorrector
from echo_rl.costs.batched_profile import BatchedCostProfile
from echo_rl.costs.batched_records import BatchedLoadView, BatchedStepReport

Floats = NDArray[np.float64]


_ARRIVALS, _ACCEPTANCE, _CONFIDENCE = 0, slice(1, 1 + DEPTHS), slice(1 + DEPTHS, 4 + DEPTHS)
_YIELD, _USED = 4 + DEPTHS, 5 + DEPTHS
_SPECULATION = slice(1, 6 + DEPTHS)  # averages over speculative steps alone
_LOW = np.array([low for _, low, _ in FEATURES])
_HIGH = np.array([high for _, _, high in FEATURES])
_AT = np.array(CONFIDENCE)


class BatchedObservationEncoder:
    """The running statistics behind an observation, for E servers. `update` after a step, `observe` before one."""

    def __init__(self, costs: BatchedCostProfile, servers: int = 1) -> None:
        self._costs, self._corrector = costs, BatchedCostCorrector(costs, servers)
        self._average = np.tile(FIRST, (servers, 1))  # [E, len(FIRST)] running averages, columns as below
        self._last = np.zeros((servers, 3))
        self._plain = np.zeros(servers)

    def reset(self, servers: NDArray[np.bool_]) -> None:
        """Forget everything about these servers ([E] bool)."""
        self._average[servers], self._last[servers], self._plain[servers] = FIRST, 0.0, 0.0
        self._corrector.reset(servers)

    def update(self, outcomes: BatchedStepReport) -> None:
        """Learn from a step. Servers without a decoding request change nothing: the next one's arrivals hold theirs."""
        loads, on = outcomes.loads, outcomes.budget > 0
        live, batch = loads.batch > 0, np.maximum(loads.batch, 1.0)
        spoken = on & live
        measured = np.zeros_like(self._average)
        rate = np.full_like(measured, RATE)
        reached = outcomes.reached
        measured[:, _ARRIVALS] = loads.arrived
        measured[:, _ACCEPTANCE] = outcomes.accepted / np.maximum(reached, 1.0)
        rate[:, _ARRIVALS] *= live
        rate[:, _ACCEPTANCE] = SPARSE_RATE * np.minimum(1.0, reached / 4.0)
        measured[:, _CONFIDENCE] = outcomes.confidence
        measured[:, _YIELD] = outcomes.committed / batch
        measured[:, _USED] = outcomes.verified / np.maximum(outcomes.budget, 1.0)
        rate[:, _SPECULATION] *= spoken[:, None]
        unknown = np.isnan(measured)
        measured[unknown] = rate[unknown] = 0.0
        self._average += rate * (measured - self._average)
        self._corrector.observe(outcomes)
        last = np.stack([outcomes.budget / batch, outcomes.depth, outcomes.width], axis=1)
        self._last[live] = last[live]
        self._plain = np.where(live, np.where(on, 0.0, self._plain + 1.0), self._plain)

    def observe(self, loads: BatchedLoadView) -> NDArray[np.float32]:
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
        ]
        return np.clip(np.stack(columns, axis=1), _LOW, _HIGH).astype(np.float32)

    def _cost_features(self, loads: BatchedLoadView) -> Floats:
        """[E, len(COST_NODES) + 1] the cost entries of an observation."""
        costs, corrector, batch = self._costs, self._corrector, np.maximum(loads.batch, 1.0)
        nodes = np.concatenate([np.zeros((len(batch), 1)), batch[:, None] * COST_NODES], axis=1)
        rows = batch[:, None] + nodes
        verify = costs.verify(batch[:, None], rows, loads.context[:, None]) * corrector.verify.factors(rows)
        plain, speculative = corrector.rest.T
        base = verify[:, 0] + costs.overhead(batch, 0.0, False) * plain
        seconds = verify[:, 1:] + costs.overhead(batch[:, None], nodes[:, 1:], True) * speculative[:, None]
        level = costs.level(batch, 3, 3) * corrector.draft
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
