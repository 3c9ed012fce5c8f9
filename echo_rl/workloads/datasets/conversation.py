"""A recorded conversation, and the prompts that it holds: one for each turn that an answer follows, or should."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from echo_rl.workloads.datasets.prompt import Message, Prompt

Turns = Literal["all", "first", "last"]


@dataclass(frozen=True)
class Conversation:
    """The messages of one conversation in their order, answers included where they were recorded."""

    id: str
    messages: tuple[Message, ...]
    category: str = ""
    max_new_tokens: int | None = None
    """The tokens of the last answer, where its source gives them."""

    @property
    def questions(self) -> tuple[int, ...]:
        """The places of the user's turns."""
        return tuple(place for place, message in enumerate(self.messages) if message["role"] == "user")

    @property
    def one_sided(self) -> bool:
        """True where the user speaks several times and no answer was recorded in between."""
        return len(self.questions) > 1 and all(message["role"] != "assistant" for message in self.messages)

    @property
    def ends(self) -> tuple[int, ...]:
        """How many messages come before each answer; of a one-sided conversation before the first alone, since what
        the later turns reply to is not known."""
        if not self.questions:
            return ()
        if self.one_sided:
            return (self.questions[0] + 1,)
        roles = [message["role"] for message in self.messages]
        asked = range(self.questions[0] + 1, len(roles) + 1)
        return tuple(
            end for end in asked if roles[end - 1] != "assistant" and (end == len(roles) or roles[end] == "assistant")
        )

    def prompts(self, suite: str, turns: Turns = "all") -> list[Prompt]:
        """A prompt for each answer, the recorded messages before it; of the `first` or `last` turn alone if so asked.

        Ids are the conversation's, with the number of the turn where it has several.
        """
        ends = self.ends
        numbered = [
            Prompt(
                suite,
                f"{self.id}.{turn}" if len(ends) > 1 else self.id,
                self.messages[:end],
                self.category,
                self.max_new_tokens if end == ends[-1] else None,
            )
            for turn, end in enumerate(ends, 1)
        ]
        return {"all": numbered, "first": numbered[:1], "last": numbered[-1:]}[turns]
