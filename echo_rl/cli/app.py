"""The tree of subcommands."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Annotated, Any, NamedTuple, Protocol, Union

import tyro

from echo_rl.cli.ab import Ab
from echo_rl.cli.bench import Bench
from echo_rl.cli.demo import Demo
from echo_rl.cli.generate import Generate
from echo_rl.cli.load import Load
from echo_rl.cli.serve import Serve
from echo_rl.cli.version import Version
from echo_rl.cli.weights import Weights

DESCRIPTION = "Speculative decoding under one batch-wide node budget, with the budget decision as a policy."


class Command(Protocol):
    def run(self) -> int:
        """Does the work; returns the exit code."""
        ...


class Group(NamedTuple):
    """Commands whose options are library dataclasses: their module is imported only when the group is named."""

    path: str
    """The commands' place below this package: ``module:name``."""
    help: str


@dataclass(frozen=True)
class Unparsed:
    """Stands for a `Group` in the help; its arguments are parsed by its own module."""


COMMANDS: dict[str, type[Command] | Group] = {
    "generate": Generate,
    "serve": Serve,
    "demo": Demo,
    "bench": Bench,
    "ab": Ab,
    "load": Load,
    "calibrate": Group(
        "calibrate:AnyCommand",
        "Measure this machine's costs (cost), model a GPU's (roofline), or find where this drafter's gates "
        "cut (gates).",
    ),
    "drafter": Group(
        "drafter:AnyCommand", "Write training conversations (synthesize), or train a drafter on them (train)."
    ),
    "record": Group("record:Record", "Record responses with the widest forest at every position, for replay."),
    "eval": Group("evaluate:Eval", "Rank controllers on recorded responses in simulated time."),
    "tune": Group("tune:Tune", "Search the options of controllers on recorded responses, for eval --tuned."),
    "train": Group("train:Train", "Train a policy on replayed servers; rerun it to go on where it stopped."),
    "sglang": Group(
        "sglang:AnyCommand",
        "Check the plugin against the SGLang that is installed (doctor), or print a configuration for it (example).",
    ),
    "weights": Weights,
    "version": Version,
}


def parse(argv: Sequence[str] | None = None) -> Command:
    """Returns the command that the arguments name. Exits with help or usage as argparse does."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    group = COMMANDS.get(arguments[0]) if arguments else None
    kind, program, description = _all_commands(), "echo-rl", DESCRIPTION
    if isinstance(group, Group):
        kind, description = resolve_name(f"echo_rl.cli.{group.path}"), group.help
        program = f"echo-rl {arguments.pop(0)}"
    command: Command = tyro.cli(kind, args=arguments, prog=program, description=description)
    return command


def _all_commands() -> Any:
    """Returns the union of all commands, each under its name."""
    named = [
        Annotated[Unparsed, tyro.conf.subcommand(name, description=kind.help)]
        if isinstance(kind, Group)
        else Annotated[kind, tyro.conf.subcommand(name)]
        for name, kind in COMMANDS.items()
    ]
    return Union[tuple(named)]  # noqa: UP007
