"""Tables as they come out at a width, and what their columns say whatever the width."""

from __future__ import annotations

import io

from rich.console import Console

BARS = str.maketrans("┃", "│")


def drawn(table, width: int) -> list[str]:
    stream = io.StringIO()
    Console(file=stream, width=width).print(table)
    return stream.getvalue().splitlines()


def squeezed(text: object) -> str:
    return "".join(str(text).split())


def columns(lines: list[str]) -> list[str]:
    """The text of each column, top to bottom without blanks."""
    rows = [line.translate(BARS).split("│")[1:-1] for line in lines if line[:1] in ("│", "┃")]
    return [squeezed("".join(parts)) for parts in zip(*rows, strict=True)]
