"""What is not let in, or not any longer."""

from __future__ import annotations

import asyncio
import json
import socket
import threading

import httpx
import pytest

from echo_rl.errors import ConfigError
from echo_rl.server.api.errors import ApiError
from echo_rl.server.api.limits import Admission
from echo_rl.server.config import ServerConfig
from tests.conftest import FakeClock
from tests.server.engine_clients import until
from tests.server.front_world import FakeEngineClient, client_of, listening, make_app, wait_until

COMPLETION = "/v1/completions"


def test_places_are_given_back_and_their_rate_is_known():
    clock = FakeClock()
    admission = Admission(4, clock)
    assert admission.retry_after() == 1  # nothing is known yet
    for _ in range(3):
        with admission.enter(2):
            assert admission.unfinished == 2
            clock.now += 6.0
    assert admission.unfinished == 0
    assert admission.retry_after() == 2  # 6 completions, the first two 12 s ago
    assert admission.retry_after(4) == 8
    assert admission.retry_after(400) == 60


def test_a_place_is_given_back_after_an_error():
    admission = Admission(1)
    with pytest.raises(ZeroDivisionError), admission.enter(1):
        1 / 0  # noqa: B018
    assert admission.unfinished == 0


def test_more_than_ever_fits_is_another_error_than_more_than_fits_now():
    admission = Admission(2)
    with admission.enter(1):
        with pytest.raises(ApiError) as never, admission.enter(3):
            pass
        with pytest.raises(ApiError) as not_now, admission.enter(2):
            pass
    assert (never.value.status_code, not_now.value.status_code) == (400, 429)
    assert not_now.value.headers["Retry-After"] == "1"


def test_a_full_queue_is_429_until_a_place_is_free():
    engine_client = FakeEngineClient()
    engine_client.pause = 0.02
    app = make_app(engine_client, max_queue=2)
    with listening(app) as url:
        first = threading.Thread(target=httpx.post, args=(url + COMPLETION,), kwargs={"json": body(20, n=2)})
        first.start()
        wait_until(lambda: engine_client.in_flight == 2)
        refused = httpx.post(url + COMPLETION, json=body(1))
        assert refused.status_code == 429 and int(refused.headers["Retry-After"]) >= 1
        assert refused.json()["error"]["type"] == "rate_limit_error"
        first.join()
        assert httpx.post(url + COMPLETION, json=body(1)).status_code == 200
    assert app.state.front.admission.unfinished == 0


def body(max_tokens: int, **more) -> dict:
    return {"prompt": "x", "max_tokens": max_tokens, **more}


@pytest.mark.parametrize("announced", [True, False])
def test_large_bodies_are_413(announced):
    text = json.dumps({"prompt": "x" * 5000}).encode()
    content = text if announced else iter([text[:100], text[100:]])
    with client_of(make_app(FakeEngineClient(), max_body_bytes=1000)) as client:
        reply = client.post(COMPLETION, content=content, headers={"Content-Type": "application/json"})
    assert reply.status_code == 413 and "1000 bytes" in reply.json()["error"]["message"]


def test_the_operators_bounds_on_prompt_and_output():
    with client_of(make_app(FakeEngineClient(), max_prompt_tokens=3, max_tokens=5)) as client:
        long = client.post(COMPLETION, json={"prompt": "four"})
        many = client.post(COMPLETION, json=body(6))
        assert (long.status_code, long.json()["error"]["param"]) == (400, "prompt")
        assert (many.status_code, many.json()["error"]["param"]) == (400, "max_tokens")
        assert client.post(COMPLETION, json={"prompt": "abc"}).json()["usage"]["completion_tokens"] == 5


