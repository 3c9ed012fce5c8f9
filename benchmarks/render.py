"""Writes the tables of the documentation from the JSON results, so that no number is typed by hand.

Each table stands between ``<!-- results:NAME -->`` and ``<!-- /results -->``, in the README or in
``docs/benchmarks.md``. ``--check`` changes nothing and exits with 1 where a page is out of date.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from benchmarks.common import RESULTS, main
from benchmarks.tables import TABLES, WITHOUT_DRAFTER
from benchmarks.tables.markdown import PENDING
from echo_rl.errors import ConfigError
from echo_rl.utils.result_store import digest

HERE = Path(__file__).resolve().parent
PAGES = (HERE.parent / "README.md", HERE.parent / "docs" / "benchmarks.md")
MARKED = re.compile(r"(<!-- results:(\w+) -->\n).*?(<!-- /results -->)", re.DOTALL)
EARLIER = "\n*Measured with an earlier drafter than the one that ships.*\n"
SHIPPED = HERE.parent / "checkpoints" / "smollm2-135m-eagle3" / "model.safetensors"


@dataclass(frozen=True)
class Args:
    """Render the tables of the documentation."""

    pages: tuple[Path, ...] = PAGES
    results: Path = RESULTS
    check: bool = False
    """Only say whether the pages are up to date."""


def render(text: str, results: Path) -> str:
    """The text with every marked table written anew. Raises `ConfigError` for an unknown name.

    Where drafts took part, a table says whether by another drafter than ships: a result names its own.
    """
    shipped = digest(SHIPPED)

    def fill(match: re.Match[str]) -> str:
        name = match[2]
        if name not in TABLES:
            raise ConfigError(f"there is no table called {name}; known: {', '.join(TABLES)}")
        file, make = TABLES[name]
        path = results / f"{file}.json"
        if not path.is_file():
            return f"{match[1]}\n{PENDING}\n{match[3]}"
        result = path.read_text()
        earlier = EARLIER if file not in WITHOUT_DRAFTER and shipped not in result else ""
        return f"{match[1]}\n{make(json.loads(result))}{earlier}\n{match[3]}"

    return MARKED.sub(fill, text)


def script() -> None:
    args = tyro.cli(Args)
    for page in args.pages:
        before = page.read_text()
        after = render(before, args.results)
        if args.check and before != after:
            sys.exit(f"{page} is out of date; run python -m benchmarks.render")
        if not args.check:
            page.write_text(after)


if __name__ == "__main__":
    main(script)
