"""Settles how the operating system schedules a process of the server, and what its garbage collector skips."""

from __future__ import annotations

import contextlib
import gc
import os


def freeze_gc_heap() -> None:
    """Takes all that is loaded now out of garbage collection; call it once a process has loaded what it serves with.

    A full collection would otherwise walk through all modules again and again, a tenth of a second each time, in
    which no stream gets a token.
    """
    gc.collect()
    gc.freeze()


def use_batch_scheduling() -> None:
    """Keeps this thread, and those that it starts, from interrupting others when they wake up.

    A step sends its outputs, and Linux would let the front, which has slept since the last step, run at once on the
    core that sent them: the engine would wait, between two steps, until every stream is written.
    """
    _schedule("SCHED_BATCH")


def use_default_scheduling() -> None:
    """Undoes the `use_batch_scheduling` that this thread inherited from the process that started it."""
    _schedule("SCHED_OTHER")


def _schedule(policy: str) -> None:
    """Does nothing where the system knows no such policy, or forbids it."""
    if hasattr(os, policy):
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, getattr(os, policy), os.sched_param(0))
