"""What a validation is made of: processes in stages. Knows how they look, not how they are run."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
ECHO = (sys.executable, "-m", "echo_rl.cli")
ROOMY = ("--device", "cuda", "--kv-tokens", "131072")
FAILED = ("failed", "timed out")
"""Outcomes of a stage that went wrong."""


@dataclass(frozen=True)
class Args:
    """Validate and measure this project on a GPU."""

    out: Path = Path("results/gpu")
    """Folder of the report, the logs and all results."""
    dry_run: bool = False
    """Print the plan with the exact commands and do nothing."""
    again: tuple[str, ...] = ()
    """Stages to do anew."""
    model: str | None = None
    """Target for SGLang: a folder or a Hugging Face name, as ``meta-llama/Llama-3.1-8B-Instruct``; with `drafter`."""
    drafter: str | None = None
    """Its EAGLE-3 drafter, as ``yuhuili/EAGLE3-LLaMA3.1-Instruct-8B``."""
    controller: str = "echo"
    """Who decides in SGLang."""
    profile: Path | None = None
    """Costs for that controller; by default those modelled for a Llama-3.1-8B on an H100."""
    port: int = 8123
    """A free port for the servers, one at a time."""
    patience: float = 1.0
    """Multiplies every time limit."""


@dataclass(frozen=True)
class Step:
    """One process, with a server that is up while it runs."""

    command: tuple[str, ...]
    serve: tuple[str, ...] = ()
    url: str = ""
    """The server's."""
    env: Mapping[str, str] = field(default_factory=dict)
    """More environment, the server's too."""

    def lines(self) -> list[str]:
        """As a shell would take it."""
        known = " ".join(f"{key}={shlex.quote(value)}" for key, value in self.env.items())
        every = [f"{shlex.join(self.serve)} &  # until {self.url}/health answers"] if self.serve else []
        return [f"{known} {line}".strip() for line in [*every, shlex.join(self.command)]]


@dataclass(frozen=True)
class Stage:
    """Steps that succeed or fail together."""

    name: str
    title: str
    minutes: float
    """Its time limit."""
    steps: tuple[Step, ...]
    needs: str = ""
    """A stage without which it is skipped."""
    skip: str = ""
    """Why it can't be done at all."""
    note: str = ""
    """What a reader of its numbers must know."""
    thorough: bool = False
    """Whether the other steps are still run after one has failed."""

    def lines(self) -> list[str]:
        return [line for step in self.steps for line in step.lines()]


Runner = Callable[[Step, Path, float], int | None]
"""(step, log, seconds) -> exit code, None at the limit."""


def module(name: str, *options: str, **env: str) -> Step:
    return Step((sys.executable, "-m", name, *options), env=env)


def tests(name: str, out: Path, **env: str) -> tuple[Step, ...]:
    report = f"--junitxml={out / name / 'junit.xml'}"
    pytest = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--timeout=900", report)
    return (Step((*pytest, str(ROOT / "tests" / name)), env=env),)


def benchmark(name: str, folder: Path, *options: str) -> Step:
    """A benchmark that writes into ``folder/results``, so that the committed results stay as they are."""
    return module(f"benchmarks.{name}", *options, ECHO_RL_RESULTS=str(folder / "results"))


def load(url: str, out: Path, *options: str) -> tuple[str, ...]:
    loads = ("closed:1", "closed:8", "closed:32", "closed:64")
    return (*ECHO, "load", "--url", url, "--workloads", *loads, "--seconds", "20", *options, "--out", str(out))
