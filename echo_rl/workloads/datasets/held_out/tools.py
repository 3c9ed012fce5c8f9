"""The tools of an agent over a set of files, what they print, and the styles in which agents call them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from echo_rl.workloads.datasets.prompt import Message

MOST_LINES = 12
"""A search prints at most so many hits."""


@dataclass(frozen=True)
class Call:
    """One call of a tool: as a JSON tool, as a shell command, and what it prints."""

    tool: str
    arguments: Mapping[str, str | int]
    command: str
    output: str


def list_files(files: Mapping[str, str], folder: str) -> Call:
    inside = [path for path in files if path.startswith(f"{folder}/" if folder else "")]
    names = sorted({path[len(folder) :].lstrip("/").split("/")[0] for path in inside})
    return Call("list_files", {"folder": folder or "."}, f"ls {folder or '.'}", "\n".join(names))


def search(files: Mapping[str, str], text: str) -> Call:
    hits = [
        f"{path}:{number}:{line[:160]}"
        for path, content in files.items()
        for number, line in enumerate(content.splitlines(), 1)
        if text in line
    ]
    command = f"grep -rnF '{text}' --include='*.py' | head -{MOST_LINES}"
    return Call("search", {"text": text}, command, "\n".join(hits[:MOST_LINES]))


def read_file(files: Mapping[str, str], path: str, first: int, last: int) -> Call:
    """Lines `first` to `last` of a file, or that there is none."""
    arguments: dict[str, str | int] = {"path": path, "first_line": first, "last_line": last}
    command = f"sed -n '{first},{last}p' {path}"
    if path not in files:
        return Call("read_file", arguments, command, f"{path}: No such file or directory")
    return Call("read_file", arguments, command, "\n".join(files[path].splitlines()[first - 1 : last]))


@dataclass(frozen=True)
class Style:
    """How an agent is told of its tools, how it writes a call, and how the result comes back."""

    system: str
    call: Callable[[Call], str]
    result: Callable[[Call], str]

    def opening(self, request: str) -> list[Message]:
        return [{"role": "system", "content": self.system}, {"role": "user", "content": request}]


def _json_call(call: Call) -> str:
    return json.dumps({"tool": call.tool, "arguments": call.arguments})


def _tagged_call(call: Call) -> str:
    return f"<tool_call>\n{json.dumps({'name': call.tool, 'arguments': call.arguments})}\n</tool_call>"


STYLES = (
    Style(
        "You are a coding agent working in a repository. Tools: list_files(folder), search(text), "
        'read_file(path, first_line, last_line). To call one, write {"tool": NAME, "arguments": {...}} and stop; its '
        "result comes as the next message. When you know enough, answer the user instead.",
        _json_call,
        lambda call: f"Result of {call.tool}:\n{call.output}",
    ),
    Style(
        "You solve tasks in a terminal. Each reply holds a thought and at most one command in a ```bash block; the "
        "command's output is sent back to you. Reply without a command when the task is done.",
        lambda call: f"```bash\n{call.command}\n```",
        lambda call: f"```\n{call.output}\n```",
    ),
    Style(
        "You are a helpful assistant with access to functions. You may call one or more of them to assist with a "
        'query.\n<tools>\n{"name": "list_files", "parameters": {"folder": "string"}}\n'
        '{"name": "search", "parameters": {"text": "string"}}\n'
        '{"name": "read_file", "parameters": {"path": "string", "first_line": "integer", "last_line": "integer"}}\n'
        '</tools>\nReturn each call as <tool_call>{"name": ..., "arguments": ...}</tool_call>.',
        _tagged_call,
        lambda call: f"<tool_response>\n{call.output}\n</tool_response>",
    ),
)
