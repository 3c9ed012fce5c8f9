"""What /metrics and the log say."""

from __future__ import annotations

import io
import json
import logging
import time

import pytest

from echo_rl.server import logs
from echo_rl.server.api.metrics import Metrics
from echo_rl.server.api.model_metrics import ModelMetrics
from echo_rl.server.api.step_metrics import StepMetrics
from echo_rl.server.client.engine_client import EngineClient, SupervisorConfig
from echo_rl.server.core.worker import build_controller
from echo_rl.server.messages import Stepped
from tests.server.front_world import FakeEngineClient, client_of, make_app, stats

SECRET = "the quick brown secret"


class Reading:
    """Samples of a registry by name and labels."""

    def __init__(self, registry) -> None:
        self._registry = registry

    def __call__(self, name: str, **labels) -> float | None:
        return self._registry.get_sample_value(name, {"model_name": "m", **labels})


@pytest.fixture
def steps():
    metrics = ModelMetrics("m")
    return StepMetrics(metrics), Reading(metrics.registry)


def test_speculation_is_counted_truly(steps):
    metrics, value = steps
    for _ in range(2):
        metrics.step(stats())
    plain = {"verified": 0, "accepted": 0, "drafted": 0, "budget": 0, "committed": 2}
    metrics.step(stats(**plain, reached_by_depth=(), accepted_by_depth=()))
    assert [value("echo_rl:spec_tokens_total", stage=s) for s in ("drafted", "verified", "accepted")] == [20, 16, 8]
    assert value("sglang:spec_verify_calls_total") == 4  # two speculative steps of two requests
    assert value("echo_rl:spec_reached_total", depth="1") == value("echo_rl:spec_accepted_total", depth="0") == 4
    assert value("echo_rl:spec_budget") == 0 and value("echo_rl:spec_knee") == 12
    metrics.refresh(time.time(), idle=False)
    assert value("sglang:spec_accept_length") == 3.0 and value("sglang:spec_accept_rate") == 0.5
    metrics.refresh(time.time() + 60.0, idle=True)
    assert value("sglang:spec_accept_length") == value("sglang:spec_accept_rate") == 0.0


def test_requests_that_refuse_speculation_say_nothing_of_it(steps):
    metrics, value = steps
    metrics.step(stats(plain=6, running=8))
    metrics.refresh(time.time(), idle=False)
    assert value("sglang:spec_accept_length") == 3.0 and value("sglang:spec_verify_calls_total") == 2


def test_throughput_is_of_the_last_seconds_and_idle_is_zero(steps):
    metrics, value = steps
    for i in range(100):
        metrics.step(stats(end=1000.0 + i, seconds=1.0))
    metrics.refresh(1099.0, idle=False)
    assert value("sglang:gen_throughput") == pytest.approx(7.0), "the first tokens of requests count, too"
    assert (value("sglang:num_running_reqs"), value("sglang:num_queue_reqs")) == (2, 3)
    metrics.refresh(1200.0, idle=True)
    assert value("sglang:gen_throughput") == value("sglang:num_running_reqs") == value("sglang:token_usage") == 0


def test_swaps_fallbacks_and_rollbacks_count_on_over_a_restart():
    client = EngineClient(SupervisorConfig(), build_controller)
    value = Reading(Metrics("m", client).registry)
    for counted in (
        stats(fallbacks={"nan": 5}, rollbacks=1, serving={"device": 3, "eager:width": 1}),
        stats(
            controller="ppo:path=/secret", fallbacks={"nan": 7}, rollbacks=3, serving={"device": 4, "eager:width": 1}
        ),
    ):
        client.on_event(Stepped((), counted))
    client.on_exit("killed")
    client.on_event(Stepped((), stats(controller="ppo:path=/secret", fallbacks={"nan": 1}, rollbacks=1)))
    assert value("echo_rl:controller_rollbacks_total") == 4
    assert value("echo_rl:served_total", way="device") == 4 and value("echo_rl:served_total", way="eager:width") == 1
    assert value("echo_rl:controller_swaps_total") == 1
    assert value("echo_rl:fallbacks_total", cause="nan") == 8
    assert value("echo_rl:controller_info", controller="ppo") == 1
    assert value("echo_rl:controller_info", controller="echo") is None


