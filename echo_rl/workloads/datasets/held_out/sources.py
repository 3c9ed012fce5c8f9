"""Finds the functions in the Python sources of a package, for the suites about code."""

from __future__ import annotations

import ast
import textwrap
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Function:
    """A function of a module; `first` and `last` are its lines there, counted from 1."""

    path: str
    node: ast.FunctionDef
    source: str
    first: int
    last: int

    @property
    def name(self) -> str:
        return self.node.name

    @property
    def parameters(self) -> list[str]:
        """The names of the positional parameters, without `self` and `cls`."""
        return [held.arg for held in self.node.args.args if held.arg not in ("self", "cls")]


def functions(files: Mapping[str, str], least: int, most: int) -> Iterator[Function]:
    """The functions and methods of `least` to `most` lines, special methods aside, in the order of the files."""
    for path, text in files.items():
        lines = text.splitlines()
        for node in ast.walk(_parsed(text)):
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("__"):
                last = node.end_lineno or node.lineno
                source = textwrap.dedent("\n".join(lines[node.lineno - 1 : last])) + "\n"
                if least <= last - node.lineno + 1 <= most:
                    yield Function(path, node, source, node.lineno, last)


def _parsed(text: str) -> ast.Module:
    """The syntax tree, without warnings about escapes that newer Pythons frown upon."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(text)
