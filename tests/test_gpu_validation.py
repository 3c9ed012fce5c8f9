"""The GPU validation with a fake runner: nothing here needs a GPU, and every command of its plan parses."""

from __future__ import annotations

import json
import shutil
import socket
import sys
import time
from pathlib import Path

import pytest
import tyro

import kernels
import losslessness
from echo_rl.cli.app import parse
from echo_rl.errors import ConfigError, EchoError
from echo_rl.integrations.sglang.host import Host
from echo_rl.integrations.sglang.settings import PluginConfig
from echo_rl.load.record import LoadRecord
from echo_rl.records import RequestRecord, RunRecord
from scripts import gpu_validation as gpu

RESULTS = gpu.ROOT / "benchmarks" / "results"
NAMES = [
    *("environment", "kernels", "runtime", "compile", "calibrate", "losslessness", "bench", "serve"),
    *("sglang-install", "sglang-none", "sglang-eagle3", "sglang-adaptive", "sglang-trees"),
]


class Fake:
    """Does nothing but say what it was given; `codes` are the exit codes of stages (None: out of time)."""

    def __init__(self, card: str | None = "Card 1", **codes: int | None) -> None:
        self.card, self.codes, self.ran, self.seconds = card, codes, [], []

    def __call__(self, step, log, seconds):
        name = log.stem
        self.ran.append(name)
        self.seconds.append(seconds)
        if name == "environment":
            gpu.write_json(Path(step.command[-1]), {"gpu": self.card, "torch": "2.13.0"})
        log.write_text("".join(f"line {i} of {name}\n" for i in range(40)))
        return self.codes.get(name.replace("-", "_"), 0)

    @property
    def stages(self) -> list[str]:
        return list(dict.fromkeys(self.ran))


def args(out: Path, **more) -> gpu.Args:
    return gpu.Args(out=out, model="org/target", drafter="org/drafter", **more)


def test_stages_run_in_order_and_a_rerun_does_only_what_is_missing(tmp_path):
    assert gpu.Validation(args(tmp_path), first := Fake()).run()
    assert first.stages == NAMES
    assert gpu.Validation(args(tmp_path), second := Fake()).run()
    assert second.stages == ["environment"]
    gpu.Validation(args(tmp_path, again=("bench",)), third := Fake()).run()
    assert third.stages == ["environment", "bench"]
    with pytest.raises(ConfigError, match="no stage benhc"):
        gpu.plan(args(tmp_path, again=("benhc",)))


def test_a_failure_stops_no_other_stage_and_is_tried_again_where_it_stopped(tmp_path):
    assert not gpu.Validation(args(tmp_path), first := Fake(kernels=1, bench=None)).run()
    assert first.stages == NAMES and first.ran.count("bench") == 1
    (tmp_path / "bench" / "half").write_text("kept")
    assert gpu.Validation(args(tmp_path), second := Fake()).run()
    assert second.stages == ["environment", "kernels", "bench"]
    assert (tmp_path / "bench" / "half").is_file()
    gpu.Validation(args(tmp_path, again=("bench",)), Fake()).run()
    assert not (tmp_path / "bench" / "half").exists()


def test_other_settings_begin_a_stage_anew(tmp_path):
    gpu.Validation(args(tmp_path), Fake()).run()
    gpu.Validation(args(tmp_path, controller="chain"), second := Fake()).run()
    assert second.stages == ["environment", "sglang-adaptive", "sglang-trees"]
    assert json.loads((tmp_path / "sglang-trees.json").read_text())["controller"] == "chain"


def test_sglang_is_skipped_with_its_reason(tmp_path):
    gpu.Validation(gpu.Args(out=tmp_path), fake := Fake()).run()
    assert fake.stages == NAMES[:8]
    text = (tmp_path / "report.md").read_text()
    assert text.count("no --model and --drafter were given") == 5
    gpu.Validation(args(tmp_path), fake := Fake(sglang_install=1)).run()
    assert fake.stages == ["environment", "sglang-install"]
    assert (tmp_path / "report.md").read_text().count("sglang-install was not done") == 4


@pytest.mark.parametrize("fake", [Fake(card=None), Fake(environment=1)])
def test_without_a_gpu_it_refuses(tmp_path, fake):
    with pytest.raises(ConfigError, match="sees no GPU.*--dry-run"):
        gpu.Validation(args(tmp_path), fake).run()
    assert fake.stages == ["environment"]


