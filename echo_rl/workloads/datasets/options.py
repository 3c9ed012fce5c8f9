"""The prompts that a command is given: a built-in suite, or files of yours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from echo_rl.errors import ConfigError
from echo_rl.workloads.datasets.conversation import Conversation, Turns
from echo_rl.workloads.datasets.files import PromptFile
from echo_rl.workloads.datasets.load import GROUPS, in_turn, load_prompts, shuffled
from echo_rl.workloads.datasets.prompt import Prompt
from echo_rl.workloads.datasets.suites import SUITES


@dataclass(frozen=True)
class PromptSet:
    """Prompts in the order in which they are served."""

    suite: str
    """The name that results show."""
    prompts: list[Prompt]
    notes: tuple[str, ...] = ()
    """What was left out of their files, in words."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """What tells these prompts from others, beside the suite and the seed."""


@dataclass(frozen=True)
class FileOptions:
    """Prompts out of files."""

    prompts: tuple[Path, ...] = ()
    """Files of your own prompts, each a suite named after it: JSON lines or an array, also gzipped, of messages,
    ShareGPT's conversations, or {"prompt": ...}; malformed lines are named."""
    turns: Turns = "all"
    """Which of a recorded conversation's turns are answered: every one, after the recorded ones before it; the first
    alone, or the last alone."""
    limit: int | None = None
    """The most prompts; all by default."""

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"the prompt limit is {self.limit}; give at least 1")

    def files(self) -> dict[str, PromptFile]:
        """The files by the names of their suites. Raises `DatasetError`."""
        found: dict[str, PromptFile] = {}
        for path in self.prompts:
            if path.name.isdecimal() and not path.exists():
                raise ConfigError(f"--prompts {path} names no file; --limit {path} takes so many prompts")
            read = PromptFile.read(path)
            found[read.suite({*SUITES, *GROUPS, *found})] = read
        return found

    def conversations(self, files: Mapping[str, PromptFile], seed: int = 0) -> list[Conversation]:
        """The conversations of the files in turn, each file's shuffled by the seed."""
        groups = (shuffled(file.conversations, f"{seed}/{name}") for name, file in files.items())
        return in_turn(groups)[: self.limit]

    def load_files(self, seed: int = 0) -> PromptSet:
        """The prompts of the files in turn, each file's shuffled by the seed. Raises `DatasetError`."""
        files = self.files()
        prompts = {
            name: [prompt for each in file.conversations for prompt in each.prompts(name, self.turns)]
            for name, file in files.items()
        }
        mixed = in_turn(shuffled(found, f"{seed}/{name}") for name, found in prompts.items())
        return PromptSet("+".join(files), mixed[: self.limit], notes(files), self.facts(files))

    def facts(self, files: Mapping[str, PromptFile]) -> dict[str, str]:
        """What tells the prompts from others: the files by content, and which of their prompts are taken."""
        named = {f"prompts {name}": f"sha256 {file.sha256}" for name, file in files.items()}
        chosen = {"turns": self.turns, "limit": str(self.limit)}
        return named | {name: value for name, value in chosen.items() if value not in ("all", "None")}


@dataclass(frozen=True)
class PromptOptions(FileOptions):
    """Prompts of a built-in suite, or out of files."""

    suite: str = "all"
    """A built-in suite; ``all`` takes mt_bench, humaneval and gsm8k in turn, ``held_out`` those that nothing is tuned
    on."""

    def load(self, seed: int = 0) -> PromptSet:
        """Raises `ConfigError` (`DatasetError` for a file that can't be read) and `PackageUnavailable`."""
        if not self.prompts:
            return PromptSet(self.suite, load_prompts(self.suite, self.limit, seed), facts=self.facts({}))
        if self.suite != "all":
            raise ConfigError(f"--suite {self.suite} and --prompts are given; give one of them")
        return self.load_files(seed)


def notes(files: Mapping[str, PromptFile]) -> tuple[str, ...]:
    """What was left out of the files, in words."""
    return tuple(note for file in files.values() for note in file.notes)
