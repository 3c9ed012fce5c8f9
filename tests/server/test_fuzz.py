"""The OpenAPI document against a real tiny engine: whatever is sent, no 500, and answers are as documented."""

from __future__ import annotations

import json

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from echo_rl.runtime.tokenizer import Tokenizer
from tests import tiny
from tests.server.engine_clients import tiny_client
from tests.server.front_world import FakeEngineClient, make_app, serving

EXAMPLES = 60
"""Of each operation and of each kind, valid and broken; the whole file stays below half a minute."""
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
SCHEMA = schemathesis.openapi.from_dict(make_app(FakeEngineClient()).openapi())
OPERATIONS = {operation.ok().label: operation.ok() for operation in SCHEMA.get_all_operations()}
SLOW = settings(
    max_examples=EXAMPLES,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    tokenizer = Tokenizer.load(tiny.target_folder(root / "target"))
    bounds = {"max_queue": 8, "max_tokens": 4, "max_body_bytes": 20_000}
    with serving(lambda: tiny_client(root, controller="none"), tokenizer, **bounds) as url:
        yield url


def test_the_document_holds_every_route():
    written = {"POST /v1/completions", "POST /v1/chat/completions", "PUT /admin/controller", "POST /admin/ab"}
    assert written < set(OPERATIONS)
    assert "422" not in str(SCHEMA.raw_schema["paths"])  # errors are 400 here, in OpenAI's format


BREAKABLE = [label for label in OPERATIONS if label.startswith(("POST", "PUT")) or "{" in label]
VALID = [(label, GenerationMode.POSITIVE) for label in OPERATIONS]
BROKEN = [(label, GenerationMode.NEGATIVE) for label in BREAKABLE]


@pytest.mark.parametrize(("label", "mode"), VALID + BROKEN, ids=str)
def test_no_input_is_a_500(url, label, mode):
    statuses = set()

    @SLOW
    @given(case=OPERATIONS[label].as_strategy(generation_mode=mode))
    def check(case):
        if mode is GenerationMode.POSITIVE and isinstance(case.body, dict):
            case.body.pop("model", None)  # no model has the name that is drawn
        reply = case.call(base_url=url)
        statuses.add(reply.status_code)
        case.validate_response(reply, checks=CHECKS)

    check()
    assert httpx.get(f"{url}/health").status_code == 200  # the engine has survived it all
    if mode is GenerationMode.POSITIVE and "/completions" in label:
        assert 200 in statuses, "no example ever came through"


KIND = {"Content-Type": "application/json"}
TEXT = st.text(st.characters(exclude_categories=()), max_size=20)  # lone surrogates, too
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/admin/ab"])
def test_no_body_is_a_500(url, path):
    """Bodies that no document describes: any JSON, any bytes, any of our fields with any value."""
    fields = st.sampled_from(["prompt", "messages", "n", "stop", "tools", "seed", "stream", "control", "logprobs"])
    bodies = JSON | st.dictionaries(fields, JSON, max_size=5)

    with httpx.Client(base_url=url) as client:

        @SLOW
        @given(body=bodies, raw=st.binary(max_size=40))
        def check(body, raw):
            for reply in (
                client.post(path, content=json.dumps(body), headers=KIND),
                client.post(path, content=raw, headers=KIND),
            ):
                assert reply.status_code < 500, reply.text
                assert reply.status_code == 200 or set(reply.json()["error"]) == {"message", "type", "param", "code"}

        check()
