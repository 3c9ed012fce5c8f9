"""Tokens that open one stream each: a browser's EventSource cannot send the admin key in a header."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable

SESSION_SECONDS = 60.0
MOST_SESSIONS = 256


class Sessions:
    """Random tokens, each good once and for a minute. The oldest are forgotten beyond 256 unused ones."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._expiry: dict[str, float] = {}  # token -> when it expires, oldest first

    def issue(self) -> str:
        now = self._clock()
        self._expiry = {token: end for token, end in self._expiry.items() if end > now}
        while len(self._expiry) >= MOST_SESSIONS:
            del self._expiry[next(iter(self._expiry))]
        token = secrets.token_urlsafe(32)
        self._expiry[token] = now + SESSION_SECONDS
        return token

    def redeem(self, token: str) -> bool:
        """Returns whether the token was good; it can be used only once."""
        return self._expiry.pop(token, float("-inf")) > self._clock()