def test_a_folder_belongs_to_one_gpu(tmp_path):
    gpu.Validation(args(tmp_path), Fake()).run()
    for _ in range(2):
        with pytest.raises(ConfigError, match="is of Card 1, this is Card 2"):
            gpu.Validation(args(tmp_path), Fake("Card 2")).run()


def test_steps_share_their_stages_limit(tmp_path):
    gpu.Validation(args(tmp_path, patience=0.5), fake := Fake()).run()
    limits = {stage.name: 30 * stage.minutes for stage in gpu.plan(args(tmp_path))}
    for name, seconds in zip(fake.ran, fake.seconds, strict=True):
        assert limits[name] - 5 < seconds <= limits[name]


def test_the_report_says_what_was_measured_and_what_was_not(tmp_path):
    runner = Fake(kernels=1, bench=None)
    for stage, name in (("bench/device", "throughput"), ("losslessness/eager", "losslessness"), ("compile", "kernels")):
        target = tmp_path / stage / ("result.json" if name == "throughput" else f"results/{name}.json")
        target.parent.mkdir(parents=True)
        shutil.copy(RESULTS / f"{name}.json", target)
    gpu.Validation(args(tmp_path), runner).run()
    report = json.loads((tmp_path / "report.json").read_text())
    found = {entry["name"]: entry for entry in report["stages"]}
    assert list(found) == NAMES and report["machine"]["gpu"] == "Card 1"
    assert found["kernels"]["outcome"] == "failed" and found["kernels"]["tail"][-2:] == [
        "line 39 of kernels",
        "exit code 1",
    ]
    assert found["bench"]["outcome"] == "timed out" and found["serve"]["numbers"] == []
    committed = json.loads((RESULTS / "throughput.json").read_text())["cells"]
    rows = found["bench"]["numbers"]
    assert len(rows) == len(committed) and rows[0]["step"] == "device" and rows[0]["arm"] == committed[0]["arm"]
    float32 = json.loads((RESULTS / "losslessness.json").read_text())["dtypes"]["float32"]
    assert found["losslessness"]["numbers"][0]["tokens"] == float32["tokens"]
    assert found["compile"]["numbers"][0]["launches a step, after"] > 0
    text = (tmp_path / "report.md").read_text()
    assert "Card 1" in text and "Unfinished:" in text and "line 39 of kernels" in text
    assert text.count("Nothing was measured.") == 8  # kernels, runtime, calibrate, serve, four of SGLang


def test_a_damaged_result_spoils_no_report(tmp_path):
    (tmp_path / "serve").mkdir()
    (tmp_path / "serve" / "result.json").write_text('{"cells": [{}]}')
    gpu.Validation(args(tmp_path), Fake()).run()
    assert "results not readable" in (tmp_path / "report.md").read_text()


def test_tests_are_counted(tmp_path):
    xml = '<testsuites><testsuite tests="9" failures="1" errors="0" skipped="2"/></testsuites>'
    (tmp_path / "junit.xml").write_text(xml)
    assert gpu.numbers("kernels", tmp_path) == [{"tests": "9", "failures": "1", "errors": "0", "skipped": "2"}]


def test_sglang_is_compared_with_no_speculation(tmp_path):
    def write(name: str, seconds: float, texts: tuple[str, ...]) -> None:
        def record(block: int) -> LoadRecord:
            times = (0.1, 0.2, 0.3, 0.4)
            requests = [RequestRecord(f"{block}.{i}", 3, 0.0, seconds, (-1,) * 4, times, "stop") for i in (0, 1)]
            return LoadRecord(RunRecord("", 1, seconds, tuple(requests), ()), texts, 4, 0, 0.1)

        (tmp_path / name).mkdir()
        with open(tmp_path / name / "blocks.jsonl", "w") as stream:
            for block in (1, 0):
                unit = {"block": block, "workload": "closed:1", "arm": "a"}
                stream.write(json.dumps({"unit": unit, "record": record(block).to_json()}) + "\n")

    write("sglang-none", 2.0, ("same", "same"))
    write("sglang-trees", 1.0, ("same", "other"))
    (plain,) = gpu.numbers("sglang-none", tmp_path / "sglang-none")
    (row,) = gpu.numbers("sglang-trees", tmp_path / "sglang-trees")
    assert plain["against none"] == plain["outputs differing"] == "-"
    assert row["against none"].startswith("2.00x") and row["outputs differing"] == "2 of 4"


