"""Loads prompts by the name of a suite, in an order that a seed decides."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TypeVar

from echo_rl.errors import ConfigError
from echo_rl.utils.archives import cache_root
from echo_rl.workloads.datasets.prompt import Prompt
from echo_rl.workloads.datasets.suite import Suite
from echo_rl.workloads.datasets.suites import MIX, SUITES

T = TypeVar("T")
GROUPS = ("all", "held_out")
"""Names that stand for several suites."""


def load_prompts(
    suite: str = "all",
    limit: int | None = None,
    seed: int = 0,
    cache: Path | None = None,
    suites: Mapping[str, Suite] = SUITES,
) -> list[Prompt]:
    """The prompts of one suite; of those of `MIX` in turn (``all``), so that any prefix is a fair mix; or of those that
    are held out in turn (``held_out``).

    The order is a shuffle by `seed`; `limit` keeps the first so many. Raises `ConfigError` for an
    unknown suite, `PackageUnavailable` where an archive can't be fetched or has the wrong sha256.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"the prompt limit is {limit}; give at least 1")
    folder = cache_root() / "prompts" if cache is None else cache
    chosen = suite_names(suite, suites)
    return in_turn(shuffled(suites[name].prompts(folder), f"{seed}/{name}") for name in chosen)[:limit]


def suite_names(suite: str, suites: Mapping[str, Suite] = SUITES) -> list[str]:
    """The suites that a name stands for. Raises `ConfigError` where it stands for none."""
    held_out = [name for name, kept in suites.items() if kept.held_out]
    groups = dict(zip(GROUPS, ([name for name in MIX if name in suites], held_out), strict=True))
    names = groups.get(suite, [suite] if suite in suites else [])
    if not names:
        raise ConfigError(f"unknown prompt suite {suite!r}; give {', '.join((*GROUPS, *suites))}")
    return names


def in_turn(groups: Iterable[Sequence[T]]) -> list[T]:
    """One of each group after the other, so that any prefix is a fair mix."""
    return [each for row in zip_longest(*groups) for each in row if each is not None]


def shuffled(prompts: Iterable[T], key: str) -> list[T]:
    """In an order that the key decides."""
    order = list(prompts)
    random.Random(key).shuffle(order)
    return order
