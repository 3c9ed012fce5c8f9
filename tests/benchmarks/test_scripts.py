"""The benchmark scripts on a tiny model: each runs, goes on where it stopped, and fills its tables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks import common, render
from benchmarks.engine import acceptance, losslessness, neighbours, plain_decoding, throughput
from benchmarks.learning import ceiling, env_rate, policies
from benchmarks.research import fidelity, rivals
from benchmarks.tables import TABLES
from echo_rl.config import EngineConfig
from echo_rl.contracts import Request, SamplingParams
from echo_rl.errors import ConfigError
from echo_rl.replay.recorder import RecordOptions, record
from echo_rl.runtime.engine import Engine
from echo_rl.workloads.datasets import SUITES, Prompt
from tests import tiny

PROMPTS = [Prompt("gsm8k", str(i), ({"role": "user", "content": "x" * (i + 1)},)) for i in range(5)]
QUIET = Console(quiet=True)
COMMITTED = render.HERE / "results"
PAGES = "".join(page.read_text() for page in render.PAGES)
LIVE = (throughput, acceptance, losslessness, plain_decoding, neighbours)
REPLAYED = (policies, ceiling, rivals, fidelity)
TESTED_ELSEWHERE = {"ab_live", "first_token", "roofline", "server", "server_identity", "server_overhead", "soak"}
"""Results of `echo-rl ab`, and of scripts that have tests of their own."""


@pytest.fixture
def scripts(monkeypatch, tmp_path):
    """The scripts write under a temporary folder, run a tiny model, and say nothing."""
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    engine_options = {
        "model": str(tiny.target_folder(tmp_path / "target")),
        "drafter": str(tiny.drafter_folder(tmp_path / "drafter")),
        "dtype": "float32",
        "kv_tokens": 8192,
    }
    for script in (*LIVE, *REPLAYED, env_rate):
        monkeypatch.setattr(script, "CONSOLE", QUIET)
        if hasattr(script, "load_prompts"):
            monkeypatch.setattr(script, "load_prompts", lambda *args, **more: PROMPTS[: more.get("limit")])
    flags = [f for name, value in engine_options.items() for f in (f"--{name.replace('_', '-')}", str(value))]

    def run(script, *more: str, result: str = "") -> dict:
        own = [] if script in (ceiling, env_rate, policies, rivals) else flags
        monkeypatch.setattr("sys.argv", ["script", "--quick", *more, *own])
        script.script()
        name = result or script.__name__.rpartition(".")[2]
        return json.loads((tmp_path / "quick" / f"{name}.json").read_text())

    return run


def test_losslessness_finds_no_difference_in_float32(scripts, tmp_path):
    found = scripts(losslessness, "--dtypes", "float32")["dtypes"]["float32"]
    assert found["diverged_requests"] == 0 and found["tokens"] > 1000
    assert found["logit_gap_everywhere"]["p10"] >= 0 and found["logit_gap_at_divergence"] is None
    assert {cell["controller"] for cell in found["cells"]} == set(losslessness.controllers())
    check_filled(losslessness, tmp_path / "quick", "| float32 |")


def test_losslessness_goes_on_in_the_same_environment_alone(scripts, monkeypatch):
    monkeypatch.setattr(losslessness, "controllers", lambda: ["none"])
    monkeypatch.setattr(losslessness.Comparison, "cells", lambda comparison: iter([]))
    monkeypatch.setattr(losslessness, "totals", lambda *_: {"diverged_requests": 0, "requests": 0, "tokens": 0})
    found = scripts(losslessness, "--dtypes", "float32")["dtypes"]["float32"]["environment"]
    assert found["dtype"] == "float32" and found["engine"] == "kv_tokens 8192"
    scripts(losslessness, "--dtypes", "float32")
    monkeypatch.setattr(losslessness, "environment_of", lambda config: {"cpu": "another"})
    with pytest.raises(ConfigError, match="other settings"):
        scripts(losslessness, "--dtypes", "float32")


def test_losslessness_reports_a_divergence_with_its_gap():
    reference = {"tokens": {"a": [1, 2, 3], "b": [4, 5]}, "gaps": {"a": [9.0, 0.25, 7.0], "b": [1.0, 1.0]}}
    cell = losslessness.compare({"a": [1, 9, 3], "b": [4, 5]}, reference, greedy=True)
    assert cell["divergences"] == [{"request": "a", "position": 1, "logit_gap": 0.25}]
    total = losslessness.totals([cell], [1.0, 2.0, 3.0])
    assert (total["divergence_rate"], total["tokens"]) == (0.5, 5)
    assert total["logit_gap_at_divergence"]["median"] == 0.25 and total["logit_gap_everywhere"]["median"] == 2.0


def tiny_trace(root: Path):
    """What the tiny model answers, with the forests of its random drafter."""
    options = RecordOptions(batch=8)
    engine = Engine.load(
        EngineConfig(
            model=str(root / "target"), drafter=str(root / "drafter"), dtype="float32", max_expanded=options.expanded
        )
    )
    params = SamplingParams(max_new_tokens=24)
    requests = [Request(f"gsm8k/{i}", tuple(range(66, 72 + i)), params) for i in range(12)]
    return record(engine, requests, frozenset(), options, root / "parts", "tiny")


def tables_of(name: str) -> str:
    """The marked tables of the pages that this result fills."""
    return "".join(match[0] for match in render.MARKED.finditer(PAGES) if TABLES[match[2]][0] == name)


@pytest.mark.parametrize(
    ("script", "shown"),
    [
        (throughput, "| 8 | `echo` |"),
        (acceptance, "| "),
        (plain_decoding, "| transformers |"),
        (neighbours, "| 8 | 1 at nice 0 | 1 thread |"),
    ],
    ids=lambda value: getattr(value, "__name__", "").rpartition(".")[2] or None,
)
def test_a_script_that_serves_live_fills_its_tables(script, shown, scripts, tmp_path):
    scripts(script)
    check_filled(script, tmp_path / "quick", shown)


def test_suites_that_are_held_out_are_measured_apart(scripts, monkeypatch, tmp_path):
    """Throughput on them is a result of its own and leaves the mix's alone; acceptance has a table of theirs."""
    asked = []
    monkeypatch.setattr(throughput, "load_prompts", lambda suite, seed: asked.append(suite) or PROMPTS)
    found = scripts(throughput, "--suite", "held_out", "--concurrency", "1", result="throughput_held_out")
    assert asked == [found["config"]["suite"]] == ["held_out"]
    assert [path.name for path in (tmp_path / "quick").iterdir()] == ["throughput_held_out.json"]
    apart = {entry["suite"]: entry["held_out"] for entry in scripts(acceptance)["entries"]}
    assert apart == {name: suite.held_out for name, suite in SUITES.items()}
    tables = render.render(tables_of("acceptance"), tmp_path / "quick").split("<!-- /results -->")
    assert [("| gsm8k |" in table, "| retrieval |" in table) for table in tables[:2]] == [(True, False), (False, True)]


