"""Prompts of your own on the command line: served by each command, what is left out is said, broken files refused."""

from __future__ import annotations

import json

import pytest

from echo_rl.cli import main
from echo_rl.replay.trace import Trace
from tests import tiny

SHAREGPT = [
    {
        "id": f"talk_{number}",
        "conversations": [
            {"from": "human", "value": f"why {number}?"},
            {"from": "gpt", "value": "because"},
            {"from": "human", "value": "and then?"},
            {"from": "gpt", "value": "nothing"},
        ],
    }
    for number in range(6)
]
SIZES = ["--concurrency", "2", "--blocks", "1", "--requests", "4", "--max-new-tokens", "6"]


@pytest.fixture
def model(tmp_path):
    target, drafter = tiny.target_folder(tmp_path / "target"), tiny.drafter_folder(tmp_path / "drafter")
    return ["--model", str(target), "--drafter", str(drafter), "--dtype", "float32", "--kv-tokens", "8192"]


@pytest.fixture
def sharegpt(tmp_path):
    path = tmp_path / "ShareGPT split.json"
    path.write_text(json.dumps(SHAREGPT))
    return path


def test_bench_serves_every_turn_of_a_sharegpt_file_and_resumes_with_the_same_file_alone(
    sharegpt, model, tmp_path, capsys
):
    arguments = ["bench", "--prompts", str(sharegpt), "--arms", "none", "chain", "--out", str(tmp_path / "out"), *SIZES]
    assert main([*arguments, *model]) == 0
    assert "Prompts: ShareGPT_split. Against none" in " ".join(capsys.readouterr().out.split())
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["config"]["suite"] == "ShareGPT_split"
    assert result["environment"]["prompts ShareGPT_split"].startswith("sha256 ")
    served = [
        request["id"].split("#")[0]
        for line in (tmp_path / "out" / "blocks.jsonl").read_text().splitlines()
        for request in json.loads(line)["record"]["requests"]
    ]
    assert {name.split("/")[0] for name in served} == {"ShareGPT_split"}
    assert {name.rpartition(".")[2] for name in served} == {"1", "2"}  # first turns, and second ones behind them
    assert main([*arguments, "--turns", "first", *model]) == 2
    assert "another turns" in capsys.readouterr().err
    sharegpt.write_text(json.dumps(SHAREGPT[:3]))
    assert main([*arguments, *model]) == 2
    assert "another prompts ShareGPT_split; choose another folder" in " ".join(capsys.readouterr().err.split())


def test_a_length_in_the_file_stands_instead_of_the_commands(model, tmp_path):
    path = tmp_path / "short.jsonl"
    path.write_text('{"prompt": "hello", "output_tokens": 3}\n')
    assert (
        main(["bench", "--prompts", str(path), "--arms", "none", "--out", str(tmp_path / "out"), *SIZES, *model]) == 0
    )
    lines = (tmp_path / "out" / "blocks.jsonl").read_text().splitlines()
    assert {len(request["tokens"]) for line in lines for request in json.loads(line)["record"]["requests"]} == {3}


def test_broken_files_are_one_typed_line_before_the_model_is_loaded(tmp_path, capsys):
    path = tmp_path / "broken.jsonl"
    path.write_text('{"prompt": "fine"}\n{"prompt": 5}\n')
    for command in (["bench"], ["record"], ["calibrate", "gates"], ["load"], ["ab"], ["tune"], ["train"], ["eval"]):
        assert main([*command, "--prompts", str(path), "--out", str(tmp_path / "out"), "--model", "nowhere"]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith(f"error: {path}: 1 of 2 rows cannot be read: line 2 has a number as prompt"), command


def test_prompts_that_do_not_fit_are_counted(model, tmp_path, capsys):
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps({"prompt": "x" * size}) + "\n" for size in (5, 9, 500, 5)))
    arguments = ["bench", "--prompts", str(path), "--arms", "none", "--out", str(tmp_path / "out"), *SIZES, *model]
    assert main([*arguments, "--max-context", "64"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "prompts left out: 1 (longer, with their answers, than the context of 64 tokens)" in said
    assert main([*arguments, "--max-context", "8"]) == 2
    assert "no prompt can be served; prompts left out: 4" in " ".join(capsys.readouterr().err.split())


def test_commands_on_recordings_record_the_files_prompts_first(sharegpt, model, tmp_path, capsys):
    asked = ["--prompts", str(sharegpt), "--limit", "6", *model]
    out = tmp_path / "tuned"
    sizes = ["--controllers", "chain", "--concurrency", "1", "--blocks", "1", "--requests", "2", "--cap", "1"]
    assert main(["tune", *asked, "--out", str(out), *sizes]) == 0
    trace = Trace.load(out / "recorded" / "trace.safetensors")
    assert trace.suites == ("ShareGPT_split",) and len(trace.responses) == 6
    assert json.loads((out / "tuned.json").read_text())["chain"]["score"]
    arms = ["--a", "none", "--b", "chain", "--workloads", "closed:2", "--blocks", "2", "--steps", "5"]
    assert main(["ab", *asked, "--out", str(tmp_path / "ab"), *arms]) == 0
    assert main(["eval", "--trace", "x", *asked, "--out", str(tmp_path / "eval")]) == 2
    assert "--trace x and --prompts are given; give one" in " ".join(capsys.readouterr().err.split())


def test_gates_are_calibrated_on_the_files_prompts_and_say_so(sharegpt, model, tmp_path):
    sizes = ["--limit", "10", "--max-new-tokens", "32", "--least", "1", "--resamples", "20"]
    out = tmp_path / "made"
    assert main(["calibrate", "gates", "--prompts", str(sharegpt), "--out", str(out), *sizes, *model]) == 0
    provenance = json.loads((out / "gates.json").read_text())["body"]["provenance"]
    assert provenance.startswith("10 ShareGPT_split prompts, sha256 ")


def test_ab_serves_a_trace_of_arrivals_with_its_lengths_on_the_live_engine_and_its_times_on_a_replay(
    sharegpt, model, tmp_path, capsys
):
    arrivals = tmp_path / "mooncake.jsonl"
    rows = [{"timestamp": 1, "input_length": 30 + n, "output_length": 4 + n, "hash_ids": [0]} for n in range(4)]
    rows.append({"timestamp": 2, "input_length": 3_000, "output_length": 5, "hash_ids": []})
    arrivals.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = ["--prompts", str(sharegpt), "--limit", "6", "--arrivals", str(arrivals), *model]
    arms = ["--a", "none", "--b", "chain", "--blocks", "2", "--steps", "12", "--on", "replay", "live"]
    assert main(["ab", *asked, "--out", str(tmp_path / "ab"), *arms, "--max-context", "256"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert f"trace:{arrivals} on replay: its times alone" in told
    assert "1 of 5 requests of the arrivals' trace are longer than the context of 256 tokens and clipped to it" in told
    lines = (tmp_path / "ab" / "live" / "blocks.jsonl").read_text().splitlines()
    lengths = {request["prompt_tokens"] for line in lines for request in json.loads(line)["record"]["requests"]}
    assert lengths <= {30, 31, 32, 33, 251} and len(lengths) > 2
    settings = json.loads((tmp_path / "ab" / "live" / "config.json").read_text())
    assert settings["environment"][f"arrivals trace:{arrivals}"].startswith("sha256 ")
