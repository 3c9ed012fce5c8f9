"""Agent loops: a task about a code base, with the tool calls and their true output so far in the history."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from echo_rl.workloads.datasets.held_out.archives import FUTURE
from echo_rl.workloads.datasets.held_out.sources import Function, functions
from echo_rl.workloads.datasets.held_out.tools import STYLES, Call, Style, list_files, read_file, search
from echo_rl.workloads.datasets.members import read_members
from echo_rl.workloads.datasets.prompt import Message, Prompt
from echo_rl.workloads.datasets.suite import Suite

PROMPTS = 90
ROOT = "future/backports/"
LINES = (8, 32)
SAID = ("", "Let me look at that.", "I'll check the code first.", "Next I need the source.", "Looking closer.")


@dataclass(frozen=True)
class Task:
    """What the user asks about a function, and the tools that the agent has called since."""

    category: str
    text: str
    tools: tuple[str, ...]
    follow_up: str = ""
    """A second request of the user's, made after the agent said where the function is."""


TASKS = (
    Task("locate", "Where is `{name}` defined, and what does it return? Cite the lines.", ("define", "read")),
    Task("error", "Under which inputs can `{name}` fail? Look at the code, do not guess.", ("guess", "define", "read")),
    Task("callers", "I want to remove `{name}`. Find out who uses it and what breaks.", ("define", "uses", "read")),
    Task("change", "Add `verbose=False` to `{name}`: print what it does. Give a patch.", ("list", "define", "read")),
    Task("test", "Write unit tests for `{name}` in {module}.", ("read", "uses")),
    Task("follow_up", "Find `{name}`.", ("define", "read"), "Good. Now add type hints to it and show me the result."),
    Task("document", "Our docs say nothing about `{name}`. Write a paragraph with an example.", ("uses", "read")),
    Task("review", "Review `{name}` in {module} and list what you would improve.", ("list", "read")),
    Task("follow_up", "Which file has `{name}`?", ("define",), "Explain to a colleague how it works, step by step."),
    Task("plan", "We port `{name}` to Rust. Which parts of the code base does it depend on?", ("define",)),
    Task("follow_up", "Show me `{name}`.", ("guess", "define", "read"), "Which inputs make it raise? Give examples."),
)  # fmt: skip


def read(future: Path) -> list[Prompt]:
    """One task a function, over ports of modules of the Python standard library."""
    members = read_members(future, f"{ROOT}*.py")
    files = {path.removeprefix(ROOT): data.decode("utf-8") for path, data in members.items() if "/test/" not in path}
    found = list(functions(files, *LINES))
    names = Counter(function.name for function in found)
    targets = [function for function in found if names[function.name] == 1]
    step = max(1, len(targets) // PROMPTS)
    return [_prompt(i, function, files) for i, function in enumerate(targets[::step][:PROMPTS])]


def _prompt(i: int, function: Function, files: Mapping[str, str]) -> Prompt:
    task, style = TASKS[i % len(TASKS)], STYLES[i % len(STYLES)]
    request = task.text.format(name=function.name, module=function.path)
    calls = [_call(tool, function, files) for tool in task.tools]
    messages = [*style.opening(request), *_history(style, calls, i)]
    if task.follow_up:
        place = f"`{function.name}` is in {function.path}, lines {function.first} to {function.last}."
        messages += [{"role": "assistant", "content": place}, {"role": "user", "content": task.follow_up}]
    return Prompt("agent_loops", f"{function.path}:{function.first}", tuple(messages), task.category)


def _history(style: Style, calls: Sequence[Call], i: int) -> list[Message]:
    """The agent's calls as its turns, each answered by what the tool printed."""
    turns: list[Message] = []
    for k, call in enumerate(calls):
        said = SAID[(i + k) % len(SAID)]
        turns.append({"role": "assistant", "content": f"{said}\n{style.call(call)}".strip()})
        turns.append({"role": "user", "content": style.result(call)})
    return turns


def _call(tool: str, function: Function, files: Mapping[str, str]) -> Call:
    path = function.path
    calls = {
        "list": lambda: list_files(files, path.rpartition("/")[0]),
        "define": lambda: search(files, f"def {function.name}("),
        "uses": lambda: search(files, function.name),
        "guess": lambda: read_file(files, path.rpartition("/")[2].replace(".", "s."), 1, 40),
        "read": lambda: read_file(files, path, max(1, function.first - 2), function.last + 2),
    }
    return calls[tool]()


AGENT_LOOPS = Suite(
    name="agent_loops",
    about="Tasks about a code base with tool calls and their output in the history.",
    licence="MIT AND PSF-2.0",
    archives=(FUTURE,),
    read=read,
    held_out=True,
)
