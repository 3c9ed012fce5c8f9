"""Tables that fit the width they are written to: whole cells, and only the columns there is room for."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

from rich.table import Table
from rich.text import Text

Cell = str | Text
Row = tuple[Sequence[Cell], Mapping[str, Cell]]
"""The cells that say what a row is of, and its values by column."""
LABEL = 14
"""The least width to which a label that says what a row is of is folded."""


def fitted(title: str, labels: Sequence[str], rows: Sequence[Row], width: int, kept: int, sections: bool) -> Table:
    """A table of at most `width` columns of text.

    The first `kept` values are always shown, the others as far as they fit, first to last. Where even the first do not
    fit, an interval goes below its estimate, and then labels are folded. With `sections`, rows whose first label is
    the same stand together.
    """
    names = list(dict.fromkeys(name for _, values in rows for name in values))
    if _width(labels, names[:kept], rows) > width:
        rows = [(label, {name: _stacked(cell) for name, cell in values.items()}) for label, values in rows]
    shown = max((n for n in range(kept, len(names) + 1) if _width(labels, names[:n], rows) <= width), default=kept)
    return _table(title, labels, names[:shown], rows, sections)


def _table(title: str, labels: Sequence[str], names: Sequence[str], rows: Sequence[Row], sections: bool) -> Table:
    view = Table(title=Text(title), title_justify="left")
    for place, label in enumerate(labels):
        numbers = all(str(row[0][place]).isdigit() or row[0][place] == "-" for row in rows)
        head = _wrapped(label, _label_width(label, place, rows))
        view.add_column(head, justify="right" if numbers else "left", overflow="fold")
    for name in names:
        head = _wrapped(name, _value_width(name, rows))
        view.add_column(head, justify="right", no_wrap=True, overflow="fold")
    for (own, values), following in zip(rows, [*rows[1:], None], strict=True):
        last = sections and (following is None or following[0][0] != own[0])
        cells = (*own, *(values.get(name, "") for name in names))
        view.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in cells), end_section=last)
    return view


def _width(labels: Sequence[str], names: Sequence[str], rows: Sequence[Row]) -> int:
    """The width of the table at its narrowest, borders and padding included."""
    own = [min(LABEL, _label_width(label, place, rows)) for place, label in enumerate(labels)]
    own += [_value_width(name, rows) for name in names]
    return sum(own) + 3 * len(own) + 1


def _label_width(label: str, place: int, rows: Sequence[Row]) -> int:
    return max(_longest(label), *(len(row[0][place]) for row in rows))


def _value_width(name: str, rows: Sequence[Row]) -> int:
    cells = (str(values.get(name, "")).split("\n") for _, values in rows)
    return max(_longest(name), *(len(line) for lines in cells for line in lines))


def _longest(words: str) -> int:
    return max(map(len, words.split()), default=0)


def _wrapped(words: str, width: int) -> Text:
    return Text("\n".join(textwrap.wrap(words, width)) if words else "")


def _stacked(cell: Cell) -> Cell:
    return cell.replace(" [", "\n[") if isinstance(cell, str) else cell
