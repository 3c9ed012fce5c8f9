"""Hand-made cost profiles."""

from __future__ import annotations

from echo_rl.costs.profile import CostProfile

BATCHES = (1, 2, 4, 8, 16, 32)
ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128)


def hinge_profile(
    free_rows: int = 16, per_row: float = 0.55e-3, level: float = 2e-3, base: float = 14e-3
) -> CostProfile:
    """Flat up to `free_rows`, then linear; drafting costs `level` seconds a level."""
    verify = tuple(tuple((base + per_row * max(0, max(r, b) - free_rows),) for r in ROWS) for b in BATCHES)
    draft = tuple(tuple(tuple(level * d for d in (1, 2, 4, 8)) for _ in (1, 10)) for _ in BATCHES)
    return CostProfile(
        "cpu", "bfloat16", "test", 2, BATCHES, ROWS, (128,), verify, BATCHES, (1, 10), (1, 2, 4, 8), draft,
        step_overhead=1e-3, spec_overhead=0.5e-3,
    )  # fmt: skip
