"""Structured fields out of a text: the arguments that a request gives, and facts out of a message."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from echo_rl.workloads.datasets.held_out.archives import BFCL
from echo_rl.workloads.datasets.members import read_member
from echo_rl.workloads.datasets.prompt import Prompt, user
from echo_rl.workloads.datasets.suite import Suite

REQUESTS = 80
MOST_FIELDS = 12
"""Forms with more fields than this are left out: they would make most of the prompt."""
FORMS = (
    "Extract these fields from the message and answer with one JSON object and nothing else. Use null for what the "
    "message does not say.\n\nFields:\n{fields}\n\nMessage: {text}",
    "{text}\n\nFill in the form from the text above, one `field: value` a line:\n{fields}",
    "Below are the parameters of `{name}` ({about}) and a user's request. Write the call as JSON, "
    '{{"name": ..., "arguments": {{...}}}}, with the values that the request gives.\n\n{fields}\n\nRequest: {text}',
    "JSON schema:\n```json\n{schema}\n```\nWrite an object that satisfies it from this input: {text}",
)
FACTS = (
    'List every person, place, organisation, date and amount in this message as JSON with the keys "people", '
    '"places", "organisations", "dates" and "amounts".\n\n{}',
    "{}\n\nMake a table with two columns, fact and evidence, of what the author says of themself. Quote the evidence.",
    'From this text, extract the author\'s plans as a JSON list of {{"plan": ..., "when": ..., "with": ...}}.\n\n{}',
    "Text: {}\n\nReturn YAML with a topic and with lists of activities, problems, preferences and next steps.",
    "Which things that are worth remembering for a later conversation does this message hold? Give them as a JSON "
    "object of short keys and values.\n\n{}",
)
WRITERS = ("student", "notetaker")


def read(bfcl: Path) -> list[Prompt]:
    """Requests with the form that they fill in, then every third message of a student or a note taker."""
    rows = [json.loads(line) for line in read_member(bfcl, "/data/BFCL_v4_live_simple.json").splitlines()]
    forms = [row for row in rows if 2 <= len(row["function"][0]["parameters"]["properties"]) <= MOST_FIELDS]
    step = max(1, len(forms) // REQUESTS)
    asked = [
        (row["id"], "request", _form(row, FORMS[i % len(FORMS)])) for i, row in enumerate(forms[::step][:REQUESTS])
    ]
    facts = [(name, "facts", FACTS[i % len(FACTS)].format(text)) for i, (name, text) in enumerate(_messages(bfcl)[::3])]
    return [Prompt("extraction", name, user(text), category) for name, category, text in asked + facts]


def _form(row: Mapping[str, Any], wording: str) -> str:
    (function,) = row["function"]
    parameters = function["parameters"]
    return wording.format(
        name=function["name"],
        about=function["description"].rstrip(".").split("\n")[0],
        fields="\n".join(_field(name, held) for name, held in parameters["properties"].items()),
        schema=json.dumps(_schema(parameters), indent=2, ensure_ascii=False),
        text=row["question"][0][-1]["content"].strip(),
    )


def _field(name: str, held: Mapping[str, Any]) -> str:
    choice = f", one of {', '.join(map(str, held['enum']))}" if "enum" in held else ""
    return f"- {name} ({held['type']}{choice}): {held.get('description', '')}"


def _schema(parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {**parameters, "type": "object"}


def _messages(bfcl: Path) -> list[tuple[str, str]]:
    found = []
    for writer in WRITERS:
        for line in read_member(bfcl, f"/memory_prereq_conversation/memory_{writer}.json").splitlines():
            row = json.loads(line)
            found += [(f"{row['id']}/{i}", turn["content"]) for i, [turn] in enumerate(row["question"])]
    return found


EXTRACTION = Suite(
    name="extraction",
    about="Structured fields (JSON, YAML, tables) out of requests and messages.",
    licence="Apache-2.0",
    archives=(BFCL,),
    read=read,
    held_out=True,
)