def test_every_command_of_the_plan_parses(tmp_path):
    parsed = []
    for stage in gpu.plan(args(tmp_path)):
        for step in stage.steps:
            for command in filter(None, (step.serve, step.command)):
                if command[1:3] == ("-m", "echo_rl.cli"):
                    parsed.append(parse(command[3:]))
                elif command[0] == sys.executable and command[1].endswith(".py"):
                    options = {"kernels.py": kernels.Args, "losslessness.py": losslessness.Args}
                    parsed.append(tyro.cli(options.get(Path(command[1]).name, gpu.Args), args=command[2:]))
                elif command[1:3] == ("-m", "pytest"):
                    assert Path(command[-1]).is_dir()
                else:
                    assert command[0] in ("sh", "install") or command[2] in ("venv", "pip", "sglang.launch_server")
    loads = [command.config() for command in parsed if type(command).__name__ == "Load"]
    assert len(loads) == 5 and all(load.temperature == 0 for load in loads)
    assert len(next(c for c in parsed if type(c).__name__ == "Bench").config().loads) == 4
    assert [c.engine.step for c in parsed if type(c).__name__ == "Bench"] == ["device", "eager"]


@pytest.mark.parametrize("mode", gpu.MODES)
def test_sglang_is_launched_as_the_plugin_demands(tmp_path, mode):
    given = args(tmp_path)
    config = PluginConfig.of(gpu.settings(given, mode))
    stage = next(stage for stage in gpu.plan(given) if stage.name == f"sglang-{mode}")
    serve = list(stage.steps[-1].serve)
    demanded = Host(config).remedy().partition("start it with ")[2]
    if mode == "adaptive":
        pairs = demanded.removesuffix(" --speculative-adaptive").split(" --")
        assert (
            all(pair.removeprefix("--") in " ".join(serve) for pair in pairs) and serve[-1] == "--speculative-adaptive"
        )
    else:
        assert "--speculative-adaptive" not in serve
        assert int(serve[serve.index("--speculative-eagle-topk") + 1]) > 1
    for flag, value in (("num-steps", config.launch.steps), ("num-draft-tokens", config.launch.width)):
        assert serve[serve.index(f"--speculative-{flag}") + 1] == str(value)
    assert stage.steps[-1].env == {"ECHO_RL_CONFIG": str(tmp_path / f"sglang-{mode}.json")}


def test_the_dry_run_prints_and_does_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_validation.py", "--dry-run", "--out", str(tmp_path / "new")])
    gpu.main()
    printed = capsys.readouterr().out
    assert all(f"# {name}: " in printed for name in NAMES) and "SKIPPED: no --model" in printed
    assert "--arms none eagle3 echo ppo" in printed and not (tmp_path / "new").exists()


SERVER = "import http.server as h; s = h.HTTPServer(('127.0.0.1', {port}), type('H', (h.BaseHTTPRequestHandler,), dict(do_GET=lambda s: (s.send_response(200), s.end_headers())))); s.serve_forever()"  # fmt: skip  # noqa: E501


@pytest.fixture
def port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def python(code: str) -> tuple[str, ...]:
    return sys.executable, "-c", code


def test_the_runner_keeps_logs_and_limits(tmp_path, monkeypatch):
    monkeypatch.setenv("ECHO_RL_ADMIN_KEY", "secret")
    log = tmp_path / "log"
    code = "import os; print(os.environ.get('ECHO_RL_ADMIN_KEY'), os.environ['MORE']); exit(3)"
    assert gpu.run_step(gpu.Step(python(code), env={"MORE": "more"}), log, 30) == 3
    assert "None more" in log.read_text()
    begin = time.monotonic()
    assert gpu.run_step(gpu.Step(python("import time; time.sleep(60)")), log, 0.3) is None
    assert time.monotonic() - begin < 20


def test_the_runner_has_a_server_up_for_the_step_and_ends_it(tmp_path, port):
    url = f"http://127.0.0.1:{port}"
    ask = python(f"from urllib.request import urlopen; assert urlopen('{url}/health').status == 200")
    step = gpu.Step(ask, python(SERVER.format(port=port)), url)
    assert gpu.run_step(step, tmp_path / "log", 60) == 0
    assert not gpu.healthy(url)
    with pytest.raises(EchoError, match="ended with 5 before"):
        gpu.run_step(gpu.Step(ask, python("exit(5)"), url), tmp_path / "log", 60)
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", port))
        other.listen()
        with pytest.raises(EchoError, match="taken"):
            gpu.run_step(step, tmp_path / "log", 60)
