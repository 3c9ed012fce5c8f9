"""The judgements of the server's benchmark, on made-up measurements."""

from __future__ import annotations

import inspect
import os
import time

import pytest

from benchmarks import common
from benchmarks.server import identity as server_identity
from benchmarks.server import overhead as server_overhead
from benchmarks.server.identity import compare
from benchmarks.server.overhead import overhead_of
from benchmarks.server.process import Server, children, cpu_seconds, flags, resident_mb, total
from benchmarks.server.sweep import as_in_a_bench
from echo_rl.config import EngineConfig
from echo_rl.errors import ConfigError, EchoError

EXPECTED = {"a": ["one two", 2, "stop"], "b": ["three", 1, "length"]}


def test_identical_answers_are_counted_and_nothing_else():
    answers = [["a", ["one two", 2, "stop"], None], ["b", ["three", 1, "length"], None]] * 2
    found = compare(answers, EXPECTED)
    assert (found["requests"], found["distinct"], found["lost"], found["differing"]) == (4, 2, 0, 0)
    assert found["tokens"] == 6 and found["finish_reasons"] == {"stop": 2, "length": 2}


@pytest.mark.parametrize("answer", [["one too", 2, "stop"], ["one two", 3, "stop"], ["one two", 2, "length"]])
def test_another_text_count_or_end_differs(answer):
    assert compare([["a", answer, None]], EXPECTED)["differing"] == 1


def test_a_request_that_failed_is_lost_and_not_compared():
    found = compare([["a", ["one", 1, "error"], "connection: gone"]], EXPECTED)
    assert (found["lost"], found["differing"], found["errors"]) == (1, 0, ["connection: gone"])


def test_overhead_is_the_ratio_of_throughputs_and_says_where_it_comes_from():
    engine = [{"tokens": 100, "seconds": 1.0, "steps": 10, "busy": 0.9}] * 3
    http = [
        {"tokens": 100, "seconds": 1.25, "steps": 10, "busy": 1.0, "front_cpu": 0.05, "client_cpu": 0.1, "failed": 0}
    ] * 3
    found = overhead_of("none", engine, http)
    assert found["http_over_engine"]["estimate"] == pytest.approx(0.8)
    assert found["step_seconds"] == {"engine": pytest.approx(0.09), "http": pytest.approx(0.1)}
    assert (found["engine_busy"], found["client_cpu_share"]) == (pytest.approx(0.8), pytest.approx(0.08))
    assert found["front_cpu_share"] == pytest.approx(0.04) and found["steps"] == {"engine": 30, "http": 30}


@pytest.mark.parametrize("part", [server_identity.identity, server_overhead.overhead])
def test_measurements_of_another_environment_are_not_gone_on_with(part, monkeypatch, tmp_path):
    def stops(*_):
        raise KeyboardInterrupt

    for module in (server_identity, server_overhead):
        monkeypatch.setattr(module, "load_prompts", lambda *_, **__: [])
    monkeypatch.setattr(server_identity, "by_itself", stops)
    monkeypatch.setattr(server_overhead.Sides, "measured", stops)
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    setting = {"identity": server_identity.Identity, "overhead": server_overhead.Overhead}[part.__name__]()
    for cpu, outcome in (("this", KeyboardInterrupt), ("this", KeyboardInterrupt), ("other", ConfigError)):
        monkeypatch.setattr(inspect.getmodule(part), "environment_of", lambda config, cpu=cpu: {"cpu": cpu})
        with pytest.raises(outcome):
            part(setting, EngineConfig(), common.Place("part", False))


def test_a_cell_of_a_load_test_is_one_of_a_bench():
    rates, ratios = {"tokens_per_second": {"estimate": 5.0}}, {"tokens_per_second": {"estimate": 1.1}}
    found = as_in_a_bench({"workload": "closed:16", "rates": rates, "ratios": ratios})
    assert found == {"concurrency": 16, "throughput": {"estimate": 5.0}, "speedup": {"estimate": 1.1}}
    assert as_in_a_bench({"workload": "closed:1", "rates": rates, "ratios": {}})["speedup"] is None


def test_only_settings_that_differ_become_options():
    assert flags(EngineConfig()) == []
    assert flags(EngineConfig(kv_tokens=4096, drafter=None)) == ["--drafter", "None", "--kv-tokens", "4096"]


def test_series_are_summed_by_name_and_labels():
    text = '# HELP x_total X.\nx_total{a="1",b="2"} 3.0\nx_total{a="2",b="2"} 4.0\nx_total_more{a="1"} 9.0\nx 1.5\n'
    assert total(text, "x_total") == 7 and total(text, "x_total", a="1") == 3 and total(text, "x") == 1.5


def test_this_process_is_a_child_of_its_parent_and_uses_memory():
    assert os.getpid() in children(os.getppid())
    assert resident_mb(os.getpid()) > 20 and resident_mb(2**30) is None
    assert 0 < cpu_seconds(os.getpid()) == pytest.approx(time.process_time(), abs=0.1) and cpu_seconds(2**30) == 0


def test_a_server_that_does_not_start_shows_the_end_of_its_log(tmp_path):
    with (
        Server(EngineConfig(), tmp_path / "log", ["--controller", "nonsense"]) as server,
        pytest.raises(EchoError) as e,
    ):
        server.ready()
    assert "nonsense" in str(e.value) and server.process.poll() == 2
