"""A prompt: the chat messages up to the answer that is asked for. Knows nothing about tokenization."""

from __future__ import annotations

from dataclasses import dataclass

Message = dict[str, str]


@dataclass(frozen=True)
class Prompt:
    """The chat messages up to the answer, and what its source tells of that answer."""

    suite: str
    id: str
    """Unique within the suite."""
    messages: tuple[Message, ...]
    category: str = ""
    """The kind of task that the source names, as MT-Bench does (writing, math, ...); empty where it names none."""
    max_new_tokens: int | None = None
    """The tokens of the answer that the source gives or asks for; None where it tells none."""

    def length(self, most: int) -> int:
        """The most tokens of the answer: the source's own, else `most`."""
        return most if self.max_new_tokens is None else self.max_new_tokens


def user(content: str) -> tuple[Message, ...]:
    """The messages of a conversation that one user's turn opens."""
    return ({"role": "user", "content": content},)
