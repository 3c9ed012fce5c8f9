"""Plans what an experiment runs, and in which order. Pure descriptions: nothing here runs anything.

A *run* is one arm that serves one block of one workload. Within a block every arm meets the same requests, one arm
after the other, in an order that rotates and reverses from block to block (A B, B A, ...), so that the machine's drift
falls on all arms alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from echo_rl.errors import ConfigError
from echo_rl.workloads.metrics import SLO


@dataclass(frozen=True)
class Run:
    """One arm's run over one block of one workload."""

    block: int
    workload: str
    """The workload's text, which `workloads.arrivals.parse` reads."""
    arm: str

    def __str__(self) -> str:
        return f"{self.arm}, {self.workload}, block {self.block + 1}"


def arm_order(arms: Sequence[str], block: int) -> list[str]:
    """Pairs of blocks run forwards and backwards, each pair starting one arm later."""
    shift = (block // 2) % len(arms)
    order = [*arms[shift:], *arms[:shift]]
    return order[::-1] if block % 2 else order


def schedule(arms: Sequence[str], blocks: Mapping[str, int]) -> list[Run]:
    """All runs in their order; `blocks` says how many a workload has.

    Blocks are outermost, so that every workload is sampled early and late.
    """
    return [
        Run(block, workload, arm)
        for block in range(max(blocks.values()))
        for workload, count in blocks.items()
        if block < count
        for arm in arm_order(arms, block)
    ]


@dataclass(frozen=True)
class Load:
    """One point of a sweep. `requests` are served in each block; take at least twice the concurrency
    where the time allows, so that a full batch dominates the drain at a block's end."""

    concurrency: int
    requests: int
    max_new_tokens: int = 128
    blocks: int = 4

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise ConfigError(f"{name} is {value}; give at least 1")

    @property
    def workload(self) -> str:
        return f"closed:{self.concurrency}"


@dataclass(frozen=True)
class BenchConfig:
    """The arms and loads of a benchmark. The first arm is the baseline of speed-ups and of output equality."""

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

    @property
    def runs(self) -> list[Run]:
        return schedule(self.arms, {load.workload: load.blocks for load in self.loads})


@dataclass(frozen=True)
class AbConfig:
    """Controllers under workloads, for a time or a number of steps in each block. The first arm is the baseline."""

    arms: tuple[str, ...]
    workloads: tuple[str, ...]
    blocks: int = 6
    seconds: float | None = 20.0
    """Seconds of the backend's clock; None: `steps` alone end a block."""
    steps: int | None = None
    seed: int = 0
    """The seed of the arrivals, of the requests' order and of simulated noise."""
    slo: SLO | None = None

    def __post_init__(self) -> None:
        check_blocks(self.arms, self.workloads, self.blocks)
        ends = [end for end in (self.seconds, self.steps) if end is not None]
        if not ends or min(ends) <= 0:
            raise ConfigError("a block needs an end: give seconds or steps above 0")

    @property
    def runs(self) -> list[Run]:
        return schedule(self.arms, dict.fromkeys(self.workloads, self.blocks))


def check_blocks(arms: Sequence[str], workloads: Sequence[str], blocks: int) -> None:
    """Raises `ConfigError` where there is nothing to run, or an arm or a workload comes twice."""
    for name, values in (("arms", arms), ("workloads", workloads)):
        if not values or len(set(values)) < len(values):
            raise ConfigError(f"{name} are {', '.join(values) or 'none'}; give at least one, each once")
    if blocks < 1:
        raise ConfigError(f"there are {blocks} blocks; give blocks of at least 1")