def test_requests_in_the_exposition():
    engine_client = FakeEngineClient()
    with client_of(make_app(engine_client, model="m")) as client:
        client.post("/v1/completions", json={"prompt": "abc", "max_tokens": 4})
        client.post("/v1/completions", json={"prompt": "abc", "temperature": -1})
        engine_client.fail_at = 1
        client.post("/v1/completions", json={"prompt": "abc", "stream": True})
        client.get("/no/such/path")
        engine_client.step()
        text = client.get("/metrics").text
    for line in (
        'sglang:prompt_tokens_total{model_name="m"} 6.0',
        'sglang:generation_tokens_total{model_name="m"} 5.0',
        'sglang:num_requests_total{model_name="m"} 1.0',
        'sglang:num_aborted_requests_total{model_name="m"} 1.0',
        'sglang:time_to_first_token_seconds_count{model_name="m"} 2.0',
        'sglang:inter_token_latency_seconds_count{model_name="m"} 3.0',
        'sglang:e2e_request_latency_seconds_count{model_name="m"} 1.0',
        'sglang:time_per_output_token_seconds_count{model_name="m"} 1.0',
        'echo_rl:http_requests_total{model_name="m",route="/v1/completions",status="400"} 1.0',
        'echo_rl:http_requests_total{model_name="m",route="unmatched",status="404"} 1.0',
        'echo_rl:step_seconds_count{model_name="m"} 1.0',
    ):
        assert line in text.splitlines(), line


def test_each_completion_of_a_request_is_one_in_the_exposition():
    engine_client = FakeEngineClient()
    engine_client.pause = 0.03
    app = make_app(engine_client, model="m")
    value = Reading(app.state.front.metrics.registry)
    with client_of(app) as client:
        client.post("/v1/completions", json={"prompt": ["abc", "abc"], "n": 2, "max_tokens": 3})
        for name in ("e2e_request_latency", "time_per_output_token", "time_to_first_token"):
            assert value(f"sglang:{name}_seconds_count") == 4, name
        assert value("sglang:time_per_output_token_seconds_sum") > 4 * 0.03
        assert value("sglang:num_requests_total") == 4 and value("sglang:num_aborted_requests_total") == 0
        engine_client.fail_at = 1
        client.post("/v1/completions", json={"prompt": "abc", "n": 3, "max_tokens": 3})
        assert value("sglang:num_requests_total") == 4 and value("sglang:num_aborted_requests_total") == 3


def test_tokens_that_come_together_each_count_with_their_share():
    metrics = Metrics("m", FakeEngineClient())
    metrics.more_tokens(4, 0.2)
    metrics.more_tokens(1, 3.0)
    value = Reading(metrics.registry)
    assert value("sglang:inter_token_latency_seconds_count") == 5
    assert value("sglang:inter_token_latency_seconds_sum") == pytest.approx(3.2)
    assert value("sglang:inter_token_latency_seconds_bucket", le="0.04") == 0
    assert value("sglang:inter_token_latency_seconds_bucket", le="0.06") == 4
    assert value("sglang:inter_token_latency_seconds_bucket", le="+Inf") == 5


def test_servers_of_one_process_count_apart():
    one, other = (Metrics("m", FakeEngineClient()) for _ in range(2))
    one.prompt_tokens.inc(3)
    assert Reading(one.registry)("sglang:prompt_tokens_total") == 3
    assert Reading(other.registry)("sglang:prompt_tokens_total") == 0


@pytest.fixture
def lines():
    """What the log holds, a line each, in the given form."""
    root, package = logging.getLogger(), logging.getLogger("echo_rl")
    handlers, levels = root.handlers[:], (root.level, package.level)
    stream = io.StringIO()

    def start(form):
        logs.configure(form, stream)
        return lambda: stream.getvalue().splitlines()

    yield start
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    package.setLevel(levels[1])


def test_a_request_is_one_json_line_without_its_text(lines):
    read = lines("json")
    with client_of(make_app(FakeEngineClient())) as client:
        reply = client.post("/v1/completions", json={"prompt": SECRET, "max_tokens": 3})
        client.get("/health")
    (line,) = read()
    entry = json.loads(line)
    assert entry["id"] == reply.headers["x-request-id"] and reply.json()["id"] == "cmpl-" + entry["id"]
    assert (entry["route"], entry["status"], entry["finish_reason"]) == ("/v1/completions", 200, "length")
    assert (entry["prompt_tokens"], entry["output_tokens"]) == (len(SECRET), 3)
    assert 0 < entry["ttft"] <= entry["e2e"]
    assert SECRET not in line


def test_errors_are_logged_without_the_input(lines):
    read = lines("json")
    with client_of(make_app(FakeEngineClient())) as client:
        client.post("/v1/completions", json={"prompt": "x", "temperature": SECRET})
        client.post("/v1/completions", json={"prompt": [SECRET, 1]}, headers={"Authorization": f"Bearer {SECRET}"})
    assert [json.loads(line)["status"] for line in read()] == [400, 400]
    assert not any(SECRET in line for line in read())


def test_the_text_form_keeps_to_one_line(lines):
    read = lines("text")
    logs.write("admin controller", controller="a\nb")
    (line,) = read()
    assert line.endswith(r'INFO admin controller controller="a\nb"')
