"""Reads the JSON and text files of a model folder, and refuses by file and name what can't be used."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from echo_rl.errors import WeightsError


@dataclass(frozen=True)
class Document:
    """An object of a JSON file, its values taken by name and kind. A null counts as absent.

    Every reader raises `WeightsError` where the value is of another kind, or absent without a default.
    """

    source: str
    """The name that messages give it: the file, and the keys that lead to the object."""
    values: Mapping[str, Any]

    def count(self, name: str, default: int | None = None) -> int:
        """A whole number of at least 1."""
        value = self._value(name, default)
        if not _whole(value) or value < 1:
            raise self.refusal(name, "a whole number of at least 1")
        return int(value)

    def number(self, name: str, default: float | None = None) -> float:
        """A positive, finite number."""
        value = self._value(name, default)
        if not (_whole(value) or isinstance(value, float)) or not 0 < value < math.inf:
            raise self.refusal(name, "a positive number")
        return float(value)

    def ids(self, name: str) -> tuple[int, ...] | None:
        """A whole number or a list of them; None where absent."""
        value = self.values.get(name)
        found = value if isinstance(value, list) else [] if value is None else [value]
        if not all(map(_whole, found)):
            raise self.refusal(name, "a whole number or a list of them")
        return None if value is None else tuple(found)

    def section(self, *names: str) -> Document:
        """The first object under these names that isn't empty; an empty one where there is none."""
        for name in names:
            value = self._value(name, {})
            if not isinstance(value, dict):
                raise self.refusal(name, "an object")
            if value:
                return Document(f"{self.source}, {name}", value)
        return Document(self.source, {})

    def refusal(self, name: str, wanted: str) -> WeightsError:
        """The error that says what a value is and what is wanted."""
        found = f"is {reprlib.repr(self.values[name])}" if name in self.values else "is missing"
        return WeightsError(
            f"{self.source}: {name} {found}, {wanted} is needed; correct it or download the model again"
        )

    def _value(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        return default if value is None else value


def read_document(path: Path) -> Document:
    """The object that a JSON file holds. Raises `WeightsError` where it can't be read or holds something else."""
    try:
        values = json.loads(read_text(path))
    except (ValueError, RecursionError) as e:
        if isinstance(e, WeightsError):
            raise
        raise WeightsError(f"{path} is damaged: not valid JSON ({e}); download the model again") from e
    if not isinstance(values, dict):
        raise WeightsError(f"{path} is damaged: it holds no JSON object; download the model again")
    return Document(str(path), values)


def read_text(path: Path) -> str:
    """The text of a UTF-8 file. Raises `WeightsError` where it can't be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise WeightsError(f"{path} cannot be read ({e}); download the model again") from e


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
