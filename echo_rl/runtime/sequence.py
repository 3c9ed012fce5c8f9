"""Holds one request while it is served. Counters are derived from the token list wherever they can be."""

from __future__ import annotations

from dataclasses import dataclass, field

from echo_rl.contracts import Request
from echo_rl.runtime.tokenizer import TextStream


@dataclass(eq=False)
class Sequence:
    """Tokens, the KV they have, and the blocks that hold it.

    The invariant of a step's start: tokens[:kv_len] are in the target's cache, and the drafter has
    seen the pairs (feature of token i, token i + 1) for i < draft_len <= kv_len.
    """

    request: Request
    text: TextStream
    tokens: list[int] = field(default_factory=list)
    kv_len: int = 0
    draft_len: int = 0
    blocks: list[int] = field(default_factory=list)
    reserved_blocks: int = 0
    drafts: bool = True
    """True where it may speculate."""

    def __post_init__(self) -> None:
        self.tokens, self.drafts = list(self.request.prompt), self.request.speculate

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def pending(self) -> int:
        """Tokens not yet in the target's cache. A decoding sequence has exactly one, the root."""
        return len(self.tokens) - self.kv_len

    @property
    def decoding(self) -> bool:
        """True once it has its first token; until then its prompt is processed."""
        return self.output_len > 0

    @property
    def output_len(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def next_position(self) -> int:
        """Position of the token that comes next: the key of its sampling noise."""
        return len(self.tokens)
