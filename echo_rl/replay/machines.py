"""Machines like a given one, but faster here and slower there: what a policy that transfers is trained on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from echo_rl.costs.interpolation import monotone
from echo_rl.costs.profile import CostProfile

Floats = NDArray[np.float64]

LEVEL, BEND, REST = 0.4, 0.8, 0.5
"""Log ratios to the given machine, at most, either way: of all passes alike; of the largest passes against the smallest
(memory bounds the small ones, arithmetic the large ones); of drafting, and of what is outside the passes."""
PLACE = (0.1, 0.8)
"""The place of the bend, as a share of the way from one row to the most that were measured, in octaves."""
SHARPNESS = (0.3, 1.0)
"""Octaves over which passes turn from small to large."""


def another(profile: CostProfile, generator: np.random.Generator) -> CostProfile:
    """A machine drawn at random about this one, on the same grid."""
    octaves = np.log2(profile.rows)
    middle = octaves[-1] * generator.uniform(*PLACE)
    large = 1.0 / (1.0 + np.exp((middle - octaves) / generator.uniform(*SHARPNESS)))
    factors = np.exp(generator.uniform(-LEVEL, LEVEL) + generator.uniform(-BEND, BEND) * large)  # [R]
    drafting, outside = np.exp(generator.uniform(-REST, REST, 2)).tolist()
    return replace(
        profile,
        verify=monotone(_verify(profile, factors)),
        draft=monotone(drafting * np.asarray(profile.draft)),
        step_overhead=outside * profile.step_overhead,
        spec_overhead=outside * profile.spec_overhead,
        request_overhead=outside * profile.request_overhead,
        node_overhead=outside * profile.node_overhead,
        catch_up=drafting * profile.catch_up,
        gate_overhead=drafting * profile.gate_overhead,
    )


def _verify(profile: CostProfile, factors: Floats) -> Floats:
    """The verify surface times the factors of passes by their rows."""
    seconds = np.asarray(profile.verify) * factors[:, None]
    for plane, batch in zip(seconds, profile.batches, strict=True):
        first = int(np.searchsorted(profile.rows[:-1], batch))
        plane[:first] = plane[first]  # no pass has fewer rows than requests
    return seconds
