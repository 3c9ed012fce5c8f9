"""``echo-rl serve`` as a process of its own, on a tiny model: from its start to a signal."""

from __future__ import annotations

import json
import os
import signal
import socket
from dataclasses import replace
from itertools import count
from pathlib import Path

import httpx
import pytest

from benchmarks.server.process import Server
from echo_rl.config import EngineConfig
from echo_rl.errors import WeightsError
from echo_rl.server import serve as serving_module
from echo_rl.server.config import ServerConfig
from tests import tiny
from tests.runtime.models.fake_hub import fake_hub

LIMITS = {"max_context": 500, "kv_tokens": 8192, "max_nodes": 24, "max_expanded": 40}
LONG = {"prompt": "hello", "max_tokens": 480, "n": 6, "temperature": 1.0, "stream": True, "ignore_eos": True}


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    models = {"model": tiny.target_folder(root / "target"), "drafter": tiny.drafter_folder(root / "drafter")}
    names = {name: str(folder) for name, folder in models.items()}
    return EngineConfig(**names, **LIMITS, device="cpu", dtype="float32", threads=1)


@pytest.fixture
def serve(engine, tmp_path):
    logs = (tmp_path / f"{number}.log" for number in count())
    started = []

    def start(*options: str) -> Server:
        started.append(Server(engine, next(logs), options))
        return started[-1]

    yield start
    for server in started:
        server.end(0.0)


@pytest.mark.parametrize(("host", "reached"), [("127.0.0.1", ["127.0.0.1"]), ("::", ["127.0.0.1", "::1"])])
def test_every_address_of_a_host_is_listened_on(host, reached):
    if ":" in host and not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    with serving_module.listen(host, 0) as listener:
        for address in reached:
            socket.create_connection((address, listener.getsockname()[1]), timeout=10).close()


def test_a_name_with_addresses_of_both_kinds_has_its_ipv4_one(monkeypatch):
    both = [(socket.AF_INET6, 1, 6, "", ("::1", 0, 0, 0)), (socket.AF_INET, 1, 6, "", ("127.0.0.1", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **more: both)
    with serving_module.listen("localhost", 0) as listener:
        assert listener.getsockname()[0] == "127.0.0.1"


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
    assert server.process.wait(30) == 0
    (line,) = [line for line in server.lines("request") if line["status"] == 200]
    assert line["output_tokens"] == LONG["n"] * LONG["max_tokens"]


def test_the_engines_process_logs_in_the_same_form(serve):
    server = serve("--controller", "none")
    url = server.ready()
    assert httpx.put(f"{url}/admin/controller", json={"controller": "chain"}, timeout=60).status_code == 200
    entry = server.wait_for("controller 'chain' replaces 'none'", seconds=10)
    assert (entry["level"], entry["logger"]) == ("info", "echo_rl.server.core.controller_manager")


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
    assert (patient.process.wait(30), hasty.process.wait(30)) == (0, 130)


def test_what_is_wrong_is_one_line_and_exit_code_2(serve):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        busy = serve("--port", str(taken.getsockname()[1]))
        wrong = serve("--controller", "nonsense")
        assert (busy.process.wait(60), wrong.process.wait(60)) == (2, 2)
    last = [server.log.read_text().splitlines()[-1] for server in (busy, wrong)]
    assert "cannot listen" in last[0] and "nonsense" in last[1]


def test_the_port_stays_closed_while_the_model_is_fetched(engine, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = free.getsockname()

    def fetch(model, revision):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address)
        raise WeightsError("the network is down")

    monkeypatch.setattr(serving_module, "resolve_model", fetch)
    monkeypatch.setattr(serving_module.logs, "configure", lambda form: None)
    with pytest.raises(WeightsError, match="the network is down"):
        serving_module.serve(engine, ServerConfig(port=address[1]), "none", load=None)


def test_a_model_of_the_hub_is_served_under_its_name(tmp_path, engine, monkeypatch):
    with fake_hub() as hub:
        commits = [hub.add(f"maker/{kind}", Path(getattr(engine, kind))) for kind in ("model", "drafter")]
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        named = replace(engine, model="maker/model", drafter="maker/drafter", drafter_revision=commits[1])
        with Server(named, tmp_path / "log") as server:
            url = server.ready()
            assert server.wait_for("ready")["model"] == f"maker/model@{commits[0]}"
            assert server.wait_for("ready")["drafter"] == f"maker/drafter@{commits[1]}"
            assert [model["id"] for model in httpx.get(f"{url}/v1/models").json()["data"]] == ["maker/model"]
            body = {"model": "maker/model", "prompt": "hello", "max_tokens": 4}
            assert httpx.post(f"{url}/v1/completions", json=body, timeout=60).status_code == 200
        assert len(hub.downloads()) == len(set(hub.downloads()) - {"config.json", "model.safetensors"}) + 4


def test_the_front_never_interrupts_a_step_and_the_engine_runs_as_usual(serve):
    server = serve("--controller", "none")
    server.ready()
    assert os.sched_getscheduler(server.process.pid) == os.SCHED_BATCH
    assert os.sched_getscheduler(server.engine()) == os.SCHED_OTHER
