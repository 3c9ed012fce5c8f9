"""What must hold of a server after a soak, by its counters, its log, its memory and its clients."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.server.process import total
from benchmarks.soak.clients import COMPLETIONS, ClientRequest
from echo_rl.server.api.request_stats import CUT_OFF

TO_V1 = COMPLETIONS | {"malformed", "senseless", "oversized prompt"}
"""Kinds whose requests reach a route of /v1, where the server reads them at all."""
WARM = 0.25
"""The share of a run, and of an engine process, in which memory may grow freely."""
FRONT_MB, ENGINE_MB = 24.0, 64.0
"""The most megabytes that the trend of the rest may add."""
STRETCHES = 100
FEWEST = 5
"""The fewest samples for a trend."""
SHORTEST = 20.0
"""The fewest seconds for a trend: in less a busy machine has not even warmed up."""


@dataclass(frozen=True)
class Sample:
    """Resident memory in MB; None of a process that is not there."""

    at: float
    front_mb: float | None
    engine: int | None
    """Its process id."""
    engine_mb: float | None


@dataclass(frozen=True)
class Totals:
    """What the server says of itself: /admin/stats and /metrics."""

    stats: dict[str, Any]
    metrics: str

    @classmethod
    def of(cls, stats: bytes, metrics: bytes) -> Totals:
        return cls(json.loads(stats), metrics.decode())

    @property
    def empty(self) -> bool:
        """No request is held anywhere."""
        core = self.stats["core"].get("in_flight")
        return not (self.stats["in_flight"] or self.stats["admitted"] or core)

    def leaks(self) -> list[str]:
        """What is still held by a server without requests."""
        kv = self.stats["core"].get("kv")
        return [] if kv == "conserved" else [f"KV at rest: {kv}, {self.stats}"]

    def count(self, name: str, **labels: str) -> int:
        return round(total(self.metrics, name, **labels))


def compare_texts(requests: Sequence[ClientRequest]) -> dict[str, int]:
    """How many answers repeat a request, and how many of those are not the first answer to it."""
    answers: dict[bytes, list[tuple[str, ...]]] = defaultdict(list)
    for request in requests:
        if request.outcome == "finished":
            answers[request.asked].append(request.texts)
    return {
        "requests": len(answers),
        "compared": sum(len(found) - 1 for found in answers.values()),
        "changed": sum(text != found[0] for found in answers.values() for text in found[1:]),
    }


def compare_counters(
    requests: Sequence[ClientRequest], totals: Totals, log: Sequence[Mapping[str, Any]], engine_losses: int
) -> tuple[dict[str, int], list[str]]:
    """Counts, and where clients, log and metrics disagree. All taken at rest; `log` holds the lines of requests."""
    own = [line for line in log if line["route"].startswith("/v1/")]
    reasons = [reason for line in own if line["finish_reason"] for reason in line["finish_reason"].split(",")]
    aborted = sum(reason in CUT_OFF for reason in reasons)
    accepted = totals.count("echo_rl:spec_tokens_total", stage="accepted")
    verified = totals.count("echo_rl:spec_tokens_total", stage="verified")
    same = {
        "prompt tokens": (sum(line["prompt_tokens"] for line in own), totals.count("sglang:prompt_tokens_total")),
        "output tokens": (sum(line["output_tokens"] for line in own), totals.count("sglang:generation_tokens_total")),
        "requests served": (len(reasons) - aborted, totals.count("sglang:num_requests_total")),
        "requests aborted": (aborted, totals.count("sglang:num_aborted_requests_total")),
        "deaths and restarts": (engine_losses, totals.count("echo_rl:core_restarts")),
        "accepted tokens, by depth": (totals.count("echo_rl:spec_accepted_total"), accepted),
    }
    for (route, status), count in Counter((line["route"], str(line["status"])) for line in own).items():
        found = totals.count("echo_rl:http_requests_total", route=route, status=status)
        same[f"{route} with {status}"] = (count, found)
    bad = [f"{name}: {one}, but {other} by another count" for name, (one, other) in same.items() if one != other]
    if not accepted <= verified <= totals.count("echo_rl:spec_tokens_total", stage="drafted"):
        bad.append(f"{accepted} tokens accepted of {verified} verified")
    return {name: one for name, (one, _) in same.items()}, bad + _clients_and_log(requests, own)


def _clients_and_log(requests: Sequence[ClientRequest], log: Sequence[Mapping[str, Any]]) -> list[str]:
    """Each answer that a client got stands in the log as it was; those of clients that left may stand there."""
    by_id = {line["id"]: line for line in log}
    bad = []
    for request in requests:
        if request.outcome == "finished":
            line = by_id.get(request.id, {})
            if (line.get("status"), line.get("output_tokens")) != (200, request.tokens):
                bad.append(f"a client got {request.tokens} tokens in {request.id}, the log says {line or 'nothing'}")
    came = [request for request in requests if request.kind in TO_V1]
    answered = sum(request.status > 0 for request in came)
    if not answered <= len(log) <= len(came):
        bad.append(f"clients sent {len(came)} requests and got {answered} answers, the log has {len(log)}")
    return bad


def ends(requests: Sequence[ClientRequest], began: float, seconds: float) -> dict[str, list[int]]:
    """By outcome, without its details: how many requests ended in each of `STRETCHES` equal parts of the run."""
    found: dict[str, list[int]] = {request.outcome.split()[0]: [0] * STRETCHES for request in requests}
    for request in requests:
        stretch = int(STRETCHES * (request.ended - began) / seconds)
        found[request.outcome.split()[0]][min(stretch, STRETCHES - 1)] += 1
    return found


def growth(samples: Sequence[Sample], seconds: float) -> dict[str, dict[str, float | None]]:
    """The trend of memory after warming up, over the rest of the run and of the longest-lived engine process."""
    front = [(s.at, s.front_mb) for s in samples if s.front_mb is not None and WARM * seconds < s.at < seconds]
    by_process: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for s in samples:
        if s.engine is not None and s.engine_mb is not None and s.at < seconds:
            by_process[s.engine].append((s.at, s.engine_mb))
    longest = max(by_process.values(), key=len, default=[])
    return {
        "front": _trend(front, FRONT_MB),
        "engine": _trend(longest[int(WARM * len(longest)) :], ENGINE_MB),
    }


def _trend(points: Sequence[tuple[float, float]], bound: float) -> dict[str, float | None]:
    """The trend by least squares; None with too few points, or over too short a time, to tell."""
    if len(points) < FEWEST or points[-1][0] - points[0][0] < SHORTEST:
        return {"seconds": 0.0, "last_mb": None, "trend_mb": None, "bound_mb": bound}
    at, values = np.array(points).T
    seconds = float(at[-1] - at[0])
    slope = float(np.polyfit(at - at[0], values, 1)[0])
    return {"seconds": seconds, "last_mb": float(values[-1]), "trend_mb": slope * seconds, "bound_mb": bound}


def too_much(memory: Mapping[str, Mapping[str, float | None]]) -> list[str]:
    """The processes that grew more than they may."""
    return [
        f"the {name} grew by {found['trend_mb']:.1f} MB in {found['seconds']:.0f} s, {found['bound_mb']:g} are allowed"
        for name, found in memory.items()
        if found["trend_mb"] is not None and found["bound_mb"] is not None and found["trend_mb"] > found["bound_mb"]
    ]
