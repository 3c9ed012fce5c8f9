"""The tree of subcommands."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Annotated, Protocol

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


class Heavy:
    """A command whose options are library dataclasses: its module is imported only when it is named."""

    def run(self) -> int:
        raise AssertionError("parsed by its own module")


@dataclass(frozen=True)
class Calibrate(Heavy):
    """Measure this machine's costs (cost), model a GPU's (roofline), or find where this drafter's gates cut (gates)."""


@dataclass(frozen=True)
class Drafter(Heavy):
    """Write training conversations (synthesize), or train a drafter on them (train)."""


@dataclass(frozen=True)
class Record(Heavy):
    """Record responses with the widest forest at every position, for replay."""


@dataclass(frozen=True)
class Train(Heavy):
    """Train a policy on replayed servers; rerun it to go on where it stopped."""


@dataclass(frozen=True)
class Eval(Heavy):
    """Rank controllers on recorded responses in simulated time."""


@dataclass(frozen=True)
class Tune(Heavy):
    """Search the options of controllers on recorded responses, for eval --tuned."""


@dataclass(frozen=True)
class Sglang(Heavy):
    """Check the plugin against the SGLang that is installed (doctor), or print a configuration for it (example)."""


GROUPS: dict[str, tuple[str, type[Heavy]]] = {
    "calibrate": ("echo_rl.cli.calibrate", Calibrate),
    "drafter": ("echo_rl.cli.drafter", Drafter),
    "record": ("echo_rl.cli.record", Record),
    "eval": ("echo_rl.cli.evaluate", Eval),
    "tune": ("echo_rl.cli.tune", Tune),
    "train": ("echo_rl.cli.train", Train),
    "sglang": ("echo_rl.cli.sglang", Sglang),
}

AnyCommand = (
    Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[Serve, tyro.conf.subcommand("serve")]
    | Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Bench, tyro.conf.subcommand("bench")]
    | Annotated[Ab, tyro.conf.subcommand("ab")]
    | Annotated[Load, tyro.conf.subcommand("load")]
    | Annotated[Calibrate, tyro.conf.subcommand("calibrate")]
    | Annotated[Drafter, tyro.conf.subcommand("drafter")]
    | Annotated[Record, tyro.conf.subcommand("record")]
    | Annotated[Eval, tyro.conf.subcommand("eval")]
    | Annotated[Tune, tyro.conf.subcommand("tune")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Sglang, tyro.conf.subcommand("sglang")]
    | Annotated[Weights, tyro.conf.subcommand("weights")]
    | Annotated[Version, tyro.conf.subcommand("version")]
)


def parse(argv: Sequence[str] | None = None) -> Command:
    """The command that the arguments name. Exits with help or usage as argparse does."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command: Command
    if arguments and arguments[0] in GROUPS:
        module, group = GROUPS[arguments[0]]
        kinds = import_module(module).AnyCommand
        command = tyro.cli(kinds, args=arguments[1:], prog=f"echo-rl {arguments[0]}", description=group.__doc__)
    else:
        command = tyro.cli(AnyCommand, args=arguments, prog="echo-rl", description=DESCRIPTION)
    return command
