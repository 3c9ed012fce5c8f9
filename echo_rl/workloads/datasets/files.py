"""Reads prompt files: every row a conversation, bad ones named by their numbers, nothing left out without a word."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from echo_rl.errors import DatasetError
from echo_rl.workloads.datasets.conversation import Conversation
from echo_rl.workloads.datasets.formats import EXPECTED, conversation
from echo_rl.workloads.datasets.rows import Malformed, json_rows

NAMED = 3
"""Bad rows that an error names; it counts the others."""


@dataclass(frozen=True)
class PromptFile:
    """The conversations of a file that have a turn to answer, in its order."""

    path: Path
    sha256: str
    conversations: tuple[Conversation, ...]
    notes: tuple[str, ...] = ()
    """What was left out, in words."""

    @classmethod
    def read(cls, path: Path) -> PromptFile:
        """Raises `DatasetError` where the file can't be read, holds no turn to answer, or holds a malformed row."""
        found, bad = [], []
        for number, (place, row) in enumerate(json_rows(path), 1):
            try:
                found.append(conversation(row, str(number)))
            except Malformed as error:
                bad.append(f"{place} {error}")
        if bad:
            raise DatasetError(_refusal(path, bad, len(bad) + len(found)))
        asking = tuple(each for each in found if each.ends)
        if not asking:
            raise DatasetError(f"{path} holds {'no turn of a user' if found else 'nothing'}; {EXPECTED}")
        with open(path, "rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        return cls(path, sha256, asking, tuple(_notes(path, found, asking)))

    def suite(self, taken: Collection[str]) -> str:
        """A name for the file's prompts: its stem, in letters that an arm, a workload and a request's id can hold."""
        stem = re.sub(r"(\.(json|jsonl|ndjson|txt|gz))+$", "", self.path.name)
        name = base = re.sub(r"[^A-Za-z0-9_.-]+", "_", stem).strip("_.") or "prompts"
        number = 1
        while name in taken:
            number += 1
            name = f"{base}_{number}"
        return name


def _refusal(path: Path, bad: list[str], rows: int) -> str:
    named = "; ".join(bad[:NAMED])
    more = f"; and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
    return f"{path}: {len(bad)} of {rows} rows cannot be read: {named}{more}. Correct these or take them out"


def _notes(path: Path, found: list[Conversation], asking: tuple[Conversation, ...]) -> Iterator[str]:
    if empty := len(found) - len(asking):
        yield f"{path.name}: conversations left out: {empty} (no turn of a user)"
    if later := sum(len(each.questions) - 1 for each in asking if each.one_sided):
        yield f"{path.name}: later turns left out: {later} (the answers before them are not recorded)"
