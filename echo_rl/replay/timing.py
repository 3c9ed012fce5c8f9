"""Tells how long a simulated step takes: applies the measured cost surface to what it did, for E servers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from echo_rl.costs.batched_profile import BatchedCostProfile

Floats = NDArray[np.float64]


LEAST = 0.1
"""Share of a plain step that a step is taken to last, however much of it its prompts are predicted to take."""


@dataclass(frozen=True)
class Work:
    """The work that E steps did, [E] each."""

    batch: Floats
    context: Floats
    prefill: Floats
    verified: Floats
    width: Floats
    drafting: Floats  # [E, D] requests that drafted each depth
    unseen: Floats  # tokens that the drafter caught up on, past two a request
    asked: Floats  # gates that were asked


@dataclass(frozen=True)
class Phases:
    """Seconds, [E] each."""

    verify: Floats
    draft: Floats
    overhead: Floats

    @property
    def total(self) -> Floats:
        return self.verify + self.draft + self.overhead

    def times(self, factor: Floats) -> Phases:
        return Phases(self.verify * factor, self.draft * factor, self.overhead * factor)


def step_phases(costs: BatchedCostProfile, work: Work) -> Phases:
    """Noise-free seconds of the steps."""
    rows = work.batch + work.verified + costs.scalar("prefill_weight") * work.prefill
    verify = costs.verify(np.maximum(work.batch, 1.0), rows, work.context)
    speculative = work.drafting[:, 0] > 0
    overhead = costs.overhead(work.batch, work.verified, speculative)
    return Phases(verify, _draft(costs, work, speculative), overhead)


@dataclass(frozen=True)
class Plain:
    """The seconds of steps without speculation and noise, [E] each: the measure of what speculation brings."""

    decode: Floats  # a step of the decoding requests alone: a token each
    prompts: Floats  # what the prompt tokens add to it, whatever is decided

    def besides(self, seconds: Floats) -> Floats:
        """The predicted seconds, without their prompts, of steps that took so long."""
        return np.maximum(seconds - self.prompts, LEAST * self.decode)

    def worth(self, decoded: Floats, batch: Floats) -> Floats:
        """Seconds of plain serving that a step replaces which brought `decoded` tokens of decoding requests."""
        return self.decode * decoded / np.maximum(batch, 1.0) + self.prompts


def plain_step(costs: BatchedCostProfile, batch: Floats, context: Floats, prefill: Floats) -> Plain:
    """`Plain` of steps with these loads."""
    rows = np.stack([batch, batch + costs.scalar("prefill_weight") * prefill], axis=1)
    alone, beside = costs.verify(batch[:, None], rows, context[:, None]).T
    return Plain(alone + costs.overhead(batch, 0.0, False), beside - alone)


def noise(generators: Sequence[np.random.Generator], sigma: Floats) -> Floats:
    """[E] lognormal factors of mean 1, one of each generator."""
    drawn = np.array([generator.standard_normal() for generator in generators])
    return np.exp(sigma * drawn - 0.5 * sigma * sigma)


def _draft(costs: BatchedCostProfile, work: Work, speculative: NDArray[np.bool_]) -> Floats:
    """Level by level, each at the cost of the requests that drafted it."""
    if not speculative.any():
        return np.zeros(len(work.batch))
    levels = 1 + int(np.flatnonzero(work.drafting.any(0))[-1])
    alive = work.drafting[:, :levels]
    depth = np.arange(1, levels + 1)
    step = costs.level(np.maximum(alive, 1.0), np.maximum(work.width, 1.0)[:, None], depth)
    besides = costs.scalar("catch_up") * work.unseen + costs.scalar("gate_overhead") * work.asked
    drafted: Floats = np.where(alive > 0, step, 0.0).sum(1) + np.where(speculative, besides, 0.0)
    return drafted
