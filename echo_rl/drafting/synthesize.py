"""Generates training conversations: the target writes a user turn, then answers it.

A drafter has to imitate its target on the target's own text, so no outside data is needed: an opened user turn is
continued at temperature 1, which yields a question; the answer is mostly greedy, as it will be when serving. A seeded
opening (chat, word problem, code, or nothing) spreads the questions. `answers` takes the questions from files instead.
Knows the target only as a `Generator`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from rich.progress import Progress

from echo_rl.drafting.conversations import SYNTHESIS, Conversations
from echo_rl.errors import ConfigError
from echo_rl.utils.result_store import claim

Encode = Callable[[str], list[int]]
SHARDS = 16

# Alternatives, separated by "|".
NAMES = (
    "James|Mary|John|Linda|Sarah|Emma|Tom|Lisa|Mark|Anna|Ben|Julia|Carlos|Maya|Sam|Olivia|Jack|Rosa|Peter|Nina|Alex|"
    "Kevin|Grace|Tina|Leo"
)
CHAT = (
    "Write a|Compose|Imagine you are|Pretend to be|Explain|What is the difference between|Describe|How can|Why|"
    "Given the following|Provide|Rewrite the following|Extract|Analyze|Please|Can you|Discuss|Create|Draft|Act as|"
    "Suppose|Evaluate|What are|Is it|Which|Help me|Summarize|Suggest|Compare|Edit the following paragraph"
)
CODE = (
    "Write a Python function|Write a Python function that|Write a Python program to|"
    "Complete the following Python function:\n```python\ndef |"
    "Complete the following Python function:\n```python\nfrom typing import List\n\n\ndef |"
    "Complete the following Python code:\n```python\ndef |Implement a function|def |"
    "from typing import List\n\n\ndef |Write a C++ program|Write a SQL query|Write a function to|Write an algorithm to"
)
MATH = (
    "{name} has {k}|{name} bought {k}|{name} is|A store sells|{name} and {other}|There are {k}|A train|"
    "In a class of {k}|If {name}|{name} earns ${k}|{name} reads|The cost of|A farmer has {k}|{name} needs|"
    "Every day, {name}|What is the value of|Solve|A box contains {k}|{name} made"
)


class Generator(Protocol):
    """The live engine, or anything that completes token prompts."""

    def __call__(
        self, prompts: list[list[int]], temperature: float, max_new: int, stop_ids: Sequence[int]
    ) -> list[list[int]]:
        """New tokens of each prompt, without the stop token, at most `max_new`."""
        ...


@dataclass(frozen=True)
class SynthesizeConfig:
    """The settings by which conversations are generated."""

    out: str
    """Folder for the shards; shards already there are kept, so a rerun resumes."""
    shards: int | None = None
    """Number of shards; a rerun may ask for more. 16 by default, and with prompts of files as many as they fill."""
    per_shard: int = 256
    """Conversations a shard."""
    user_tokens: int = 96
    """Most tokens of a user turn that the target writes."""
    answer_tokens: int = 288
    """Most tokens of the answer."""
    greedy_share: float = 0.8
    """Share of greedy answers; the rest are sampled at `temperature`."""
    temperature: float = 0.7
    """Temperature of the answers that are not greedy."""
    min_answer: int = 8
    """Shorter answers are dropped: they teach nothing."""
    seed: int = 0
    """The seed of the openings, or of the files' order. (Sampling is the generator's own.)"""

    def __post_init__(self) -> None:
        shards = SHARDS if self.shards is None else self.shards
        if min(shards, self.per_shard, self.user_tokens, self.answer_tokens, self.min_answer) < 1:
            raise ConfigError("shards, per_shard, user_tokens, answer_tokens and min_answer must be at least 1")
        if not 0 <= self.greedy_share <= 1 or self.temperature <= 0:
            raise ConfigError("greedy_share must lie in [0, 1] and temperature be positive")


@dataclass(frozen=True)
class ChatFormat:
    """The fixed text around the turns, e.g. of ChatML."""

    before_user: str
    """Everything up to the user's text, the system prompt included."""
    before_answer: str
    """Everything from the end of the user's text to the answer, without the end-of-turn token."""
    end_of_turn: int
    """Token that ends a turn."""


