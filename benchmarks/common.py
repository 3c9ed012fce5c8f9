"""Holds what the benchmark scripts share: the place of results, and cells that survive an interruption."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from echo_rl.config import EngineConfig
from echo_rl.errors import EchoError
from echo_rl.utils import terminal
from echo_rl.utils.result_store import ResultStore

RESULTS = Path(os.environ.get("ECHO_RL_RESULTS", Path(__file__).resolve().parent / "results"))
"""The folder of the committed results; the environment may name another, so that they stay as they are."""
EngineOptions = Annotated[EngineConfig, tyro.conf.arg(name="")]
CONSOLE = terminal.console(stderr=True)


@dataclass(frozen=True)
class Place:
    """Names where a script writes: the committed result, and the work that lets it resume (not committed)."""

    name: str
    quick: bool

    @property
    def result(self) -> Path:
        return RESULTS / ("quick" if self.quick else "") / f"{self.name}.json"

    @property
    def work(self) -> Path:
        return RESULTS / "work" / f"{self.name}{'-quick' if self.quick else ''}"


class Ledger:
    """The cells of a script, kept in its work folder; prints which one it computes."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self._store = ResultStore.in_file(folder / "cells.jsonl", settings)

    def cell(self, key: Mapping[str, Any], compute: Callable[[], Any]) -> Any:
        def said() -> Any:
            CONSOLE.print(" ".join(f"{k}={v}" for k, v in key.items()), highlight=False)
            return compute()

        return self._store.get(key, said)


def main(script: Callable[[], None]) -> None:
    """Runs a script; errors of this package are one line and exit code 2, an interrupt says how to go on."""
    try:
        script()
    except EchoError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from here")
