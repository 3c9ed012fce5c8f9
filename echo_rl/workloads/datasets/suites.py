"""The built-in suites by name: those of the mix that things are tuned on, and those that are held out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from echo_rl.errors import HeldOutError
from echo_rl.workloads.datasets.benchmarks import GSM8K, HUMANEVAL, MT_BENCH
from echo_rl.workloads.datasets.held_out import HELD_OUT
from echo_rl.workloads.datasets.suite import Suite

MIX = ("mt_bench", "humaneval", "gsm8k")
"""The suites that ``all`` takes in turn. It stays these three: results are compared over releases."""
SUITES: Mapping[str, Suite] = {suite.name: suite for suite in (MT_BENCH, HUMANEVAL, GSM8K, *HELD_OUT)}


def refuse_held_out(names: Iterable[str], purpose: str, suites: Mapping[str, Suite] = SUITES) -> None:
    """Raises `HeldOutError` where one of these suites is held out; `purpose` says what it was asked for."""
    found = sorted(name for name in {*names} & {*suites} if suites[name].held_out)
    if found:
        raise HeldOutError(
            f"{', '.join(found)} is held out: nothing is ever tuned on it, so that it can judge what was; {purpose} "
            f"with {', '.join(MIX)} or with prompts of your own (--prompts FILE)"
        )
