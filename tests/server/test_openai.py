"""/v1 as OpenAI's own client and as raw bytes see it."""

from __future__ import annotations

import asyncio
import json

import httpx
import openai
import pytest

from echo_rl.server.api import completion_response
from echo_rl.server.api.completion_response import Choice, CompletionResponse
from echo_rl.server.api.openai_format import TextFormat
from echo_rl.server.api.request_stats import KEY, RequestStats
from echo_rl.server.api.schemas import CompletionRequest
from tests.conftest import FakeTokenizer
from tests.server.front_world import FakeEngineClient, client_of, listening, make_app

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def engine_client():
    return FakeEngineClient()


@pytest.fixture(scope="module")
def url(engine_client):
    with listening(make_app(engine_client)) as url:
        yield url


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def events(url: str, path: str, **body) -> list:
    """The events of a stream: objects, then the ``[DONE]``."""
    reply = httpx.post(url + path, json={"stream": True, **body})
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"].startswith("text/event-stream")
    texts = [part.removeprefix("data: ") for part in reply.text.strip().split("\n\n")]
    return [text if text == "[DONE]" else json.loads(text) for text in texts]


def test_models(client):
    (model,) = client.models.list().data
    assert model.id == "fake" and model.max_model_len == 64
    assert client.models.retrieve("fake").id == "fake"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


def test_a_chat(client, engine_client):
    reply = client.chat.completions.create(model="fake", messages=HELLO, max_tokens=5, temperature=0.0, seed=3)
    (choice,) = reply.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "abcde", "length")
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.total_tokens) == (5, 5, 10)
    request = engine_client.requests[reply.id.removeprefix("chatcmpl-") + "-0"]
    assert (request.params.temperature, request.params.seed, request.speculate) == (0.0, 3, True)


def test_a_chat_may_use_the_whole_context_and_a_completion_16_tokens(client):
    chat = client.chat.completions.create(model="fake", messages=HELLO)
    assert chat.usage.completion_tokens == 64 - 5
    assert client.completions.create(model="fake", prompt="hello").usage.completion_tokens == 16


def test_max_completion_tokens_goes_before_max_tokens(client):
    reply = client.chat.completions.create(model="fake", messages=HELLO, max_tokens=9, max_completion_tokens=2)
    assert reply.choices[0].message.content == "ab"


def test_text_parts_are_joined(client, engine_client):
    parts = [{"type": "text", "text": "he"}, {"type": "text", "text": "y"}]
    reply = client.chat.completions.create(model="fake", messages=[{"role": "user", "content": parts}], max_tokens=1)
    assert engine_client.requests[reply.id.removeprefix("chatcmpl-") + "-0"].prompt == tuple(map(ord, "hey"))


def test_a_chat_stream_has_openais_order(url):
    got = events(url, "/v1/chat/completions", messages=HELLO, max_tokens=2, stream_options={"include_usage": True})
    assert got[-1] == "[DONE]"
    chunks, usage = got[:-2], got[-2]
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": "", "refusal": None}, {"content": "a"}, {"content": "b"}, {},
    ]  # fmt: skip
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "length"]
    assert all(chunk["usage"] is None and chunk["object"] == "chat.completion.chunk" for chunk in chunks)
    assert usage["choices"] == [] and usage["usage"] == {
        "prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7,
    }  # fmt: skip
    assert len({chunk["id"] for chunk in got[:-1]}) == 1


def test_a_completion_stream_without_usage(url):
    got = events(url, "/v1/completions", prompt="hi", max_tokens=2)
    assert [chunk["choices"][0]["text"] for chunk in got[:-1]] == ["a", "b", ""]
    assert all("usage" not in chunk for chunk in got[:-1])


