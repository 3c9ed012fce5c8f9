"""Holds `LoadView` and `StepReport` of many servers at once, [E] arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class BatchedLoadView:
    """The part of `LoadView` that costs and observations need, over servers, [E] each."""

    batch: Floats
    prefill: Floats
    waiting: Floats
    context: Floats
    kv_used: Floats
    arrived: Floats


@dataclass(frozen=True)
class BatchedStepReport:
    """The part of `StepReport` that costs and observations need, over servers."""

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
