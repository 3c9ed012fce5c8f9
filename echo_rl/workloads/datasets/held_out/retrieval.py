"""Answers out of documents in the prompt: passages about countries, of which one or two matter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from echo_rl.workloads.datasets.held_out.archives import FACTBOOK
from echo_rl.workloads.datasets.held_out.factbook import Country, read_countries
from echo_rl.workloads.datasets.prompt import Prompt, user
from echo_rl.workloads.datasets.suite import Suite

PROMPTS = 110
WORDS = (300, 450, 220, 360, 700, 280)
"""The words that a prompt's passages have together at most, in turn."""
SECTIONS = {
    "Introduction": ("Background",),
    "Geography": ("Area", "Area - comparative", "Climate", "Terrain", "Natural resources", "Natural hazards"),
    "People and Society": ("Population", "Ethnic groups", "Languages", "Religions", "Population distribution"),
    "Government": ("Government type", "Capital", "Independence", "National holiday", "Constitution", "Legal system"),
    "Economy": ("Economic overview", "Agricultural products", "Industries", "Exports - partners", "Imports - partners"),
    "Environment": ("Environmental issues", "Climate", "Total renewable water resources"),
}
QUESTIONS = (
    ("Introduction", "What were the turning points in the history of {0}?"),
    ("Geography", "Which natural hazards threaten {0}, and what resources does it have?"),
    ("People and Society", "Which languages do people in {0} speak, and where in the country do most of them live?"),
    ("Government", "When did {0} become independent, and how does it celebrate that today?"),
    ("Economy", "Who are the main trading partners of {0}, and what does it produce?"),
    ("Introduction", "Who ruled {0} before it became independent?"),
    ("Geography", "How large is {0}, and what is its climate like?"),
    ("Economy", "What are the strengths and weaknesses of the economy of {0}?"),
    ("People and Society", "How many people live in {0}, and what are its ethnic groups and religions?"),
    ("Government", "What is the capital of {0}, and where does its name come from?"),
    ("Geography", "How do the terrain and the climate of {0} and {1} differ?"),
    ("Environment", "Which environmental problems does {0} have?"),
    ("Economy", "Does {0} or {1} depend more on farming? Say what in the text makes you think so."),
)
WORDINGS = (
    "Use the following documents to answer the question. Name the document that each statement comes from, as in [1]."
    "\n\n{documents}\n\nQuestion: {question}",
    '{question}\n\nAnswer from the passages below only; if they do not say, say "not in the passages".\n\n{documents}',
    "Context:\n{documents}\n\nAnswer with the help of the context: {question}",
    "You are an assistant that answers with the help of search results. Search results:\n\n{documents}\n\n"
    "The user asks: {question}\nQuote the sentence that you rely on, then answer in your own words.",
    "{documents}\n\nBased on the above: {question} Keep it under 80 words.",
)


def read(factbook: Path) -> list[Prompt]:
    """One question a country, with two to five passages about it and about countries nearby."""
    countries = [country for i, country in enumerate(read_countries(factbook)) if i % 4]  # the others are translated
    return [_prompt(i, countries) for i in range(min(PROMPTS, len(countries)))]


def _prompt(i: int, countries: Sequence[Country]) -> Prompt:
    asked, other = countries[i], countries[i - 1]
    section, question = QUESTIONS[i % len(QUESTIONS)]
    kept = [(asked, section)] + ([(other, section)] if "{1}" in question else [])
    spare = [name for name in SECTIONS if name != section]
    kept += [(countries[i - k], spare[(i + k) % len(spare)]) for k in range(i % 4 + 1)]
    order = [kept[(i + k) % len(kept)] for k in range(len(kept))]
    text = WORDINGS[i % len(WORDINGS)].format(
        documents=_documents(order, WORDS[i % len(WORDS)]), question=question.format(asked.name, other.name)
    )
    return Prompt("retrieval", f"{asked.code}/{section}", user(text), section.lower())


def _documents(kept: Sequence[tuple[Country, str]], words: int) -> str:
    """Numbered passages that together have at most so many words, each cut to its share."""
    texts = [(country.name, section, country.passage(section, SECTIONS[section])) for country, section in kept]
    share = words // len(texts)
    return "\n\n".join(
        f"[{i + 1}] {name}: {section}\n{_cut(text, share)}" for i, (name, section, text) in enumerate(texts)
    )


def _cut(text: str, words: int) -> str:
    lines = [line.split(" ") for line in text.split("\n")]
    kept = []
    for line in lines:
        kept.append(" ".join(line[:words]))
        words -= len(line)
        if words <= 0:
            break
    return "\n".join(kept)


RETRIEVAL = Suite(
    name="retrieval",
    about="Questions to be answered from two to six passages in the prompt.",
    licence="MIT",
    archives=(FACTBOOK,),
    read=read,
    held_out=True,
)
