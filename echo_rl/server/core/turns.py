"""Who goes first where the front and the engine want the same core.

A step sends its outputs, and Linux would let the front, which has slept since the last step, run at
once on the core that sent them: the engine waits, between two steps, until every stream is written.
"""

from __future__ import annotations

import contextlib
import os


def give_way() -> None:
    """This thread, and those that it starts, no longer interrupt others when they wake up."""
    _schedule("SCHED_BATCH")


def take_turns() -> None:
    """This thread is scheduled as usual: undoes the `give_way` of the process that started it."""
    _schedule("SCHED_OTHER")


def _schedule(policy: str) -> None:
    """Does nothing where the system knows no such thing, or forbids it."""
    if hasattr(os, policy):
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, getattr(os, policy), os.sched_param(0))
