"""Tables and consoles: at every width every cell is whole, and a pipe has room for all of them."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.text import Text

from echo_rl.utils.terminal import BOUNDLESS, fitted
from tests.drawn import columns, drawn, squeezed

ROOT = Path(__file__).parents[2]

words = st.text(st.characters(categories=("L", "N", "P", "Sm"), exclude_characters="│┃"), min_size=1, max_size=24)
sentences = st.lists(words, max_size=6).map(" ".join)
intervals = st.tuples(*[st.floats(0.0, 1e6)] * 3).map(lambda x: "{:.2f}x [{:.2f}, {:.2f}]".format(*x))
cells = st.one_of(st.just(""), words, intervals, words.map(lambda text: Text(text, "bold")))


@st.composite
def contents(draw):
    """The labels, the rows and how many values are kept of a table."""
    labels = draw(st.lists(sentences, min_size=1, max_size=3))
    names = draw(st.lists(sentences.filter(bool), max_size=6, unique=True))
    values = st.fixed_dictionaries({}, optional=dict.fromkeys(names, cells))
    row = st.tuples(st.tuples(*[sentences] * len(labels)), values)
    rows = draw(st.lists(row, max_size=5))
    return labels, rows, draw(st.integers(0, len({name for _, values in rows for name in values})))


@settings(max_examples=300, deadline=None)
@given(contents(), st.one_of(st.just(BOUNDLESS), st.integers(8, 160)), st.booleans())
def test_every_cell_that_is_shown_is_whole(table, width, sections):
    labels, rows, kept = table
    names = list(dict.fromkeys(name for _, values in rows for name in values))
    view = fitted("", labels, rows, width, kept, sections)
    lines = drawn(view, width)
    assert all(cell_len(line.rstrip()) <= width for line in lines)
    if view.box is None:  # paragraphs
        own = [[*zip(labels, label, strict=True), *((n, v[n]) for n in names if n in v)] for label, v in rows]
        assert squeezed("".join(lines)) == squeezed("".join(f"{n}:{c}" if n else str(c) for row in own for n, c in row))
        return
    shown = names[: len(view.columns) - len(labels)]
    assert len(shown) >= kept and (width < BOUNDLESS or shown == names)
    expected = [squeezed(label + "".join(str(own[i]) for own, _ in rows)) for i, label in enumerate(labels)]
    expected += [squeezed(name + "".join(str(values.get(name, "")) for _, values in rows)) for name in shown]
    assert columns(lines) == expected
    assert bool(view.caption) is (shown != names)
    assert all(name in str(view.caption) for name in names[len(shown) :])


@given(contents())
@settings(max_examples=50, deadline=None)
def test_room_is_taken_as_it_is_there(table):
    """No width shows fewer columns than a smaller one does."""
    labels, rows, kept = table
    views = [fitted("", labels, rows, width, kept) for width in (10, 40, 80, 160, BOUNDLESS)]
    counts = [0 if view.box is None else len(view.columns) for view in views]
    assert counts == sorted(counts)


def test_in_a_pipe_a_table_is_as_wide_as_it_needs():
    """Whatever the width of the terminal that standard error still is, or that the environment names."""
    program = (
        "from echo_rl.utils.terminal import console, fitted; out = console();"
        "out.print(fitted('', ('arm',), [(('none',), {str(n): '123456789/123456789' for n in range(30)})], out.width));"
        "out.print('word ' * 100)"
    )
    environment = os.environ | {"COLUMNS": "40", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    lines = done.stdout.splitlines()
    assert lines[-1].split() == ["word"] * 100
    assert lines[-3].count("123456789/123456789") == 30 and len(lines) == 6
    assert all(len(line) < 1000 for line in lines)


def test_tables_and_consoles_are_made_in_one_place():
    """Elsewhere they would not fit every width."""
    paths = [path for room in ("echo_rl", "benchmarks") for path in (ROOT / room).rglob("*.py")]
    assert [path.name for path in paths if makes_views(ast.parse(path.read_text()))] == ["terminal.py"]


def makes_views(tree: ast.AST) -> bool:
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    rich = {alias.name for node in imports if node.module in ("rich.table", "rich.console") for alias in node.names}
    calls = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    return any(isinstance(made, ast.Name) and made.id in rich for made in calls)