def test_openais_client_reads_the_stream(client):
    stream = client.chat.completions.create(model="fake", messages=HELLO, max_tokens=4, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "abcd"


def test_quotes_and_control_characters_survive_a_stream():
    class Nasty(FakeEngineClient):
        def _output(self, request, i, reason):
            output = super()._output(request, i, reason)
            return type(output)(output.id, output.tokens, '"\\\n\u2028é😀', reason)

    with client_of(make_app(Nasty())) as client:
        reply = client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1, "stream": True})
    first = json.loads(reply.text.split("\n\n")[0].removeprefix("data: "))
    assert first["choices"][0]["text"] == '"\\\n\u2028é😀'


def test_several_prompts_and_copies_keep_their_places(client, engine_client):
    reply = client.completions.create(model="fake", prompt=["x", "yy"], n=2, max_tokens=3, seed=10)
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    assert reply.usage.prompt_tokens == 3 and reply.usage.completion_tokens == 12
    sent = [engine_client.requests[reply.id.removeprefix("cmpl-") + f"-{i}"] for i in range(4)]
    assert [(len(r.prompt), r.params.seed) for r in sent] == [(1, 10), (1, 11), (2, 10), (2, 11)]


def test_streamed_copies_are_whole_each(url):
    got = events(url, "/v1/chat/completions", messages=HELLO, max_tokens=3, n=3)
    texts = ["", "", ""]
    for chunk in got[:-1]:
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == ["abc"] * 3
    assert sum(chunk["choices"][0]["finish_reason"] == "length" for chunk in got[:-1]) == 3


@pytest.mark.parametrize(("prompt", "ids"), [([7, 8], [(7, 8)]), ([[7], [8, 9]], [(7,), (8, 9)])])
def test_prompts_as_token_ids(client, engine_client, prompt, ids):
    reply = client.completions.create(model="fake", prompt=prompt, max_tokens=1)
    sent = [engine_client.requests[reply.id.removeprefix("cmpl-") + f"-{i}"].prompt for i in range(len(ids))]
    assert sent == ids


def test_without_a_seed_every_request_has_another(client, engine_client):
    seeds = set()
    for _ in range(3):
        reply = client.completions.create(model="fake", prompt="x", max_tokens=1)
        request = engine_client.requests[reply.id.removeprefix("cmpl-") + "-0"]
        assert request.params.temperature == 1.0
        seeds.add(request.params.seed)
    assert len(seeds) == 3


def test_extensions_reach_the_engine(client, engine_client):
    more = {"speculation": "off", "top_k": 5, "ignore_eos": True}
    reply = client.completions.create(model="fake", prompt="x", max_tokens=1, stop=["\n", "z"], extra_body=more)
    request = engine_client.requests[reply.id.removeprefix("cmpl-") + "-0"]
    assert not request.speculate
    assert (request.params.top_k, request.params.ignore_eos, request.params.stop) == (5, True, ("\n", "z"))


def test_logprobs_of_a_completion(client):
    logprobs = client.completions.create(model="fake", prompt="x", max_tokens=2, logprobs=2).choices[0].logprobs
    assert logprobs.tokens == ["a", "b"] and logprobs.text_offset == [0, 1]
    assert logprobs.token_logprobs == [-0.5, -9999.0]  # minus infinity, as OpenAI writes it
    assert logprobs.top_logprobs[0] == {"a": -0.5, "b": -1.5}


def test_logprobs_of_a_chat(client):
    reply = client.chat.completions.create(model="fake", messages=HELLO, max_tokens=1, logprobs=True, top_logprobs=2)
    (token,) = reply.choices[0].logprobs.content
    assert (token.token, token.logprob, token.bytes) == ("a", -0.5, [97])
    assert [(top.token, top.logprob) for top in token.top_logprobs] == [("a", -0.5), ("b", -1.5)]


def test_logprobs_in_a_stream_go_on_with_the_offset(url):
    got = events(url, "/v1/completions", prompt="x", max_tokens=3, logprobs=0)
    offsets = [chunk["choices"][0]["logprobs"]["text_offset"] for chunk in got[:-2]]
    assert offsets == [[0], [1], [2]]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("response_format", {"type": "json_object"}),
        ("audio", {"voice": "x"}),
        ("logit_bias", {"5": 1}),
        ("presence_penalty", 0.5),
        ("frequency_penalty", -1),
        ("repetition_penalty", 1.2),
        ("min_p", 0.1),
        ("stop_token_ids", [2]),
        ("guided_json", {"type": "object"}),
        ("chat_template_kwargs", {"enable_thinking": False}),
    ],
)
def test_what_is_not_supported_is_said(url, field, value):
    error = refusal(url, "/v1/chat/completions", messages=HELLO, **{field: value})
    assert error["param"] == field and "does not support" in error["message"]


