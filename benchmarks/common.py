"""What the benchmark scripts share: where results go, the engine, and cells that survive an interruption."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from echo_rl.cli.session import load_engine
from echo_rl.config import EngineConfig
from echo_rl.errors import ConfigError, EchoError

RESULTS = Path(__file__).resolve().parent / "results"
EngineOptions = Annotated[EngineConfig, tyro.conf.arg(name="")]
CONSOLE = Console(stderr=True)


@dataclass(frozen=True)
class Place:
    """Where a script writes: the committed result, and the work that lets it resume (not committed)."""

    name: str
    quick: bool

    @property
    def result(self) -> Path:
        return RESULTS / ("quick" if self.quick else "") / f"{self.name}.json"

    @property
    def work(self) -> Path:
        return RESULTS / "work" / f"{self.name}{'-quick' if self.quick else ''}"


class Ledger:
    """Finished cells, one JSON line each; a cell whose key is there is not computed again.

    Raises `ConfigError` where the file was begun with other settings or on another machine.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.path = folder / "cells.jsonl"
        self.cells: dict[str, Any] = {}
        folder.mkdir(parents=True, exist_ok=True)
        rows = _rows(self.path)
        wanted = json.loads(json.dumps({"settings": settings}))
        if rows and rows[0] != wanted:
            raise ConfigError(f"{self.path} was begun with other settings; delete it to start anew")
        if not rows:
            self._append(wanted)
        self.cells.update((row["key"], row["value"]) for row in rows[1:])

    def cell(self, key: Mapping[str, Any], compute: Callable[[], Any]) -> Any:
        """The value under `key`, computed and stored first where it is absent."""
        name = json.dumps(key, sort_keys=True)
        if name not in self.cells:
            CONSOLE.print(" ".join(f"{k}={v}" for k, v in key.items()), highlight=False)
            self.cells[name] = json.loads(json.dumps(compute()))
            self._append({"key": name, "value": self.cells[name]})
        return self.cells[name]

    def _append(self, row: Any) -> None:
        with open(self.path, "a") as stream:
            stream.write(json.dumps(row) + "\n")


def _rows(path: Path) -> list[Any]:
    """The lines written so far; one cut short by an interruption is dropped, from the file too."""
    if not path.is_file():
        return []
    lines = path.read_text().split("\n")
    if lines.pop():
        path.write_text("".join(f"{line}\n" for line in lines))
    return [json.loads(line) for line in lines]


def main(script: Callable[[], None]) -> None:
    """Runs a script; errors of this package are one line and exit code 2, an interrupt says how to go on."""
    try:
        script()
    except EchoError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from here")


__all__ = ["CONSOLE", "RESULTS", "EngineOptions", "Ledger", "Place", "load_engine", "main"]
