"""The output folder of a benchmark, and the report over it.

Every finished unit is one line of ``blocks.jsonl``, so an interrupted run goes on where it stopped.
Speed-ups are paired by block and their intervals come from resampling blocks.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, Protocol, Self, TypeVar

from echo_rl import intervals, metrics
from echo_rl.errors import ConfigError
from echo_rl.ledger import read_lines
from echo_rl.records import RequestRecord, RunRecord, pool
from echo_rl.sweep import BenchConfig, Load, Unit


class Storable(Protocol):
    """What a finished unit leaves behind."""

    def to_json(self) -> dict[str, Any]: ...

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self: ...


U = TypeVar("U")
R = TypeVar("R", bound=Storable)


class Store(Generic[U, R]):
    """An output folder: what is measured (``config.json``) and each finished unit (``blocks.jsonl``).

    `config` and the units are frozen dataclasses of plain values; `unit` and `record` are the classes
    of what is stored. Raises `ConfigError` where the folder holds something else.
    """

    def __init__(self, out: Path, config: Any, environment: Mapping[str, str], unit: type[U], record: type[R]) -> None:
        self.environment = dict(environment)
        self._unit, self._record = unit, record
        self.blocks = out / "blocks.jsonl"
        wanted = json.loads(json.dumps({"config": asdict(config), "environment": self.environment}))
        path = out / "config.json"
        if path.is_file():
            _require_same(json.loads(path.read_text()), wanted, out)
        else:
            write_json(path, wanted)

    def read(self) -> dict[U, R]:
        """The finished units. A line cut short by an interruption is dropped, from the file too."""
        rows = read_lines(self.blocks)
        return {self._unit(**row["unit"]): self._record.from_json(row["record"]) for row in rows}

    def append(self, unit: U, record: R) -> None:
        with open(self.blocks, "a") as stream:
            stream.write(json.dumps({"unit": vars(unit), "record": record.to_json()}) + "\n")


class BlockStore(Store[Unit, RunRecord]):
    """The folder of a benchmark over concurrencies."""

    def __init__(self, out: Path, config: BenchConfig, environment: Mapping[str, str]) -> None:
        super().__init__(out, config, environment, Unit, RunRecord)


def _require_same(found: Any, wanted: Any, out: Path) -> None:
    for part in ("config", "environment"):
        keys = {**found.get(part, {}), **wanted[part]}
        changed = [key for key in keys if found.get(part, {}).get(key) != wanted[part].get(key)]
        if changed:
            raise ConfigError(
                f"{out} holds a benchmark with another {', '.join(changed)}; choose another folder or delete it"
            )


def report(
    config: BenchConfig, units: Mapping[Unit, RunRecord], environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The result as plain JSON types: one cell per arm and load, blocks pooled, speed-ups paired by block."""
    cells = []
    for load in config.loads:
        baseline = _blocks(units, config.arms[0], load)
        for arm in config.arms:
            ours = _blocks(units, arm, load)
            speedup = None if arm == config.arms[0] else intervals.rate_ratio(_rates(ours), _rates(baseline))
            pooled = pool(ours)
            cells.append(
                {
                    **metrics.summary(pooled, config.slo),
                    "arm": arm,
                    "throughput": asdict(intervals.rate(_rates(ours))),
                    "speedup": asdict(speedup) if speedup else None,
                    "outputs": compare_outputs(pooled, pool(baseline)),
                }
            )
    return {
        "config": asdict(config),
        "environment": dict(environment or {}),
        "baseline": config.arms[0],
        "cells": cells,
    }


def compare_outputs(ours: RunRecord, baseline: RunRecord) -> dict[str, Any]:
    """How many requests and tokens were compared, and where each differing request first differs.

    Requests that both runs served; of one that either run cut off, as many tokens as both have.
    """
    expected = {request.id: request for request in baseline.requests}
    pairs = [
        (request.id, *_comparable(request, expected[request.id])) for request in ours.requests if request.id in expected
    ]
    first = {name: first_difference(a, b) for name, a, b in pairs if a != b}
    return {
        "requests": len(pairs),
        "tokens": sum(len(a) for _, a, _ in pairs),
        "differing": len(first),
        "first_difference": first,
    }


def _comparable(ours: RequestRecord, theirs: RequestRecord) -> tuple[tuple[int, ...], tuple[int, ...]]:
    both = min(len(ours.tokens), len(theirs.tokens)) if ours.cut or theirs.cut else None
    return ours.tokens[:both], theirs.tokens[:both]


def first_difference(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """Index of the first token that differs; the shorter length where one is a prefix of the other."""
    pairs = zip(ours, theirs, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))


def machine(**more: str) -> dict[str, str]:
    """What timings depend on: the processor and what the caller adds (device, dtype, torch version)."""
    return {"cpu": _cpu_name(), "cores": str(os.cpu_count()), "python": platform.python_version(), **more}


def digest(*paths: Path) -> str:
    """The first 12 digits of the files' common sha256: enough to tell whether they changed."""
    return digest_of(*(path.read_bytes() for path in paths))


def digest_of(*parts: bytes) -> str:
    """`digest` of what is in memory."""
    state = hashlib.sha256()
    for part in parts:
        state.update(part)
    return state.hexdigest()[:12]


def write_json(path: Path, value: Any) -> None:
    """Writes through a neighbour file, so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=2) + "\n")
    partial.replace(path)


def _blocks(units: Mapping[Unit, RunRecord], arm: str, load: Load) -> list[RunRecord]:
    return [units[Unit(block, load.concurrency, arm)] for block in range(load.blocks)]


def _rates(records: Iterable[RunRecord]) -> list[intervals.Rate]:
    return [intervals.Rate(record.output_tokens, record.seconds) for record in records]


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
