"""Recorded responses: at every position the widest forest that could have been drafted, and what the target said.

The token path doesn't depend on the controller (position-keyed sampling), and the forest of a
narrower or shallower plan is a part of the recorded one, so a trace tells exactly what *any* plan
would have had accepted. Knows nothing of time, controllers or models.

Shapes: R responses, P positions (a response of n tokens has n - 1: its first token is the
prompt's), D depths, W width, F_d nodes expanded to draft depth d (F_0 = 1, the root).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from echo_rl.contracts import Request, SamplingParams
from echo_rl.errors import ConfigError, TraceError
from echo_rl.replay.levels import Level, Restricted, restrict
from echo_rl.replay.response import Response
from echo_rl.replay.trace_file import read_trace, write_trace
from echo_rl.utils.result_store import digest_of

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Trace:
    """Responses and the levels of their forests, positions of all responses in order. Raises `TraceError`."""

    responses: tuple[Response, ...]
    levels: tuple[Level, ...]
    provenance: str = ""

    def __post_init__(self) -> None:
        if not self.responses or not self.levels:
            raise TraceError("the trace holds no response; record again")
        positions = sum(r.positions for r in self.responses)
        if any(len(level.scores) != positions for level in self.levels):
            raise TraceError(f"the trace's levels do not have one entry for each of its {positions} positions")

    @property
    def max_depth(self) -> int:
        return len(self.levels)

    @property
    def max_width(self) -> int:
        return self.levels[0].scores.shape[2]

    @property
    def suites(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(r.suite for r in self.responses))

    @cached_property
    def first(self) -> Ints:
        """[R] index of each response's first position."""
        counts = np.array([r.positions for r in self.responses])
        return np.cumsum(counts) - counts

    @cached_property
    def index(self) -> dict[tuple[Any, ...], int]:
        """Responses by what identifies their request."""
        return {key(r.prompt, r.params): i for i, r in enumerate(self.responses)}

    @cached_property
    def digest(self) -> str:
        """The first 12 digits of a hash over what a replay depends on."""
        parts = [repr(self.responses).encode()]
        parts += [array.tobytes() for level in self.levels for array in (level.scores, level.parents, level.path)]
        return digest_of(*parts)

    @cached_property
    def _restricted(self) -> dict[int, Restricted]:
        return {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Trace:
        """The trace itself: it never changes, so copies of what replays it share it."""
        return self

    def restricted(self, width: int) -> Restricted:
        """The forests of plans of this width. Raises `TraceError` where it was recorded narrower."""
        if not 1 <= width <= self.max_width:
            raise TraceError(f"the trace holds widths 1 to {self.max_width}, not {width}; record with --width {width}")
        if width not in self._restricted:
            self._restricted[width] = restrict(self.levels, width)
        return self._restricted[width]

    def require(self, depth: int, width: int) -> None:
        """Raises `TraceError` where an action table drafts deeper or wider than was recorded."""
        if depth > self.max_depth or width > self.max_width:
            raise TraceError(
                f"the action table drafts {depth} levels deep, the trace holds {self.max_depth}; record with --depth "
                f"{depth} --width {width} (this one has {self.max_depth} levels of width {self.max_width}), or give a "
                "smaller table"
            )

    def requests(self, suite: str = "all") -> tuple[Request, ...]:
        """The recorded requests, of one suite or all. Raises `TraceError` on an unknown suite."""
        if suite != "all" and suite not in self.suites:
            raise TraceError(f"the trace has no suite {suite!r}; it has {', '.join(self.suites)}")
        chosen = enumerate(self.responses)
        return tuple(Request(f"{r.suite}/{i}", r.prompt, r.params) for i, r in chosen if suite in ("all", r.suite))

    def split(self, held_out: float = 0.3, seed: int = 0) -> tuple[Trace, Trace]:
        """(train, held-out) by prompt: all responses to one prompt stay together. Of nothing held out both are all."""
        if not held_out:
            return self, self
        texts = {r.prompt: f"{seed}:{','.join(map(str, r.prompt))}".encode() for r in self.responses}
        prompts = sorted(texts, key=lambda prompt: hashlib.sha256(texts[prompt]).hexdigest())
        if len(prompts) < 2 or not 0.0 < held_out < 1.0:
            raise ConfigError(f"cannot hold out {held_out} of {len(prompts)} prompts; record more, or give a share < 1")
        apart = set(prompts[: min(len(prompts) - 1, max(1, round(held_out * len(prompts))))])
        out = [r.prompt in apart for r in self.responses]
        return self.subset([i for i, o in enumerate(out) if not o]), self.subset([i for i, o in enumerate(out) if o])

    def subset(self, responses: Sequence[int]) -> Trace:
        """The trace of these responses alone, in this order."""
        rows = np.concatenate([self.first[i] + np.arange(self.responses[i].positions) for i in responses])
        levels = tuple(Level(v.scores[rows], v.parents[rows], v.path[rows]) for v in self.levels)
        return Trace(tuple(self.responses[i] for i in responses), levels, self.provenance)

    def save(self, path: Path, half: bool = False) -> None:
        """Write the trace; `half` keeps log-probabilities in 16 bits: near-ties may then turn out otherwise."""
        write_trace(path, self.responses, self.levels, self.provenance, half)

    @classmethod
    def load(cls, path: Path) -> Trace:
        """Read a trace. Raises `TraceError` where the file is missing, damaged or of another version."""
        return cls(*read_trace(path))

    @classmethod
    def of(cls, path: Path | None) -> Trace:
        """The trace at `path`, else the packaged one. Raises `TraceError`."""
        return cls.load(path) if path else cls.packaged()

    @classmethod
    def packaged(cls) -> Trace:
        """The small trace that ships with the package."""
        return cls.load(Path(str(files("echo_rl").joinpath("replay", "data", "trace.safetensors"))))


def key(prompt: Sequence[int], params: SamplingParams) -> tuple[Any, ...]:
    """The values that decide a request's tokens: its prompt and how they are drawn."""
    p = params
    return tuple(prompt), p.temperature, p.top_k, p.top_p, p.seed, p.max_new_tokens, p.stop, p.ignore_eos
