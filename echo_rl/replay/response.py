"""Holds one recorded response."""

from __future__ import annotations

from dataclasses import dataclass

from echo_rl.contracts import SamplingParams


@dataclass(frozen=True)
class Response:
    """One recorded answer. `tokens` goes `depth` tokens past its end: drafted trees reach there too."""

    suite: str
    prompt: tuple[int, ...]
    params: SamplingParams
    tokens: tuple[int, ...]
    length: int
    """Tokens that the request really got."""
    finish_reason: str

    @property
    def positions(self) -> int:
        return self.length - 1
