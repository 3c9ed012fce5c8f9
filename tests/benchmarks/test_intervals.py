"""The intervals of means over policies and seeds."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.intervals import geometric_mean
from echo_rl.errors import ConfigError


def test_geometric_mean_of_ratios():
    found = geometric_mean([0.5, 2.0, 1.0, 1.0])
    assert found.estimate == pytest.approx(1.0) and found.low < 1.0 < found.high and found.blocks == 4
    assert geometric_mean([1.5] * 3).text() == "1.50 [1.50, 1.50]"
    assert geometric_mean([[2.0, 0.5, 1.0]]) == geometric_mean([2.0, 0.5, 1.0])


def test_policies_that_met_the_same_seeds_are_not_as_many_independent_ones():
    """Five policies of which each seed makes the same: as wide as one policy's, not as that of 5 x 6 ratios."""
    rng, held = np.random.default_rng(0), 0
    for seed in range(100):
        shared = np.exp(0.02 * rng.normal(size=6))
        found = geometric_mean(np.tile(shared, (5, 1)), seed=seed)
        assert found.estimate == pytest.approx(np.exp(np.log(shared).mean())) and found.blocks == 6
        held += found.low <= 1.0 <= found.high
    assert held >= 88  # of 95 expected
    with pytest.raises(ConfigError):
        geometric_mean([])
