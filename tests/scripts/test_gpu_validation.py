"""The GPU validation with a fake runner: nothing here needs a GPU, and every command of its plan parses."""

from __future__ import annotations

import json
import shutil
import socket
import sys
import time
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import tyro

from benchmarks.engine import parity
from benchmarks.kernels import timings
from echo_rl.cli.app import parse
from echo_rl.errors import ConfigError, EchoError
from echo_rl.experiments.targets.http.record import LoadRecord
from echo_rl.integrations.sglang.settings import PluginConfig
from echo_rl.integrations.sglang.state import PluginState
from echo_rl.utils.result_store import write_json
from echo_rl.workloads.records import RequestRecord, RunRecord
from scripts import gpu_validation
from scripts.gpu.plan import MODES, ROOT, Args, Step, plan, settings
from scripts.gpu.report import numbers
from scripts.gpu.runner import Validation, healthy, run_step
from tests import tiny
from tests.runtime import driving

RESULTS = ROOT / "benchmarks" / "results"
OWN = [
    "environment",
    "kernels",
    "compile",
    "timings",
    "runtime",
    "parity",
    "calibrate",
    "losslessness",
    "bench",
    "serve",
]
NAMES = [*OWN, "sglang-install", "sglang-none", "sglang-eagle3", "sglang-adaptive", "sglang-trees"]


class Fake:
    """Does nothing but say what it was given; `codes` are the exit codes of stages (None: out of time)."""

    def __init__(self, card: str | None = "Card 1", **codes: int | None) -> None:
        self.card, self.codes, self.ran, self.seconds = card, codes, [], []

    def __call__(self, step, log, seconds):
        name = log.stem
        self.ran.append(name)
        self.seconds.append(seconds)
        if name == "environment":
            write_json(Path(step.command[-1]), {"gpu": self.card, "torch": "2.13.0"})
        log.write_text("".join(f"line {i} of {name}\n" for i in range(40)))
        return self.codes.get(name.replace("-", "_"), 0)

    @property
    def stages(self) -> list[str]:
        return list(dict.fromkeys(self.ran))


def args(out: Path, **more) -> Args:
    return Args(out=out, model="org/target", drafter="org/drafter", **more)


def test_stages_run_in_order_and_a_rerun_does_only_what_is_missing(tmp_path):
    assert Validation(args(tmp_path), first := Fake()).run()
    assert first.stages == NAMES
    assert Validation(args(tmp_path), second := Fake()).run()
    assert second.stages == ["environment"]
    Validation(args(tmp_path, again=("bench",)), third := Fake()).run()
    assert third.stages == ["environment", "bench"]
    with pytest.raises(ConfigError, match="no stage benhc"):
        plan(args(tmp_path, again=("benhc",)))


def test_a_failure_stops_no_other_stage_and_is_tried_again_where_it_stopped(tmp_path):
    assert not Validation(args(tmp_path), first := Fake(kernels=1, bench=None)).run()
    assert first.stages == NAMES and first.ran.count("bench") == 1 and first.ran.count("calibrate") == 2
    (tmp_path / "bench" / "half").write_text("kept")
    assert Validation(args(tmp_path), second := Fake()).run()
    assert second.stages == ["environment", "kernels", "bench"]
    assert (tmp_path / "bench" / "half").is_file()
    Validation(args(tmp_path, again=("bench",)), Fake()).run()
    assert not (tmp_path / "bench" / "half").exists()


def test_other_settings_begin_a_stage_anew(tmp_path):
    Validation(args(tmp_path), Fake()).run()
    Validation(args(tmp_path, controller="chain"), second := Fake()).run()
    assert second.stages == ["environment", "sglang-adaptive", "sglang-trees"]
    assert json.loads((tmp_path / "sglang-trees.json").read_text())["controller"] == "chain"


def test_sglang_is_skipped_with_its_reason(tmp_path):
    Validation(Args(out=tmp_path), fake := Fake()).run()
    assert fake.stages == OWN
    text = (tmp_path / "report.md").read_text()
    assert text.count("no --model and --drafter were given") == 5
    Validation(args(tmp_path), fake := Fake(sglang_install=1)).run()
    assert fake.stages == ["environment", "sglang-install"]
    assert (tmp_path / "report.md").read_text().count("sglang-install was not done") == 4


@pytest.mark.parametrize("fake", [Fake(card=None), Fake(environment=1)])
def test_without_a_gpu_it_refuses(tmp_path, fake):
    with pytest.raises(ConfigError, match="sees no GPU.*--dry-run"):
        Validation(args(tmp_path), fake).run()
    assert fake.stages == ["environment"]


def test_a_folder_belongs_to_one_gpu(tmp_path):
    Validation(args(tmp_path), Fake()).run()
    for _ in range(2):
        with pytest.raises(ConfigError, match="is of Card 1, this is Card 2"):
            Validation(args(tmp_path), Fake("Card 2")).run()


def test_steps_share_their_stages_limit(tmp_path):
    Validation(args(tmp_path, patience=0.5), fake := Fake()).run()
    limits = {stage.name: 30 * stage.minutes for stage in plan(args(tmp_path))}
    for name, seconds in zip(fake.ran, fake.seconds, strict=True):
        assert limits[name] - 5 < seconds <= limits[name]


