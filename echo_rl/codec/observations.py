"""Encodes observations of the one server that a controller serves, in plain floats: few numbers don't pay for
arrays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from echo_rl.codec.features import CONFIDENCE, COST_NODES, DEPTHS, FEATURES, FIRST, RATE, SPARSE_RATE
from echo_rl.contracts import LoadView, StepReport
from echo_rl.costs.correction import CostCorrector, basis
from echo_rl.costs.profile import CostProfile, context_of, half_octave

Floats = NDArray[np.float64]

_LOW = tuple(low for _, low, _ in FEATURES)
_HIGH = tuple(high for _, _, high in FEATURES)
_CONFIDENCE = 1 + DEPTHS
_YIELD = _CONFIDENCE + len(CONFIDENCE)
_USED = _YIELD + 1


class ObservationEncoder:
    """The running statistics behind one server's observations. `update` after a step, `observe` before one."""

    def __init__(self, costs: CostProfile) -> None:
        self._costs = costs
        self._predictions: dict[tuple[int, int], _Predictions] = {}  # by (batch, half octave of context)
        self.reset()

    def reset(self) -> None:
        """Forget every step."""
        self._average, self._corrector = list(FIRST), CostCorrector(self._costs)
        self._last = (0.0, 0, 0)  # budget a request, depth and width of the last step that decoded
        self._plain = 0  # plain steps since one speculated
        self._arrived = 0  # since a step with a decoding request

    def update(self, report: StepReport) -> None:
        """Learn from a step. Of one without a decoding request the arrivals alone count, with the next one's."""
        load, plan = report.load, report.plan
        self._arrived += load.arrived
        self._corrector.observe(report)
        if not load.batch_size:
            return
        self._follow(0, float(self._arrived))
        self._arrived = 0
        if plan.speculates:
            self._plain, self._last = 0, (plan.budget / load.batch_size, plan.max_depth, plan.width)
            self._speculated(report)
        else:
            self._plain, self._last = self._plain + 1, (0.0, 0, 0)

    def observe(self, load: LoadView) -> NDArray[np.float32]:
        """[len(FEATURES)], each entry clipped to its range."""
        average, (budget, depth, width) = self._average, self._last
        entries = (
            math.log2(max(load.batch_size, 1)) / 6.0,
            load.prefill_tokens / 256.0,
            math.log2(1.0 + load.waiting) / 6.0,
            math.log2(1.0 + load.mean_context) / 11.0,
            load.kv_used,
            math.log2(1.0 + average[0]) / 6.0,
            *average[1:_YIELD],
            math.log2(1.0 + budget) / 6.0,
            depth / 8.0,
            width / 8.0,
            average[_YIELD] / 9.0,
            average[_USED],
            math.log2(1.0 + self._plain) / 10.0,
            *self._cost_features(load),
        )
        clipped = [min(max(x, low), high) for x, low, high in zip(entries, _LOW, _HIGH, strict=True)]
        return np.array(clipped, dtype=np.float32)

    def _speculated(self, report: StepReport) -> None:
        batch = report.load.batch_size
        levels = zip(report.reached_by_depth[:DEPTHS], report.accepted_by_depth[:DEPTHS], strict=False)
        for depth, (reached, accepted) in enumerate(levels):
            if reached:
                self._follow(1 + depth, accepted / reached, SPARSE_RATE * min(1.0, reached / 4.0))
        for place, value in enumerate(_quantiles(report.confidence)):
            self._follow(_CONFIDENCE + place, value)
        self._follow(_YIELD, report.committed / batch)
        self._follow(_USED, report.verified / report.plan.budget)

    def _follow(self, place: int, measured: float, rate: float = RATE) -> None:
        if not math.isnan(measured):
            self._average[place] += rate * (measured - self._average[place])

    def _cost_features(self, load: LoadView) -> list[float]:
        """`BatchedObservationEncoder._cost_features` of one load."""
        predicted, corrector = self._predicted(load), self._corrector
        verify = predicted.verify * corrector.verify.factors(predicted.weights)
        base = float(verify[0]) + predicted.plain_rest * corrector.rest[False]
        seconds = verify[1:] + predicted.rest * corrector.rest[True]
        return [*(np.log2(seconds / base) / 4.0).tolist(), predicted.level * corrector.draft / base]

    def _predicted(self, load: LoadView) -> _Predictions:
        key = (load.batch_size, half_octave(load.mean_context))
        if key not in self._predictions:
            self._predictions[key] = _predict(self._costs, max(1, load.batch_size), context_of(key[1]))
        return self._predictions[key]


@dataclass(frozen=True)
class _Predictions:
    """The profile's seconds of a plain step, and of steps with `COST_NODES` nodes a request (N of them)."""

    verify: Floats  # [1 + N] seconds
    weights: Floats  # [1 + N, OCTAVES] see `correction.basis`
    plain_rest: float  # seconds outside the pass
    rest: Floats  # [N] seconds outside the passes
    level: float  # seconds of one drafted level


def _predict(profile: CostProfile, batch: int, context: float) -> _Predictions:
    nodes = batch * np.array(COST_NODES)
    rows = [float(batch), *(batch + nodes).tolist()]
    return _Predictions(
        np.array(profile.verify_each(batch, rows, context)),
        basis(rows),
        profile.overhead_seconds(batch),
        profile.overhead_seconds(batch, 0, True) + profile.node_overhead * nodes,
        profile.draft_seconds(batch, 3, 3) - profile.draft_seconds(batch, 3, 2),
    )


def _quantiles(values: Sequence[float]) -> list[float]:
    """`CONFIDENCE` of the values, as `batched_observations.quantiles`; NaN counts as the highest."""
    known = sorted(value for value in values if not math.isnan(value))
    ordered, last = [*known, *[math.nan] * (len(values) - len(known))], len(values) - 1
    found = []
    for share in CONFIDENCE if ordered else ():
        place = share * last
        low = int(place)
        found.append(ordered[low] + (place - low) * (ordered[min(low + 1, last)] - ordered[low]))
    return found
