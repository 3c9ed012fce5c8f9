"""The benchmark on a fake engine: order, pairing, resuming, reporting, drawing."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from rich.console import Console

from echo_rl.controllers.arm import Arm
from echo_rl.errors import ConfigError
from echo_rl.experiments.bench import run_bench
from echo_rl.experiments.plan import BenchConfig, Load, Run, arm_order
from echo_rl.experiments.report import plots
from echo_rl.experiments.report.measures import compare_outputs, first_difference
from echo_rl.workloads.datasets import Prompt
from echo_rl.workloads.driver import serve

PROMPTS = [Prompt("gsm8k", str(i), ({"role": "user", "content": "x" * (i + 1)},)) for i in range(5)]
CONFIG = BenchConfig(
    arms=("none", "chain", "echo"),
    loads=(Load(1, requests=2, max_new_tokens=9, blocks=3), Load(2, requests=4, max_new_tokens=6, blocks=2)),
)
QUIET = Console(quiet=True)


def bench(engine, make_controller, out, config=CONFIG, **more):
    return run_bench(engine, config, PROMPTS, make_controller, out, console=QUIET, **more)


def cell(result, arm, concurrency):
    return next(c for c in result["cells"] if (c["arm"], c["concurrency"]) == (arm, concurrency))


def test_two_arms_run_abba():
    assert [arm_order(["a", "b"], block) for block in range(4)] == [["a", "b"], ["b", "a"], ["b", "a"], ["a", "b"]]


def test_every_arm_takes_every_place_equally_often():
    arms = ["a", "b", "c"]
    places = Counter((arm, place) for block in range(6) for place, arm in enumerate(arm_order(arms, block)))
    assert set(places.values()) == {2}


def test_a_block_runs_all_its_arms_before_the_next_begins():
    units = CONFIG.runs
    assert len(units) == 15 and len(set(units)) == 15
    assert [unit.block for unit in units] == sorted(unit.block for unit in units)
    for start in range(0, 15, 3):
        assert len({(unit.block, unit.workload) for unit in units[start : start + 3]}) == 1


def test_arms_of_a_block_serve_the_same_prompts_and_blocks_differ(fake_engine, make_controller, tmp_path):
    bench(fake_engine, make_controller, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "blocks.jsonl").read_text().splitlines()]
    served: dict[tuple[int, int], set[tuple[str, ...]]] = {}
    for row in rows:
        key = (row["unit"]["block"], row["unit"]["concurrency"])
        served.setdefault(key, set()).add(tuple(request["id"] for request in row["record"]["requests"]))
    assert all(len(ids) == 1 for ids in served.values())
    assert len({next(iter(ids)) for ids in served.values()}) == len(served)


def test_the_result_has_a_cell_per_arm_and_load(fake_engine, make_controller, tmp_path):
    result = bench(fake_engine, make_controller, tmp_path, clock=fake_engine.clock)
    assert len(result["cells"]) == 6 and result["baseline"] == "none"
    plain, echo = cell(result, "none", 1), cell(result, "echo", 1)
    assert plain["mat"] == 1.0 and plain["speedup"] is None and plain["tokens_per_second"] == 1.0
    assert echo["mat"] == 4.0 and echo["speedup"]["estimate"] == pytest.approx(3.0)  # 9 steps against 3
    assert echo["speedup"]["blocks"] == 3 and echo["budget_utilisation"] == 0.5
    assert echo["outputs"] == {"requests": 6, "tokens": 54, "differing": 0, "first_difference": {}}
    assert json.loads((tmp_path / "result.json").read_text()) == json.loads(json.dumps(result))


def test_an_interrupted_run_goes_on_where_it_stopped(make_engine, make_controller, tmp_path):
    whole = bench(make_engine(), make_controller, tmp_path / "whole")
    stopped = make_engine()
    stopped.fail_after = 90
    with pytest.raises(KeyboardInterrupt):
        bench(stopped, make_controller, tmp_path / "parts")
    path = tmp_path / "parts" / "blocks.jsonl"
    before = path.read_text()
    assert 0 < before.count("\n") < 15
    path.write_text(before + '{"unit": {"block": 9')  # the write was cut short
    again = make_engine()
    resumed = bench(again, make_controller, tmp_path / "parts")
    assert path.read_text().startswith(before) and path.read_text().count("\n") == 15
    assert [c["outputs"] for c in resumed["cells"]] == [c["outputs"] for c in whole["cells"]]
    assert again.steps < make_total_steps(make_engine, make_controller, tmp_path)


def make_total_steps(make_engine, make_controller, tmp_path) -> int:
    engine = make_engine()
    bench(engine, make_controller, tmp_path / "total")
    return engine.steps


def test_a_finished_run_serves_nothing_again(make_engine, make_controller, tmp_path):
    bench(make_engine(), make_controller, tmp_path)
    engine = make_engine()
    bench(engine, make_controller, tmp_path)
    assert engine.steps == 0


def test_blocks_of_a_policy_that_was_trained_again_are_not_its_own(fake_engine, make_controller, tmp_path):
    def made(weights):
        def make(name, **options):
            controller = make_controller(name, **options)
            controller.materials = (weights,) if name == "echo" else ()
            return controller

        return make

    first = bench(fake_engine, made("old"), tmp_path)
    assert bench(fake_engine, made("old"), tmp_path)["environment"] == first["environment"]
    with pytest.raises(ConfigError, match="another echo made of"):
        bench(fake_engine, made("new"), tmp_path)


def test_a_folder_of_another_benchmark_is_refused(fake_engine, make_controller, tmp_path):
    bench(fake_engine, make_controller, tmp_path)
    other = BenchConfig(arms=("none", "echo"), loads=CONFIG.loads)
    with pytest.raises(ConfigError, match="another arms; choose another folder"):
        bench(fake_engine, make_controller, tmp_path, config=other)
    with pytest.raises(ConfigError, match="another cpu"):
        bench(fake_engine, make_controller, tmp_path, environment={"cpu": "another"})


def test_a_damaged_folder_is_named(fake_engine, make_controller, tmp_path):
    """Not the last line: that one may be cut short by an interruption."""
    bench(fake_engine, make_controller, tmp_path)
    config, blocks = tmp_path / "config.json", tmp_path / "blocks.jsonl"
    whole = blocks.read_text().splitlines(keepends=True)
    for bad, message in (
        ('{"unit": {"block"\n', "line 2 of .*blocks.jsonl is damaged"),
        ('{"unit": 3, "record": {}}\n', "no finished unit"),
        ("{}\n", "no finished unit"),
    ):
        blocks.write_text("".join([whole[0], bad, *whole[2:]]))
        with pytest.raises(ConfigError, match=message):
            bench(fake_engine, make_controller, tmp_path)
    for text in ("{", "[]", ""):
        config.write_text(text)
        with pytest.raises(ConfigError, match="is damaged|holds a benchmark with another"):
            bench(fake_engine, make_controller, tmp_path)
    config.unlink()
    with pytest.raises(ConfigError, match="of unknown settings"):
        bench(fake_engine, make_controller, tmp_path)


def test_controllers_keep_what_they_learn_over_blocks(fake_engine, make_controller, tmp_path):
    made = []

    def make(name, **options):
        made.append(make_controller(name, **options))
        return made[-1]

    bench(fake_engine, make, tmp_path)
    assert len(made) == 6  # one an arm and load


def test_arms_carry_options():
    arm = Arm.parse("echo:gain=5,gates=dense,tau=0.2")
    assert (arm.controller, arm.options) == ("echo", {"gain": 5, "gates": "dense", "tau": 0.2})
    assert Arm.parse("none").options == {}
    for text in ("echo:gain", "echo:=3", ":gain=1", ""):
        with pytest.raises(ConfigError):
            Arm.parse(text)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Load(0, 1),
        lambda: Load(1, 1, blocks=0),
        lambda: BenchConfig((), CONFIG.loads),
        lambda: BenchConfig(("none",), ()),
        lambda: BenchConfig(("none", "none"), CONFIG.loads),
        lambda: BenchConfig(("none",), (Load(1, 1), Load(1, 2))),
    ],
)
def test_impossible_benchmarks_are_refused(make):
    with pytest.raises(ConfigError):
        make()


def test_differences_are_located(fake_engine, make_controller):
    assert first_difference((1, 2, 3), (1, 5, 3)) == 1
    assert first_difference((1, 2), (1, 2, 3)) == 2
    from echo_rl.experiments.bench import block_requests

    requests = block_requests(fake_engine, PROMPTS, CONFIG, CONFIG.loads[0], 0)
    plain = serve(fake_engine, make_controller("none"), requests, 1)
    wrong = plain.to_json()
    wrong["requests"][1]["tokens"][4] += 1
    outputs = compare_outputs(type(plain).from_json(wrong), plain)
    assert outputs["differing"] == 1 and outputs["first_difference"] == {requests[1].id: 4}


def test_plots_are_drawn(fake_engine, make_controller, tmp_path):
    result = bench(fake_engine, make_controller, tmp_path)
    paths = plots.draw(result, tmp_path)
    assert [path.name for path in paths] == ["throughput.png", "acceptance.png", "phases.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_one_block_of_plain_decoding_can_be_drawn(fake_engine, make_controller, tmp_path):
    config = BenchConfig(("none",), (Load(1, 1, 2, 1),))
    result = bench(fake_engine, make_controller, tmp_path, config=config)
    assert result["cells"][0]["throughput"]["low"] is None
    assert len(plots.draw(result, tmp_path)) == 3


def test_units_are_hashable_keys():
    assert Run(0, "closed:1", "none") == Run(**{"block": 0, "workload": "closed:1", "arm": "none"})
