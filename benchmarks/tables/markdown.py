"""Markdown of the results: tables, numbers, and what they were measured on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Result = Mapping[str, Any]
PENDING = "*Not measured yet: run `make bench`.*\n"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def machine(environment: Mapping[str, str]) -> str:
    parts = ("cpu", "cores", "device", "dtype", "torch", "model")
    said = ", ".join(f"{part} {environment[part]}" for part in parts if part in environment)
    return f"\nMachine: {said}. Intervals: 95 %, bootstrap over paired blocks.\n"


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
