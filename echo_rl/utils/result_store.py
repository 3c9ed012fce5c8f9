"""Keeps results through an interruption: what is measured, and each finished result as a line of JSON.

An interrupted experiment goes on where it stopped, and its results are never mixed with another's.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, Protocol, Self, TypeVar

from echo_rl.errors import ConfigError
from echo_rl.utils.files import replacing


class Storable(Protocol):
    """A record that knows its JSON."""

    def to_json(self) -> dict[str, Any]: ...

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self: ...


K = TypeVar("K")
R = TypeVar("R")
S = TypeVar("S", bound=Storable)


class ResultStore(Generic[K, R]):
    """Finished results by key; each is appended to a file as one line as soon as it is there.

    A store belongs to one experiment: what is measured is written beside the lines (`in_folder`) or before them
    (`in_file`). A line that an interruption cut short is dropped, from the file too.
    """

    def __init__(
        self,
        path: Path | None,
        rows: Iterable[Any],
        names: tuple[str, str],
        key: Callable[[K], Any],
        record: type[Storable] | None,
    ) -> None:
        """`names` are those of a line's key and value. Raises `ConfigError` where one of `rows` isn't such a line."""
        self._path, self._names, self._key, self._record = path, names, key, record
        read: Callable[[Any], Any] = record.from_json if record else lambda row: row
        try:
            self._found: dict[str, Any] = {_text(row[names[0]]): read(row[names[1]]) for row in rows}
        except (KeyError, TypeError, AttributeError) as error:
            kind = "unit" if record else "cell"
            raise ConfigError(
                f"{path} holds a line that is no finished {kind} ({error!r}); delete it to measure anew"
            ) from error

    @classmethod
    def in_folder(
        cls,
        out: Path,
        config: Any,
        environment: Mapping[str, str],
        record: type[S],
        key: Callable[[K], Mapping[str, Any]] = vars,
    ) -> ResultStore[K, S]:
        """Records in ``out/blocks.jsonl``, and what they are of in ``out/config.json``.

        `config` is a dataclass of plain values, `record` the records' class; `key` turns a key into plain values.
        Raises `ConfigError` where the folder holds something else or is damaged.
        """
        blocks = out / "blocks.jsonl"
        what = {"config": asdict(config), "environment": dict(environment)}
        claim(out / "config.json", what, "a benchmark", [blocks])
        return ResultStore(blocks, read_lines(blocks), ("unit", "record"), key, record)

    @classmethod
    def in_file(cls, path: Path | None, settings: Mapping[str, Any]) -> ResultStore[Mapping[str, Any], Any]:
        """Values of plain JSON types in one file, which begins with what they are of; without a path, in memory alone.

        Raises `ConfigError` where the file was begun with other settings or is damaged.
        """
        rows = read_lines(path) if path is not None else []
        wanted = _plain({"settings": settings})
        if rows and rows[0] != wanted:
            raise ConfigError(f"{path} was begun with other settings; delete it to start anew")
        if path is not None and not rows:
            _append(path, wanted)
        return ResultStore(path, rows[1:], ("key", "value"), _text, None)

    def __contains__(self, key: K) -> bool:
        return _text(self._key(key)) in self._found

    def __getitem__(self, key: K) -> R:
        found: R = self._found[_text(self._key(key))]
        return found

    def add(self, key: K, value: R) -> None:
        """Keeps a result; of plain JSON types, as it will be read back."""
        row = self._record.to_json(value) if self._record else _plain(value)  # type: ignore[arg-type]
        self._found[_text(self._key(key))] = value if self._record else row
        if self._path is not None:
            _append(self._path, dict(zip(self._names, (self._key(key), row), strict=True)))

    def get(self, key: K, compute: Callable[[], R]) -> R:
        """The result under `key`; computed and kept first where it is absent."""
        if key not in self:
            self.add(key, compute())
        return self[key]


def read_lines(path: Path) -> list[Any]:
    """The JSON lines written so far; one cut short by an interruption is dropped, from the file too.

    Raises `ConfigError` naming the first whole line that isn't JSON.
    """
    if not path.is_file():
        return []
    lines = path.read_text().split("\n")
    if lines.pop():
        os.truncate(path, sum(len(line.encode()) + 1 for line in lines))
    return [_parsed(path, number, line) for number, line in enumerate(lines, 1)]


def _parsed(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ConfigError(
            f"line {number} of {path} is damaged ({error}); delete the line, and what it held is measured again"
        ) from error


def _append(path: Path, row: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as stream:
        stream.write(json.dumps(row) + "\n")


def _plain(value: Any) -> Any:
    """The value in JSON's own types, as it would be read back."""
    return json.loads(json.dumps(value))


def _text(key: Any) -> str:
    """A key as keys are compared."""
    return key if isinstance(key, str) else json.dumps(key, sort_keys=True)


def claim(path: Path, what: Mapping[str, Any], kind: str, made: Iterable[Path] = ()) -> None:
    """Say in `path` what its folder holds, in JSON's types, so that nothing else is ever mixed into it.

    Raises `ConfigError` where the file says something else, or is missing beside results (`made`) that are there:
    nobody knows what those are of. `kind` is what the folder holds, in words.
    """
    wanted = _plain(what)
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
