"""A thread that makes calls whose caller can't wait for them. Knows nothing of controllers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

Call = Callable[[], Any]


@dataclass(frozen=True)
class Answer:
    """The value that a call returned, or the error that it raised."""

    value: Any = None
    error: BaseException | None = None

    def result(self) -> Any:
        """Returns the value, or raises the error."""
        if self.error is not None:
            raise self.error
        return self.value


class BackgroundCaller:
    """Makes one call at a time in a daemon thread of its own, which the first call starts.

    A call that never returns holds nothing up: the owner drops this object, and the thread ends with the process. The
    methods are for one thread, the owner's.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._calls: SimpleQueue[Call | None] = SimpleQueue()
        self._answers: SimpleQueue[Answer] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self.busy = False
        """True while a call's answer is still to be taken."""

    def post(self, call: Call) -> None:
        """Begins a call; the answer of the one before must have been taken."""
        assert not self.busy, "one call at a time"
        self.busy = True
        if self._thread is None:
            self._thread = threading.Thread(target=_serve, args=(self._calls, self._answers), name=self._name)
            self._thread.daemon = True
            self._thread.start()
        self._calls.put(call)

    def wait(self, seconds: float) -> Answer | None:
        """Returns the answer to the call under way, or None if it isn't there after so many seconds."""
        try:
            answer = self._answers.get(timeout=seconds) if seconds > 0 else self._answers.get_nowait()
        except Empty:
            return None
        self.busy = False
        return answer

    def close(self) -> None:
        """Lets the thread end after the call under way."""
        self._calls.put(None)


def _serve(calls: SimpleQueue[Call | None], answers: SimpleQueue[Answer]) -> None:
    while (call := calls.get()) is not None:
        try:
            answer = Answer(call())
        except BaseException as error:  # a SystemExit of foreign code is an error like any other
            answer = Answer(error=error)
        del call  # holds the controller
        answers.put(answer)
        del answer