@pytest.mark.parametrize("script", REPLAYED, ids=lambda s: s.__name__.rpartition(".")[2])
def test_a_script_that_replays_fills_its_tables(script, scripts, tmp_path):
    recording = tmp_path / "trace.safetensors"
    tiny_trace(tmp_path).save(recording)
    scripts(script, "--trace", str(recording))
    check_filled(script, tmp_path / "quick", "| ")


def test_the_environments_rates_fill_their_table(scripts, tmp_path):
    scripts(env_rate)
    check_filled(env_rate, tmp_path / "quick", "| `gymnasium.make_vec` | 256 |")


def check_filled(script, results: Path, shown: str) -> None:
    text = tables_of(script.__name__.rpartition(".")[2])
    filled = render.render(text, results)
    assert text.count("<!-- results:") and render.PENDING not in filled and shown in filled
    assert render.render(filled, results) == filled
    assert render.render(filled, results / "nowhere").count(render.PENDING) == text.count("<!-- results:")


def test_the_pages_show_every_table_and_each_has_a_script():
    assert {match[1] for match in render.MARKED.findall(PAGES)} == set(TABLES)
    tested = {script.__name__.rpartition(".")[2] for script in (*LIVE, *REPLAYED, env_rate)} | {"throughput_held_out"}
    assert tested | TESTED_ELSEWHERE == {result for result, _ in TABLES.values()}


def test_the_committed_pages_show_the_committed_results():
    for page in render.PAGES:
        assert render.render(page.read_text(), COMMITTED) == page.read_text()


def test_a_ledger_goes_on_and_refuses_other_settings(monkeypatch, tmp_path):
    monkeypatch.setattr(common, "CONSOLE", QUIET)
    calls = []
    ledger = common.Ledger(tmp_path, {"seed": 0})
    assert ledger.cell({"a": 1}, lambda: calls.append(1) or (1, 2)) == [1, 2]
    with open(tmp_path / "cells.jsonl", "a") as stream:
        stream.write('{"key": "cut sho')
    again = common.Ledger(tmp_path, {"seed": 0})
    assert again.cell({"a": 1}, lambda: calls.append(2)) == [1, 2]
    assert again.cell({"a": 2}, lambda: 5) == 5 and calls == [1]
    with pytest.raises(ConfigError, match="other settings"):
        common.Ledger(tmp_path, {"seed": 1})
    for bad, message in (("nonsense", "line 4 of"), ("[1]", "no finished cell"), ("{}", "no finished cell")):
        whole = (tmp_path / "cells.jsonl").read_text()
        (tmp_path / "cells.jsonl").write_text(f"{whole}{bad}\n")
        with pytest.raises(ConfigError, match=message):
            common.Ledger(tmp_path, {"seed": 0})
        (tmp_path / "cells.jsonl").write_text(whole)
