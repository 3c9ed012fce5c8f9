"""Code edits: a function of a library of utilities, to be rewritten with a stated change."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from echo_rl.workloads.datasets.held_out.archives import BOLTONS
from echo_rl.workloads.datasets.held_out.sources import Function, functions
from echo_rl.workloads.datasets.members import read_members
from echo_rl.workloads.datasets.prompt import Prompt, user
from echo_rl.workloads.datasets.suite import Suite

PROMPTS = 110
LINES = (6, 45)
DROPPED = ("boltons/iterutils.py:286",)
"""Counts from 1 to 9, as an answer that drafters were trained on does."""
FORMATTED = re.compile(r"\.format\(|['\"] % ")
BETTER_NAMES = {
    "src": "items", "text": "string", "obj": "target", "path": "file_path", "func": "callback", "key": "entry_key",
    "iterable": "values", "dt": "moment", "data": "payload", "x": "number", "val": "value", "name": "label", "k": "key",
    "n": "count", "cls_name": "class_name", "hex": "digits", "d": "date", "s": "string", "idx": "index",
    "f": "callback", "fmt": "template", "exc_type": "error_type", "tb": "traceback", "seq": "items", "b": "payload",
}  # fmt: skip


def _has(kind: type[ast.AST]) -> Callable[[Function], bool]:
    return lambda function: any(isinstance(node, kind) for node in ast.walk(function.node))


def _callee(function: Function) -> str:
    """The first function that this one calls by its bare name; empty where there is none."""
    calls = [node.func for node in ast.walk(function.node) if isinstance(node, ast.Call)]
    return next((call.id for call in calls if isinstance(call, ast.Name) and call.id[0].islower()), "")


def _docstring(function: Function) -> str:
    return ast.get_docstring(function.node) or ""


def _nested(function: Function) -> bool:
    branches = [node for node in ast.walk(function.node) if isinstance(node, ast.If)]
    return any(isinstance(inner, ast.If) for branch in branches for inner in branch.body)


def _several(function: Function) -> bool:
    return len(function.parameters) > 1


@dataclass(frozen=True)
class Edit:
    """A change to ask for, and the functions that it fits."""

    category: str
    text: str
    fits: Callable[[Function], bool] = lambda function: True


EDITS = (
    Edit("types", "Add type hints to the signature.", _several),
    Edit(
        "rename", "Rename the parameter `{first}` to `{renamed}` everywhere.", lambda f: f.parameters[0] in BETTER_NAMES
    ),
    Edit("docstring", "Shorten the docstring to one line.", lambda f: "\n" in _docstring(f)),
    Edit("docstring", "Write a Google docstring: Args, Returns and Raises.", lambda f: "Args:" not in f.source),
    Edit("check", "Raise a TypeError with a helpful message when `{first}` is None, before anything else."),
    Edit("logging", "Log the arguments at debug level when it is entered; the module has a `logger`."),
    Edit("formatting", "Replace % and str.format by f-strings.", lambda f: bool(FORMATTED.search(f.source))),
    Edit("structure", "Use early returns to get rid of the nested branches.", _nested),
    Edit("structure", "Replace the loop by a comprehension where that reads better.", _has(ast.For)),
    Edit("errors", "Rename it to `try_{name}` and let it return None where it now raises.", _has(ast.Raise)),
    Edit("errors", "Move the checks that raise into a helper `_check_{name}` and call that.", _has(ast.Raise)),
    Edit("async", "Make it a coroutine that awaits `{callee}`, which has become one.", lambda f: bool(_callee(f))),
    Edit("signature", "Drop the parameter `{last}` and use its default instead.", lambda f: bool(f.node.args.defaults)),
    Edit("signature", "Make all parameters after `{first}` keyword-only.", _several),
    Edit("signature", "Add a keyword-only parameter `strict=False`: with True, an empty `{first}` is a ValueError."),
)
WORDINGS = (
    "Here is a function of our code base:\n```python\n{source}```\n{change} Return the whole function.",
    "{change}\n\n```python\n{source}```",
    'A reviewer left this comment on the function below: "{change}" Apply it and reply with the full updated code in '
    "one block, without an explanation.\n\n{source}",
    "File `{path}`, lines {first_line}-{last_line}:\n```python\n{source}```\n\nTask: {change}\nChange nothing else. "
    "After the code, say in one sentence what you changed.",
    "I need a small refactoring. {change} Keep the behaviour otherwise.\n\n{source}\nRewritten function:",
)


def read(boltons: Path) -> list[Prompt]:
    """Functions spread over all modules, each with one of the changes that fit it."""
    files = {path: data.decode("utf-8") for path, data in read_members(boltons, "boltons/*.py").items()}
    found = [function for function in functions(files, *LINES) if function.parameters]
    step = max(1, len(found) // PROMPTS)
    chosen = found[::step][:PROMPTS]
    edits = zip(chosen, _edits(chosen), strict=True)
    prompts = [_prompt(i, function, edit) for i, (function, edit) in enumerate(edits)]
    return [prompt for prompt in prompts if prompt.id not in DROPPED]


def _edits(chosen: Iterable[Function]) -> Iterator[Edit]:
    """For each function the change that fits it and was asked for least so far."""
    asked: Counter[Edit] = Counter()
    for function in chosen:
        edit = min((edit for edit in EDITS if edit.fits(function)), key=lambda edit: asked[edit])
        asked[edit] += 1
        yield edit


def _prompt(i: int, function: Function, edit: Edit) -> Prompt:
    parameters = function.parameters
    change = edit.text.format(
        name=function.name,
        first=parameters[0],
        last=parameters[-1],
        renamed=BETTER_NAMES.get(parameters[0], ""),
        callee=_callee(function),
    )
    text = WORDINGS[i % len(WORDINGS)].format(
        change=change, source=function.source, path=function.path, first_line=function.first, last_line=function.last
    )
    return Prompt("code_edits", f"{function.path}:{function.first}", user(text), edit.category)


CODE_EDITS = Suite(
    name="code_edits",
    about="Functions to be rewritten with a stated change.",
    licence="BSD-3-Clause",
    archives=(BOLTONS,),
    read=read,
    held_out=True,
)
