"""What MkDocs can't do by itself: the pages of the controllers and of the benchmarks' pictures, from their sources.

``<!-- controllers -->`` in a page becomes a table of all registered controllers and a section for each, written from
the docstrings of the classes and of their options, so that the page can't go stale. Links into ``benchmarks/results``
work in the repository as they stand; for the site they are shortened, and the pictures are taken along.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from echo_rl.controllers.registry import CONTROLLERS, Family

ROOT = Path(__file__).resolve().parent.parent
MARKER = "<!-- controllers -->"
PICTURES = "benchmarks/results"
PAPER = re.compile(r"arXiv (\d{4}\.\d{5})")


def on_files(files: Any, config: Any) -> Any:
    """Adds the pictures of the benchmarks to the site."""
    from mkdocs.structure.files import File

    for path in sorted((ROOT / PICTURES).glob("*.png")):
        files.append(File.generated(config, f"{PICTURES}/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The page with its controllers filled in, and with the links of the site."""
    up = "../" * page.file.src_uri.count("/")
    markdown = re.sub(rf"\]\((?:\.\./)+{PICTURES}/", f"]({up}{PICTURES}/", markdown)
    return markdown.replace(MARKER, controllers()) if MARKER in markdown else markdown


def controllers() -> str:
    """Markdown: one table of all registered controllers, then a section for each with its rule and options."""
    heads = "| controller | rule | source |\n| --- | --- | --- |\n"
    rows = "".join(
        f"| [`{name}`](#{name}) | {_cell(_summary(family))} | {', '.join(_sources(family)) or '-'} |\n"
        for name, family in CONTROLLERS.items()
    )
    return heads + rows + "".join(_section(name, family) for name, family in CONTROLLERS.items())


def _section(name: str, family: Family) -> str:
    text = f"\n## `{name}` {{ #{name} }}\n\n{inspect.getdoc(family.controller)}\n\n"
    documented, known = field_docs(family.options), fields(family.options)
    if not known:
        return text + "It has no options.\n"
    rows = "".join(f"| `{f.name}` | {_default(f)} | {_cell(documented.get(f.name, ''))} |\n" for f in known)
    return f"{text}| option | default | meaning |\n| --- | --- | --- |\n{rows}"


def _summary(family: Family) -> str:
    return str(inspect.getdoc(family.controller)).partition("\n\n")[0]


def _sources(family: Family) -> list[str]:
    """Links to the papers that the docstring of the controller names, or of the nearest rule that it derives from."""
    named = (PAPER.findall(kind.__doc__ or "") for kind in family.controller.__mro__)
    papers: list[str] = next(filter(None, named), [])
    return [f"[arXiv {paper}](https://arxiv.org/abs/{paper})" for paper in dict.fromkeys(papers)]


def _default(field: Field[Any]) -> str:
    value: Any = field.default
    if value is MISSING:
        return f"`{getattr(field.default_factory, '__name__', '')}()`"
    text = repr(value)
    return f"`{text}`" if len(text) <= 60 else f"{len(value)} entries"


def field_docs(record: type[Any]) -> dict[str, str]:
    """The strings that stand below a dataclass's fields, those of its bases included."""
    found: dict[str, str] = {}
    for base in reversed(record.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body  # type: ignore[attr-defined]
        for field, below in zip(body, [*body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(field.target, ast.Name):
                found[field.target.id] = ast.literal_eval(below.value)
    return found


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
