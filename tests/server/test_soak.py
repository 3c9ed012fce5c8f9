"""A short soak of a real server on a tiny model, and whether a soak would notice what it looks for."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import pytest

from benchmarks.soak import faulty_controllers as soak_guard
from benchmarks.soak.checks import (
    ENGINE_MB,
    FRONT_MB,
    Sample,
    Totals,
    compare_counters,
    compare_texts,
    ends,
    growth,
    too_much,
)
from benchmarks.soak.clients import WEIGHTS, ClientRequest, judge
from benchmarks.soak.plot import draw
from benchmarks.soak.run import Plan, soak
from echo_rl.config import EngineConfig
from echo_rl.experiments.targets.http.connection import Answer
from tests import tiny

PLAN = Plan(
    seconds=14.0, clients=8, kills=1, pauses=1, freezes=0, rests=1, pause_seconds=0.5,
    swap_every=0.7, experiment_every=3.0, sample_every=0.2, repeats=1.0,
)  # fmt: skip


@pytest.fixture
def engine(tmp_path):
    return EngineConfig(
        model=str(tiny.target_folder(tmp_path / "target")), drafter=str(tiny.drafter_folder(tmp_path / "drafter")),
        device="cpu", dtype="float32", kv_tokens=4096, max_context=500, max_nodes=24, max_expanded=40, threads=1,
    )  # fmt: skip


def test_a_server_outlives_everything_that_goes_wrong(engine, tmp_path):
    result = soak(PLAN, engine, tmp_path / "server.log")
    assert result["violations"] == []
    assert result["exit_code"] == 0 and result["counters"]["deaths and restarts"] == 1
    assert [event["what"] for event in result["events"]] == ["pause", "kill", "rest", "SIGTERM"]
    assert result["events"][-1]["clients"] > 0, "the end came without load"
    outcomes = {outcome for ends in result["visits"].values() for outcome in ends}
    assert {"finished", "left", "done", "refused 400", "refused 413", "busy 503"} <= outcomes
    assert {*WEIGHTS, "swap", "experiment"} <= set(result["visits"])
    assert result["texts"]["compared"] > result["texts"]["requests"]
    draw(json.loads(json.dumps(result)), tmp_path / "soak.png")
    assert (tmp_path / "soak.png").stat().st_size > 10_000


def test_faulty_controllers_are_taken_over_and_replaced(engine):
    found = asyncio.run(soak_guard.under_faulty_controllers(engine))
    assert found["violations"] == []
    assert set(found["faults"]) == set(soak_guard.FAULTS)


def test_a_fault_without_consequences_is_noticed(engine, monkeypatch):
    monkeypatch.setattr(soak_guard, "ROLL_BACK_SECONDS", 0.5)
    monkeypatch.setattr(soak_guard, "FAULTS", {"chain": (None, "nan")})  # a sound one
    found = asyncio.run(soak_guard.under_faulty_controllers(engine))
    assert len(found["violations"]) == 2 and "was not replaced" in found["violations"][0]


# ----------------------------------------------------------------------------- judging an answer

CHUNK = {"id": "chatcmpl-abc", "choices": [{"index": 0, "delta": {"content": "hi"}, "finish_reason": None}]}
LAST = {"id": "chatcmpl-abc", "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
USAGE = {"id": "chatcmpl-abc", "choices": [], "usage": {"completion_tokens": 2}}
DIED = {"error": {"message": "the engine died: killed"}}
CURSED = {"error": {"message": "the weights are cursed"}}


def events(*chunks) -> bytes:
    return b"".join(b"data: " + (c if isinstance(c, bytes) else json.dumps(c).encode()) + b"\n\n" for c in chunks)


@pytest.mark.parametrize(
    ("raw", "outcome", "fair"),
    [
        (events(CHUNK, LAST, USAGE, b"[DONE]"), "finished", True),
        (events(CHUNK, LAST, USAGE), "broken", False),
        (events(CHUNK, USAGE, b"[DONE]"), "broken", False),
        (events(CHUNK, DIED, b"[DONE]"), "failed", True),
        (events(CHUNK, CURSED, b"[DONE]"), "failed", False),
    ],
)
def test_a_stream_is_whole_or_says_why_not(raw, outcome, fair):
    request = ClientRequest("chat")
    judge(request, Answer(200), raw)
    assert (request.outcome, request.fair) == (outcome, fair)
    if outcome == "finished":
        assert (request.id, request.tokens, request.texts) == ("abc", 2, ("hi",))


@pytest.mark.parametrize(
    ("kind", "status", "retry", "code", "outcome", "fair"),
    [
        ("chat", 503, 5.0, "unavailable", "busy 503", True),
        ("chat", 503, None, "unavailable", "busy without Retry-After", False),
        ("several", 429, 1.0, "queue_full", "busy 429", True),
        ("chat", 400, None, None, "refused 400", False),
        ("malformed", 400, None, None, "refused 400", True),
        ("malformed", 500, None, "internal_error", "failed", False),
        ("swap", 500, None, "internal_error", "failed", False),
    ],
)
def test_a_refusal_must_fit_what_was_asked(kind, status, retry, code, outcome, fair):
    request = ClientRequest(kind)
    body = {"error": {"message": "no", "type": "x", "param": None, "code": code}}
    judge(request, Answer(status, retry, bytearray(json.dumps(body).encode())), b"")
    assert (request.outcome, request.fair) == (outcome, fair)


def test_an_error_that_is_no_object_is_not_fair():
    request = ClientRequest("malformed")
    judge(request, Answer(400, None, bytearray(b"Bad Request")), b"")
    assert not request.fair


# ----------------------------------------------------------------------------- counters, texts, memory

LOG = [
    {"id": "a", "route": "/v1/completions", "status": 200, "prompt_tokens": 5, "output_tokens": 9,
     "finish_reason": "stop,length"},
    {"id": "b", "route": "/v1/completions", "status": 499, "prompt_tokens": 5, "output_tokens": 3,
     "finish_reason": "cancelled"},
    {"id": "c", "route": "/v1/completions", "status": 400, "prompt_tokens": 0, "output_tokens": 0,
     "finish_reason": None},
    {"id": "d", "route": "/admin/stats", "status": 200, "prompt_tokens": 0, "output_tokens": 0,
     "finish_reason": None},
]  # fmt: skip
REQUESTS = [
    ClientRequest("several", "finished", 200, id="a", tokens=9),
    ClientRequest("leaver", "left"),
    ClientRequest("malformed", "refused 400", 400),
    ClientRequest("stats", "done", 200),
]
METRICS = """# HELP sglang:prompt_tokens_total Prompt tokens.
sglang:prompt_tokens_total{model_name="m"} 10.0
sglang:generation_tokens_total{model_name="m"} 12.0
sglang:num_requests_total{model_name="m"} 2.0
sglang:num_aborted_requests_total{model_name="m"} 1.0
echo_rl:core_restarts{model_name="m"} 1.0
echo_rl:http_requests_total{model_name="m",route="/v1/completions",status="200"} 1.0
echo_rl:http_requests_total{model_name="m",route="/v1/completions",status="499"} 1.0
echo_rl:http_requests_total{model_name="m",route="/v1/completions",status="400"} 1.0
echo_rl:spec_tokens_total{model_name="m",stage="drafted"} 20.0
echo_rl:spec_tokens_total{model_name="m",stage="verified"} 10.0
echo_rl:spec_tokens_total{model_name="m",stage="accepted"} 6.0
echo_rl:spec_accepted_total{model_name="m",depth="0"} 4.0
echo_rl:spec_accepted_total{model_name="m",depth="1"} 2.0
"""


def disagreements(requests=REQUESTS, metrics=METRICS, log=LOG, engine_losses=1):
    return compare_counters(requests, Totals({}, metrics), log, engine_losses)[1]


def test_clients_log_and_metrics_agree():
    assert disagreements() == []


@pytest.mark.parametrize("line", [line for line in METRICS.splitlines() if not line.startswith("#")])
def test_each_counter_is_looked_at(line):
    series, value = line.rsplit(" ", 1)
    assert disagreements(metrics=METRICS.replace(line, f"{series} {0.1 * float(value)}"))


@pytest.mark.parametrize(
    "requests",
    [
        [replace(REQUESTS[0], tokens=8), *REQUESTS[1:]],
        [replace(REQUESTS[0], id="x"), *REQUESTS[1:]],
        REQUESTS[1:],  # the log knows of a request that nobody sent
        [*REQUESTS, *[ClientRequest("malformed", "refused 400", 400)] * 2],  # and lacks two that were answered
    ],
)
def test_an_answer_that_the_log_does_not_know_is_noticed(requests):
    assert disagreements(requests=requests)


def test_a_lost_engine_without_a_restart_is_noticed():
    assert disagreements(engine_losses=2)


def test_a_changed_answer_is_noticed():
    requests = [ClientRequest("chat", "finished", asked=b"x", texts=(text,)) for text in ("one", "one", "two")]
    requests.append(ClientRequest("chat", "left", asked=b"x"))
    assert compare_texts(requests) == {"requests": 1, "compared": 2, "changed": 1}


def test_ends_are_counted_over_time():
    requests = [
        ClientRequest("chat", "busy 503", ended=10.11),
        ClientRequest("chat", "busy 429", ended=10.11),
        ClientRequest("chat", ended=12.0),
    ]
    found = ends(requests, began=10.0, seconds=2.0)
    assert set(found) == {"busy", "lost"} and found["busy"][5] == 2 and found["lost"][-1] == 1


@pytest.mark.parametrize(
    ("leak", "names"), [(0.0, []), (2 * FRONT_MB, ["front"]), (2 * ENGINE_MB, ["front", "engine"])]
)
def test_a_leak_is_noticed_and_warming_up_is_not(leak, names):
    """The first quarter, and the engine that was killed, grow by as much as they like."""

    def sample(at: float) -> Sample:
        grown = 200.0 * min(at, 25.0) / 25.0 + leak * max(0.0, at - 25.0) / 60.0
        return Sample(at, 100.0 + grown, 1 if at < 10 else 2, 10.0 * at if at < 10 else 300.0 + grown)

    found = too_much(growth([sample(float(at)) for at in range(100)], 100.0))
    assert [text.split()[1] for text in found] == names
