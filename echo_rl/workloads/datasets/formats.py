"""Reads a conversation out of one JSON value, in any of the forms that serving benchmarks take.

- OpenAI's ``{"messages": [{"role", "content"}]}``, as ``sglang.bench_serving --dataset-name openai``;
- ShareGPT's ``{"conversations": [{"from", "value"}]}``, also as ``sglang.bench_serving --dataset-name custom`` has it
  (``conversation``, ``role`` and ``content``; turns that name no one alternate);
- ``{"prompt": ...}``, as ``vllm bench serve --dataset-name custom``;
- ``{"turns": [...]}``, the user's alone, as MT-Bench and Spec-Bench.

A length of the answer may stand beside each, and a category. Other fields are not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from echo_rl.workloads.datasets.conversation import Conversation
from echo_rl.workloads.datasets.prompt import Message, user
from echo_rl.workloads.datasets.rows import Malformed

EXPECTED = (
    'expected {"messages": [{"role": ..., "content": ...}]}, ShareGPT\'s {"conversations": [{"from": ..., "value": '
    '...}]}, {"prompt": "..."} or {"turns": ["..."]}'
)
ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "function", "observation"), "tool"),
}
"""The role that each name for a speaker means."""
LENGTHS = ("output_tokens", "output_len", "output_length", "max_tokens", "max_completion_tokens")
CATEGORIES = ("category", "kind")


def conversation(row: Any, number: str) -> Conversation:
    """The conversation of a row; `number` becomes its id. Raises `Malformed`."""
    if isinstance(row, Malformed):
        raise row
    if not isinstance(row, Mapping):
        raise Malformed(f"is {_kind(row)}; {EXPECTED}")
    category = next((row[name] for name in CATEGORIES if isinstance(row.get(name), str)), "")
    return Conversation(number, _messages(row), category, _length(row))


def _messages(row: Mapping[str, Any]) -> tuple[Message, ...]:
    for name in ("messages", "conversations", "conversation"):
        if name in row:
            return _spoken(row[name], name)
    if "turns" in row:
        return tuple(
            {"role": "user", "content": _text(turn, f"turns[{place}]")}
            for place, turn in enumerate(_list(row["turns"], "turns"))
        )
    if "prompt" not in row:
        raise Malformed(f"has the fields {', '.join(map(repr, row)) or 'none'}; {EXPECTED}")
    prompt = row["prompt"]
    return _spoken(prompt, "prompt") if isinstance(prompt, list) else user(_text(prompt, "prompt"))


def _spoken(turns: Any, name: str) -> tuple[Message, ...]:
    return tuple(_turn(turn, f"{name}[{place}]", place) for place, turn in enumerate(_list(turns, name)))


def _turn(turn: Any, name: str, place: int) -> Message:
    """One message. A speaker that isn't named is the user at even places and the assistant at odd ones."""
    if not isinstance(turn, Mapping):
        raise Malformed(f"has {_kind(turn)} as {name}, expected an object with a speaker and a text")
    speaker = turn.get("role", turn.get("from", ("user", "assistant")[place % 2]))
    if not isinstance(speaker, str) or speaker.lower() not in ROLES:
        raise Malformed(f"has the speaker {speaker!r} in {name}, expected one of {', '.join(ROLES)}")
    role = ROLES[speaker.lower()]
    key = next((key for key in ("content", "value") if key in turn), None)
    if key is None and role != "assistant":
        raise Malformed(f"has no content (or value) in {name}")
    said = turn[key] if key else None
    return {"role": role, "content": "" if said is None and role == "assistant" else _text(said, f"{name}.{key}")}


def _text(value: Any, name: str) -> str:
    """A text, or the joined texts of OpenAI's content parts."""
    if isinstance(value, list):
        return "".join(_part(part, f"{name}[{place}]") for place, part in enumerate(value))
    if not isinstance(value, str):
        raise Malformed(f"has {_kind(value)} as {name}, expected a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise Malformed(f"has half of a character in {name} (a lone surrogate), expected Unicode text") from error
    return value


def _part(part: Any, name: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind != "text":
        raise Malformed(f"has {'a part of type ' + repr(kind) if kind else _kind(part)} as {name}, expected text parts")
    return _text(part.get("text"), f"{name}.text")


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise Malformed(f"has {_kind(value)} as {name}, expected a list")
    return value


def _length(row: Mapping[str, Any]) -> int | None:
    name = next((name for name in LENGTHS if row.get(name) is not None), None)
    if name is None:
        return None
    value = row[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 1 or value != value // 1:
        raise Malformed(f"has {value!r} as {name}, expected a whole number of tokens above 0")
    return int(value)


def _kind(value: Any) -> str:
    """The JSON type of a value, in words."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")
