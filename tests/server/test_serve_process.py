"""``echo-rl serve`` as a process of its own, on a tiny model: from its start to a signal."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest

from tests import tiny

LONG = {"prompt": "hello", "max_tokens": 480, "n": 6, "temperature": 1.0, "stream": True, "ignore_eos": True}


class Server:
    """The process and what it has logged."""

    def __init__(self, model, drafter, *options: str) -> None:
        command = [
            *(sys.executable, "-m", "echo_rl.cli", "serve", "--model", str(model), "--drafter", str(drafter)),
            *("--device", "cpu", "--dtype", "float32", "--max-context", "500", "--kv-tokens", "8192"),
            *("--max-nodes", "24", "--max-expanded", "40", "--threads", "1", "--port", "0", "--log-format", "json"),
            *options,
        ]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("ECHO_RL_")}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        self.raw: list[str] = []
        self._reader = threading.Thread(target=lambda: self.raw.extend(self.process.stderr), daemon=True)
        self._reader.start()

    def lines(self, message: str) -> list[dict]:
        entries = [json.loads(line) for line in self.raw if line.startswith("{")]
        return [entry for entry in entries if entry["message"] == message]

    def wait_for(self, message: str, seconds: float = 60.0) -> dict:
        end = time.monotonic() + seconds
        while not (found := self.lines(message)):
            assert self.process.poll() is None and time.monotonic() < end, "".join(self.raw)
            time.sleep(0.02)
        return found[0]

    def end(self, seconds: float = 30.0) -> int:
        code = self.process.wait(seconds)
        self._reader.join(5)
        return code


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    return tiny.target_folder(root / "target"), tiny.drafter_folder(root / "drafter")


@pytest.fixture
def serve(folders):
    started = []

    def start(*options: str) -> Server:
        started.append(Server(*folders, *options))
        return started[-1]

    yield start
    for server in started:
        server.process.kill()
        server.process.wait()


def test_sigterm_finishes_what_is_in_flight_and_exits_with_0(serve):
    server = serve("--controller", "none", "--served-model-name", "tiny")
    url = server.wait_for("listening")["url"]
    assert httpx.get(f"{url}/health/live").status_code == 200
    server.wait_for("ready")
    with httpx.stream("POST", f"{url}/v1/completions", json=LONG, timeout=60) as reply:
        lines = reply.iter_lines()
        assert reply.status_code == 200 and next(lines).startswith("data: ")
        server.process.send_signal(signal.SIGTERM)
        server.wait_for("draining")
        refused = httpx.post(f"{url}/v1/completions", json={"prompt": "x"})
        assert refused.status_code == 503 and int(refused.headers["Retry-After"]) > 0
        assert httpx.get(f"{url}/health/ready").status_code == 503
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    reasons = [json.loads(line[6:])["choices"][0]["finish_reason"] for line in rest[:-1]]
    assert [reason for reason in reasons if reason] == ["length"] * LONG["n"]
    assert server.end() == 0
    (line,) = [line for line in server.lines("request") if line["status"] == 200]
    assert line["output_tokens"] == LONG["n"] * LONG["max_tokens"]


def test_a_drain_that_takes_too_long_cancels_and_a_second_signal_does_at_once(serve):
    patient, hasty = serve("--controller", "none", "--drain-seconds", "0.1"), serve("--controller", "none")
    for server in (patient, hasty):
        server.wait_for("ready")
        with httpx.stream("POST", server.wait_for("listening")["url"] + "/v1/completions", json=LONG) as reply:
            lines = reply.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            server.wait_for("draining")
            if server is hasty:
                server.process.send_signal(signal.SIGINT)
            rest = "".join(lines)
        assert '"code": "cancelled"' in rest or '"code": "engine_error"' in rest
    assert (patient.end(), hasty.end()) == (0, 130)


def test_what_is_wrong_is_one_line_and_exit_code_2(serve):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        busy = serve("--port", str(taken.getsockname()[1]))
        wrong = serve("--controller", "nonsense")
        assert (busy.end(60), wrong.end(60)) == (2, 2)
    assert "cannot listen" in busy.raw[-1] and "nonsense" in wrong.raw[-1]
