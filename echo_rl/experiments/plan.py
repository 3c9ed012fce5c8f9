"""What a benchmark measures, and in which order. Pure descriptions: nothing here runs anything.

A *unit* is one arm serving one block of prompts at one load. Within a block every arm serves the
same prompts one after the other, in an order that rotates and reverses from block to block (A B, B
A, ...), so that the machine's drift falls on all arms alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from echo_rl.errors import ConfigError
from echo_rl.workloads.metrics import SLO


@dataclass(frozen=True)
class Load:
    """One point of the sweep. `requests` are served in each block; take at least twice the concurrency
    where the time allows, so that a full batch dominates the drain at a block's end."""

    concurrency: int
    requests: int
    max_new_tokens: int = 128
    blocks: int = 4

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise ConfigError(f"{name} is {value}; give at least 1")


@dataclass(frozen=True)
class BenchConfig:
    """What is measured. The first arm is the baseline of speed-ups and of output equality."""

    arms: tuple[str, ...]
    loads: tuple[Load, ...]
    suite: str = "all"
    temperature: float = 0.0
    seed: int = 0
    ignore_eos: bool = False
    slo: SLO | None = None

    def __post_init__(self) -> None:
        if not self.arms or not self.loads:
            raise ConfigError("a benchmark needs at least one arm and one load")
        if len(set(self.arms)) < len(self.arms):
            raise ConfigError(f"arms repeat: {', '.join(self.arms)}")
        if len({load.concurrency for load in self.loads}) < len(self.loads):
            raise ConfigError("two loads have the same concurrency")


@dataclass(frozen=True)
class Unit:
    """One arm's run over one block at one load."""

    block: int
    concurrency: int
    arm: str

    def __str__(self) -> str:
        return f"{self.arm} x{self.concurrency}, block {self.block + 1}"


@dataclass(frozen=True)
class TrialConfig:
    """Controllers under workloads (see `env.workload.parse`), for a time or a number of steps in each block.

    The first arm is the baseline.
    """

    arms: tuple[str, ...]
    workloads: tuple[str, ...]
    blocks: int = 6
    seconds: float | None = 20.0
    """Seconds of the backend's clock; None: `steps` alone end a block."""
    steps: int | None = None
    seed: int = 0
    """Of the arrivals, of the requests' order and of simulated noise."""
    slo: SLO | None = None

    def __post_init__(self) -> None:
        for name in ("arms", "workloads"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ConfigError(f"{name} are {', '.join(values) or 'none'}; give at least one, each once")
        ends = [end for end in (self.seconds, self.steps) if end is not None]
        if self.blocks < 1 or not ends or min(ends) <= 0:
            raise ConfigError("a comparison needs blocks of at least 1, and seconds or steps above 0")


@dataclass(frozen=True)
class Trial:
    """One arm's run over one block of one workload."""

    block: int
    workload: str
    arm: str

    def __str__(self) -> str:
        return f"{self.arm}, {self.workload}, block {self.block + 1}"


def arm_order(arms: Sequence[str], block: int) -> list[str]:
    """Pairs of blocks run forwards and backwards, each pair starting one arm later."""
    shift = (block // 2) % len(arms)
    order = [*arms[shift:], *arms[:shift]]
    return order[::-1] if block % 2 else order


def schedule(config: BenchConfig) -> Iterator[Unit]:
    """All units in the order they run: blocks outermost, so that every load is sampled early and late."""
    for block in range(max(load.blocks for load in config.loads)):
        for load in config.loads:
            if block < load.blocks:
                for arm in arm_order(config.arms, block):
                    yield Unit(block, load.concurrency, arm)


def trials(config: TrialConfig) -> Iterator[Trial]:
    """All trials in the order they run, as `schedule` does it."""
    for block in range(config.blocks):
        for workload in config.workloads:
            for arm in arm_order(config.arms, block):
                yield Trial(block, workload, arm)