def test_a_run_ends_at_its_limit_and_the_next_one_goes_on(tmp_path):
    class Slow(Fake):
        def __call__(self, step, log, seconds):
            code = super().__call__(step, log, seconds)
            time.sleep(0.3 if len(self.stages) == 3 else 0.0)
            return code

    first, second = Slow(), Fake()
    assert not Validation(args(tmp_path, minutes=0.2 / 60), first).run()
    assert first.stages == NAMES[:3] and all(seconds <= 0.2 for seconds in first.seconds)
    assert (tmp_path / "report.md").read_text().count("**not run**") == len(NAMES) - 3
    assert Validation(args(tmp_path), second).run()
    assert second.stages == ["environment", *NAMES[3:]]


def test_the_report_says_what_was_measured_and_what_was_not(tmp_path):
    runner = Fake(kernels=1, bench=None)
    for stage, name in (("bench/device", "throughput"), ("losslessness/eager", "losslessness"), ("compile", "kernels")):
        target = tmp_path / stage / ("result.json" if name == "throughput" else f"results/{name}.json")
        target.parent.mkdir(parents=True)
        shutil.copy(RESULTS / f"{name}.json", target)
    Validation(args(tmp_path), runner).run()
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
    assert (
        text.count("Nothing was measured.") == 10
    )  # kernels, timings, runtime, parity, calibrate, serve, four of SGLang


def test_a_damaged_result_spoils_no_report(tmp_path):
    (tmp_path / "serve").mkdir()
    (tmp_path / "serve" / "result.json").write_text('{"cells": [{}]}')
    Validation(args(tmp_path), Fake()).run()
    assert "results not readable" in (tmp_path / "report.md").read_text()


def test_tests_are_counted(tmp_path):
    xml = '<testsuites><testsuite tests="9" failures="1" errors="0" skipped="2"/></testsuites>'
    (tmp_path / "junit.xml").write_text(xml)
    assert numbers("kernels", tmp_path) == [{"tests": "9", "failures": "1", "errors": "0", "skipped": "2"}]


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
    (plain,) = numbers("sglang-none", tmp_path / "sglang-none")
    (row,) = numbers("sglang-trees", tmp_path / "sglang-trees")
    assert plain["against none"] == plain["outputs differing"] == "-"
    assert row["against none"].startswith("2.00x") and row["outputs differing"] == "2 of 4"


def parsed(command: tuple[str, ...]) -> object:
    """The options that a command of the plan comes to; the program itself reads them."""
    if command[1:3] == ("-m", "echo_rl.cli"):
        return parse(command[3:])
    if command[1:2] == ("-m",) and command[2].partition(".")[0] in ("benchmarks", "scripts"):
        module = import_module(command[2])
        return tyro.cli(module.Args, args=command[3:]) if hasattr(module, "Args") else None
    if command[1:3] == ("-m", "pytest"):
        assert Path(command[-1]).is_dir()
        return None
    assert command[0] == "install" or command[2] in ("venv", "pip", "sglang.launch_server")
    return None


def test_every_command_of_the_plan_parses(tmp_path):
    steps = [step for stage in plan(args(tmp_path)) for step in stage.steps]
    found = [parsed(command) for step in steps for command in (step.serve, step.command) if command]
    by_name: dict[str, list] = {}
    for options in found:
        by_name.setdefault(type(options).__name__, []).append(options)
    loads = [options.config() for options in by_name["Load"]]
    assert len(loads) == 5 and all(load.temperature == 0 for load in loads)
    assert len(by_name["Bench"][0].config().loads) == 4
    assert [options.engine.step for options in by_name["Bench"]] == ["device", "eager"]
    engines = [o.engine for o in found if hasattr(o, "engine")]
    assert len(engines) == 8 and all(engine.device == "cuda" for engine in engines)
    dtypes = [o.engine.dtype for o in found if isinstance(o, parity.Args)]
    assert dtypes == ["float32", "bfloat16"]


def test_the_runtimes_tests_run_on_the_gpu(tmp_path):
    (step,) = next(stage for stage in plan(args(tmp_path)) if stage.name == "runtime").steps
    assert step.env == {"ECHO_RL_TEST_DEVICE": "cuda"}
    assert "ECHO_RL_TEST_DEVICE=cuda" in step.lines()[0]


def test_a_thorough_stage_goes_on_after_a_failure(tmp_path):
    runner = Fake(losslessness=1, calibrate=1)
    Validation(args(tmp_path), runner).run()
    assert runner.ran.count("losslessness") == 2 and runner.ran.count("calibrate") == 1
    state = json.loads((tmp_path / "state.json").read_text())
    assert state["losslessness"]["outcome"] == state["calibrate"]["outcome"] == "failed"


