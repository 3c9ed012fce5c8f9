"""Writes to a terminal or into a pipe: tables of whole cells, with the columns that there is room for."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

Cell = str | Text
Row = tuple[Sequence[Cell], Mapping[str, Cell]]
"""The cells that say what a row is of, and its values by column."""
LABEL = 14
"""The least width to which a label that says what a row is of is folded."""
BOUNDLESS = 100_000
"""The width of what is no terminal: more than any table needs."""


def console(stderr: bool = False) -> Console:
    """A console on standard output or error. In a pipe or a file nothing is wrapped, and tables have all columns."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else BOUNDLESS)


def say(console: Console, lines: Iterable[str]) -> None:
    """Each line as it is: not wrapped, nothing highlighted."""
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False)


def fitted(
    title: str, labels: Sequence[str], rows: Sequence[Row], width: int, kept: int = 0, sections: bool = False
) -> Table:
    """A table of at most `width` columns of text, in which every cell is whole.

    The first `kept` values are always shown, the others as far as they fit, first to last; the caption names those
    that don't. Where even the first do not fit, an interval goes below its estimate, and then labels are folded; where
    that is too wide as well, each row becomes a paragraph with one line a value. With `sections`, rows whose first
    label is the same stand together.
    """
    names = list(dict.fromkeys(name for _, values in rows for name in values))
    view = rows
    if _width(labels, names[:kept], rows) > width:
        view = [(label, {name: _stacked(cell) for name, cell in values.items()}) for label, values in rows]
    fits = [n for n in range(kept, len(names) + 1) if _width(labels, names[:n], view) <= width]
    if not fits:
        return _paragraphs(title, labels, names, rows)
    table = _table(title, labels, names[: fits[-1]], view, sections)
    if left_out := ", ".join(names[fits[-1] :]):
        table.caption = f"a wider terminal, or a pipe, also has: {left_out}"
    return table


def _empty(title: str) -> Table:
    return Table(title=Text(title), title_justify="left", caption_justify="left")


def _table(title: str, labels: Sequence[str], names: Sequence[str], rows: Sequence[Row], sections: bool) -> Table:
    view = _empty(title)
    for place, label in enumerate(labels):
        numbers = all(str(row[0][place]).isdigit() or row[0][place] == "-" for row in rows)
        head = _wrapped(label, _label_width(label, place, rows))
        view.add_column(head, justify="right" if numbers else "left", overflow="fold")
    for name in names:
        head = _wrapped(name, _value_width(name, rows))
        view.add_column(head, justify="right", no_wrap=True, overflow="fold")
    for (own, values), following in zip(rows, [*rows[1:], None], strict=False):
        last = sections and (following is None or following[0][0] != own[0])
        cells = (*own, *(values.get(name, "") for name in names))
        view.add_row(*map(_text, cells), end_section=last)
    return view


def _paragraphs(title: str, labels: Sequence[str], names: Sequence[str], rows: Sequence[Row]) -> Table:
    view = _empty(title)
    view.box, view.show_header, view.padding = None, False, (0, 0)
    view.add_column(overflow="fold")
    for own, values in rows:
        cells = [*zip(labels, own, strict=True), *((name, values[name]) for name in names if name in values)]
        for name, cell in cells:
            view.add_row(Text(f"{name}: " if name else "").append(_text(cell)))
        view.add_row("")
    return view


def _width(labels: Sequence[str], names: Sequence[str], rows: Sequence[Row]) -> int:
    """The width of the table at its narrowest, borders and padding included."""
    own = [min(LABEL, _label_width(label, place, rows)) for place, label in enumerate(labels)]
    own += [_value_width(name, rows) for name in names]
    return sum(own) + 3 * len(own) + 1


def _label_width(label: str, place: int, rows: Sequence[Row]) -> int:
    return max(_longest(label), *(_cell_width(row[0][place]) for row in rows), 0)


def _value_width(name: str, rows: Sequence[Row]) -> int:
    return max(_longest(name), *(_cell_width(values.get(name, "")) for _, values in rows), 0)


def _cell_width(cell: Cell) -> int:
    return max(map(cell_len, str(cell).split("\n")))


def _longest(words: str) -> int:
    return max(map(cell_len, words.split()), default=0)


def _wrapped(words: str, width: int) -> Text:
    return Text("\n".join(textwrap.wrap(words, width)) if words else "")


def _stacked(cell: Cell) -> Cell:
    return cell.replace(" [", "\n[") if isinstance(cell, str) else cell


def _text(cell: Cell) -> Text:
    return Text(cell) if isinstance(cell, str) else cell