@pytest.mark.parametrize(("field", "value"), [("echo", True), ("suffix", "x"), ("best_of", 2)])
def test_what_completions_do_not_support(url, field, value):
    assert "support" in refusal(url, "/v1/completions", prompt="x", **{field: value})["message"]


def test_values_that_mean_nothing_are_fine(client):
    harmless = {
        "tools": [], "tool_choice": "auto", "logit_bias": {}, "presence_penalty": 0, "frequency_penalty": 0.0,
        "response_format": {"type": "text"}, "user": "me", "unheard_of": 1, "repetition_penalty": 1.0, "min_p": 0,
    }  # fmt: skip
    reply = client.chat.completions.create(model="fake", messages=HELLO, max_tokens=1, extra_body=harmless)
    assert reply.choices[0].message.content == "a"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": "x", "temperature": -1}, "temperature"),
        ({"prompt": "x", "top_p": 0}, "top_p"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "x", "max_tokens": 64}, "max_tokens"),
        ({"prompt": "x" * 64}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [2_000_000]}, "prompt"),
        ({"prompt": "x", "n": 0}, "n"),
        ({"prompt": "x", "seed": 2**63}, "seed"),
        ({"prompt": "x", "stop": [""]}, None),
        ({"prompt": "x", "logprobs": 21}, "logprobs"),
        ({"prompt": "x", "speculation": "maybe"}, "speculation"),
        ({"prompt": "x", "stream_options": {"include_usage": True}}, None),
        ({}, "prompt"),
    ],
)
def test_bad_values_are_400_in_openais_format(url, body, param):
    error = refusal(url, "/v1/completions", **body)
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert param is None or error["param"] == param


def refusal(url: str, path: str, **body) -> dict:
    reply = httpx.post(url + path, json=body)
    assert reply.status_code == 400, reply.text
    return reply.json()["error"]


