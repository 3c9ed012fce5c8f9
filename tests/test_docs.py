"""The documentation tells the truth: what it names exists, what it lists is whole, what it shows runs."""

from __future__ import annotations

import ast
import re
import shlex
import tomllib
from dataclasses import fields
from functools import cache
from importlib import import_module
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest

from echo_rl.cli.app import parse
from echo_rl.controllers.registry import CONTROLLERS
from scripts import docs_hooks

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
DOTTED = re.compile(r"\becho_(?:rl|kernels)(?:\.\w+)+")
FILES = re.compile(r"(?<![\w./-])(?:echo_rl|kernels|tests|benchmarks|scripts|docs|checkpoints)/[\w./*-]*[\w*]")
CLASSES = re.compile(r"`([A-Z][a-z]+[A-Z]\w+)(?=[.`(])")
SCRIPTS = re.compile(r"`(benchmarks(?:\.\w+){1,2})`|python -m (benchmarks(?:\.\w+){1,2})")
WRITTEN = ("benchmarks/results/work", "benchmarks/results/quick")
"""Folders that a command makes."""
LINKS = re.compile(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)")

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@cache
def known_words() -> frozenset[str]:
    """Every word of the sources."""
    sources = [path for folder in ("echo_rl", "kernels") for path in (ROOT / folder).rglob("*.py")]
    return frozenset(word for path in sources for word in re.findall(r"\w+", path.read_text()))


def resolve(dotted: str) -> object:
    """The module or attribute of that name. Raises `AttributeError` or `ImportError`."""
    parts = dotted.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found: object = import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for name in parts[end:]:
            found = getattr(found, name)
        return found
    raise ImportError(dotted)


@every_page
def test_every_module_and_name_that_a_page_mentions_exists(page):
    text = page.read_text()
    for dotted in sorted(set(DOTTED.findall(text))):
        resolve(dotted)
    assert set(CLASSES.findall(text)) <= known_words()
    for script in ("".join(groups) for groups in SCRIPTS.findall(text)):
        assert (ROOT / f"{script.replace('.', '/')}.py").is_file(), script


@every_page
def test_every_file_that_a_page_mentions_exists(page):
    for named in sorted(set(FILES.findall(page.read_text()))):
        assert named.startswith(WRITTEN) or list(ROOT.glob(named)), named


@every_page
def test_every_relative_link_of_a_page_leads_to_a_file(page):
    for target in LINKS.findall(page.read_text()):
        assert re.match(r"[a-z]+:", target) or (page.parent / target).exists(), target


def test_a_name_that_does_not_exist_is_found_out():
    assert resolve("echo_rl.contracts.Request") and "Forest" in known_words() and "Frist" not in known_words()
    for wrong in ("echo_rl.contracts.Nothing", "echo_rl.nowhere", "nowhere.at.all"):
        with pytest.raises((AttributeError, ImportError)):
            resolve(wrong)
    assert FILES.findall("see `tests/test_docs.py` and /usr/tests/x") == ["tests/test_docs.py"]


def test_the_page_of_controllers_has_every_registered_one_with_its_rule_and_options():
    text = docs_hooks.controllers()
    for name, family in CONTROLLERS.items():
        assert f"| [`{name}`](#{name}) |" in text
        section = text.partition(f"## `{name}` ")[2].partition("\n## ")[0]
        assert str(family.controller.__doc__).split("\n")[0].strip() in section
        for field in fields(family.options):
            row = re.search(rf"^\| `{field.name}` \| (.+) \| (.+) \|$", section, re.MULTILINE)
            assert row and len(row[2]) > 8, f"{name} {field.name}: say below the field what it means"
    assert docs_hooks.MARKER in (ROOT / "docs" / "algorithms.md").read_text()


def test_every_registered_controller_is_of_one_kind():
    text = (ROOT / "docs" / "algorithms.md").read_text()
    rows = re.findall(r"^\| [^|]+ \| (`[^|]+) \|", text.partition("## Kinds")[2], re.MULTILINE)
    assert sorted(re.findall(r"`(\w+)`", " ".join(rows))) == sorted(CONTROLLERS)


def test_field_docs_are_those_below_the_fields():
    docs = docs_hooks.field_docs(CONTROLLERS["echo_fixed"].options)
    assert docs["tau"].startswith("The one threshold") and docs["profile"].startswith("The machine's costs")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


@every_page
def test_every_code_block_parses(page):
    for block in blocks(page, "python"):
        ast.parse(block)
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if "echo-rl" in words:
                arguments = words[words.index("echo-rl") + 1 :]
                parse(list(takewhile(lambda word: word not in (">", "&", "|"), arguments)))


def run_blocks(page: Path) -> dict[str, Any]:
    """Runs the Python of a page from top to bottom; what it leaves behind, by name."""
    names: dict[str, Any] = {"__name__": "page"}
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec", dont_inherit=True), names)
    return names


def test_every_room_is_on_the_page_of_the_architecture():
    text = (ROOT / "docs" / "architecture.md").read_text()
    for path in (ROOT / "echo_rl").iterdir():
        if path.name[0] not in "_." and path.name != "py.typed":
            assert f"echo_rl/{path.name}/`" in text or f"{path.name}`" in text, path


def test_the_environments_of_the_page_can_be_made():
    names = run_blocks(ROOT / "docs" / "environment.md")
    assert names["env"].spec.id == "EchoRL/Replay-v0" and len(names["rewards"]) == names["envs"].num_envs == 16


@pytest.mark.model
@pytest.mark.timeout(600)
def test_the_lines_of_the_readme_answer(model_folder, capsys):
    (lines,) = blocks(ROOT / "README.md", "python")
    assert lines in (ROOT / "docs" / "index.md").read_text()
    run_blocks(ROOT / "README.md")
    assert "copper" in capsys.readouterr().out.lower()


def test_the_controller_of_the_guide_serves_and_keeps_to_its_budget():
    page = ROOT / "docs" / "guides" / "write-a-controller.md"
    names = run_blocks(page)
    runs, speed = names["runs"], names["tokens_per_second"]
    assert list(runs) == ["none", "share", "echo"] and speed(runs["share"]) > speed(runs["none"])
    assert 0 < max(step.verified for step in runs["share"].steps) <= names["ShareOptions"]().nodes
    assert {run.requests[0].tokens for run in runs.values()} == {runs["none"].requests[0].tokens}
    assert blocks(page, "python")[0].count("\n") <= 30, "the guide promises thirty lines"


def test_the_readme_is_short():
    assert (ROOT / "README.md").read_text().count("\n") <= 120


def test_the_docs_extra_is_part_of_dev():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert "echo-rl[docs]" in extras["dev"] and any("mkdocs-material" in need for need in extras["docs"])
