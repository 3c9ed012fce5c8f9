"""Loads and outcomes of many servers at once (lanes, [E] arrays)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class BatchedLoadView:
    """`LoadView` over lanes, [E] each."""

    batch: Floats
    prefill: Floats
    waiting: Floats
    context: Floats
    kv_used: Floats
    arrived: Floats


@dataclass(frozen=True)
class BatchedStepReport:
    """What a step did, over lanes: the part of `StepReport` that observations are made of."""

    loads: BatchedLoadView
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
    other_seconds: Floats  # [E] outside the two
