"""`Tracker` for the one server that a controller serves, in plain floats: a few numbers don't pay for arrays."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from echo_rl.codec.features import CONFIDENCE, COST_NODES, DEPTHS, FEATURES, FIRST, RATE, SPARSE_RATE
from echo_rl.contracts import LoadView, StepReport
from echo_rl.profile import CostProfile

_LOW = tuple(low for _, low, _ in FEATURES)
_HIGH = tuple(high for _, _, high in FEATURES)
_CONFIDENCE = 1 + DEPTHS
_YIELD = _CONFIDENCE + len(CONFIDENCE)
_USED, _VERIFY, _DRAFT = _YIELD + 1, _YIELD + 2, _YIELD + 3


class Lane:
    """The running statistics behind one server's observations. `update` after a step, `observe` before one."""

    def __init__(self, costs: CostProfile) -> None:
        self._costs = costs
        self._predicted: dict[tuple[int, int], tuple[float, ...]] = {}  # by (batch, context octave half)
        self.reset()

    def reset(self) -> None:
        """Forget every step."""
        self._average = list(FIRST)
        self._last = (0.0, 0, 0)  # budget a request, depth and width of the last step that decoded
        self._plain = 0  # plain steps since one speculated

    def update(self, report: StepReport) -> None:
        """Learn from a step. One without a decoding request changes nothing but the arrivals."""
        load, plan = report.load, report.plan
        self._follow(0, float(load.arrived))
        if not load.batch_size:
            return
        if plan.speculates:
            self._plain, self._last = 0, (plan.budget / load.batch_size, plan.max_depth, plan.width)
            self._speculated(report)
        else:
            self._plain, self._last = self._plain + 1, (0.0, 0, 0)
        if not load.prefill_tokens:
            self._timed(report)

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
            *self._prediction(load),
            average[_VERIFY],
            average[_DRAFT],
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

    def _timed(self, report: StepReport) -> None:
        """Log of measured over predicted seconds, from a step without prefill: its predicted time is known."""
        load, plan, times, profile = report.load, report.plan, report.times, self._costs
        batch = load.batch_size
        if times.verify > 0.0:
            expected = profile.verify_seconds(batch, batch + report.verified, load.mean_context)
            self._follow(_VERIFY, _pace(times.verify, expected))
        if plan.speculates and times.draft > 0.0:
            expected = profile.draft_seconds(batch, plan.width, plan.max_depth)
            self._follow(_DRAFT, _pace(times.draft, expected))

    def _follow(self, place: int, measured: float, rate: float = RATE) -> None:
        if not math.isnan(measured):
            self._average[place] += rate * (measured - self._average[place])

    def _prediction(self, load: LoadView) -> tuple[float, ...]:
        octave = round(2.0 * math.log2(load.mean_context + 1.0))
        key = (load.batch_size, octave)
        if key not in self._predicted:
            self._predicted[key] = self._predict(max(1, load.batch_size), 2.0 ** (octave / 2.0) - 1.0)
        return self._predicted[key]

    def _predict(self, batch: int, context: float) -> tuple[float, ...]:
        """`tracker.cost_features` of one load."""
        profile, nodes = self._costs, [batch * n for n in COST_NODES]
        plain, *full = profile.verify_each(batch, [batch, *(batch + n for n in nodes)], context)
        base, fixed = plain + profile.overhead_seconds(batch), profile.overhead_seconds(batch, 0, True)
        times = (verify + fixed + profile.node_overhead * n for verify, n in zip(full, nodes, strict=True))
        level = profile.draft_seconds(batch, 3, 3) - profile.draft_seconds(batch, 3, 2)
        return *(math.log2(seconds / base) / 4.0 for seconds in times), level / base


def _pace(taken: float, expected: float) -> float:
    return min(2.0, max(-2.0, math.log(max(taken, 1e-9) / max(expected, 1e-9))))


def _quantiles(values: Sequence[float]) -> list[float]:
    """`CONFIDENCE` of the values, as `tracker.quantiles`; NaN counts as the highest."""
    known = sorted(value for value in values if not math.isnan(value))
    ordered, last = [*known, *[math.nan] * (len(values) - len(known))], len(values) - 1
    found = []
    for share in CONFIDENCE if ordered else ():
        place = share * last
        low = int(place)
        found.append(ordered[low] + (place - low) * (ordered[min(low + 1, last)] - ordered[low]))
    return found
