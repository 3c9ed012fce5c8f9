"""Corrects a profile of single passes by what live steps took: caches are cold there, and steps do more than passes.

Serves prompts under random plans at several concurrencies and fits, to the steps of each phase, a
factor per batch size for plain and for speculative verify passes and for drafting, the fixed costs of
a step, a request and a node, the costs of catching up and of a gate, the weight of a prompt token, and the noise.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from echo_rl.codec import gates_asked
from echo_rl.contracts import Backend, LoadView, Request, SpecPlan, StepReport
from echo_rl.controllers.base import BaseController
from echo_rl.loop import serve
from echo_rl.profile import CostProfile, Surface

SHAPES = (
    (0.0, 1, 1), (0.0, 1, 1), (0.5, 2, 2), (1.0, 2, 2), (1.0, 3, 3), (2.0, 2, 2), (2.0, 3, 3), (3.0, 3, 1), (3.0, 3, 3),
    (5.0, 3, 3), (5.0, 4, 4), (7.0, 4, 2), (7.0, 4, 3), (9.0, 5, 4), (15.0, 5, 4), (15.0, 8, 6), (31.0, 8, 8),
)  # fmt: skip
"""(nodes a request, depth, width) of the random plans."""
STRETCH = 3
"""Steps under one plan; more of them, and the drafter would never have much to catch up on."""
MOST_ROWS = 320
"""Rows of the largest random step: larger ones take long and are never chosen."""
GATES = (0.0, 0.0, 0.02, 0.1, 0.3)
"""Thresholds of the random plans, the same at every depth; 0 = no gates."""
FEWEST = 8
"""Steps that a factor must rest on."""


@dataclass(frozen=True)
class Sample:
    """One live step, and how many committed tokens past two a request the drafter had not seen."""

    report: StepReport
    unseen: int


class RandomPlans(BaseController):
    """A random shape every few steps; keeps what the steps took."""

    name = "random-plans"

    def __init__(self, prompts: dict[str, int], seed: int = 0) -> None:
        super().__init__()
        self.samples: list[Sample] = []
        self._prompts = prompts  # request id -> prompt tokens
        self._unseen: dict[str, int] = {}
        self._random, self._left, self._shape, self._gate = random.Random(seed), 0, SHAPES[0], GATES[0]

    def propose(self, load: LoadView) -> SpecPlan:
        if not self._left:
            fits = [shape for shape in SHAPES if load.batch_size * (1 + shape[0]) <= MOST_ROWS]
            self._shape, self._left = self._random.choice(fits), STRETCH
            self._gate = self._random.choice(GATES)
        self._left -= 1
        nodes, depth, width = self._shape
        gates = tuple((d, self._gate) for d in range(depth - 1)) if self._gate else ()
        return SpecPlan(round(nodes * load.batch_size), depth, width, gates)

    def observe(self, report: StepReport) -> None:
        decodes = report.outputs[: report.load.batch_size]
        behind = sum(max(0, self._unseen[output.id] - 2) for output in decodes)
        self.samples.append(Sample(report, behind))
        for i, output in enumerate(report.outputs):
            if i >= report.load.batch_size:
                self._unseen[output.id] = self._prompts[output.id]
            else:
                before = 0 if report.plan.speculates else self._unseen[output.id]
                self._unseen[output.id] = before + len(output.tokens)


def observe_steps(
    engine: Backend, make: Callable[[int], list[Request]], concurrencies: Sequence[int], on_step: Callable[[], None]
) -> list[Sample]:
    """Live steps under random plans; `make(c)` gives the requests to serve at concurrency c."""
    samples: list[Sample] = []
    for concurrency in concurrencies:
        requests = make(concurrency)
        plans = RandomPlans({r.id: len(r.prompt) for r in requests}, seed=concurrency)
        serve(engine, plans, requests, concurrency)
        samples += plans.samples
        on_step()
    return samples


def correct(profile: CostProfile, samples: Sequence[Sample]) -> CostProfile:
    """The profile that fits the samples; parts that too few of them show stay as they are."""
    fitted = _fit_overheads(profile, samples)
    clean = [s for s in samples if s.report.load.batch_size and not s.report.load.prefill_tokens]
    fitted = _scale_verify(fitted, clean)
    fitted = _scale_draft(fitted, clean)
    fitted = replace(fitted, prefill_weight=_prefill_weight(fitted, samples))
    return replace(fitted, noise=_noise(fitted, clean))


def predicted(profile: CostProfile, sample: Sample) -> tuple[float, float, float]:
    """(verify, draft, rest) seconds that the profile gives a step with decoding requests."""
    report, load, plan = sample.report, sample.report.load, sample.report.plan
    batch, verified = load.batch_size, report.verified
    rows = batch + verified + profile.prefill_weight * load.prefill_tokens
    verify = profile.verify_seconds(batch, rows, load.mean_context)
    draft = 0.0
    if plan.speculates:
        draft = sum(_level(profile, alive, plan.width, d) for d, alive in enumerate(report.drafting) if alive)
        asked = gates_asked(plan.gates, plan.max_depth, report.drafting)
        draft += profile.catch_up * sample.unseen + profile.gate_overhead * asked
    return verify, draft, profile.overhead_seconds(batch, verified, plan.speculates)


def _level(profile: CostProfile, alive: int, width: int, depth: int) -> float:
    """Seconds of drafting one more level for the requests that do."""
    return profile.draft_seconds(alive, width, depth + 1) - profile.draft_seconds(alive, width, depth)


def _fit_overheads(profile: CostProfile, samples: Sequence[Sample]) -> CostProfile:
    """Least squares of the time outside the passes, twice: the second time without what the first calls outliers."""
    used = [s.report for s in samples if s.report.load.batch_size]
    if len(used) < FEWEST:
        return profile
    on = np.array([float(r.plan.speculates) for r in used])
    batch = np.array([float(r.load.batch_size) for r in used])
    matrix = np.stack([np.ones(len(used)), batch, on, on * np.array([float(r.verified) for r in used])], axis=1)
    rest = np.array([max(0.0, r.times.total - r.times.verify - r.times.draft) for r in used])
    fit = _least_squares(matrix, rest)
    error = np.abs(rest - matrix @ fit)
    fit = _least_squares(matrix[error <= 3.0 * np.median(error)], rest[error <= 3.0 * np.median(error)])
    step, request, speculative, node = (float(x) for x in fit)
    return replace(profile, step_overhead=step, request_overhead=request, spec_overhead=speculative, node_overhead=node)


def _least_squares(matrix: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Non-negative: columns that want to be negative are dropped, the most negative first."""
    kept = list(range(matrix.shape[1]))
    while kept:
        fit = np.linalg.lstsq(matrix[:, kept], values, rcond=None)[0]
        if fit.min() >= 0.0:
            break
        kept.pop(int(fit.argmin()))
    full = np.zeros(matrix.shape[1])
    if kept:
        full[kept] = fit
    return full


