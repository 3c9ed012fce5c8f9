"""Translation: messages and mails of a web application into and out of English, and prose out of English."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from echo_rl.workloads.datasets.held_out.archives import ALLAUTH, FACTBOOK
from echo_rl.workloads.datasets.held_out.factbook import read_countries
from echo_rl.workloads.datasets.members import read_member
from echo_rl.workloads.datasets.prompt import Prompt, user
from echo_rl.workloads.datasets.suite import Suite

LANGUAGES = {"de": "German", "fr": "French", "es": "Spanish", "it": "Italian", "pt_BR": "Portuguese", "nl": "Dutch"}
SIZES = (1, 4, 2, 7, 1, 3, 5)
"""How many messages are translated at once, in turn."""
EACH_WAY = 6
"""Prompts per language and direction."""
PROSE = 40
LEAST_WORDS = 6
"""Shorter messages are labels of buttons."""
INTO_ENGLISH = (
    "Translate the following {language} text into English.\n\n{text}",
    "What does this mean in English?\n\n{text}",
    "These are messages of a web application in {language}. Give the English of each, one a line, in order.\n{text}",
    "You are a professional translator. Render this {language} text in natural English, nothing else:\n\n{text}",
    "{text}\n\nPut the above into English. Leave placeholders such as %(user)s as they are.",
)
OUT_OF_ENGLISH = (
    "Translate into {language}:\n\n{text}",
    "{text}\n\nHow would a native speaker of {language} say this?",
    "English:\n{text}\n\n{language}:",
    "Give a formal {language} version of the following, then a note on any word that has no exact match.\n\n{text}",
    "Please localise these interface texts for {language} users. Keep placeholders unchanged.\n\n{text}",
)
"""The last is for texts of an interface alone."""
ENTRY = re.compile(r'^msgid ((?:".*"\n)+)msgstr ((?:".*"(?:\n|$))+)', re.MULTILINE)


def read(allauth: Path, factbook: Path) -> list[Prompt]:
    """Messages both ways in each language, then the first sentences of countries' histories out of English."""
    return [*_messages(allauth), *_prose(factbook)]


def _messages(allauth: Path) -> Iterator[Prompt]:
    for row, (code, language) in enumerate(LANGUAGES.items()):
        catalogue = read_member(allauth, f"/allauth/locale/{code}/LC_MESSAGES/django.po").decode("utf-8")
        pairs = [(english, other) for english, other in entries(catalogue) if len(english.split()) >= LEAST_WORDS]
        start = 5 * row  # languages do not all begin with the same messages
        for i in range(2 * EACH_WAY):
            size = SIZES[(i + row) % len(SIZES)]
            chosen = [pairs[(start + k) % len(pairs)] for k in range(size)]
            english, other = ("\n".join(texts) for texts in zip(*chosen, strict=True))
            start += size
            into = i % 2 == 0
            wording = (INTO_ENGLISH if into else OUT_OF_ENGLISH)[(i // 2 + row) % 5]
            text = wording.format(language=language, text=other if into else english)
            yield Prompt("translation", f"{code}/{i}", user(text), f"{code}-en" if into else f"en-{code}")


def _prose(factbook: Path) -> Iterator[Prompt]:
    for i, country in enumerate(read_countries(factbook)[::4][:PROSE]):
        sentences = re.split(r"(?<=[.;]) +", country.fields["Introduction", "Background"])
        code, language = list(LANGUAGES.items())[i % len(LANGUAGES)]
        wording = OUT_OF_ENGLISH[i % (len(OUT_OF_ENGLISH) - 1)]
        text = wording.format(language=language, text=" ".join(sentences[: 1 + i // 4 % 4]))
        yield Prompt("translation", f"{country.code}/{code}", user(text), f"en-{code}")


def entries(catalogue: str) -> list[tuple[str, str]]:
    """The messages of a gettext catalogue and their translations, without fuzzy, plural and empty ones."""
    found = []
    for block in re.split(r"\n\n+", catalogue):
        match = ENTRY.search(block)
        if match and "#, fuzzy" not in block:
            pair = _text(match[1]), _text(match[2])
            found += [pair] if all(pair) else []
    return found


def _text(lines: str) -> str:
    return "".join(ast.literal_eval(line) for line in lines.splitlines()).strip()


TRANSLATION = Suite(
    name="translation",
    about="Texts of a web application and prose, between English and six languages.",
    licence="MIT",
    archives=(ALLAUTH, FACTBOOK),
    read=read,
    held_out=True,
)
