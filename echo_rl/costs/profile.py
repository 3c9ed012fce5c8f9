"""Tells what a step costs on one machine: a measured surface, interpolated.

Pure data and arithmetic: it knows nothing of tensors, models or how the numbers were measured
(`echo_rl.calibrate.cost` measures them). Times are seconds, contexts are committed tokens a request.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from echo_rl.costs.files import own_or_packaged, read_record, write_record
from echo_rl.costs.interpolation import Axis, Surface, check_surface, interpolate, locate, lower_hull
from echo_rl.errors import ConfigError

PROFILE_VERSION = 2
BREAK_EVEN_ACCEPTANCE = 0.6
"""Default theta of `CostProfile.knee`: how often a typical first choice is accepted, so that past the knee not even
such nodes pay."""


@dataclass(frozen=True)
class Hinge:
    """ECHO's cost model ``T_verify ~= T_ar * (1 + gamma * max(0, K - k_max))`` fitted to a surface."""

    k_max: int
    """Drafted nodes that are verified for free."""
    gamma: float
    """Relative cost of one node past the hinge."""
    error: float
    """Root mean square of the fit's relative error."""


@dataclass(frozen=True)
class CostProfile:
    """The cost of verifying and of drafting, on a grid.

    ``verify[b][r][c]`` is one pass of `rows[r]` verified rows (roots included) for `batches[b]`
    requests that each hold `contexts[c]` tokens; entries with fewer rows than requests repeat the
    first real one. ``draft[b][w][d]`` is a whole tree of `depths[d]` levels of `widths[w]`. Both are
    non-decreasing in rows, context, width and depth, so every interpolation is too. Raises `ConfigError`.
    """

    device: str
    dtype: str
    model: str
    threads: int
    batches: Axis
    rows: Axis
    contexts: Axis
    verify: Surface
    draft_batches: Axis
    widths: Axis
    depths: Axis
    draft: Surface
    step_overhead: float = 0.0
    """Fixed seconds of every step outside the verify pass."""
    spec_overhead: float = 0.0
    """Further fixed seconds of a speculative step (selection, the accept walk)."""
    request_overhead: float = 0.0
    """Seconds that each decoding request adds to a step outside its passes."""
    node_overhead: float = 0.0
    """Seconds that each verified node adds to a step outside its passes."""
    catch_up: float = 0.0
    """Drafting seconds for each committed token past the usual two a request that the drafter hasn't seen."""
    gate_overhead: float = 0.0
    """Drafting seconds that asking at one gate adds."""
    prefill_weight: float = 1.0
    """Verified rows that one prompt token costs as much as (it needs no logits)."""
    noise: float = 0.0
    """Standard deviation of log(measured / profile)."""
    provenance: str = ""
    modelled: bool = field(default=False, repr=False)
    """Worked out from published figures (`costs.roofline`), not measured; `device` and `provenance` say so too. Not
    in the repr: resumable result files hold its digest, and those begun before there was a label can go on."""

    def __post_init__(self) -> None:
        check_surface("verify", self.verify, (self.batches, self.rows, self.contexts))
        check_surface("draft", self.draft, (self.draft_batches, self.widths, self.depths))
        scalars = ("step_overhead", "spec_overhead", "request_overhead", "node_overhead", "catch_up", "gate_overhead")
        for name in (*scalars, "prefill_weight", "noise"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"profile {name} is {getattr(self, name)}; give a finite number >= 0")
        if not isinstance(self.modelled, bool):
            raise ConfigError(f"profile modelled is {self.modelled!r}; give true or false")
        if self.modelled and not all(text.startswith("modelled") for text in (self.device, self.provenance)):
            raise ConfigError("the device and the provenance of a modelled profile must begin with 'modelled'")

    @property
    def title(self) -> str:
        """The machine and model in a few words, for the heads of tables; a modelled one begins with ``modelled``."""
        return f"{self.device}, {self.model} {self.dtype}"

    def verify_seconds(self, batch: int, rows: float, context: float = 0.0) -> float:
        """One verify pass. Linear between knots and past the last row; batch and context are clamped to the grid."""
        at = (batch, max(rows, batch), context)
        return interpolate(self.verify, (self.batches, self.rows, self.contexts), at, (False, True, False))

    def verify_each(self, batch: int, rows: Sequence[float], context: float = 0.0) -> list[float]:
        """`verify_seconds` of passes that differ in their rows alone, for little more than the time of one."""
        (a0, a1, ta), (c0, c1, tc) = locate(self.batches, batch, False), locate(self.contexts, context, False)
        curve = [line[c0] + tc * (line[c1] - line[c0]) for line in self.verify[a0]]
        if ta:
            other = [line[c0] + tc * (line[c1] - line[c0]) for line in self.verify[a1]]
            curve = [low + ta * (high - low) for low, high in zip(curve, other, strict=True)]
        places = (locate(self.rows, max(n, batch), True) for n in rows)
        return [curve[b0] + tb * (curve[b1] - curve[b0]) for b0, b1, tb in places]

    def draft_seconds(self, batch: int, width: int, depth: int) -> float:
        """Drafting a tree of `depth` levels, 0 for none. Linear past the last depth; batch and width are clamped."""
        if depth <= 0:
            return 0.0
        axes = (self.draft_batches, self.widths, self.depths)
        return interpolate(self.draft, axes, (batch, width, depth), (False, False, True))

    def ar_seconds(self, batch: int, context: float = 0.0) -> float:
        """The pass of one plain decoding step: every request verifies its root alone."""
        return self.verify_seconds(batch, batch, context)

    def step_seconds(self, batch: int, nodes: int, width: int, depth: int, context: float = 0.0) -> float:
        """A whole step that verifies `nodes` drafted nodes over the batch; 0 nodes is plain decoding."""
        verify = self.verify_seconds(batch, batch + nodes, context) + self.overhead_seconds(batch, nodes, nodes > 0)
        return verify + self.draft_seconds(batch, width, depth) if nodes else verify

    def overhead_seconds(self, batch: int, nodes: int = 0, speculative: bool = False) -> float:
        """Seconds that a step spends outside drafting and verifying."""
        extra = self.spec_overhead + self.node_overhead * nodes if speculative else 0.0
        return self.step_overhead + self.request_overhead * batch + extra

    def knee(self, batch: int, context: float = 0.0, theta: float = BREAK_EVEN_ACCEPTANCE, beside: float = 0.0) -> int:
        """K_max: the most drafted nodes for which one more costs at most `theta` plainly decoded tokens.

        Walks the lower convex hull of the measured knots past the roots, so that one noisy knot
        neither ends nor prolongs the walk, and stops at the first edge whose seconds a node exceed
        ``theta * ar_seconds / batch``. Past it, a node that is accepted with probability
        theta costs more time than plain decoding needs for the tokens it brings, whatever the
        drafter costs; so theta is the break-even acceptance. Never more than the grid measured. What
        the first nodes cost at once (a speculative pass is another pass than a plain one) is no slope: it
        is left to whoever weighs the whole step. Under ECHO's own model (see `hinge`) with
        ``gamma * batch > theta`` the knee is exactly its K_max; where gamma is smaller the nodes past
        the hinge still pay and the knee lies further out.

        `beside` are the rows that prompts already take in the pass: they use up the idle arithmetic first.
        """
        price = theta * self.ar_seconds(batch, context) / max(1, batch) * (1.0 + 1e-9)
        rows = [r for r in self.rows if r > batch]
        seconds = self.verify_each(batch, [r + beside for r in rows], context)
        knots = list(zip(rows, seconds, strict=True))
        edges = [(high, (dear - cheap) / (high - low)) for (low, cheap), (high, dear) in pairwise(lower_hull(knots))]
        reached = 0
        for corner, slope in edges:
            if slope > price:
                break
            reached = corner - batch
        if not reached and knots:
            least, dearer = knots[0]
            flat = dearer - self.verify_seconds(batch, batch + beside, context) <= price * (least - batch)
            reached = least - batch if flat else 0
        return reached

    def hinge(self, batch: int, context: float = 0.0) -> Hinge:
        """Least squares fit (relative errors) of ECHO's cost model over the measured knots.

        Source: ECHO, arXiv 2604.09603, which gives the form and neither number.
        """
        plain = self.ar_seconds(batch, context)
        knots = [0, *(r - batch for r in self.rows if r > batch)]
        ratios = [self.verify_seconds(batch, batch + n, context) / plain for n in knots]
        return min((_fit_gamma(k, knots, ratios) for k in range(knots[-1] + 1)), key=lambda h: (h.error, h.k_max))

    def save(self, path: str | Path) -> None:
        write_record(path, "cost profile", PROFILE_VERSION, asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> CostProfile:
        """Read a profile. Raises `ConfigError` when the file is missing, corrupt or of another version."""
        body = read_record(path, "cost profile", PROFILE_VERSION)
        unknown = body.keys() - {f.name for f in fields(cls)}
        if unknown:
            raise ConfigError(f"{path} has unknown fields {sorted(unknown)}; calibrate again")
        try:
            return cls(**{key: _frozen(value) for key, value in body.items()})
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{path} is not a usable cost profile ({error}); calibrate again") from error

    @classmethod
    def of(cls, given: CostProfile | str | Path | None) -> CostProfile:
        """A profile, the one in a file, or for None the default. Raises `ConfigError`."""
        if given is None:
            return cls.default()
        return given if isinstance(given, CostProfile) else cls.load(given)

    @classmethod
    def default(cls) -> CostProfile:
        """This machine's own profile where `echo-rl calibrate` has made one, else the one that ships with the package.

        `provenance` says where the numbers come from.
        """
        return cls.load(own_or_packaged("profile.json"))


def half_octave(context: float) -> int:
    """A mean context in steps of a factor of the square root of 2."""
    return round(2.0 * math.log2(context + 1.0))


def context_of(halves: int) -> float:
    """The context that so many half octaves stand for."""
    return float(2.0 ** (halves / 2.0)) - 1.0


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, list) else value


def _fit_gamma(k_max: int, nodes: Sequence[int], ratios: Sequence[float]) -> Hinge:
    """The gamma >= 0 that fits `ratios` best for a given hinge, errors weighted by 1 / ratio."""
    xs = [max(0, n - k_max) / r for n, r in zip(nodes, ratios, strict=True)]
    ys = [(r - 1.0) / r for r in ratios]
    square = sum(x * x for x in xs)
    gamma = max(0.0, sum(x * y for x, y in zip(xs, ys, strict=True)) / square) if square else 0.0
    residual = sum((y - gamma * x) ** 2 for x, y in zip(xs, ys, strict=True)) / len(xs)
    return Hinge(k_max, gamma, round(math.sqrt(residual), 12))
