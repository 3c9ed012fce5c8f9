"""A trace of arrivals sent to a server: texts of the lengths that it counts, answers of exactly those asked for."""

from __future__ import annotations

import json

import pytest

from echo_rl.errors import ConfigError
from echo_rl.experiments.load import run_load
from echo_rl.experiments.targets.http.config import LoadConfig
from echo_rl.experiments.targets.http.shaped import Counting
from echo_rl.experiments.targets.http.target import Keys
from echo_rl.workloads.datasets import Prompt
from echo_rl.workloads.datasets.prompt import user
from tests.experiments.test_load import DONE, QUIET, FakeServer, Running, chunk

PROMPTS = [Prompt("mine", str(n), user("word " * (n + 2))) for n in range(5)]
FIXED = 20
"""Tokens that the server's template adds; every five characters are one more."""


def counts(server, path, body):
    characters = sum(len(message["content"]) for message in body["messages"])
    told = {"prompt_tokens": FIXED + characters // 5, "completion_tokens": body["max_tokens"]}
    usage = b"data: " + json.dumps({"choices": [], "usage": told}).encode() + b"\n\n"
    return [chunk("x"), chunk("y", "length"), usage, DONE]


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "azure.csv"
    rows = [f"2023-11-16 18:17:03.{n:02}0,{60 + 10 * n},{3 + n}" for n in range(5)]
    path.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]) + "\n")
    return path


def test_prompts_and_answers_have_the_traces_lengths_and_are_the_same_for_every_arm(trace, tmp_path):
    with Running(FakeServer(counts)) as server:
        config = LoadConfig(
            (server.url,), (f"trace:{trace}",), controllers=("slow", "fast"), blocks=1, seconds=None, requests=5
        )
        result, done = run_load(config, PROMPTS, tmp_path / "out", Keys(), QUIET)
        sent = [(arm, body) for arm, body in server.bodies if body.get("ignore_eos")]
    for record in done.values():
        assert sorted(one.prompt_tokens for one in record.run.requests) == pytest.approx([60, 70, 80, 90, 100], abs=1)
        assert sorted(len(one.tokens) for one in record.run.requests) == [3, 4, 5, 6, 7]
        arrivals = sorted(one.arrival for one in record.run.requests)
        assert arrivals[0] >= 0 and arrivals[-1] < 0.1
    slow, fast = ([body for at, body in sent if at == arm] for arm in ("slow", "fast"))
    assert sorted(map(json.dumps, slow)) == sorted(map(json.dumps, fast)) and len(slow) == 5
    assert result["environment"][f"arrivals trace:{trace}"].startswith("sha256 ")
    assert {cell["workload"] for cell in result["cells"]} == {f"trace:{trace}"}


def test_a_server_that_counts_nothing_cannot_be_sent_lengths(trace, tmp_path):
    with Running(FakeServer(lambda *_: [chunk("x", "stop"), DONE])) as server:
        config = LoadConfig((server.url,), (f"trace:{trace}",), blocks=1, seconds=None, requests=2)
        with pytest.raises(ConfigError, match="doesn't say how many tokens a prompt has"):
            run_load(config, PROMPTS, tmp_path / "out", Keys(), QUIET)


def test_counting_is_the_line_through_what_was_counted():
    counting = Counting.of([10, 20, 40], [22, 24, 28])
    assert counting.fixed == pytest.approx(20) and counting.characters(30) == 50
    assert counting.characters(3) == 1
    assert Counting.of([10, 10], [5, 5]).characters(7) == 14  # of one length: through the origin
    assert Counting.of([10, 20], [9, 3]).characters(12) == 30  # longer texts of fewer tokens: the same
