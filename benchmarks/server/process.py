"""A real ``echo-rl serve`` process: started, read by its log, inspected through /proc (Linux), ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Self

from echo_rl.config import EngineConfig
from echo_rl.errors import EchoError
from echo_rl.experiments.targets.http.connection import OK, Endpoint

START_SECONDS = 300.0
STOP_SECONDS = 60.0
POLL = 0.05
KEYS = ("ECHO_RL_API_KEY", "ECHO_RL_ADMIN_KEY")
"""Not handed on: the server of a benchmark asks for none."""


class Server:
    """One process on a free port of this machine; as a context manager it is ended on the way out."""

    def __init__(self, engine: EngineConfig, log: Path, options: Sequence[str] = ()) -> None:
        """`log` takes its log, JSON lines; it is begun anew."""
        command = [sys.executable, "-m", "echo_rl.cli", "serve", "--port", "0", "--log-format", "json"]
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = {key: value for key, value in os.environ.items() if key not in KEYS}
        self.log = log
        with open(log, "wb") as stream:
            self.process = subprocess.Popen(
                [*command, *flags(engine), *options], stdout=stream, stderr=stream, env=environment
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.end()

    def ready(self) -> str:
        """Waits until the engine is loaded; returns the server's URL. Raises `EchoError` with the end of its log."""
        self.wait_for("ready")
        return str(self.wait_for("listening")["url"])

    def wait_for(self, message: str, seconds: float = START_SECONDS) -> dict[str, Any]:
        """The log's first entry with this message. Raises `EchoError` with the end of the log where none comes."""
        end = time.monotonic() + seconds
        while not (found := self.lines(message)):
            if self.process.poll() is not None or time.monotonic() > end:
                tail = "".join(self.log.read_text(errors="replace").splitlines(keepends=True)[-15:])
                self.end()
                raise EchoError(f"the server did not say '{message}'; the end of its log:\n{tail}")
            time.sleep(POLL)
        return found[0]

    def lines(self, message: str) -> list[dict[str, Any]]:
        """The log's entries with this message, so far."""
        text = self.log.read_text(errors="replace")
        whole = text[: text.rfind("\n") + 1].splitlines()
        entries = [json.loads(line) for line in whole if line.startswith("{")]
        return [entry for entry in entries if entry["message"] == message]

    def engine(self) -> int | None:
        """The process that runs the engine; None while there is none."""
        return next((pid for pid in children(self.process.pid) if b"spawn_main" in _read(pid, "cmdline")), None)

    def end(self, seconds: float = STOP_SECONDS) -> int:
        """SIGTERM, and SIGKILL after so many seconds. Returns its exit code, -9 for the latter."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            engine = self.engine()
            self.process.kill()
            if engine is not None:
                os.kill(engine, signal.SIGKILL)
            return self.process.wait()


def flags(engine: EngineConfig) -> list[str]:
    """What differs from the defaults, as options of the command line."""
    default = EngineConfig()
    changed = [f.name for f in fields(engine) if getattr(engine, f.name) != getattr(default, f.name)]
    return [part for name in changed for part in (f"--{name.replace('_', '-')}", str(getattr(engine, name)))]


async def get(endpoint: Endpoint, path: str) -> bytes:
    """The body of a 200. Raises `EchoError` on any other answer, `OSError` where there is none."""
    return await _asked(endpoint, "GET", path)


async def post(endpoint: Endpoint, path: str, body: Mapping[str, Any]) -> bytes:
    """The body of the answer to a POST of JSON; raises what `get` raises."""
    return await _asked(endpoint, "POST", path, json.dumps(body).encode())


async def _asked(endpoint: Endpoint, method: str, path: str, body: bytes = b"") -> bytes:
    found = bytearray()
    answer = await endpoint.fetch(method, path, body, sink=found.extend)
    if answer.status != OK:
        raise EchoError(f"{path} answers {answer.status}: {answer.body.decode(errors='replace')[:300]}")
    return bytes(found)


def total(exposition: str, name: str, **labels: str) -> float:
    """The sum over all series of that name with these labels, in Prometheus' text format."""
    wanted = [f'{label}="{value}"' for label, value in labels.items()]
    found = (line.rpartition(" ") for line in exposition.splitlines() if not line.startswith("#"))
    return sum(
        float(value)
        for series, _, value in found
        if series.partition("{")[0] == name and all(label in series for label in wanted)
    )


def children(parent: int) -> list[int]:
    """Processes that this one started and that are still there."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        after_name = _read(int(path.name), "stat").rpartition(b")")[2].split()
        if len(after_name) > 1 and int(after_name[1]) == parent and after_name[0] != b"Z":
            found.append(int(path.name))
    return found


def cpu_seconds(pid: int) -> float:
    """Processor time of a process so far, all its threads; 0 where it is gone."""
    after_name = _read(pid, "stat").rpartition(b")")[2].split()
    return sum(map(int, after_name[11:13])) / os.sysconf("SC_CLK_TCK")


def resident_mb(pid: int) -> float | None:
    """Memory of a process in MB; None where it is gone."""
    pages = _read(pid, "statm").split()
    return int(pages[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6 if len(pages) > 1 else None


def _read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""  # it has just ended
