"""Reads the World Factbook's entries: what one country has to say under each field, as plain text."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from echo_rl.workloads.datasets.members import read_members

INDEPENDENCE = ("Government", "Independence")
TAG = re.compile(r"<[^>]*>")


@dataclass(frozen=True)
class Country:
    """One entry: a name, and the text of its fields by section and field."""

    code: str
    name: str
    fields: Mapping[tuple[str, str], str]

    def passage(self, section: str, names: tuple[str, ...]) -> str:
        """The named fields of one section that the entry has, one a line."""
        lines = [(name, self.fields.get((section, name), "")) for name in names]
        return "\n".join(f"{name}: {text}" for name, text in lines if text)


def read_countries(archive: Path) -> list[Country]:
    """Independent countries in the order of region and code; territories and oceans are left out."""
    files = read_members(archive, "*/data/*/*.json")
    entries = (_country(path, json.loads(data)) for path, data in files.items())
    return [country for country in entries if not country.fields.get(INDEPENDENCE, "none").startswith("none")]


def _country(path: str, sections: Mapping[str, Mapping[str, Any]]) -> Country:
    fields = {(section, name): plain(value) for section, held in sections.items() for name, value in held.items()}
    name = sections.get("Government", {}).get("Country name", {})
    short = name.get("conventional short form", {}).get("text", "none")
    long = name.get("conventional long form", {}).get("text", "")
    return Country(Path(path).stem, _name(plain(long if short == "none" else short)), fields)


def _name(listed: str) -> str:
    """A name as it is said: the Factbook lists "Gambia, The"."""
    return f"the {listed.removesuffix(', The')}" if listed.endswith(", The") else listed


def plain(value: Any) -> str:
    """The text of a field without markup, its parts joined by semicolons."""
    if isinstance(value, str):
        return " ".join(html.unescape(TAG.sub(" ", value)).split())
    parts = [plain(part) if key == "text" else f"{key.strip()}: {plain(part)}" for key, part in value.items()]
    return "; ".join(part.removeprefix("note: ") if part.startswith("note: note") else part for part in parts)
