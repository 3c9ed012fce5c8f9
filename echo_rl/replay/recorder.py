"""Records responses with the widest forest at every position: the raw material of replay.

Drives a live engine by plain decoding (one token a step, so every position is seen) while the
drafter grows a nested forest that is looked at and never verified. Writes one part a batch of
prompts; a rerun goes on with the parts that are missing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from echo_rl.contracts import Backend, Forest, LoadView, Request, Selection, SpecPlan, StepReport
from echo_rl.controllers.base import BaseController
from echo_rl.controllers.selection import pack
from echo_rl.errors import ConfigError
from echo_rl.replay.levels import Level, beams
from echo_rl.replay.response import Response
from echo_rl.replay.trace import Trace
from echo_rl.utils.result_store import claim, digest_of
from echo_rl.workloads.driver import serve


@dataclass(frozen=True)
class RecordOptions:
    depth: int = 8
    """Levels of the recorded forests."""
    width: int = 8
    """Widest beam that a replayed plan may ask for."""
    batch: int = 16
    """Requests recorded side by side, and one part of the file."""

    def __post_init__(self) -> None:
        if not (1 <= self.depth <= 8 and 1 <= self.width <= 16 and self.batch >= 1):
            raise ConfigError(f"record needs depth in 1..8, width in 1..16 and batch >= 1, not {self}")

    @property
    def expanded(self) -> int:
        """The expanded nodes a request that `EngineConfig.max_expanded` must allow."""
        return SpecPlan(1, self.depth, self.width, nested=True).expanded


def record(
    engine: Backend,
    requests: Sequence[Request],
    eos: frozenset[int],
    options: RecordOptions,
    parts: Path,
    provenance: str = "",
    console: Console | None = None,
) -> Trace:
    """The trace of these requests, whose parts lie in the folder `parts`.

    Raises `ConfigError` for requests that refuse speculation, for stop strings (a trace knows tokens only), for answers
    of a single token, where there are no requests, and where `parts` holds those of other requests (prompts, sampling
    and all), options or provenance.
    """
    if not all(request.speculate for request in requests):
        raise ConfigError("a recording drafts for every request; leave `speculate` true, their tokens are the same")
    if any(request.params.stop for request in requests):
        raise ConfigError("a recording cannot end at stop strings; leave `stop` empty")
    if not requests:
        raise ConfigError("there are no requests to record; give at least one")
    if min(request.params.max_new_tokens for request in requests) < 2:
        raise ConfigError("a first token is the prompt's, not a step's; record with max_new_tokens of at least 2")
    asked = digest_of(*(repr(request).encode() for request in requests))
    what = {"options": asdict(options), "requests": asked, "provenance": provenance}
    claim(parts / "recording.json", what, "a recording", parts.glob("part-*.safetensors"))
    chunks = [requests[i : i + options.batch] for i in range(0, len(requests), options.batch)]
    traces = []
    columns = (TextColumn("recording"), MofNCompleteColumn(), TextColumn("parts"), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=console is None) as progress:
        for i, chunk in enumerate(progress.track(chunks)):
            path = parts / f"part-{i:04}.safetensors"
            if not path.is_file():
                _record_part(engine, chunk, eos, options, provenance).save(path)
            traces.append(Trace.load(path))
    return concatenate(traces)


def concatenate(traces: Sequence[Trace]) -> Trace:
    """One trace of all responses; levels are padded to the widest."""
    levels = tuple(_stack([t.levels[d] for t in traces]) for d in range(traces[0].max_depth))
    return Trace(tuple(r for t in traces for r in t.responses), levels, traces[0].provenance)


class Recorder(BaseController):
    """Verifies nothing; keeps the forests, request by request."""

    name = "recorder"

    def __init__(self, options: RecordOptions) -> None:
        super().__init__()
        self._options = options
        self._forest: Forest | None = None
        self.seen: dict[str, list[_Position]] = defaultdict(list)

    def propose(self, load: LoadView) -> SpecPlan:
        return SpecPlan(1, self._options.depth, self._options.width, nested=True)

    def select(self, forest: Forest, plan: SpecPlan) -> Selection:
        self._forest = forest
        return pack(forest, torch.zeros_like(forest.exists))

    def observe(self, report: StepReport) -> None:
        if self._forest is not None:
            rows = _positions(self._forest, self._options)
            for output, row in zip(report.outputs, rows, strict=False):
                self.seen[output.id].append(row)
        self._forest = None


@dataclass(frozen=True)
class _Position:
    """One position's forest: a `Level` of one row each, its path still unknown, and the candidates' tokens [F, W]."""

    levels: tuple[Level, ...]
    tokens: tuple[NDArray[np.int64], ...]


def _record_part(
    engine: Backend, requests: Sequence[Request], eos: frozenset[int], options: RecordOptions, provenance: str
) -> Trace:
    recorder = Recorder(options)
    longer = [
        replace(r, params=replace(r.params, max_new_tokens=r.params.max_new_tokens + options.depth, ignore_eos=True))
        for r in requests
    ]
    run = serve(engine, recorder, longer, len(longer))
    responses, rows = [], []
    for request, got in zip(requests, run.requests, strict=True):
        if got.error is not None:
            raise ConfigError(f"request '{request.id}' failed while recording: {got.error}")
        response = _response(request, got.tokens, eos, options.depth)
        responses.append(response)
        rows += [
            _on_path(position, response.tokens[t : t + options.depth])
            for t, position in enumerate(recorder.seen[request.id][: response.positions], 1)
        ]
    levels = tuple(_stack([row[d] for row in rows] or [_none(options.width)]) for d in range(options.depth))
    return Trace(tuple(responses), levels, provenance)


def _response(request: Request, tokens: tuple[int, ...], eos: frozenset[int], depth: int) -> Response:
    params = request.params
    ends = [i + 1 for i, t in enumerate(tokens[: params.max_new_tokens]) if t in eos and not params.ignore_eos]
    length = ends[0] if ends else params.max_new_tokens
    suite = request.id.split("/")[0]
    return Response(suite, request.prompt, params, tokens[: length + depth], length, "stop" if ends else "length")


def _positions(forest: Forest, options: RecordOptions) -> list[_Position]:
    """The step's forests, one a request, without the expansions that no beam needs."""
    depths, width = forest.depths.cpu().numpy(), options.width
    scores, parents, tokens = (each.cpu().numpy() for each in (forest.scores, forest.parents, forest.tokens))
    bounds = np.searchsorted(depths, np.arange(options.depth + 1))
    levels, words = [], []
    for d in range(options.depth):
        begin, end = bounds[d], bounds[d + 1]
        group = parents[:, begin:end:width] - (bounds[d - 1] if d else 0)
        shape = (len(scores), -1, width)
        levels.append(Level(scores[:, begin:end].reshape(shape), group, np.full(len(scores), -1)))
        words.append(tokens[:, begin:end].reshape(shape))
    needed = beams(levels, width)
    return [_compact(levels, words, needed, row) for row in range(len(scores))]


