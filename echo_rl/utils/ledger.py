"""Work that survives an interruption: finished cells as JSON lines in one file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from echo_rl.errors import ConfigError


class Ledger:
    """Finished cells, one JSON line each; a cell whose key is there is not computed again.

    Raises `ConfigError` where the file was begun with other settings or is damaged. Without a path nothing is kept
    on disk.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.cells: dict[str, Any] = {}
        rows = read_lines(path) if path is not None else []
        wanted = json.loads(json.dumps({"settings": settings}))
        if rows and rows[0] != wanted:
            raise ConfigError(f"{path} was begun with other settings; delete it to start anew")
        if not rows:
            self._append(wanted)
        try:
            self.cells.update((row["key"], row["value"]) for row in rows[1:])
        except (KeyError, TypeError) as error:
            raise ConfigError(f"{path} holds a line that is no finished cell; delete it to start anew") from error

    def cell(self, key: Mapping[str, Any], compute: Callable[[], Any]) -> Any:
        """The value under `key`, as plain JSON types; computed and stored first where it is absent."""
        name = json.dumps(key, sort_keys=True)
        if name not in self.cells:
            self.cells[name] = json.loads(json.dumps(compute()))
            self._append({"key": name, "value": self.cells[name]})
        return self.cells[name]

    def _append(self, row: Any) -> None:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a") as stream:
                stream.write(json.dumps(row) + "\n")


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
