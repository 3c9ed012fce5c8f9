"""``echo-rl generate``: one prompt, streamed."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import tyro

from echo_rl.cli.options import EngineOptions, SamplingOptions
from echo_rl.config import EngineConfig
from echo_rl.contracts import Request, RequestOutput, SamplingParams
from echo_rl.errors import RequestError

if TYPE_CHECKING:
    from echo_rl.runtime.engine import Engine


@dataclass(frozen=True)
class Generate:
    """Complete one prompt, streaming the text; speed and mean accepted tokens (MAT) follow on stderr."""

    prompt: tyro.conf.Positional[str | None] = None
    """The text to answer; read from standard input where it is absent."""
    controller: str = "echo"
    """The controller: ``none``, ``eagle3``, ``echo``, ...; options as ``echo:name=value,name=value``."""
    raw: bool = False
    """Continue the prompt as it is, without the chat template."""
    sampling: SamplingOptions = field(default_factory=SamplingParams)
    engine: EngineOptions = field(default_factory=EngineConfig)

    def run(self) -> int:
        prompt = read_prompt(self.prompt)

        from echo_rl.controllers import registry
        from echo_rl.controllers.arm import Arm
        from echo_rl.runtime.engine import Engine
        from echo_rl.workloads.driver import serve
        from echo_rl.workloads.metrics import speed_line

        arm = Arm.parse(self.controller)
        controller = registry.make(arm.controller, **arm.options)
        engine = Engine.load(self.engine)
        if not engine.has_drafter and arm.controller != "none":
            print("note: decoding plainly, since no drafter is loaded; name one with --drafter", file=sys.stderr)
            controller = registry.make("none")
        request = Request("generate", self._ids(engine, prompt), self.sampling)
        record = serve(engine, controller, [request], concurrency=1, on_output=_show)
        print(flush=True)
        print(speed_line(record), file=sys.stderr)
        error = record.requests[0].error
        if error is not None:
            raise RequestError(error)
        return 0

    def _ids(self, engine: Engine, prompt: str) -> tuple[int, ...]:
        if self.raw:
            return engine.tokenizer.encode(prompt, special=True)
        return engine.tokenizer.chat([{"role": "user", "content": prompt}])


def read_prompt(argument: str | None) -> str:
    """Returns the argument, else all of standard input. Raises `RequestError` where there is neither, or no UTF-8."""
    if argument is None and sys.stdin.isatty():
        raise RequestError("there is no prompt; give one as an argument or on standard input")
    try:
        prompt = sys.stdin.read() if argument is None else argument
    except UnicodeDecodeError as error:
        raise RequestError(f"standard input is not text ({error}); encode the prompt as UTF-8") from error
    if not prompt.strip():
        raise RequestError("the prompt is empty; give at least one word")
    return prompt


def _show(output: RequestOutput) -> None:
    print(output.text, end="", flush=True)
