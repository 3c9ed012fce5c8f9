"""What a process has loaded, and the garbage collector."""

from __future__ import annotations

import gc


def settle() -> None:
    """Everything that is there now stays for good; call it once a process has loaded what it serves with.

    A full collection would otherwise walk through all modules again and again, a tenth of a second each
    time, in which no stream gets a token.
    """
    gc.collect()
    gc.freeze()
