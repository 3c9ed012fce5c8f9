"""The agreement of two rankings, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.research.fidelity import kendall


def test_kendalls_tau_by_hand():
    a = {"w": 4.0, "x": 3.0, "y": 2.0, "z": 1.0}
    assert kendall(a, a) == 1.0 and kendall(a, {k: -v for k, v in a.items()}) == -1.0
    assert kendall(a, a | {"y": 3.5, "more": 9.0}) == pytest.approx(4 / 6)
    tied = a | {"w": 3.0}  # 5 pairs of 6 told apart on one side
    assert kendall(a, tied) == pytest.approx(5 / np.sqrt(6 * 5))
    assert kendall(a, dict.fromkeys(a, 1.0)) is None and kendall({}, a) is None