@pytest.mark.parametrize("mode", MODES)
def test_sglang_is_launched_as_the_plugin_demands(tmp_path, mode):
    given = args(tmp_path)
    config = PluginConfig.of(settings(given, mode))
    stage = next(stage for stage in plan(given) if stage.name == f"sglang-{mode}")
    serve = list(stage.steps[-1].serve)
    demanded = PluginState(config).remedy().partition("start it with ")[2]
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
    gpu_validation.main()
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
    assert run_step(Step(python(code), env={"MORE": "more"}), log, 30) == 3
    assert "None more" in log.read_text()
    begin = time.monotonic()
    assert run_step(Step(python("import time; time.sleep(60)")), log, 0.3) is None
    assert time.monotonic() - begin < 20


def test_the_runner_has_a_server_up_for_the_step_and_ends_it(tmp_path, port):
    url = f"http://127.0.0.1:{port}"
    ask = python(f"from urllib.request import urlopen; assert urlopen('{url}/health').status == 200")
    step = Step(ask, python(SERVER.format(port=port)), url)
    assert run_step(step, tmp_path / "log", 60) == 0
    assert not healthy(url)
    with pytest.raises(EchoError, match="ended with 5 before"):
        run_step(Step(ask, python("exit(5)"), url), tmp_path / "log", 60)
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", port))
        other.listen()
        with pytest.raises(EchoError, match="taken"):
            run_step(step, tmp_path / "log", 60)


# --------------------------------------------------------------------------- what the stages of our own measure


def test_a_kernel_that_fails_is_a_row_and_the_others_are_timed():
    def failing():
        raise RuntimeError("no such instruction")

    def found():
        yield timings.Case("good", 2, lambda: "slow", lambda: "fast", least=1000)
        yield timings.Case("bad", 1, lambda: "slow", failing)
        yield timings.Case("last", 1, lambda: "slow", lambda: "fast")
        raise MemoryError("too large")

    rows = list(timings.measured(found(), lambda call: (4e-6, 3e-6, 5e-6) if call() == "slow" else (1e-6, 1e-6, 1e-6)))
    assert [row["name"] for row in rows] == ["good", "bad", "last", "the next operation's tensors"]
    assert rows[0]["speedup"] == pytest.approx(4.0) and rows[0]["bytes_a_second"] == pytest.approx(1e9)
    assert [row.get("error") for row in rows] == [
        None, "RuntimeError: no such instruction", None, "MemoryError: too large",
    ]  # fmt: skip


def test_the_operations_that_are_timed_are_those_of_a_step():
    small = timings.Shape(batch=2, context=64, vocab=512, draft_vocab=256, hidden=64, inner=64, layers=2)
    names = [case.name for case in timings.cases(small)]
    assert {"rms_norm", "rope_store", "tree_attention", "compact_kv", "gate_topk", "verify_tree"} <= set(names)


def test_timings_are_reported(tmp_path):
    times = {"median": 2e-6, "low": 1e-6, "high": 3e-6}
    good = {"name": "rms_norm", "calls": 1, "kernel": times, "reference": times, "speedup": 1.0, "bytes_a_second": 2e12}
    write_json(tmp_path / "timings.json", {"kernels": [good, {"name": "silu_mul", "error": "Bad: worse"}]})
    first, second = numbers("timings", tmp_path)
    assert (first["kernel, us"], first["GB/s"], second["kernel, us"], second["error"]) == (
        "2.0",
        "2000",
        "-",
        "Bad: worse",
    )


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Three requests two at a time on a tiny engine, served each way."""
    engine = tiny.engine(tmp_path_factory.mktemp("parity"), step="device", max_expanded=96)
    requests = [replace(r, params=replace(r.params, ignore_eos=True)) for r in driving.requests(4, 0.8, tokens=40)]
    return parity.compare(engine, requests, 2)


def test_all_ways_serve_the_same(compared, tmp_path):
    assert [row["way"] for row in compared] == list(parity.WAYS)
    assert all(row["differing"] == row["differing_again"] == row["differing_reports"] == 0 for row in compared)
    assert compared[0]["tokens"] == 160 and compared[0]["steps"] > 3 * parity.STRETCH
    assert compared[1]["device_steps"] == compared[1]["landings"] > 0 and compared[1]["eager_steps"] == {}
    assert parity.faults(compared, exact=True, captures=False) == []
    write_json(tmp_path / "float32.json", {"rows": compared})
    rows = numbers("parity", tmp_path)
    assert [row["way"] for row in rows] == list(parity.WAYS) and rows[0]["outputs differing"] == "0 + 0 of 4"


def test_a_difference_is_a_fault(compared):
    *others, last = compared
    bad = [*others, {**last, "differing": 1, "waits": 3, "landings": last["landings"] + 1}]
    said = " ".join(parity.faults(bad, exact=True, captures=True))
    assert all(words in said for words in ("tokens differ", "3 waits", "nothing was replayed", "landings"))
    assert "tokens differ" not in " ".join(parity.faults(bad, exact=False, captures=False))


def test_a_token_that_differs_is_counted():
    one, other = (parity.Served({"a": (1, 2), "b": tokens}, (), None) for tokens in ((3,), (4,)))
    assert parity.compared(one, other)["differing"] == 1 and parity.compared(one, one)["differing"] == 0
