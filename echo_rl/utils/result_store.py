"""A folder of results that survives an interruption: what is measured, and each finished unit as a line of JSON.

Every finished unit is one line of ``blocks.jsonl``, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, Protocol, Self, TypeVar

from echo_rl.errors import ConfigError
from echo_rl.utils.files import replacing
from echo_rl.utils.ledger import read_lines


class Storable(Protocol):
    """A record that a finished unit leaves behind."""

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


def digest(*paths: Path) -> str:
    """The first 12 digits of the files' common sha256: enough to tell whether they changed."""
    return _digest(path.read_bytes() for path in paths)


def digest_of(*parts: bytes) -> str:
    """`digest` of what is in memory."""
    return _digest(parts)


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
