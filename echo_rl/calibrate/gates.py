"""Calibrates a drafter's gates from live steps: which depths tell right paths from wrong, and where to cut.

Also yields what ECHO leaves out: how often each gate misjudges, with intervals. They flatter a little: a threshold
is judged by the observations that it was fitted to; a right path whose end was not verified is not seen, though a
wrong one would be; and the intervals take steps of one answer for independent. Knows observations only, not where
they come from. Confidence is a best path's cumulative probability.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from echo_rl.calibrate.cost import isotonic
from echo_rl.contracts import Forest
from echo_rl.controllers.echo.gates import DepthGate, GateCalibration, Rate
from echo_rl.errors import ConfigError

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

POWERS = np.geomspace(0.25, 4.0, 65)


@dataclass(frozen=True)
class GateObservation:
    """One request at one depth of one step."""

    depth: int
    confidence: float
    """Probability of the request's best path at this depth, in [0, 1]."""
    accepted: bool
    """True where the target's own tokens follow that path to this depth."""


@dataclass(frozen=True)
class GateOptions:
    price: float = 0.2
    """Cost of one more level for a request over what it brings when the path is right, both in tokens.

    A request is worth extending iff its path is right with more than this probability.
    """
    least: int = 20
    """Fewest accepted and fewest rejected observations for a depth to count as measured."""
    resamples: int = 400
    """Bootstrap resamples for an AUC's interval."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 < self.price < 1.0 or self.least < 1 or self.resamples < 20 or self.seed < 0:
            raise ConfigError(f"gate options need 0 < price < 1, least >= 1, resamples >= 20 and seed >= 0, not {self}")


def best_paths(forest: Forest, tokens: Sequence[Sequence[int]]) -> Iterator[GateObservation]:
    """Observations of one step: every depth of every request whose best path can be judged.

    `tokens[b]` are the tokens that the target emitted for request b (accepted ones, then the bonus). A path
    that agrees with all of them is unjudged below them and yields nothing there.
    """
    for scores, parents, drafted, truth in zip(
        forest.scores, forest.parents.tolist(), forest.tokens.tolist(), tokens, strict=True
    ):
        for depth in range(int(forest.depths.amax()) + 1):
            level = scores.masked_fill((forest.depths != depth) | scores.isnan(), float("-inf"))
            best = int(level.argmax())
            if not float(level[best]) > float("-inf"):
                break
            confidence, path, node = math.exp(min(0.0, float(level[best]))), [], best
            while node >= 0:
                path.append(drafted[node])
                node = parents[node]
            path.reverse()
            known = min(len(path), len(truth))
            wrong = path[:known] != list(truth[:known])
            if wrong or known == len(path):
                yield GateObservation(depth, confidence, not wrong)


def calibrate(observations: Iterable[GateObservation], options: GateOptions, provenance: str = "") -> GateCalibration:
    """Gates for every measured depth, the sparse depths, and the calibration of path scores.

    Sparse depths: of the measured depths' first, middle and last third, the one with the highest AUC,
    where its 95 % interval lies above one half. Raises `ConfigError` when no depth has enough observations.
    """
    by_depth: dict[int, list[GateObservation]] = {}
    for observation in observations:
        by_depth.setdefault(observation.depth, []).append(observation)
    gates, powers = [], []
    for depth, seen in sorted(by_depth.items()):
        confidence = np.array([o.confidence for o in seen], dtype=np.float64)
        accepted = np.array([o.accepted for o in seen], dtype=np.bool_)
        if min(accepted.sum(), (~accepted).sum()) >= options.least:
            gates.append(_measured_gate(depth, confidence, accepted, options))
            powers.append(score_power(confidence, accepted))
    if not gates:
        raise ConfigError(
            f"no depth has {options.least} accepted and {options.least} rejected paths; observe more steps"
        )
    return GateCalibration(tuple(gates), sparse_depths(gates), _rising_powers(gates, powers), provenance)


def auc(confidence: Floats, accepted: Bools, weights: Floats | None = None) -> float:
    """Probability that an accepted path is more confident than a rejected one, ties counting half."""
    weights = np.ones(len(confidence)) if weights is None else weights
    _, group = np.unique(confidence, return_inverse=True)
    right = np.bincount(group, weights * accepted)
    wrong = np.bincount(group, weights * ~accepted)
    below = np.cumsum(wrong) - wrong
    return float((right * (below + 0.5 * wrong)).sum() / (right.sum() * wrong.sum()))


def auc_interval(confidence: Floats, accepted: Bools, options: GateOptions) -> Rate:
    """The AUC with its 95 % bootstrap percentile interval."""
    rng, n = np.random.default_rng(options.seed), len(confidence)
    draws = []
    for _ in range(options.resamples):
        weights = np.bincount(rng.integers(n, size=n), minlength=n).astype(np.float64)
        if weights[accepted].sum() and weights[~accepted].sum():
            draws.append(auc(confidence, accepted, weights))
    low, high = np.quantile(draws, (0.025, 0.975))
    return Rate(auc(confidence, accepted), float(low), float(high))


def wilson(hits: int, n: int) -> Rate:
    """A share with its 95 % Wilson score interval."""
    z, share = 1.959964, hits / n
    centre, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return Rate(share, max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale))


def best_tau(confidence: Floats, accepted: Bools, price: float) -> float:
    """The threshold that maximises the expected benefit: accepted minus `price`, summed over extended requests.

    Lies halfway between the neighbouring confidences; 0 when extending everyone is best, 1 when no one.
    """
    order = np.argsort(-confidence, kind="stable")
    ordered = confidence[order]
    benefit = np.cumsum(accepted[order] - price)
    ends = np.append(ordered[1:] < ordered[:-1], True)  # a cut may not split equal confidences
    best = int(np.argmax(np.where(ends, benefit, -np.inf)))
    if benefit[best] <= 0.0:
        return 1.0
    return 0.0 if best == len(ordered) - 1 else float((ordered[best] + ordered[best + 1]) / 2)


def score_power(confidence: Floats, accepted: Bools) -> float:
    """The power a for which ``confidence ** a`` is the likeliest acceptance probability (maximum likelihood)."""
    logs = np.log(np.clip(confidence, 1e-6, 1.0 - 1e-6))
    fit = [(a * logs[accepted]).sum() + np.log1p(-np.exp(a * logs[~accepted])).sum() for a in POWERS]
    return float(POWERS[int(np.argmax(fit))])


def sparse_depths(gates: Sequence[DepthGate]) -> tuple[int, ...]:
    """One depth near the root, one mid, one deep: the best AUC of each third that beats chance."""
    levels = max(gate.depth for gate in gates) + 1
    chosen = []
    for third in range(3):
        band = [g for g in gates if g.depth * 3 // levels == third and g.auc is not None and g.auc.low > 0.5]
        if band:
            chosen.append(max(band, key=lambda g: g.auc.value if g.auc else 0.0).depth)
    return tuple(chosen)


def _measured_gate(depth: int, confidence: Floats, accepted: Bools, options: GateOptions) -> DepthGate:
    gate = DepthGate(depth, best_tau(confidence, accepted, options.price), len(confidence))
    passed = confidence >= gate.tau
    right, wrong = int(accepted.sum()), int((~accepted).sum())
    return replace(
        gate,
        auc=auc_interval(confidence, accepted, options),
        false_truncation=wilson(int((accepted & ~passed).sum()), right),
        false_extension=wilson(int((~accepted & passed).sum()), wrong),
    )


def _rising_powers(gates: Sequence[DepthGate], powers: Sequence[float]) -> tuple[float, ...]:
    """[D] a power for each depth from 0, smoothed to never fall; an unmeasured depth takes the next shallower one's."""
    smooth = isotonic(powers, [gate.samples for gate in gates])
    known = {gate.depth: power for gate, power in zip(gates, smooth, strict=True)}
    rising, power = [], smooth[0]
    for depth in range(gates[-1].depth + 1):
        power = known.get(depth, power)
        rising.append(power)
    return tuple(rising)
