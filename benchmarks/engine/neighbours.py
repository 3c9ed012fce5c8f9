"""Measures what a busy neighbour costs: decoding beside processes that come and go, with all threads and with one.

A neighbour is a process that computes without a pause. Those of a state start, serving is measured from that moment on,
with all threads and with one in turn, a few times; then they go and the next state's come. An engine whose threads wait
for one another at barriers loses nearly everything beside one neighbour; with one thread it would lose no more than
that share, but half the machine when it is alone.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import count
from typing import Any

import torch
import tyro

from benchmarks.common import CONSOLE, EngineOptions, Ledger, Place, main
from echo_rl.config import EngineConfig
from echo_rl.contracts import SamplingParams
from echo_rl.controllers import registry
from echo_rl.experiments.plan import arm_order
from echo_rl.runtime.engine import Engine
from echo_rl.runtime.environment import load_engine
from echo_rl.utils import statistics
from echo_rl.utils.result_store import write_json
from echo_rl.workloads.datasets import Prompt, load_prompts
from echo_rl.workloads.requests import chat_requests

STATES = {"alone": (), "1 at nice 0": (0,), "2 at nice 0": (0, 0), "1 at nice 15": (15,), "2 at nice 15": (15, 15)}
"""The niceness of each neighbour."""
BUSY = "print(flush=True)\nwhile True: pass"


@dataclass(frozen=True)
class Args:
    """Measure decoding beside busy processes."""

    quick: bool = False
    """One short block."""
    concurrency: tuple[int, ...] = (1, 8)
    controller: str = "none"
    blocks: int = 8
    seconds: float = 1.0
    """The seconds for which serving is timed at once."""
    turns: int = 2
    """The times that both numbers of threads are timed in a state."""
    seed: int = 0
    engine: EngineOptions = field(default_factory=EngineConfig)

    def sized(self) -> Args:
        return replace(self, blocks=2, seconds=0.2, turns=1) if self.quick else self


@contextmanager
def neighbours(niceness: Sequence[int]) -> Iterator[None]:
    """Busy processes, running when this begins."""
    command = [sys.executable, "-c", BUSY]
    made = [subprocess.Popen(["nice", "-n", str(n), *command], stdout=subprocess.PIPE) for n in niceness]
    try:
        for process in made:
            assert process.stdout is not None
            process.stdout.readline()
        yield
    finally:
        for process in made:
            process.kill()
            process.wait()


class Load:
    """Keeps so many requests decoding, each to its full length."""

    def __init__(self, engine: Engine, prompts: Sequence[Prompt], concurrency: int, controller: str) -> None:
        self._engine, self._prompts, self._concurrency = engine, prompts, concurrency
        self._controller = registry.make(controller)
        self._numbers = count()
        self._running = 0

    def serve(self, seconds: float) -> dict[str, float]:
        """Tokens and seconds of the steps that only decode, for about so long, and the share of these steps whose
        report says that they were contended."""
        tokens, contended, steps, passed = 0, 0, 0, 0.0
        while passed < seconds:
            self._fill()
            begin = time.perf_counter()
            report = self._engine.step(self._controller)
            took = time.perf_counter() - begin
            self._running -= sum(output.finish_reason is not None for output in report.outputs)
            if not report.load.prefill_tokens:
                tokens += report.committed
                contended, steps, passed = contended + report.contended, steps + 1, passed + took
        return {"tokens": tokens, "seconds": passed, "contended": contended / steps}

    def drain(self) -> None:
        while self._engine.has_work:
            self._engine.step(self._controller)
        self._running = 0

    def _fill(self) -> None:
        params = SamplingParams(max_new_tokens=128, ignore_eos=True)
        while self._running < self._concurrency:
            number = next(self._numbers)
            prompt = self._prompts[number % len(self._prompts)]
            self._engine.add(chat_requests(self._engine, [prompt], lambda _: params, number)[0])
            self._running += 1


class Measurement:
    """Times all threads and one beside each state's neighbours, block by block."""

    def __init__(self, args: Args, ledger: Ledger, engine: Engine) -> None:
        self.args, self.ledger, self.engine = args, ledger, engine
        self.prompts = load_prompts("all", seed=args.seed)
        most = torch.get_num_threads()
        self.threads = {f"{most} threads": most, "1 thread": 1}

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yields the counts of `Load.serve` by load, block, state and number of threads."""
        for concurrency in self.args.concurrency:
            load = Load(self.engine, self.prompts, concurrency, self.args.controller)
            for block in range(self.args.blocks):
                for state in arm_order(list(STATES), block):
                    key = {"concurrency": concurrency, "block": block, "state": state}
                    found = self.ledger.cell(key, partial(self.beside, load, state, block))
                    yield from ({**key, "threads": threads, **served} for threads, served in found.items())
            load.drain()

    def beside(self, load: Load, state: str, block: int) -> dict[str, dict[str, float]]:
        sums = {name: {"tokens": 0.0, "seconds": 0.0, "contended": 0.0} for name in self.threads}
        load.serve(self.args.seconds / 2)
        with neighbours(STATES[state]):
            for turn in range(self.args.turns):
                for name in arm_order(list(self.threads), block + turn):
                    for what, value in self.served(load, self.threads[name]).items():
                        sums[name][what] += value if what != "contended" else value / self.args.turns
        return sums

    def served(self, load: Load, threads: int) -> dict[str, float]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return load.serve(self.args.seconds)
        finally:
            torch.set_num_threads(before)


def report(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry a load, state and number of threads: its rate, also over one thread's and over that when alone."""
    rates: dict[tuple[int, str, str], list[statistics.Rate]] = {}
    contended: dict[tuple[int, str, str], list[float]] = {}
    for row in sorted(rows, key=lambda row: row["block"]):
        key = (row["concurrency"], row["state"], row["threads"])
        rates.setdefault(key, []).append(statistics.Rate(row["tokens"], row["seconds"]))
        contended.setdefault(key, []).append(row["contended"])
    return [
        {
            "concurrency": concurrency,
            "state": state,
            "threads": threads,
            "tokens_per_second": asdict(statistics.rate(blocks)),
            "over_one_thread": asdict(statistics.rate_ratio(blocks, rates[concurrency, state, "1 thread"])),
            "over_alone": asdict(statistics.rate_ratio(blocks, rates[concurrency, "alone", threads])),
            "contended": sum(contended[concurrency, state, threads]) / len(blocks),
        }
        for (concurrency, state, threads), blocks in sorted(rates.items(), key=lambda item: _place(*item[0]))
    ]


def _place(concurrency: int, state: str, threads: str) -> tuple[int, int, bool]:
    """The order of the table."""
    return concurrency, list(STATES).index(state), threads == "1 thread"


def script() -> None:
    args = tyro.cli(Args).sized()
    place = Place("neighbours", args.quick)
    engine, environment = load_engine(args.engine)
    ledger = Ledger(place.work, {**asdict(args), "environment": environment})
    entries = report(list(Measurement(args, ledger, engine).rows()))
    write_json(place.result, {"settings": asdict(args), "environment": environment, "entries": entries})
    for entry in entries:
        ratio = statistics.Interval(**entry["over_one_thread"]).text(2, "x")
        CONSOLE.print(
            f"{entry['concurrency']} in flight, {entry['state']}, {entry['threads']}: over one thread {ratio}, "
            f"contended {entry['contended']:.0%}",
            highlight=False,
        )


if __name__ == "__main__":
    main(script)
