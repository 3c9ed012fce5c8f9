"""Runs what an experiment's store lacks, in the order of its plan, under a progress bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from echo_rl.utils.result_store import K, R, ResultStore

T = TypeVar("T")


def run_missing(
    plan: Sequence[K], store: ResultStore[K, R], serve: Callable[[K], R], console: Console | None = None
) -> dict[K, R]:
    """The results of the whole plan: those that the store lacks are served in turn and kept at once."""
    missing = [run for run in plan if run not in store]
    with shown(missing, console, done=len(plan) - len(missing)) as runs:
        for run in runs:
            store.add(run, serve(run))
    return {run: store[run] for run in plan}


@contextmanager
def shown(work: Sequence[T], console: Console | None, done: int = 0) -> Iterator[Iterator[T]]:
    """The pieces of work one by one, under a bar that names each; `done` of them were done before."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, refresh_per_second=2)
    with bar:
        task = bar.add_task("", total=done + len(work), completed=done)

        def pieces() -> Iterator[T]:
            for piece in work:
                bar.update(task, description=str(piece))
                yield piece
                bar.advance(task)

        yield pieces()
