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
from numpy.typing import NDArray
from scipy.optimize import nnls

from echo_rl.codec import gates_asked
from echo_rl.contracts import Backend, LoadView, Request, SpecPlan, StepReport
from echo_rl.controllers.base import BaseController
from echo_rl.costs.batched_profile import BatchedCostProfile
from echo_rl.costs.interpolation import monotone
from echo_rl.costs.profile import CostProfile
from echo_rl.replay.timing import Floats, Phases, Work, step_phases
from echo_rl.workloads.driver import serve

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


Usual = Callable[[StepReport], bool]
"""Tells whether a step was served as most are, and not, say, while a graph was captured. Asked once a step, in
order."""


def every_step(report: StepReport) -> bool:
    """`Usual` of a backend that serves all of them alike."""
    del report
    return True


class RandomPlans(BaseController):
    """A random shape every few steps; keeps what the usual steps took."""

    name = "random-plans"

    def __init__(self, prompts: dict[str, int], seed: int = 0, usual: Usual = every_step) -> None:
        super().__init__()
        self.samples: list[Sample] = []
        self._usual = usual
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
        if self._usual(report):
            self.samples.append(Sample(report, behind))
        for i, output in enumerate(report.outputs):
            if i >= report.load.batch_size:
                self._unseen[output.id] = self._prompts[output.id]
            else:
                before = 0 if report.plan.speculates else self._unseen[output.id]
                self._unseen[output.id] = before + len(output.tokens)


def observe_steps(
    engine: Backend,
    make: Callable[[int], list[Request]],
    concurrencies: Sequence[int],
    on_step: Callable[[], None],
    usual: Usual = every_step,
) -> list[Sample]:
    """Live steps under random plans; `make(c)` gives the requests to serve at concurrency c."""
    samples: list[Sample] = []
    for concurrency in concurrencies:
        requests = make(concurrency)
        plans = RandomPlans({r.id: len(r.prompt) for r in requests}, concurrency, usual)
        serve(engine, plans, requests, concurrency)
        samples += plans.samples
        on_step()
    return samples


def correct(profile: CostProfile, samples: Sequence[Sample]) -> CostProfile:
    """The profile that fits the samples; parts that too few of them show stay as they are."""
    used = [s for s in samples if s.report.load.batch_size]
    fitted = _fit_overheads(profile, used)
    clean = [s for s in used if not s.report.load.prefill_tokens]
    fitted = _scale_verify(fitted, clean)
    fitted = _scale_draft(fitted, clean)
    fitted = replace(fitted, prefill_weight=_prefill_weight(fitted, used))
    return replace(fitted, noise=_noise(fitted, clean))


def predicted(profile: CostProfile, samples: Sequence[Sample]) -> Phases:
    """The seconds that the profile gives steps with decoding requests, as a replay charges them."""
    return step_phases(BatchedCostProfile(profile), _work(samples))


def _work(samples: Sequence[Sample]) -> Work:
    """The work of the steps, as a replay charges it."""
    reports = [s.report for s in samples]
    drafting = np.zeros((len(reports), max([1, *(len(r.drafting) for r in reports)])))
    for row, report in zip(drafting, reports, strict=True):
        row[: len(report.drafting)] = report.drafting
    asked = [gates_asked(r.plan.gates, r.plan.max_depth, r.drafting) if r.plan.speculates else 0 for r in reports]
    return Work(
        batch=_column([r.load.batch_size for r in reports]),
        context=_column([r.load.mean_context for r in reports]),
        prefill=_column([r.load.prefill_tokens for r in reports]),
        verified=_column([r.verified for r in reports]),
        width=_column([r.plan.width for r in reports]),
        drafting=drafting,
        unseen=_column([s.unseen for s in samples]),
        asked=_column(asked),
    )


def _column(values: Sequence[float]) -> Floats:
    return np.asarray(values, dtype=np.float64)


def _fit_overheads(profile: CostProfile, samples: Sequence[Sample]) -> CostProfile:
    """Non-negative least squares of the time outside the passes, then again without what the first calls outliers."""
    used = [s.report for s in samples]
    if len(used) < FEWEST:
        return profile
    on = np.array([float(r.plan.speculates) for r in used])
    batch = np.array([float(r.load.batch_size) for r in used])
    matrix = np.stack([np.ones(len(used)), batch, on, on * np.array([float(r.verified) for r in used])], axis=1)
    rest = np.array([max(0.0, r.times.total - r.times.verify - r.times.draft) for r in used])
    error = np.abs(rest - matrix @ nnls(matrix, rest)[0])
    near = error <= 3.0 * np.median(error)
    fit = nnls(matrix[near], rest[near])[0]
    step, request, speculative, node = (float(x) for x in fit)
    return replace(profile, step_overhead=step, request_overhead=request, spec_overhead=speculative, node_overhead=node)