def _scale_verify(profile: CostProfile, clean: Sequence[Sample]) -> CostProfile:
    plain = _factors(
        profile.batches, [(s, s.report.times.verify / predicted(profile, s)[0]) for s in clean if not s.report.verified]
    )
    wide = _factors(
        profile.batches, [(s, s.report.times.verify / predicted(profile, s)[0]) for s in clean if s.report.verified]
    )
    planes = []
    for batch, plane, p, w in zip(profile.batches, profile.verify, plain, wide, strict=True):
        scaled = [[t * (p if r <= batch else w) for t in line] for r, line in zip(profile.rows, plane, strict=True)]
        planes.append(scaled)
    return replace(profile, verify=_monotone(planes))


def _scale_draft(profile: CostProfile, clean: Sequence[Sample]) -> CostProfile:
    """Factors from steps with no gate and nothing to catch up on, then the costs of either from the others."""
    drafted = [s for s in clean if s.report.plan.speculates]
    fresh = [s for s in drafted if s.unseen <= s.report.load.batch_size]
    usual = [(s, s.report.times.draft / predicted(profile, s)[1]) for s in fresh if not s.report.plan.gates]
    factors = _factors(profile.draft_batches, usual)
    planes = [[[t * f for t in line] for line in plane] for plane, f in zip(profile.draft, factors, strict=True)]
    fitted = replace(profile, draft=_monotone(planes), catch_up=0.0, gate_overhead=0.0)
    fitted = replace(fitted, gate_overhead=_gate_overhead(fitted, fresh, profile.gate_overhead))
    behind = [s for s in drafted if s.unseen > 4 * s.report.load.batch_size]
    each = [(s.report.times.draft - predicted(fitted, s)[1]) / s.unseen for s in behind]
    return replace(fitted, catch_up=max(0.0, float(np.median(each))) if len(each) >= FEWEST else profile.catch_up)


def _gate_overhead(profile: CostProfile, fresh: Sequence[Sample], fallback: float) -> float:
    """Median of what each gate added to drafting; `profile` has none yet."""
    gated = [s for s in fresh if s.report.plan.gates]
    each = [
        (s.report.times.draft - predicted(profile, s)[1])
        / max(1, gates_asked(s.report.plan.gates, s.report.plan.max_depth, s.report.drafting))
        for s in gated
    ]
    return max(0.0, float(np.median(each))) if len(each) >= FEWEST else fallback


def _factors(batches: Sequence[int], ratios: Sequence[tuple[Sample, float]]) -> list[float]:
    """Median ratio at each batch size; sizes that were not seen take the nearest seen one's (in log)."""
    seen: dict[int, list[float]] = {batch: [] for batch in batches}
    for sample, ratio in ratios:
        nearest = min(batches, key=lambda b: abs(math.log(b / sample.report.load.batch_size)))
        seen[nearest].append(ratio)
    known = {batch: float(np.median(r)) for batch, r in seen.items() if len(r) >= FEWEST}
    if not known:
        return [1.0] * len(batches)
    return [known[min(known, key=lambda k: abs(math.log(k / batch)))] for batch in batches]


def _prefill_weight(profile: CostProfile, samples: Sequence[Sample]) -> float:
    """The weight at which steps with prompts are predicted best."""
    mixed = [s for s in samples if s.report.load.batch_size and s.report.load.prefill_tokens >= 32]
    if len(mixed) < FEWEST:
        return profile.prefill_weight

    def error(weight: float) -> float:
        trial = replace(profile, prefill_weight=weight)
        return float(np.median([abs(math.log(s.report.times.verify / predicted(trial, s)[0])) for s in mixed]))

    return float(min(np.arange(0.4, 1.61, 0.05).tolist(), key=error))


def _noise(profile: CostProfile, clean: Sequence[Sample]) -> float:
    """Robust standard deviation (interquartile range) of log(measured / predicted) of whole steps."""
    residuals = [math.log(s.report.times.total / sum(predicted(profile, s))) for s in clean]
    if len(residuals) < FEWEST:
        return profile.noise
    low, high = np.quantile(residuals, (0.25, 0.75))
    return float(high - low) / 1.349


def _monotone(planes: Sequence[Sequence[Sequence[float]]]) -> Surface:
    """Each plane made non-decreasing along both of its axes."""
    risen = (np.maximum.accumulate(np.maximum.accumulate(np.asarray(plane), 0), 1) for plane in planes)
    return tuple(tuple(tuple(float(t) for t in line) for line in plane) for plane in risen)