SMOLLM2_CHAT = ChatFormat(
    before_user="<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\n",
    before_answer="\n<|im_start|>assistant\n",
    end_of_turn=2,
)


def opening(rng: random.Random) -> str:
    """The first words of a user turn: a quarter empty, then chat, word problems and code."""
    draw = rng.random()
    if draw < 0.25:
        return ""
    text = rng.choice((CHAT if draw < 0.55 else MATH if draw < 0.78 else CODE).split("|"))
    name, other = rng.choices(NAMES.split("|"), k=2)
    return text.replace("{name}", name).replace("{other}", other).replace("{k}", str(rng.randint(2, 60)))


def _shard(config: SynthesizeConfig, chat: ChatFormat, encode: Encode, complete: Generator, seed: int) -> Conversations:
    rng = random.Random(seed)
    prompts = [encode(chat.before_user + opening(rng)) for _ in range(config.per_shard)]
    stops = [chat.end_of_turn]
    users = complete(prompts, 1.0, config.user_tokens, stops)
    tail = [chat.end_of_turn, *encode(chat.before_answer)]
    asked = [prompt + user + tail for prompt, user in zip(prompts, users, strict=True)]
    greedy = [rng.random() < config.greedy_share for _ in asked]
    order = sorted(range(len(asked)), key=lambda place: not greedy[place])
    answers = answered(config, asked, greedy, complete, chat.end_of_turn)
    return kept(config, ((asked[place], answers[place], greedy[place]) for place in order), chat.end_of_turn)


def answered(
    config: SynthesizeConfig, asked: Sequence[list[int]], greedy: Sequence[bool], complete: Generator, end_of_turn: int
) -> list[list[int]]:
    """The target's answer to each prompt, without the token that ends it."""
    answers: list[list[int]] = [[] for _ in asked]
    for wanted, temperature in ((True, 0.0), (False, config.temperature)):
        places = [place for place, is_greedy in enumerate(greedy) if is_greedy == wanted]
        prompts = [asked[place] for place in places]
        written = complete(prompts, temperature, config.answer_tokens, [end_of_turn]) if prompts else []
        for place, answer in zip(places, written, strict=True):
            answers[place] = answer
    return answers


def kept(
    config: SynthesizeConfig, items: Iterable[tuple[list[int], list[int], bool]], end_of_turn: int
) -> Conversations:
    """The conversations of (prompt, answer, greedy), without those whose answer is too short to teach anything."""
    return Conversations.of(
        [
            (prompt + answer + [end_of_turn] * (len(answer) < config.answer_tokens), len(prompt), greedy)
            for prompt, answer, greedy in items
            if len(answer) >= config.min_answer
        ]
    )


def synthesize(config: SynthesizeConfig, chat: ChatFormat, encode: Encode, complete: Generator) -> list[Path]:
    """Write the shards that are still missing; returns the paths of all. Raises as `write_shards`."""

    def shard(number: int) -> Conversations:
        return _shard(config, chat, encode, complete, seed=config.seed * 100_003 + number)

    return write_shards(config, shard, SHARDS if config.shards is None else config.shards)


def write_shards(
    config: SynthesizeConfig,
    shard: Callable[[int], Conversations],
    count: int,
    facts: Mapping[str, str] | None = None,
) -> list[Path]:
    """Write those of `count` shards that are still missing; returns the paths of all.

    The settings, and `facts` that the shards depend on besides, are kept beside the shards, whose number alone may
    grow. Raises `ConfigError` where those that are there were made with others, or with unknown ones (written before
    settings were kept): nothing tells whether a shard of theirs would be this run's.
    """
    out = Path(config.out)
    settings = {name: value for name, value in asdict(config).items() if name not in ("out", "shards")}
    claim(out / SYNTHESIS, {**settings, **(facts or {})}, "conversations", out.glob("shard_*.npz"))
    paths = [out / f"shard_{number:04d}.npz" for number in range(count)]
    with Progress() as progress:
        task = progress.add_task("conversations", total=count * config.per_shard)
        for number, path in enumerate(paths):
            if not path.exists():
                shard(number).save(path)
            progress.advance(task, config.per_shard)
    return paths
