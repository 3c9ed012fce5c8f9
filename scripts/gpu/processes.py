"""Runs a step: its server, its command, one log, one limit; and leaves no process behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from echo_rl.errors import EchoError
from echo_rl.integrations.sglang.settings import ENVIRONMENT
from scripts.gpu.steps import ROOT, Step

WITHHELD = ("ECHO_RL_API_KEY", "ECHO_RL_ADMIN_KEY", ENVIRONMENT)
"""Not handed on: the servers listen on this machine alone and ask for no key; each stage names its configuration."""
POLL, STOP = 1.0, 30.0
"""Seconds between looks at a starting server; seconds that a process gets to stop."""


def run_step(step: Step, log: Path, seconds: float) -> int | None:
    """The real `Runner`. Raises `EchoError` where the server doesn't come up."""
    end = time.monotonic() + seconds
    env = {**{key: value for key, value in os.environ.items() if key not in WITHHELD}, **step.env}
    with ExitStack() as stack:
        stream = stack.enter_context(open(log, "ab"))
        stream.write(("\n".join(f"$ {line}" for line in step.lines()) + "\n").encode())
        stream.flush()
        if step.serve:
            server = stack.enter_context(started(step.serve, stream, env, step.url))
            if not ready(server, step.url, end):
                return None
        process = stack.enter_context(started(step.command, stream, env))
        try:
            return process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            return None


def ready(server: subprocess.Popen[bytes], url: str, end: float) -> bool:
    """Waits until the server answers; False where it doesn't by `end`. Raises `EchoError` where it gave up."""
    while not healthy(url):
        if server.poll() is not None:
            raise EchoError(f"the server ended with {server.returncode} before it was ready")
        if time.monotonic() > end:
            return False
        time.sleep(POLL)
    return True


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