@pytest.mark.parametrize("body", [b"{", b"\xff", b"[" * 100_000, b'{"prompt": ' + b"9" * 5000 + b"}", b""])
def test_bodies_that_are_no_json(url, body):
    reply = httpx.post(f"{url}/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert reply.status_code == 400 and "error" in reply.json()


def test_unknown_models_paths_and_methods(url):
    wrong = httpx.post(f"{url}/v1/completions", json={"model": "gpt-4", "prompt": "x"})
    assert wrong.status_code == 404 and wrong.json()["error"]["code"] == "model_not_found"
    assert httpx.get(f"{url}/v2").status_code == 404
    nothing = httpx.get(f"{url}/v1/completions")
    assert nothing.status_code == 405 and "error" in nothing.json()


def test_what_the_engine_refuses_is_400(url):
    assert "holds '!'" in refusal(url, "/v1/completions", prompt="hey!")["message"]
    assert "holds '!'" in refusal(url, "/v1/completions", prompt="hey!", stream=True)["message"]
    assert "holds '!'" in refusal(url, "/v1/completions", prompt=["fine", "hey!"])["message"]


def test_an_engine_error_before_the_first_token_is_500():
    engine_client = FakeEngineClient()
    engine_client.fail_at = 0
    with client_of(make_app(engine_client)) as client:
        for stream in (False, True):
            reply = client.post("/v1/completions", json={"prompt": "x", "stream": stream})
            assert reply.status_code == 500 and reply.json()["error"]["message"] == "the weights are cursed"


def test_an_engine_error_in_a_stream_is_an_event_that_openais_client_raises():
    engine_client = FakeEngineClient()
    engine_client.fail_at = 2
    with (
        listening(make_app(engine_client)) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client,
    ):
        assert events(url, "/v1/completions", prompt="x")[-2]["error"]["code"] == "engine_error"
        stream = client.completions.create(model="fake", prompt="x", stream=True)
        with pytest.raises(openai.APIError, match="cursed"):
            list(stream)


def test_errors_of_ours_do_not_show_their_text(caplog):
    class Broken(FakeEngineClient):
        def submit(self, *requests):
            raise KeyError("/secret/path")

    with client_of(make_app(Broken())) as client:
        reply = client.post("/v1/completions", json={"prompt": "x"})
    assert reply.status_code == 500 and "secret" not in reply.text
    assert "secret" in caplog.text


def test_a_loading_engine_is_503():
    engine_client = FakeEngineClient()
    engine_client.ready = False
    with client_of(make_app(engine_client)) as client:
        reply = client.post("/v1/completions", json={"prompt": "x"})
        assert reply.status_code == 503 and int(reply.headers["Retry-After"]) > 0
        assert client.get("/v1/models").json()["data"][0]["max_model_len"] is None


def test_an_engine_that_is_dead_for_good_is_not_said_to_load():
    engine_client = FakeEngineClient()
    engine_client.ready, engine_client.alive, engine_client.dead = False, False, True
    with client_of(make_app(engine_client)) as client:
        for reply in (client.post("/v1/completions", json={"prompt": "x"}), client.get("/health/ready")):
            assert reply.status_code == 503 and reply.json()["error"]["code"] == "dead"
            assert "Retry-After" not in reply.headers


def test_a_text_to_continue_begins_as_the_model_knows_texts_to_begin(monkeypatch):
    """A conversation's template writes its special tokens itself."""
    seen = []

    def encode(self, text, special=False):
        seen.append((text, special))
        return tuple(map(ord, text))

    monkeypatch.setattr(FakeTokenizer, "encode", encode)
    with client_of(make_app(FakeEngineClient())) as client:
        client.post("/v1/completions", json={"prompt": "abc"})
        client.post("/v1/chat/completions", json={"messages": HELLO, "max_tokens": 1})
    assert seen == [("abc", True), (HELLO[0]["content"], False)]


class Pieces:
    """A vocabulary of bytes and a special token, whose decoder drops the space that begins a text."""

    SPELLED = (b" Hello", b" w\xc3", b"\xb6rld", b" ", b"\xf0\x9f", b"\x99\x82")

    def token_bytes(self, token):
        return b"<end>" if token == 9 else self.SPELLED[token]

    def decode(self, ids):
        text = b"".join(self.SPELLED[i] for i in ids if i != 9).decode(errors="replace")
        return text.removeprefix(" ")


def test_offsets_are_places_in_the_text_whatever_a_token_decodes_to_by_itself():
    choice, found = Choice(0), []
    for token in (0, 1, 2, 3, 4, 9, 5, 0):
        found.append(choice.offset)
        choice.advance(Pieces(), token)
    text = "Hello wörld 🙂 Hello"
    assert found == [0, 5, 7, 11, 12, 12, 12, 13] and choice.offset == len(text)


def test_a_reader_that_stopped_is_not_waited_for_at_the_end(monkeypatch):
    async def main():
        sent = []

        async def send(message):
            sent.append(message["type"])
            if len(sent) > 1:
                await asyncio.sleep(60.0)  # the connection takes no more

        async def receive():
            await asyncio.sleep(60.0)

        front = make_app(FakeEngineClient(), request_timeout=0.2).state.front
        body = CompletionRequest(prompt="x", max_tokens=4, stream=True)
        await CompletionResponse(front, body, TextFormat())(
            {"type": "http", KEY: RequestStats("x", 0.0)}, receive, send
        )
        assert sent == ["http.response.start", "http.response.body", "http.response.body"]

    monkeypatch.setattr(completion_response, "LAST_BYTES_SECONDS", 0.2)
    asyncio.run(asyncio.wait_for(main(), 30.0))
