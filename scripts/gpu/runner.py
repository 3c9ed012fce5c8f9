"""Runs the stages of a validation, remembers what became of them (``state.json``), and reports after each."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from echo_rl.errors import ConfigError, EchoError
from echo_rl.integrations.sglang.settings import ENVIRONMENT
from echo_rl.utils.result_store import write_json
from scripts.gpu.plan import MODES, ROOT, Args, Stage, Step, plan, settings
from scripts.gpu.report import FAILED, write_report

TAIL = 15
"""Lines of a failure's log that are shown."""
WITHHELD = ("ECHO_RL_API_KEY", "ECHO_RL_ADMIN_KEY", ENVIRONMENT)
"""Not handed on: the servers listen on this machine alone and ask for no key; each stage names its configuration."""
POLL, STOP = 1.0, 30.0
"""Seconds between looks at a starting server; seconds that a process gets to stop."""

Runner = Callable[[Step, Path, float], int | None]
"""(step, log, seconds) -> exit code, None at the limit."""


def run_step(step: Step, log: Path, seconds: float) -> int | None:
    """The real `Runner`; leaves no process behind. Raises `EchoError` where the server doesn't come up."""
    end = time.monotonic() + seconds
    env = {**{key: value for key, value in os.environ.items() if key not in WITHHELD}, **step.env}
    with ExitStack() as stack:
        stream = stack.enter_context(open(log, "ab"))
        stream.write(("\n".join(f"$ {line}" for line in step.lines()) + "\n").encode())
        stream.flush()
        if step.serve:
            server = stack.enter_context(started(step.serve, stream, env, step.url))
            while not healthy(step.url):
                if server.poll() is not None:
                    raise EchoError(f"the server ended with {server.returncode} before it was ready")
                if time.monotonic() > end:
                    return None
                time.sleep(POLL)
        process = stack.enter_context(started(step.command, stream, env))
        try:
            return process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            return None


@contextmanager
def started(
    command: tuple[str, ...], stream: IO[bytes], env: Mapping[str, str], url: str = ""
) -> Iterator[subprocess.Popen[bytes]]:
    """A process whose whole group is ended on the way out; what listens at `url` must not be there yet."""
    port = int(url.rpartition(":")[2]) if url else 0
    with socket.socket() as probe:
        if port and probe.connect_ex(("127.0.0.1", port)) == 0:
            raise EchoError(f"port {port} is taken; give another --port")
    process = subprocess.Popen(
        command, stdout=stream, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=env, cwd=ROOT,
        start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # and what it left behind
        process.wait()


def healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=10) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


class Validation:
    """The stages of one folder, done in order; those done before are not done again."""

    def __init__(self, args: Args, runner: Runner = run_step) -> None:
        self.args, self.runner, self.stages, self.out = args, runner, plan(args), args.out.resolve()
        self.state: dict[str, dict[str, Any]] = read(self.out / "state.json")
        self.end = time.monotonic() + 60.0 * args.minutes

    def run(self) -> bool:
        """Whether all is done. Raises `ConfigError` where torch sees no GPU, or another than the folder's."""
        for stage in self.stages:
            if time.monotonic() > self.end:
                return False
            self.do(stage)
            if stage.name == "environment":
                self._require_gpu()
                for mode in MODES:
                    write_json(self.out / f"sglang-{mode}.json", settings(self.args, mode))
            write_report(self.out, self.machine(), self.stages, self.state)
        return not any(self.state[stage.name]["outcome"] in FAILED for stage in self.stages)

    def machine(self) -> dict[str, Any]:
        return read(self.out / "environment" / "machine.json")

    def _require_gpu(self) -> None:
        seen, here = self.state["environment"], self.machine()
        if seen["outcome"] != "done" or not here.get("gpu"):
            raise ConfigError(
                f"torch {here.get('torch')} sees no GPU here (log: {self.out / 'environment.log'}); install a build of "
                "torch for CUDA or ROCm and check nvidia-smi, or see the plan with --dry-run"
            )
        if seen.setdefault("gpu", here["gpu"]) != here["gpu"]:
            raise ConfigError(f"{self.out} is of {seen['gpu']}, this is {here['gpu']}; give another --out")

    def do(self, stage: Stage) -> None:
        """Unless it is done already. A folder of other commands, or one to do again, is begun anew."""
        found, folder = self.state.get(stage.name), self.out / stage.name
        setting = [*stage.lines(), stage.note]
        anew = stage.name in self.args.again or (found is not None and found["setting"] != setting)
        if stage.name != "environment":
            if found and found["outcome"] == "done" and not anew:
                return say(f"{stage.name}: done before")
            if anew:
                shutil.rmtree(folder, ignore_errors=True)
        missing = stage.needs and self.state[stage.needs]["outcome"] != "done"
        reason = stage.skip or (f"{stage.needs} was not done" if missing else "")
        begin = time.monotonic()
        outcome, tail = ("skipped", [reason]) if reason else self._run(stage, folder)
        seconds = round(time.monotonic() - begin, 1)
        fresh = {"outcome": outcome, "seconds": seconds, "tail": tail, "setting": setting}
        self.state[stage.name] = {**(found or {}), **fresh}
        write_json(self.out / "state.json", self.state)
        say(f"{stage.name}: {outcome} {seconds:.0f} s {reason}")

    def _run(self, stage: Stage, folder: Path) -> tuple[str, list[str]]:
        """Its outcome, and of a failure the end of the log. The first failure is the stage's."""
        folder.mkdir(parents=True, exist_ok=True)
        log = self.out / f"{stage.name}.log"
        log.unlink(missing_ok=True)
        limit = min(60 * stage.minutes * self.args.patience, self.end - time.monotonic())
        say(f"{stage.name}: at most {limit / 60:.0f} min, log {log}")
        end, outcome, tail = time.monotonic() + limit, "done", []
        for step in stage.steps:
            try:
                code = self.runner(step, log, max(0.0, end - time.monotonic()))
                last = f"exit code {code}"
            except (OSError, EchoError) as error:
                code, last = 1, str(error)
            if code != 0 and outcome == "done":
                outcome, last = ("timed out", f"limit {limit:.0f} s") if code is None else ("failed", last)
                said = log.read_text(errors="replace").splitlines()[-TAIL:] if log.is_file() else []
                tail = [*said, last]
            if outcome == "timed out" or (outcome == "failed" and not stage.thorough):
                break
        return outcome, tail


def read(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one where there is no file."""
    return json.loads(path.read_text()) if path.is_file() else {}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
