"""The output folder of a benchmark, and the report over it.

Every finished unit is one line of ``blocks.jsonl``, so an interrupted run goes on where it stopped.
Speed-ups are paired by block and their intervals come from resampling blocks.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, Protocol, Self, TypeVar

from echo_rl import intervals, metrics
from echo_rl.contracts import Controller
from echo_rl.errors import ConfigError
from echo_rl.files import replacing
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
        what = {"config": asdict(config), "environment": self.environment}
        claim(out / "config.json", what, "a benchmark", [self.blocks])

    def read(self) -> dict[U, R]:
        """The finished units. A line cut short by an interruption is dropped, from the file too.

        Raises `ConfigError` where another line can't be read.
        """
        rows = read_lines(self.blocks)
        try:
            return {self._unit(**row["unit"]): self._record.from_json(row["record"]) for row in rows}
        except (KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{self.blocks} holds a line that is no finished unit ({error!r}); delete it to measure anew"
            ) from error

    def append(self, unit: U, record: R) -> None:
        with open(self.blocks, "a") as stream:
            stream.write(json.dumps({"unit": vars(unit), "record": record.to_json()}) + "\n")


class BlockStore(Store[Unit, RunRecord]):
    """The folder of a benchmark over concurrencies."""

    def __init__(self, out: Path, config: BenchConfig, environment: Mapping[str, str]) -> None:
        super().__init__(out, config, environment, Unit, RunRecord)


def claim(path: Path, what: Mapping[str, Any], kind: str, made: Iterable[Path] = ()) -> None:
    """Say in `path` what its folder holds, in JSON's types, so that nothing else is ever mixed into it.

    Raises `ConfigError` where the file says something else, or is missing beside results (`made`) that are there:
    nobody knows what those are of. `kind` is what the folder holds, in words.
    """
    wanted = json.loads(json.dumps(what))
    if path.is_file():
        changed = differing(read_json(path), wanted)
        problem = f"with another {', '.join(changed)}" if changed else None
    else:
        problem = f"of unknown settings ({path.name} is missing)" if any(each.exists() for each in made) else None
    if problem:
        raise ConfigError(f"{path.parent} holds {kind} {problem}; choose another folder or delete it")
    if not path.is_file():
        write_json(path, wanted)


def differing(found: Any, wanted: Mapping[str, Any]) -> list[str]:
    """The keys at which two JSON objects differ; of objects within them their own keys."""
    found = found if isinstance(found, dict) else {}
    changed = []
    for key in {**found, **wanted}:
        theirs, ours = found.get(key), wanted.get(key)
        if isinstance(theirs, dict) and isinstance(ours, dict):
            changed += differing(theirs, ours)
        elif theirs != ours:
            changed.append(key)
    return changed


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
    return _digest(path.read_bytes() for path in paths)


def digest_of(*parts: bytes) -> str:
    """`digest` of what is in memory."""
    return _digest(parts)


def made_of(controller: Controller) -> dict[str, str]:
    """The digest of a controller's materials, where it has any: what was measured with others is not its own."""
    materials = getattr(controller, "materials", ())
    return {"made of": digest_of(pickle.dumps(materials))} if materials else {}


def arms_made_of(arms: Mapping[str, Controller]) -> dict[str, str]:
    """`made_of` of every arm."""
    return {f"{arm} {name}": digest for arm, each in arms.items() for name, digest in made_of(each).items()}


def read_json(path: Path) -> Any:
    """Raises `ConfigError` where the file isn't JSON."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path} is damaged ({error}); delete it, and what is beside it, to start anew") from error


def write_json(path: Path, value: Any) -> None:
    """Writes through a neighbour file, so that a reader never sees half of it."""
    with replacing(path) as part:
        part.write_text(json.dumps(value, indent=2) + "\n")


def _digest(parts: Iterable[bytes]) -> str:
    state = hashlib.sha256()
    for part in parts:
        state.update(part)
    return state.hexdigest()[:12]


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