def _compact(
    levels: Sequence[Level], words: Sequence[NDArray[np.int64]], needed: Sequence[NDArray[np.bool_]], row: int
) -> _Position:
    """One row with the needed expansions alone, parents renumbered."""
    kept, tokens, places = [], [], np.zeros(1, dtype=np.int64)
    for d, (level, word, need) in enumerate(zip(levels, words, needed, strict=True)):
        mask, width = need[row], level.scores.shape[2]
        parents = level.parents[row][mask]
        if d:
            parents = places[parents // width] * width + parents % width
        places = np.cumsum(mask) - 1
        kept.append(Level(level.scores[row][mask][None], parents[None], level.path[row : row + 1]))
        tokens.append(word[row][mask])
    return _Position(tuple(kept), tuple(tokens))


def _on_path(position: _Position, tokens: Sequence[int]) -> list[Level]:
    """The position's levels with the place of the target's token at each depth."""
    levels, above = [], -1
    for level, words, token in zip(position.levels, position.tokens, tokens, strict=True):
        groups = np.flatnonzero(level.parents[0] == above)  # at most one
        hits = np.flatnonzero(words[groups[0]] == token) if len(groups) else groups
        above = int(groups[0] * words.shape[1] + hits[0]) if len(hits) else -2
        levels.append(replace(level, path=np.array([max(above, -1)])))
    return levels


def _none(width: int) -> Level:
    """A level of no position: every answer ended with its first token."""
    return Level(np.zeros((0, 1, width), np.float32), np.zeros((0, 1), np.int64), np.zeros(0, np.int64))


def _stack(levels: Sequence[Level]) -> Level:
    """Levels of the same depth, one below the other, padded to the widest."""
    most = max(level.parents.shape[1] for level in levels)
    pads = [(0, most - level.parents.shape[1]) for level in levels]
    scores = [np.pad(v.scores, ((0, 0), p, (0, 0)), constant_values=-np.inf) for v, p in zip(levels, pads, strict=True)]
    parents = [np.pad(v.parents, ((0, 0), p), constant_values=-1) for v, p in zip(levels, pads, strict=True)]
    return Level(np.concatenate(scores), np.concatenate(parents), np.concatenate([v.path for v in levels]))