def test_a_request_that_takes_too_long_is_504():
    engine_client = FakeEngineClient()
    engine_client.pause = 0.05
    app = make_app(engine_client, request_timeout=0.12)
    with client_of(app) as client:
        reply = client.post(COMPLETION, json=body(30))
        assert reply.status_code == 504 and reply.json()["error"]["code"] == "timeout"
        stream = client.post(COMPLETION, json=body(30, stream=True))
        events = stream.text.strip().split("\n\n")
        assert stream.status_code == 200 and events[-1] == "data: [DONE]"
        assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == "timeout"
    assert (
        len(engine_client.cancelled) == 2 and engine_client.in_flight == 0 and app.state.front.admission.unfinished == 0
    )


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("copies", [1, 3])
def test_a_client_that_leaves_frees_the_engine(stream, copies):
    engine_client = FakeEngineClient(context=5000)
    engine_client.pause = 0.01
    app = make_app(engine_client)
    with listening(app) as url:
        text = json.dumps(body(4000, stream=stream, n=copies)).encode()
        head = f"POST {COMPLETION} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(text)}"
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as connection:
            connection.sendall(head.encode() + b"\r\n\r\n" + text)
            wait_until(lambda: engine_client.in_flight == copies)
        wait_until(lambda: len(engine_client.cancelled) == copies)
    assert engine_client.in_flight == 0 and app.state.front.admission.unfinished == 0


def test_a_stream_that_nobody_reads_holds_no_place_after_its_timeout():
    engine_client = FakeEngineClient()
    engine_client.pause = 0.01
    app = make_app(engine_client, request_timeout=0.1)
    text = json.dumps(body(30, stream=True, n=2)).encode()

    async def main():
        asked = iter([{"type": "http.request", "body": text, "more_body": False}])

        async def receive():
            return next(asked, None) or await asyncio.Event().wait()

        async def send(message):
            if message["type"] == "http.response.body":
                await asyncio.Event().wait()  # the transport takes no more

        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(text)).encode())]
        scope = {"type": "http", "method": "POST", "path": COMPLETION, "query_string": b"", "headers": headers}
        serving = asyncio.create_task(app(scope, receive, send))
        admission = app.state.front.admission
        await until(lambda: admission.unfinished == 2)
        await until(lambda: admission.unfinished == 0)
        assert engine_client.in_flight == 0 and len(engine_client.cancelled) == 2
        serving.cancel()
        await asyncio.wait([serving])

    asyncio.run(main())


def test_draining_is_503():
    app = make_app(FakeEngineClient(), drain_seconds=7.0)
    app.state.front.draining = True
    with client_of(app) as client:
        reply = client.post(COMPLETION, json=body(1))
        assert reply.status_code == 503 and reply.headers["Retry-After"] == "8"
        assert client.get("/health/ready").status_code == 503
        assert client.get("/health/live").json() == {"live": True, "ready": False, "draining": True}


def test_health_of_a_dead_engine():
    engine_client = FakeEngineClient()
    with client_of(make_app(engine_client)) as client:
        assert client.get("/health").json()["ready"] is True
        engine_client.alive = engine_client.ready = False
        assert client.get("/health/live").status_code == client.get("/health").status_code == 503


@pytest.mark.parametrize("stream", [False, True])
def test_one_failure_among_many_cancels_the_others(stream):
    engine_client = FakeEngineClient()
    engine_client.pause = 0.01
    app = make_app(engine_client)
    with client_of(app) as client:
        body = {"prompt": ["good", "bad!", "fine"], "max_tokens": 50, "stream": stream}
        reply = client.post("/v1/completions", json=body)
    assert reply.status_code == 400 and "'!'" in reply.json()["error"]["message"]
    assert [request_id[-2:] for request_id in engine_client.cancelled] == ["-0", "-2"]
    assert engine_client.in_flight == app.state.front.admission.unfinished == 0


@pytest.mark.parametrize("settings", [{"port": -1}, {"max_queue": 0}, {"request_timeout": 0.0}, {"max_tokens": -5}])
def test_settings_out_of_range(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        ServerConfig(**settings)


def test_the_model_is_called_after_its_folder():
    assert ServerConfig().model_name("/models/tiny/") == "tiny"
    assert ServerConfig().model_name("smollm2") == "smollm2"
    assert ServerConfig(served_model_name="mine").model_name("smollm2") == "mine"
