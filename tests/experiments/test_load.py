"""The load generator against a small server of scripted behaviour, over real sockets."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
import time
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from echo_rl.cli import load as command
from echo_rl.contracts import Request, SamplingParams
from echo_rl.errors import ConfigError
from echo_rl.experiments.load import run_load
from echo_rl.experiments.report import plots_load as plots
from echo_rl.experiments.report import tables
from echo_rl.experiments.report.load import errors
from echo_rl.experiments.targets.http.client import Client, chat_body
from echo_rl.experiments.targets.http.config import LoadConfig
from echo_rl.experiments.targets.http.connection import run_async
from echo_rl.experiments.targets.http.drive import PAUSE, Ends, drive
from echo_rl.experiments.targets.http.record import LoadRecord
from echo_rl.experiments.targets.http.stream import Events, Stream, spread
from echo_rl.experiments.targets.http.target import WARMUP_REQUESTS, Keys
from echo_rl.workloads.arrivals import Arrivals, parse
from echo_rl.workloads.datasets import Prompt
from echo_rl.workloads.metrics import SLO
from echo_rl.workloads.records import CUT

PROMPTS = [Prompt("gsm8k", str(i), ({"role": "user", "content": f"prompt {i}"},)) for i in range(6)]
QUIET = Console(quiet=True)


def chunk(text="", reason=None, **more) -> bytes:
    body = {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": reason}], **more}
    return b"data: " + json.dumps(body).encode() + b"\n\n"


def usage(tokens: int) -> bytes:
    counts = {"prompt_tokens": 7, "completion_tokens": tokens}
    return b"data: " + json.dumps({"choices": [], "usage": counts}).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
ANSWER = [chunk(), chunk("He"), chunk("llo wörld"), chunk("!", "stop"), usage(6), DONE]


class FakeServer:
    """Speaks enough HTTP for the client. `reply(server, path, body)` yields what to write, or a pause in seconds.

    Bytes are written as HTTP chunks, `split` at a time; None hangs up, numbers sleep, a tuple is a plain response.
    """

    def __init__(self, reply=None, split=None, keep_alive=True):
        self.reply, self.split, self.keep_alive = reply or (lambda server, path, body: ANSWER), split, keep_alive
        self.connections = self.open = self.most = 0
        self.bodies, self.heads, self.lost = [], [], asyncio.Event()
        self.controller, self.controllers = "tuned", []

    async def __aenter__(self):
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_):
        self.server.close()

    async def _serve(self, reader, writer):
        self.connections += 1
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = next((int(line[15:]) for line in head.split("\r\n") if line.startswith("Content-Length:")), 0)
                method, path, _ = head.split(" ", 2)
                self.heads.append(head)
                body = json.loads(await reader.readexactly(length) or b"null")
                await self._answer(method, path, body, reader, writer)
                if not self.keep_alive:
                    return
        except (ConnectionError, asyncio.IncompleteReadError):
            self.lost.set()
        finally:
            writer.close()

    async def _answer(self, method, path, body, reader, writer):
        if path == "/v1/models":
            return _plain(writer, 200, {"data": [{"id": "tiny"}]})
        if path == "/admin/controller":
            if method == "PUT":
                if body["controller"] == "bad":
                    return _plain(writer, 400, {"error": {"message": "no controller is called bad"}})
                self.controller = body["controller"]
                self.controllers.append(body)
            return _plain(writer, 200, {"controller": self.controller})
        if path != "/v1/chat/completions":
            return _plain(writer, 404, {"detail": "Not Found"})
        self.bodies.append((self.controller, body))
        self.open += 1
        self.most = max(self.most, self.open)
        try:
            await self._stream(self.reply(self, path, body), reader, writer)
        finally:
            self.open -= 1

    async def _stream(self, parts, reader, writer):
        begun = False
        for part in parts:
            if isinstance(part, tuple):
                return _plain(writer, *part)
            if part is None:
                raise ConnectionError
            if isinstance(part, float):
                await asyncio.sleep(part)
                if reader.at_eof():
                    raise ConnectionError
                continue
            if not begun:
                writer.write(
                    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
                )
                begun = True
            for start in range(0, len(part), self.split or len(part)):
                piece = part[start : start + (self.split or len(part))]
                writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
                await writer.drain()
                if self.split:
                    await asyncio.sleep(0)
        writer.write(b"0\r\n\r\n")


def _plain(writer, status, body, headers=""):
    data = json.dumps(body).encode()
    writer.write(f"HTTP/1.1 {status} X\r\n{headers}Content-Length: {len(data)}\r\n\r\n".encode() + data)


def ask(server, times=1, **options):
    """The streams of `times` requests one after the other, and the client."""

    async def work():
        async with server:
            client = Client(server.url + "/v1", **options)
            streams = []
            for _ in range(times):
                streams.append(Stream(time.perf_counter))
                await client.complete(b"{}", streams[-1])
            await client.close()
            return streams, client

    return asyncio.run(asyncio.wait_for(work(), 60))


# ----------------------------------------------------------------------------- the stream


@given(
    events=st.lists(st.lists(st.text("ab: 1é", max_size=6), min_size=1, max_size=3), max_size=5),
    end=st.sampled_from(["\n", "\r\n"]),
    data=st.data(),
)
def test_events_are_the_same_however_the_bytes_are_split(events, end, data):
    lines = ["event: x", ": a comment", "id: 7"]
    text = "".join(end.join([*lines, *(f"data: {line}" for line in event), "", ""]) for event in events).encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    reader = Events()
    found = [e for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True) for e in reader.feed(text[a:b])]
    assert found == ["\n".join(event).encode() for event in events]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(1, 60))
def test_tokens_are_spread_over_chunks_without_loss(sizes, total):
    times = [float(i) for i in range(len(sizes))]
    placed = spread(times, sizes, total)
    assert len(placed) == total and placed == sorted(placed) and placed[0] == 0.0
    if total >= len(sizes):
        assert set(placed) == set(times)  # at least one each, so the last token is in the last chunk


def test_longer_chunks_hold_more_tokens():
    assert spread([0.0, 1.0, 2.0], [4, 12, 4], 5) == [0.0, 1.0, 1.0, 1.0, 2.0]


@pytest.mark.parametrize("split", [None, 1, 3, 50])
def test_an_answer_is_read_however_it_is_split(split):
    (stream,), _ = ask(FakeServer(split=split))
    assert (stream.text, stream.finish_reason, stream.error) == ("Hello wörld!", "stop", None)
    assert len(stream.token_times()) == 6 and stream.prompt_tokens == 7


def test_without_usage_a_chunk_counts_as_a_token():
    (stream,), _ = ask(FakeServer(lambda *_: [chunk("a"), chunk("b", "length"), DONE]))
    assert len(stream.token_times()) == 2 and stream.finish_reason == "length"


def test_connections_are_reused():
    server = FakeServer()
    streams, _ = ask(server, times=3)
    assert server.connections == 1 and all(stream.error is None for stream in streams)


def test_a_connection_that_was_closed_while_idle_is_replaced():
    server = FakeServer(keep_alive=False)
    streams, _ = ask(server, times=3)
    assert server.connections == 3 and all(stream.error is None for stream in streams)


# ----------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        ([(500, {"error": {"message": "out of\nmemory"}})], "http 500: out of memory"),
        ([(404, {"detail": "Not Found"})], "http 404: {'detail': 'Not Found'}"),
        ([chunk("a"), b'data: {"error": {"message": "engine died"}}\n\n', DONE], "stream error: engine died"),
        ([chunk("a"), None], "connection: the server closed the connection"),
        ([None], "connection: "),
        ([chunk("a"), DONE], "protocol: the answer ended without a finish reason"),
        ([b"data: {nonsense\n\n"], "protocol: not a completion chunk: b'{nonsense'"),
        ([b'data: {"choices": [7]}\n\n'], "protocol: not a completion chunk"),
        ([b"data: []\n\n"], "protocol: not a completion chunk"),
    ],
)
def test_failures_are_told_apart(reply, error):
    (stream,), _ = ask(FakeServer(lambda *_: reply))
    assert str(stream.error).startswith(error)


def test_an_answer_that_does_not_end_is_a_timeout():
    (stream,), _ = ask(FakeServer(lambda *_: [chunk("a"), 30.0]), timeout=0.2)
    assert str(stream.error).startswith("timeout: no end within 0.2 s")


def test_what_is_not_http_is_a_protocol_error():
    async def work():
        async def serve(reader, writer):
            writer.write(b"SSH-2.0-OpenSSH\r\n")

        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            client, stream = Client(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"), Stream(time.time)
            await client.complete(b"{}", stream)
            await client.close()
            return stream

    assert asyncio.run(work()).error.startswith("protocol: ")


def test_nobody_listening_is_a_connection_error():
    async def work():
        client, stream = Client("http://127.0.0.1:1"), Stream(time.time)
        await client.complete(b"{}", stream)
        await client.close()
        return stream

    assert asyncio.run(work()).error.startswith("connection: ")


def test_a_busy_server_is_asked_again_after_the_wait_that_it_names():
    def reply(server, path, body):
        busy = (429, {"error": {"message": "full"}}, "Retry-After: 1\r\n")
        return [busy] if len(server.bodies) == 1 else ANSWER

    begin = time.perf_counter()
    (stream,), client = ask(FakeServer(reply), retry=1)
    assert stream.error is None and client.retries == 1 and time.perf_counter() - begin > 0.9
    (stream,), client = ask(FakeServer(reply))
    assert stream.error == "http 429: full" and client.retries == 0


def test_retries_end():
    (stream,), client = ask(FakeServer(lambda *_: [(503, "draining", "Retry-After: 0\r\n")]), retry=3)
    assert stream.error == "http 503: draining" and client.retries == 3


@pytest.mark.parametrize("value", ["two\nlines", "bell\x07"])
def test_a_key_that_no_header_holds_is_refused(value, monkeypatch):
    monkeypatch.setenv(command.API_KEY, " schlüssel\n")
    assert command.key(command.API_KEY) == "schlüssel"
    monkeypatch.setenv(command.API_KEY, value)
    with pytest.raises(ConfigError, match="control character"):
        command.key(command.API_KEY)
    monkeypatch.delenv(command.API_KEY)
    assert command.key(command.API_KEY) is None


def test_a_key_is_sent_as_it_is_written():
    async def work():
        async with FakeServer() as server:
            client, stream = Client(server.url, key="schlüssel"), Stream(time.time)
            await client.complete(b"{}", stream)
            await client.close()
            return server.heads[0]

    assert "Authorization: Bearer schlüssel" in asyncio.run(work())


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8000", "ftp://host", "http://", "", "http://host:80OO", "http://host:99999", "http://[::1"]
)
def test_a_url_that_is_none_is_refused(url):
    with pytest.raises(ConfigError, match="give a URL like"):
        Client(url)


# ----------------------------------------------------------------------------- driving


def request_source():
    numbers = iter(range(10_000))
    return lambda suite: Request(f"gsm8k/0#{next(numbers)}", (), SamplingParams())


def driven(server, workload, ends, **options) -> LoadRecord:
    async def work():
        async with server:
            client = Client(server.url)
            record = await drive(
                client, Arrivals(parse(workload), 0), request_source(), lambda r: b"{}", ends, **options
            )
            await client.close()
            return record

    return asyncio.run(asyncio.wait_for(work(), 60))


def slow(seconds):
    return lambda *_: [chunk("a"), seconds, *ANSWER[1:]]


def test_a_closed_load_keeps_its_requests_in_flight():
    server = FakeServer(slow(0.01))
    record = driven(server, "closed:3", Ends(requests=10))
    assert server.most == 3 and record.run.concurrency == 3
    assert [r.finish_reason for r in record.run.requests] == ["stop"] * 10
    assert [r.id.rpartition("#")[2] for r in record.run.requests] == [str(i) for i in range(10)]
    assert record.chunks == 40 and record.client_cpu_seconds > 0.0


def test_open_arrivals_do_not_wait_for_answers():
    record = driven(FakeServer(slow(30.0)), "poisson:100", Ends(seconds=0.25))
    source, expected = Arrivals(parse("poisson:100"), 0), [0.0]
    while expected[-1] < 0.25:
        expected.append(source.next_time(expected[-1]))
        source.due(expected[-1], 10**9)
    assert [request.arrival for request in record.run.requests] == expected[1:-1] and len(expected) > 14
    assert record.run.concurrency == len(record.run.requests)
    assert all(request.cut for request in record.run.requests)


def test_arrivals_that_a_busy_client_missed_are_recorded():
    async def work():
        async with FakeServer() as server:
            client, source, pauses = Client(server.url), request_source(), iter([0.3])

            def late(suite):
                time.sleep(next(pauses, 0.0))
                return source(suite)

            record = await drive(client, Arrivals(parse("poisson:100"), 0), late, lambda r: b"{}", Ends(seconds=0.25))
            await client.close()
            return record

    record = asyncio.run(asyncio.wait_for(work(), 60))
    expected = driven(FakeServer(slow(30.0)), "poisson:100", Ends(seconds=0.25))
    assert [r.arrival for r in record.run.requests] == [r.arrival for r in expected.run.requests]
    assert record.run.requests[-1].cut


def test_what_is_in_flight_at_the_end_is_cut():
    record = driven(FakeServer(slow(30.0)), "closed:1", Ends(seconds=1.0))
    (only,) = record.run.requests
    assert (only.finish_reason, only.error, len(only.tokens)) == (CUT, None, 1)
    assert 1.0 <= record.run.seconds < 15.0
    assert record.texts == ("a",)


def test_tokens_of_a_cut_answer_are_as_many_as_its_characters_are_worth_elsewhere():
    """Whole answers have 6 tokens for 12 characters in 3 chunks; the one that is cut two chunks of 8 each."""
    answers = iter([ANSWER, ANSWER, [chunk("x" * 8), chunk("y" * 8), 30.0]])
    record = driven(FakeServer(lambda *_: next(answers)), "closed:1", Ends(seconds=1.0))
    assert [len(request.tokens) for request in record.run.requests] == [6, 6, 8] and record.run.requests[2].cut


def test_the_server_is_told_at_once_that_a_request_is_given_up():
    async def work():
        async with FakeServer(lambda *_: [chunk("a"), *[0.02] * 2000]) as server:
            client = Client(server.url)
            await drive(client, Arrivals(parse("closed:1"), 0), request_source(), lambda r: b"{}", Ends(seconds=1.0))
            await asyncio.wait_for(server.lost.wait(), 15.0)
            await client.close()

    asyncio.run(work())


def test_requests_beyond_the_cap_wait_at_the_client_and_their_time_counts():
    server = FakeServer(slow(0.05))
    record = driven(server, "closed:4", Ends(requests=4), max_concurrency=2)
    first = sorted(request.token_times[0] for request in record.run.requests)
    ends = sorted(request.finish for request in record.run.requests)
    assert server.most == 2 and len({request.arrival for request in record.run.requests}) == 1
    assert first[2] - record.run.requests[0].arrival > 0.045 and first[2] > ends[0] and first[3] > ends[1]


def test_a_server_that_fails_at_once_is_not_flooded():
    server = FakeServer(lambda *_: [(500, "no")])
    record = driven(server, "closed:2", Ends(requests=8))
    assert len(server.bodies) == 8 and record.run.seconds >= 3 * PAUSE
    assert errors(record.run) == {"http 500": 8}


@pytest.mark.parametrize("ends", [{}, {"seconds": 0.0}, {"requests": 0}, {"seconds": 1.0, "requests": -1}])
def test_a_block_without_an_end_is_refused(ends):
    with pytest.raises(ConfigError, match="a block needs an end"):
        Ends(**ends)


def test_failed_requests_are_no_output():
    def reply(server, path, body):
        return ANSWER if len(server.bodies) % 2 else [chunk("lost"), None]

    record = driven(FakeServer(reply), "closed:1", Ends(requests=4))
    assert [r.error is None for r in record.run.requests] == [True, False, True, False]
    assert record.served.output_tokens == 12 and errors(record.run) == {"connection": 2}
    assert len(record.texts_as_tokens.requests) == 2
    again = LoadRecord.from_json(json.loads(json.dumps(record.to_json())))
    assert again.to_json() == record.to_json() and again.texts == record.texts


def test_a_body_says_what_is_wanted():
    request = Request("gsm8k/0#1", (), SamplingParams(0.7, seed=5, max_new_tokens=9), speculate=False)
    body = json.loads(chat_body("tiny", PROMPTS[0].messages, request, {"ignore_eos": True, "seed": 8}))
    assert body["messages"] == [{"role": "user", "content": "prompt 0"}] and body["model"] == "tiny"
    assert (body["temperature"], body["max_tokens"], body["seed"], body["speculation"]) == (0.7, 9, 8, "off")
    assert body["stream"] and body["stream_options"] == {"include_usage": True} and body["ignore_eos"]
    assert "speculation" not in json.loads(chat_body("tiny", PROMPTS[0].messages, replace(request, speculate=True), {}))


# ----------------------------------------------------------------------------- whole load tests


@dataclass
class Running:
    """A server on a thread of its own, as `run_load` has its own loops."""

    server: FakeServer

    def __enter__(self):
        ready = threading.Event()

        async def serve():
            self.loop, self.over = asyncio.get_running_loop(), asyncio.Event()
            async with self.server:
                ready.set()
                await self.over.wait()

        self.thread = threading.Thread(target=asyncio.run, args=(serve(),), daemon=True)
        self.thread.start()
        assert ready.wait(30)
        return self.server

    def __exit__(self, *_):
        self.loop.call_soon_threadsafe(self.over.set)
        self.thread.join(30)


def by_controller(server, path, body):
    """`slow` takes longer, `wrong` says something else, `tuned` is what the server came with."""
    pause = {"slow": 0.15}.get(server.controller, 0.005)
    text = "something else" if server.controller == "wrong" else body["messages"][0]["content"]
    return [chunk(text[:3]), pause, chunk(text[3:], "stop"), usage(8), DONE]


def config(server, **changes):
    values = {"workloads": ("closed:2",), "controllers": ("slow", "fast"), "blocks": 2, "seconds": None, "requests": 6}
    return LoadConfig(urls=(server.url,), **{**values, "slo": SLO(1.0, 1.0), **changes})


def test_arms_are_interleaved_and_paired_and_the_controller_is_put_back(tmp_path):
    with Running(FakeServer(by_controller)) as server:
        settings, keys = config(server, requests=3), Keys("user-secret", "admin-secret")
        result, _ = run_load(settings, PROMPTS, tmp_path, keys, QUIET)
    assert [change["controller"] for change in server.controllers] == ["slow", "fast", "fast", "slow", "tuned"]
    per_block = WARMUP_REQUESTS + 3
    sent = [[body for _, body in server.bodies[i : i + per_block]] for i in range(0, 4 * per_block, per_block)]
    measured = [sorted(json.dumps(body) for body in block[WARMUP_REQUESTS:]) for block in sent]
    assert measured[0] == measured[1] != measured[2] == measured[3]
    assert len({body["seed"] for body in sent[0][WARMUP_REQUESTS:]}) == 3  # a seed a prompt
    slow_cell, fast = result["cells"]
    assert fast["ratios"]["tokens_per_second"]["estimate"] > 1.5 > fast["ratios"]["e2e"]["estimate"]
    assert fast["ratios"]["ttft"]["blocks"] == 2 and slow_cell["ratios"] == {}
    assert fast["outputs"]["requests"] == 6 and fast["outputs"]["differing"] == 0
    assert fast["requests"] == 6 and fast["output_tokens"] == 48 and fast["goodput"] > 0
    assert result["overall"]["fast"]["estimate"] == pytest.approx(fast["ratios"]["tokens_per_second"]["estimate"])
    assert json.loads((tmp_path / "result.json").read_text()) == json.loads(json.dumps(result))
    admin = [head for head in server.heads if "/admin/" in head]
    assert all("Bearer admin-secret" in head for head in admin)
    assert all("Bearer user-secret" in head for head in server.heads if "/admin/" not in head)
    assert not any("secret" in path.read_text() for path in tmp_path.iterdir())


def test_a_load_test_goes_on_where_it_stopped(tmp_path):
    with Running(FakeServer(by_controller)) as server:
        first, _ = run_load(config(server), PROMPTS, tmp_path, Keys(), QUIET)
        lines = (tmp_path / "blocks.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / "blocks.jsonl").write_text("".join(lines[:3]) + lines[3][:50])
        served = len(server.bodies)
        again, _ = run_load(config(server), PROMPTS, tmp_path, Keys(), QUIET)
        assert len(server.bodies) == served + WARMUP_REQUESTS + 6
        with pytest.raises(ConfigError, match="another max_tokens"):
            run_load(config(server, max_tokens=9), PROMPTS, tmp_path, Keys(), QUIET)
    assert [cell["outputs"] for cell in again["cells"]] == [cell["outputs"] for cell in first["cells"]]


def test_other_outputs_are_found(tmp_path):
    with Running(FakeServer(by_controller)) as server:
        result, _ = run_load(config(server, controllers=("fast", "wrong")), PROMPTS, tmp_path, Keys(), QUIET)
    assert result["cells"][1]["outputs"]["differing"] == 12
    assert "wrong, closed:2: 12 of 12 outputs differ" in tables.remarks(result)


def test_two_servers_are_compared_without_an_admin_interface(tmp_path):
    with Running(FakeServer(by_controller)) as one, Running(FakeServer(by_controller)) as two:
        settings = replace(config(one, controllers=()), urls=(one.url, two.url + "/v1/"))
        result, _ = run_load(settings, PROMPTS, tmp_path, Keys(), QUIET)
    assert [cell["arm"] for cell in result["cells"]] == [one.url, two.url + "/v1/"]
    assert len(one.bodies) == len(two.bodies) == 2 * (WARMUP_REQUESTS + 6) and not one.controllers


def test_errors_are_reported_by_kind(tmp_path):
    def reply(server, path, body):
        return ANSWER if len(server.bodies) % 3 else [(429, {"error": {"message": "full"}})]

    with Running(FakeServer(reply)) as server:
        result, _ = run_load(config(server, controllers=()), PROMPTS, tmp_path, Keys(), QUIET)
    (cell,) = result["cells"]
    assert cell["errors"] == {"http 429": 4} and cell["requests"] == 8
    assert any(line.endswith("4 x http 429") for line in tables.remarks(result))


def test_retries_are_counted_without_those_of_the_warm_up(tmp_path):
    def reply(server, path, body):
        return [(429, "full", "Retry-After: 0\r\n")] if len(server.bodies) in (1, 6, 9) else ANSWER

    with Running(FakeServer(reply)) as server:
        settings = config(server, controllers=(), blocks=1, retry=1)
        result, _ = run_load(settings, PROMPTS, tmp_path, Keys(), QUIET)
    (cell,) = result["cells"]
    assert (cell["retries"], cell["errors"], cell["requests"]) == (2, {}, 6) and len(server.bodies) == 13


def test_a_server_that_serves_nothing_is_an_error_with_its_words(tmp_path):
    words = "no token came in .*; 6 times: http 401: wrong key"
    fake = FakeServer(lambda *_: [(401, {"error": {"message": "wrong key"}})])
    with Running(fake) as server, pytest.raises(ConfigError, match=words):
        run_load(config(server, controllers=()), PROMPTS, tmp_path, Keys(), QUIET)


def test_an_unknown_controller_is_an_error_and_the_old_one_is_put_back(tmp_path):
    words = "refuses PUT /admin/controller with 400: no controller is called bad"
    with Running(FakeServer(by_controller)) as server, pytest.raises(ConfigError, match=words):
        run_load(config(server, controllers=("fast", "bad")), PROMPTS, tmp_path, Keys(), QUIET)
    assert server.controller == "tuned"


def test_a_controller_is_put_back_as_the_server_showed_it(tmp_path):
    with Running(FakeServer(by_controller)) as server:
        server.controller = "ppo:period=4,path=shipped"
        run_load(config(server, controllers=("ppo:checkpoint=best",), blocks=1), PROMPTS, tmp_path, Keys(), QUIET)
    assert server.controllers == [{"controller": "ppo:checkpoint=best"}, {"controller": "ppo:period=4,path=shipped"}]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"urls": ()}, "needs the URL"),
        ({"urls": ("http://a", "http://a")}, "two arms are the same"),
        ({"workloads": ()}, "workloads are none"),
        ({"seconds": -1.0}, "a block needs an end"),
        ({"retry": -1}, "retry is -1"),
        ({"timeout": 0.0}, "timeout 0.0"),
        ({"max_concurrency": 0}, "max_concurrency 0"),
        ({"blocks": 0}, "blocks of at least 1"),
    ],
)
def test_impossible_load_tests_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        LoadConfig(**{"urls": ("http://a",), "workloads": ("closed:1",), **changes})


# ----------------------------------------------------------------------------- the command


def test_the_command_shows_a_table_and_draws_plots(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("echo_rl.workloads.datasets.options.load_prompts", lambda *args, **more: PROMPTS)
    monkeypatch.setenv("COLUMNS", "200")
    with Running(FakeServer(by_controller)) as server:
        done = command.Load(
            url=(server.url,),
            workloads=("closed:2", "poisson:200"),
            arms=("slow", "fast"),
            blocks=1,
            num_requests=5,
            out=tmp_path,
        ).run()
    shown = capsys.readouterr().out
    assert done == 0 and "Against slow" in shown and "fast over slow, all workloads" in shown
    assert "us a chunk" in shown and "good/s" in shown
    for name in ("closed_2.png", "poisson_200.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_plots_hold_every_arm_and_only_finished_requests(tmp_path):
    with Running(FakeServer(by_controller)) as server:
        settings = config(server, blocks=1, seconds=1.0, requests=None)
        _, done = run_load(settings, PROMPTS, tmp_path, Keys(), QUIET)
    arms = {trial.arm: [record] for trial, record in done.items()}
    panels = plots.figure("closed:2", arms).axes
    assert [len(axes.lines) for axes in panels] == [2, 2, 2, 2, 2, 0]
    for axes, (_, (record,)) in zip([panels[0]] * 2, arms.items(), strict=True):
        line = next(line for line in axes.lines if line.get_label() == record.run.controller)
        assert len(line.get_xdata()) == 1 + sum(not request.cut for request in record.run.requests)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"extra": "{"}, "extra is no JSON"),
        ({"extra": "[1]"}, "give a JSON object"),
        ({"workloads": ("often:3",)}, "no workload is called 'often:3'"),
        ({"url": ("nowhere",)}, "give a URL like"),
        ({"url": ("http://127.0.0.1:1",)}, "is the server running"),
    ],
)
def test_bad_input_is_a_config_error(options, message, monkeypatch, tmp_path):
    monkeypatch.setattr("echo_rl.workloads.datasets.options.load_prompts", lambda *args, **more: PROMPTS)
    with pytest.raises(ConfigError, match=message):
        command.Load(**options, out=tmp_path / "out").run()
    assert not (tmp_path / "out").exists()


def test_the_garbage_collector_passes_over_what_there_was_only_meanwhile():
    async def frozen():
        return gc.get_freeze_count()

    before = gc.get_freeze_count()
    assert run_async(frozen()) > 10_000
    with pytest.raises(ZeroDivisionError):
        run_async(_failing())
    assert gc.get_freeze_count() <= before


async def _failing():
    raise ZeroDivisionError