def _scale_verify(profile: CostProfile, clean: Sequence[Sample]) -> CostProfile:
    ratios = _column([s.report.times.verify for s in clean]) / predicted(profile, clean).verify
    wide = np.array([s.report.verified > 0 for s in clean], dtype=bool)
    factors = (_factors(profile.batches, clean, ratios, chosen) for chosen in (~wide, wide))
    planes = []
    for batch, plane, p, w in zip(profile.batches, profile.verify, *factors, strict=True):
        scaled = [[t * (p if r <= batch else w) for t in line] for r, line in zip(profile.rows, plane, strict=True)]
        planes.append(scaled)
    return replace(profile, verify=monotone(planes))


def _scale_draft(profile: CostProfile, clean: Sequence[Sample]) -> CostProfile:
    """Factors from steps with no gate and nothing to catch up on, then the costs of either from the others."""
    drafted = [s for s in clean if s.report.plan.speculates]
    fresh = [s for s in drafted if s.unseen <= s.report.load.batch_size]
    usual = [s for s in fresh if not s.report.plan.gates]
    ratios = _column([s.report.times.draft for s in usual]) / predicted(profile, usual).draft
    factors = _factors(profile.draft_batches, usual, ratios, np.ones(len(usual), dtype=bool))
    planes = [[[t * f for t in line] for line in plane] for plane, f in zip(profile.draft, factors, strict=True)]
    fitted = replace(profile, draft=monotone(planes), catch_up=0.0, gate_overhead=0.0)
    gated = [s for s in fresh if s.report.plan.gates]
    fitted = replace(fitted, gate_overhead=_each(fitted, gated, _work(gated).asked, profile.gate_overhead))
    behind = [s for s in drafted if s.unseen > 4 * s.report.load.batch_size]
    return replace(fitted, catch_up=_each(fitted, behind, _work(behind).unseen, profile.catch_up))


def _each(profile: CostProfile, samples: Sequence[Sample], counts: Floats, fallback: float) -> float:
    """Median of what each of `counts` added to drafting, which `profile` doesn't charge yet."""
    if len(samples) < FEWEST:
        return fallback
    more = _column([s.report.times.draft for s in samples]) - predicted(profile, samples).draft
    return max(0.0, float(np.median(more / np.maximum(counts, 1.0))))


def _factors(
    batches: Sequence[int], samples: Sequence[Sample], ratios: Floats, chosen: NDArray[np.bool_]
) -> list[float]:
    """Median ratio of the chosen samples at each batch size; sizes not seen take the nearest seen one's (in log)."""
    seen: dict[int, list[float]] = {batch: [] for batch in batches}
    for sample, ratio, use in zip(samples, ratios.tolist(), chosen.tolist(), strict=True):
        if use:
            nearest = min(batches, key=lambda b: abs(math.log(b / sample.report.load.batch_size)))
            seen[nearest].append(ratio)
    known = {batch: float(np.median(r)) for batch, r in seen.items() if len(r) >= FEWEST}
    if not known:
        return [1.0] * len(batches)
    return [known[min(known, key=lambda k: abs(math.log(k / batch)))] for batch in batches]


def _prefill_weight(profile: CostProfile, samples: Sequence[Sample]) -> float:
    """The weight at which steps with prompts are predicted best."""
    mixed = [s for s in samples if s.report.load.prefill_tokens >= 32]
    if len(mixed) < FEWEST:
        return profile.prefill_weight
    took = _column([s.report.times.verify for s in mixed])

    def error(weight: float) -> float:
        trial = replace(profile, prefill_weight=weight)
        return float(np.median(np.abs(np.log(took / predicted(trial, mixed).verify))))

    return float(min(np.arange(0.4, 1.61, 0.05).tolist(), key=error))


def _noise(profile: CostProfile, clean: Sequence[Sample]) -> float:
    """Robust standard deviation (interquartile range) of log(measured / predicted) of whole steps."""
    if len(clean) < FEWEST:
        return profile.noise
    residuals = np.log(_column([s.report.times.total for s in clean]) / predicted(profile, clean).total)
    low, high = np.quantile(residuals, (0.25, 0.75))
    return float(high - low) / 1.349
