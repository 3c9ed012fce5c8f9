"""Measures a machine's cost surface into a `CostProfile`.

Knows how to measure (interleaved repetitions, quartiles, smoothing, resuming) and not what: the passes
themselves are callables, so the live engine and a fake with a known surface are measured alike.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from scipy.optimize import isotonic_regression

from echo_rl.costs.files import read_record, write_record
from echo_rl.costs.interpolation import Axis, Surface, monotone
from echo_rl.costs.profile import CostProfile
from echo_rl.errors import ConfigError
from echo_rl.utils.result_store import differing

SAMPLES_VERSION = 1
SAVE_EVERY = 2.0  # seconds between writes of the samples file

VerifyTimer = Callable[[int, int, int], float]
"""(batch, verified rows in all, context) -> seconds of one verify pass."""
DraftTimer = Callable[[int, int, int, int], float]
"""(batch, width, depth, context) -> seconds of drafting one tree of `depth` levels."""
Point = tuple[str, int, int, int]


@dataclass(frozen=True)
class Machine:
    """The machine and model that a profile is of."""

    device: str
    dtype: str
    model: str
    threads: int


@dataclass(frozen=True)
class Grid:
    """The points to measure. Rows gain every batch size, so that plain decoding is always measured itself."""

    batches: Axis = (1, 2, 4, 8, 16, 32, 64)
    rows: Axis = (1, 2, 4, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128, 256)
    contexts: Axis = (64, 512)
    widths: Axis = (1, 3, 6, 10)
    depths: Axis = (1, 2, 3, 5, 8)
    draft_context: int = 256
    """Context of the drafting measurements; its effect on a one-layer drafter is below the noise."""
    repeats: int = 5

    def __post_init__(self) -> None:
        for name in ("batches", "rows", "contexts", "widths", "depths"):
            axis: Axis = getattr(self, name)
            if not axis or axis[0] < 1 or any(b <= a for a, b in pairwise(axis)):
                raise ConfigError(f"{name} of the grid are {list(axis)}; give rising numbers from 1")
        for name in ("draft_context", "repeats"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; give at least 1")

    @property
    def verify_rows(self) -> Axis:
        return tuple(sorted({*self.rows, *self.batches}))

    def points(self) -> list[Point]:
        verify = [("verify", b, r, c) for b in self.batches for r in self.verify_rows if r >= b for c in self.contexts]
        return verify + [("draft", b, w, d) for b in self.batches for w in self.widths for d in self.depths]


def measure(
    time_verify: VerifyTimer,
    time_draft: DraftTimer,
    machine: Machine,
    grid: Grid,
    samples: Path | None = None,
    console: Console | None = None,
    provenance: str = "",
    environment: Mapping[str, str] | None = None,
) -> CostProfile:
    """Time every point `grid.repeats` times and fit the profile; overheads are left at 0.

    Every repetition visits all points in a new order, so a slow minute of the machine touches all of
    them a little and none a lot. `samples` is rewritten as the measurement goes; a later call with
    the same file continues it, and measures nothing where it has all. Raises `ConfigError` when that file belongs to
    another machine, grid or `environment` (what else times depend on: processor, release, drafter, settings).
    """
    points = grid.points()
    identity = _identity(machine, grid, environment or {})
    taken = _resume(samples, identity)
    rounds = [point for r in range(grid.repeats) for point in _shuffled(points, r) if len(taken.get(point, [])) <= r]
    saved = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=console is None) as progress:
        for point in progress.track(rounds, description="measuring"):
            kind, a, b, c = point
            seconds = time_verify(a, b, c) if kind == "verify" else time_draft(a, b, c, grid.draft_context)
            taken.setdefault(point, []).append(_checked(seconds, point))
            if samples is not None and time.monotonic() - saved > SAVE_EVERY:
                _save(samples, identity, taken)
                saved = time.monotonic()
    if samples is not None:
        _save(samples, identity, taken)
    return fit(taken, machine, grid, provenance)


def fit(taken: dict[Point, list[float]], machine: Machine, grid: Grid, provenance: str = "") -> CostProfile:
    """The profile of the samples, smoothed to be non-decreasing in work, and their residual noise.

    A point's cost is its lower quartile: machines have slow spells, and a ratio of two points means
    something only when both were measured outside one.
    """
    usual = {point: float(np.quantile(seconds, 0.25)) for point, seconds in taken.items()}
    rows, contexts = grid.verify_rows, grid.contexts
    verify = []
    for b in grid.batches:
        real = np.stack([isotonic([usual["verify", b, r, c] for r in rows if r >= b]) for c in contexts], axis=1)
        verify.append(np.pad(real, ((len(rows) - len(real), 0), (0, 0)), mode="edge"))
    draft = [[isotonic([usual["draft", b, w, d] for d in grid.depths]) for w in grid.widths] for b in grid.batches]
    surfaces = {"verify": monotone(verify), "draft": monotone(draft)}
    axes = {"verify": (grid.batches, rows, contexts), "draft": (grid.batches, grid.widths, grid.depths)}
    residuals = [
        math.log(seconds / _at(surfaces[kind], axes[kind], at))
        for (kind, *at), measured in taken.items()
        for seconds in measured
    ]
    return CostProfile(
        **asdict(machine),
        batches=grid.batches,
        rows=rows,
        contexts=contexts,
        verify=surfaces["verify"],
        draft_batches=grid.batches,
        widths=grid.widths,
        depths=grid.depths,
        draft=surfaces["draft"],
        noise=statistics.pstdev(residuals),
        provenance=provenance,
    )


def isotonic(values: Sequence[float], weights: Sequence[float] | None = None) -> list[float]:
    """The closest non-decreasing sequence in the (weighted) least squares sense."""
    risen: list[float] = isotonic_regression(values, weights=weights).x.tolist()
    return risen


def _at(surface: Surface, axes: tuple[Axis, Axis, Axis], at: Sequence[int]) -> float:
    a, b, c = (axis.index(x) for axis, x in zip(axes, at, strict=True))
    return surface[a][b][c]


def _checked(seconds: float, point: Point) -> float:
    if not 0.0 < seconds < math.inf:
        raise ConfigError(f"timing {point} returned {seconds} seconds; a timer must return a time")
    return seconds


def _shuffled(points: Sequence[Point], seed: int) -> list[Point]:
    return random.Random(seed).sample(points, len(points))


def _save(path: Path, identity: Mapping[str, object], taken: dict[Point, list[float]]) -> None:
    listed = [[*point, seconds] for point, seconds in taken.items()]
    write_record(path, "cost samples", SAMPLES_VERSION, {**identity, "samples": listed})


def _resume(path: Path | None, identity: Mapping[str, object]) -> dict[Point, list[float]]:
    if path is None or not path.exists():
        return {}
    body = read_record(path, "cost samples", SAMPLES_VERSION)
    changed = differing({key: body.get(key) for key in identity}, identity)
    if changed:
        raise ConfigError(
            f"{path} holds samples with another {', '.join(changed)}; delete it to measure anew, or give another folder"
        )
    try:
        return {(kind, a, b, c): list(seconds) for kind, a, b, c, seconds in body["samples"]}
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} holds no usable samples ({error}); delete it and measure again") from error


def _identity(machine: Machine, grid: Grid, environment: Mapping[str, str]) -> dict[str, object]:
    """Everything that must be equal to continue a measurement, in JSON's own types; the repetitions may grow."""
    axes = {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(grid).items() if key != "repeats"}
    return {"machine": asdict(machine), "grid": axes, "environment": dict(environment)}
