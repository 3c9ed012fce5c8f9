"""Generates training conversations out of real prompts: the target writes the answers alone.

A recorded conversation gives an item for each turn to answer, behind the turns as they were recorded. Where only the
user's turns are known, the target's own answers stand between them. Knows the target only as a `Generator` and a
`Chat`, and nothing of files of prompts.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from echo_rl.drafting.conversations import Conversations
from echo_rl.drafting.synthesize import Generator, SynthesizeConfig, answered, kept, write_shards
from echo_rl.errors import ConfigError
from echo_rl.workloads.datasets import Message
from echo_rl.workloads.datasets.conversation import Conversation, Turns


class Chat(Protocol):
    """The target's way from messages to tokens and back."""

    end_of_turn: int
    """The token that ends a turn."""
    most: int
    """The most tokens of a prompt together with its answer."""

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """The tokens up to the answer."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of an answer."""
        ...


@dataclass
class _Dialogue:
    """One conversation under way: the messages so far, and the user's turns that are still to come."""

    said: tuple[Message, ...]
    to_come: tuple[Message, ...] = ()


@dataclass(frozen=True)
class Answers:
    """What was written."""

    shards: list[Path]
    conversations: int
    notes: tuple[str, ...]
    """What was left out, in words."""


def synthesize_answers(
    config: SynthesizeConfig,
    conversations: Sequence[Conversation],
    turns: Turns,
    chat: Chat,
    complete: Generator,
    facts: Mapping[str, str],
) -> Answers:
    """Writes the shards that are still missing, `per_shard` conversations each; `facts` tell the prompts from others.

    Raises `ConfigError` where no prompt fits, and as `write_shards`.
    """
    needed = -(-len(conversations) // config.per_shard)
    count = needed if config.shards is None else min(config.shards, needed)

    def shard(number: int) -> Conversations:
        part = conversations[number * config.per_shard : (number + 1) * config.per_shard]
        rng = random.Random(f"{config.seed}/{number}")
        return kept(config, _items(config, part, turns, chat, complete, rng), chat.end_of_turn)

    paths = write_shards(config, shard, count, facts)
    written = sum(len(Conversations.load(path)) for path in paths)
    if not written:
        raise ConfigError(
            f"no answer of at least {config.min_answer} tokens was written within {chat.most} tokens of prompt and "
            "answer; give shorter prompts, or a smaller --answer-tokens or --min-answer"
        )
    asked = sum(_count(each, turns) for each in conversations[: count * config.per_shard])
    why = f"longer than {chat.most} tokens with their answers, or answered in fewer than {config.min_answer}"
    notes = (f"turns left out: {asked - written} ({why})",) if asked > written else ()
    return Answers(paths, written, notes)


def _items(
    config: SynthesizeConfig,
    part: Sequence[Conversation],
    turns: Turns,
    chat: Chat,
    complete: Generator,
    rng: random.Random,
) -> Iterator[tuple[list[int], list[int], bool]]:
    """(prompt, answer, greedy) of every turn, the first turns of all conversations before the second ones."""
    open_ = [dialogue for each in part for dialogue in _dialogues(each, turns)]
    while open_:
        tokens = [chat.encode(dialogue.said) for dialogue in open_]
        fits = [len(prompt) + config.answer_tokens <= chat.most for prompt in tokens]
        open_ = [dialogue for dialogue, good in zip(open_, fits, strict=True) if good]
        asked = [prompt for prompt, good in zip(tokens, fits, strict=True) if good]
        greedy = [rng.random() < config.greedy_share for _ in asked]
        answers = answered(config, asked, greedy, complete, chat.end_of_turn)
        yield from zip(asked, answers, greedy, strict=True)
        open_ = [_after(d, chat.decode(answer)) for d, answer in zip(open_, answers, strict=True) if d.to_come]


def _dialogues(conversation: Conversation, turns: Turns) -> list[_Dialogue]:
    if not conversation.one_sided or turns == "first":
        return [_Dialogue(prompt.messages) for prompt in conversation.prompts("", turns)]
    end = conversation.ends[0]
    return [_Dialogue(conversation.messages[:end], conversation.messages[end:])]


def _after(dialogue: _Dialogue, answer: str) -> _Dialogue:
    """The dialogue with an answer of the target's and the next turn."""
    turn, *rest = dialogue.to_come
    return _Dialogue((*dialogue.said, {"role": "assistant", "content": answer}, turn), tuple(rest))


def _count(conversation: Conversation, turns: Turns) -> int:
    """The turns of a conversation that are answered."""
    return sum(1 + len(dialogue.to_come) for dialogue in _dialogues(conversation, turns))
