"""Lists the entries of an observation: their meaning, their bounds, and the running averages that some are made of."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from echo_rl.errors import ConfigError

CODEC_VERSION = 3
DEPTHS = 8
"""Deepest level that is observed and planned."""

CONFIDENCE = (0.1, 0.5, 0.9)
"""Quantiles of the first tokens' probabilities over the requests."""
COST_NODES = (0.5, 1.0, 3.0, 7.0, 15.0, 31.0)
"""Nodes a request whose predicted step times are observed."""
RATE = 0.1
"""Share of a new measurement in the running averages."""
SPARSE_RATE = 0.05
"""The same for the acceptance at a depth that at least four requests reached, less where fewer did."""
FIRST = (0.0, *(0.5 for _ in range(DEPTHS + len(CONFIDENCE))), 1.0, 0.0)
"""Values that the running averages start from: arrivals, acceptance by depth, confidence quantiles, tokens a request
and step, share of the budget used."""

FEATURES: tuple[tuple[str, float, float], ...] = (
    ("batch (log2 / 6)", 0.0, 1.5),
    ("prefill tokens (/ 256)", 0.0, 2.0),
    ("waiting (log2(1 + n) / 6)", 0.0, 2.0),
    ("mean context (log2(1 + n) / 11)", 0.0, 1.5),
    ("KV used", 0.0, 1.0),
    ("arrivals a step, running (log2(1 + n) / 6)", 0.0, 2.0),
    *((f"acceptance at depth {d}, running", 0.0, 1.0) for d in range(DEPTHS)),
    *((f"first-token confidence, quantile {q}", 0.0, 1.0) for q in CONFIDENCE),
    ("last budget a request (log2(1 + n) / 6)", 0.0, 1.5),
    ("last depth (/ 8)", 0.0, 1.5),
    ("last width (/ 8)", 0.0, 2.0),
    ("tokens a request and step while speculating, running (/ 9)", 0.0, 1.0),
    ("share of the budget used, running", 0.0, 1.0),
    ("plain steps since speculating (log2(1 + n) / 10)", 0.0, 1.5),
    *((f"predicted step time at {n:g} nodes a request over plain (log2 / 4)", -1.0, 2.0) for n in COST_NODES),
    ("predicted time of one drafted level over a plain step", 0.0, 2.0),
)
"""Every entry of an observation: meaning, least and greatest value (clipped)."""

GROUPS: dict[str, tuple[int, int]] = {"load": (0, 6), "speculation": (6, 23), "cost": (23, 30)}
"""Observation entries by group, [begin, end): what the ablations switch off."""


def visible(hidden: Sequence[str]) -> NDArray[np.float32]:
    """[F] 1 for every feature that is shown. Raises `ConfigError` on an unknown group."""
    mask = np.ones(len(FEATURES), dtype=np.float32)
    for group in hidden:
        if group not in GROUPS:
            raise ConfigError(f"no observation group is called {group!r}; there are {', '.join(GROUPS)}")
        mask[slice(*GROUPS[group])] = 0.0
    return mask
