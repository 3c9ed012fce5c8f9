#!/usr/bin/env python3
"""Everything that needs a GPU, in one unattended run with one report.

    python scripts/gpu_validation.py --dry-run    # the plan, with the exact commands; needs no GPU
    python scripts/gpu_validation.py              # hours; run it again to go on where it stopped
    python scripts/gpu_validation.py --again bench

Every stage is made of processes of its own with a time limit, a log and a folder; none stops the others.
The committed results stay as they are: benchmark scripts run from copies, which write beside themselves.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import IO, Any
from xml.etree import ElementTree

import tyro

from echo_rl.errors import ConfigError, EchoError
from echo_rl.integrations.sglang.contract import RECORDED
from echo_rl.integrations.sglang.settings import ENVIRONMENT, PACKAGED, PluginConfig
from echo_rl.ledger import read_lines
from echo_rl.load.record import LoadRecord
from echo_rl.load.report import cell
from echo_rl.metrics import Interval
from echo_rl.profile import CostProfile, calibrated
from echo_rl.results import machine, write_json

ROOT = Path(__file__).resolve().parent.parent
ECHO = (sys.executable, "-m", "echo_rl.cli")
ROOMY = ("--device", "cuda", "--kv-tokens", "131072")
MODES, FAILED = ("adaptive", "trees"), ("failed", "timed out")
LOADS = ("closed:1", "closed:8", "closed:32", "closed:64")
WITHHELD = ("ECHO_RL_API_KEY", "ECHO_RL_ADMIN_KEY", ENVIRONMENT)
"""Not handed on: the servers listen on this machine alone and ask for no key; each stage names its configuration."""
POLL, STOP, TAIL = 1.0, 30.0, 15
"""Seconds between looks at a starting server; seconds it gets to stop; lines of a failure shown."""


@dataclass(frozen=True)
class Args:
    """Validate and measure this project on a GPU."""

    out: Path = Path("results/gpu")
    """Folder of the report, the logs and all results."""
    dry_run: bool = False
    """Print the plan with the exact commands and do nothing."""
    again: tuple[str, ...] = ()
    """Stages to do anew."""
    model: str | None = None
    """Target for SGLang: a folder or a Hugging Face name, as ``meta-llama/Llama-3.1-8B-Instruct``; with `drafter`."""
    drafter: str | None = None
    """Its EAGLE-3 drafter, as ``yuhuili/EAGLE3-LLaMA3.1-Instruct-8B``."""
    controller: str = "echo"
    """Who decides in SGLang."""
    profile: Path | None = None
    """Costs for that controller; by default those modelled for a Llama-3.1-8B on an H100."""
    port: int = 8123
    """A free port for the servers, one at a time."""
    patience: float = 1.0
    """Multiplies every time limit."""
    probe: Path | None = None
    """Only describe this machine, into this file (the first stage)."""


@dataclass(frozen=True)
class Step:
    """One process, with a server that is up while it runs."""

    command: tuple[str, ...]
    serve: tuple[str, ...] = ()
    url: str = ""
    """The server's."""
    env: Mapping[str, str] = field(default_factory=dict)
    """More environment, the server's too."""

    def lines(self) -> list[str]:
        """As a shell would take it."""
        known = " ".join(f"{key}={shlex.quote(value)}" for key, value in self.env.items())
        every = [f"{shlex.join(self.serve)} &  # until {self.url}/health answers"] if self.serve else []
        return [f"{known} {line}".strip() for line in [*every, shlex.join(self.command)]]


@dataclass(frozen=True)
class Stage:
    name: str
    title: str
    minutes: float
    """Its time limit."""
    steps: tuple[Step, ...]
    needs: str = ""
    """A stage without which it is skipped."""
    skip: str = ""
    """Why it can't be done at all."""
    note: str = ""
    """What a reader of its numbers must know."""

    def lines(self) -> list[str]:
        return [line for step in self.steps for line in step.lines()]


Runner = Callable[[Step, Path, float], int | None]
"""(step, log, seconds) -> exit code, None at the limit."""


def plan(args: Args) -> tuple[Stage, ...]:
    """All stages in order. Raises `ConfigError`."""
    out, url = args.out.resolve(), f"http://127.0.0.1:{args.port}"
    stages = (*own_stages(args, out, url), *sglang_stages(args, out, url))
    unknown = set(args.again) - {stage.name for stage in stages}
    if unknown:
        raise ConfigError(f"no stage {', '.join(unknown)}; give some of {', '.join(s.name for s in stages)}")
    return stages


def own_stages(args: Args, out: Path, url: str) -> Iterator[Stage]:
    """What needs this project alone."""
    probe = (sys.executable, str(Path(__file__).resolve()), "--probe", str(out / "environment" / "machine.json"))
    yield Stage("environment", "The machine", 5, (Step(probe),))
    yield Stage("kernels", "Kernels on the device against their reference", 90, tests("kernels", out))
    note = "These tests pin the CPU; what the engine gives on the GPU is compared under losslessness."
    yield Stage("runtime", "Tests of the engine and its device step", 30, tests("runtime", out), note=note)
    yield Stage("compile", "Kernels compiled ahead of time", 60, script("kernels", out / "compile"))
    profile = out / "calibrate" / "profile.json"
    cost = (*ECHO, "calibrate", "cost", "--out", str(profile.parent), *ROOMY)
    keep = ("install", "-D", str(profile), str(calibrated("profile.json")))
    note = "Controllers on this machine use these costs from then on."
    yield Stage("calibrate", "Costs of drafting and verifying", 60, (Step(cost), Step(keep)), note=note)
    steps = [(step, ("--step", step, *ROOMY)) for step in ("device", "eager")]
    same = [
        s for step, engine in steps
        for s in script("losslessness", out / "losslessness" / step, "--dtypes", "float32", *engine)
    ]  # fmt: skip
    yield Stage("losslessness", "Tokens against plain decoding, float32", 180, tuple(same))
    sweep = (*ECHO, "bench", "--arms", "none", "eagle3", "echo", "ppo", "--concurrency", "1", "8", "32", "64")
    bench = (Step((*sweep, *engine, "--out", str(out / "bench" / step))) for step, engine in steps)
    yield Stage("bench", "Controllers in the engine", 180, tuple(bench))
    serve = (*ECHO, "serve", "--controller", "none", "--port", str(args.port), *ROOMY)
    arms = ("--arms", "none", "echo", "ppo")
    yield Stage("serve", "Controllers through HTTP", 60, (Step(load(url, out / "serve", *arms), serve, url),))


def tests(name: str, out: Path) -> tuple[Step, ...]:
    report = f"--junitxml={out / name / 'junit.xml'}"
    pytest = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--timeout=900", report)
    return (Step((*pytest, str(ROOT / "tests" / name))),)


def script(name: str, folder: Path, *options: str) -> tuple[Step, ...]:
    """A benchmark script from a copy in `folder`, so that it writes into ``folder/results``."""
    copy = shlex.join(("mkdir", "-p", str(folder))) + f" && cp {shlex.quote(str(ROOT))}/benchmarks/*.py "
    return Step(("sh", "-c", copy + shlex.quote(str(folder)))), Step(
        (sys.executable, str(folder / f"{name}.py"), *options)
    )


def load(url: str, out: Path, *options: str) -> tuple[str, ...]:
    return (*ECHO, "load", "--url", url, "--workloads", *LOADS, "--seconds", "20", *options, "--out", str(out))


def sglang_stages(args: Args, out: Path, url: str) -> Iterator[Stage]:
    """SGLang in an environment of its own: without speculation, as it comes, and under each mode of the plugin."""
    skip = "" if args.model and args.drafter else "no --model and --drafter were given"
    home = out / "sglang-install"
    python = str(home / "venv" / "bin" / "python")
    costs = (
        "calibrate",
        "roofline",
        "--hardware",
        "h100",
        "--model",
        "llama-3.1-8b",
        "--out",
        str(home / "profile.json"),
    )
    install = [
        Step((sys.executable, "-m", "venv", "--clear", str(home / "venv"))),
        Step((python, "-m", "pip", "install", f"sglang=={RECORDED}", "--editable", f"{ROOT}[sglang]")),
        Step((python, "-m", "echo_rl.cli", "sglang", "doctor")),
        *([] if args.profile else [Step((*ECHO, *costs))]),
    ]
    yield Stage("sglang-install", f"SGLang {RECORDED} with the plugin", 60, tuple(install), skip=skip)
    base = (
        *(python, "-m", "sglang.launch_server", "--model-path", str(args.model), "--port", str(args.port)),
        *("--dtype", "bfloat16", "--max-running-requests", "64", "--cuda-graph-max-bs-decode", "64"),
        "--disable-radix-cache",
    )
    draft = ("--speculative-algorithm", "EAGLE3", "--speculative-draft-model-path", str(args.drafter))
    servers: dict[str, tuple[str, tuple[str, ...], dict[str, str]]] = {
        "none": ("without speculation", (), {}),
        "eagle3": ("stock EAGLE-3", (*draft, *shape(5, 4, 8)), {}),
    }
    for mode in MODES:
        file = home.parent / f"sglang-{mode}.json"
        launch = PluginConfig.of(settings(args, mode)).launch
        more = shape(launch.steps, 1 if mode == "adaptive" else 8, launch.width)
        options = (*draft, *more, *(["--speculative-adaptive"] if mode == "adaptive" else []))
        servers[mode] = (f"the plugin, mode {mode}", options, {ENVIRONMENT: str(file)})
    for name, (title, options, env) in servers.items():
        folder = out / f"sglang-{name}"
        measure = Step(load(url, folder), (*base, *options), url, env)
        check = [Step((python, "-m", "echo_rl.cli", "sglang", "doctor"), env=env)] if env else []
        note = "bfloat16: outputs may differ from those without speculation where two tokens nearly tie."
        if env:
            kind = f"those of {args.profile}" if args.profile else "modelled, not measured"
            note += f" Controller {args.controller}; its costs are {kind}, its gates those of another drafter."
        yield Stage(folder.name, f"SGLang, {title}", 90, (*check, measure), "sglang-install", skip, note)


def shape(steps: int, top_k: int, width: int) -> tuple[str, ...]:
    names = ("num-steps", "eagle-topk", "num-draft-tokens")
    return tuple(p for n, v in zip(names, (steps, top_k, width), strict=True) for p in (f"--speculative-{n}", str(v)))


def settings(args: Args, mode: str) -> dict[str, Any]:
    """The plugin's configuration file."""
    profile = args.profile or args.out / "sglang-install" / "profile.json"
    return {"controller": args.controller, "mode": mode, "profile": str(profile.resolve()), "gates": PACKAGED}


def run_step(step: Step, log: Path, seconds: float) -> int | None:
    """The real `Runner`. Raises `EchoError` where the server doesn't come up."""
    end = time.monotonic() + seconds
    env = {**{key: value for key, value in os.environ.items() if key not in WITHHELD}, **step.env}
    with ExitStack() as stack:
        stream = stack.enter_context(open(log, "ab"))
        stream.write(("\n".join(f"$ {line}" for line in step.lines()) + "\n").encode())
        stream.flush()
        if step.serve:
            server = stack.enter_context(started(step.serve, stream, env, step.url))
            while not healthy(step.url):
                if server.poll() is not None:
                    raise EchoError(f"the server ended with {server.returncode} before it was ready")
                if time.monotonic() > end:
                    return None
                time.sleep(POLL)
        process = stack.enter_context(started(step.command, stream, env))
        try:
            return process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            return None


@contextmanager
def started(
    command: tuple[str, ...], stream: IO[bytes], env: Mapping[str, str], url: str = ""
) -> Iterator[subprocess.Popen[bytes]]:
    """A process whose whole group is ended on the way out; what listens at `url` must not be there yet."""
    port = int(url.rpartition(":")[2]) if url else 0
    with socket.socket() as probe:
        if port and probe.connect_ex(("127.0.0.1", port)) == 0:
            raise EchoError(f"port {port} is taken; give another --port")
    process = subprocess.Popen(
        command, stdout=stream, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=env, cwd=ROOT,
        start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # and what it left behind
        process.wait()


def healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=10) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


class Validation:
    """The stages of a folder and what became of them (``state.json``)."""

    def __init__(self, args: Args, runner: Runner = run_step) -> None:
        self.args, self.runner, self.stages, self.out = args, runner, plan(args), args.out.resolve()
        path = self.out / "state.json"
        self.state: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else {}

    def run(self) -> bool:
        """Whether nothing failed. Raises `ConfigError` where torch sees no GPU, or another than the folder's."""
        for stage in self.stages:
            self.do(stage)
            if stage.name == "environment":
                self._require_gpu()
                for mode in MODES:
                    write_json(self.out / f"sglang-{mode}.json", settings(self.args, mode))
            write_report(self.out, self.machine(), self.stages, self.state)
        return not any(self.state[s.name]["outcome"] in FAILED for s in self.stages)

    def machine(self) -> dict[str, Any]:
        path = self.out / "environment" / "machine.json"
        return json.loads(path.read_text()) if path.is_file() else {}

    def _require_gpu(self) -> None:
        seen, here = self.state["environment"], self.machine()
        if seen["outcome"] != "done" or not here.get("gpu"):
            raise ConfigError(
                f"torch {here.get('torch')} sees no GPU here (log: {self.out / 'environment.log'}); install a build of "
                "torch for CUDA or ROCm and check nvidia-smi, or see the plan with --dry-run"
            )
        if seen.setdefault("gpu", here["gpu"]) != here["gpu"]:
            raise ConfigError(f"{self.out} is of {seen['gpu']}, this is {here['gpu']}; give another --out")

    def do(self, stage: Stage) -> None:
        """Unless it is done already. A folder of other commands, or one to do again, is begun anew."""
        found, folder = self.state.get(stage.name), self.out / stage.name
        setting = [*stage.lines(), stage.note]
        anew = stage.name in self.args.again or (found is not None and found["setting"] != setting)
        if stage.name != "environment":
            if found and found["outcome"] == "done" and not anew:
                return say(f"{stage.name}: done before")
            if anew:
                shutil.rmtree(folder, ignore_errors=True)
        missing = stage.needs and self.state[stage.needs]["outcome"] != "done"
        reason = stage.skip or (f"{stage.needs} was not done" if missing else "")
        begin = time.monotonic()
        outcome, tail = ("skipped", [reason]) if reason else self._run(stage, folder)
        seconds = round(time.monotonic() - begin, 1)
        fresh = {"outcome": outcome, "seconds": seconds, "tail": tail, "setting": setting}
        self.state[stage.name] = {**(found or {}), **fresh}
        write_json(self.out / "state.json", self.state)
        say(f"{stage.name}: {outcome} {seconds:.0f} s {reason}")

    def _run(self, stage: Stage, folder: Path) -> tuple[str, list[str]]:
        folder.mkdir(parents=True, exist_ok=True)
        log = self.out / f"{stage.name}.log"
        log.unlink(missing_ok=True)
        limit = 60 * stage.minutes * self.args.patience
        say(f"{stage.name}: at most {limit / 60:.0f} min, log {log}")
        end = time.monotonic() + limit
        for step in stage.steps:
            try:
                code = self.runner(step, log, max(0.0, end - time.monotonic()))
                last = f"exit code {code}"
            except (OSError, EchoError) as error:
                code, last = 1, str(error)
            if code != 0:
                said = log.read_text(errors="replace").splitlines()[-TAIL:] if log.is_file() else []
                return ("timed out", [*said, f"limit {limit:.0f} s"]) if code is None else ("failed", [*said, last])
        return "done", []


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def describe(path: Path) -> None:
    """Writes what the results depend on: GPU, driver, torch, triton, whether a CUDA graph replays."""
    import torch

    gpu = torch.cuda.is_available()
    found: dict[str, Any] = {"gpu": None, **machine(torch=torch.__version__, cuda=str(torch.version.cuda))}
    found["triton"] = next((d.version for d in metadata.distributions(name="triton")), None)
    if gpu:
        known = torch.cuda.get_device_properties(0)
        found |= {"gpu": known.name, "memory_gb": round(known.total_memory / 1e9), "driver": driver(), "graphs": True}
        try:
            graph, cell = torch.cuda.CUDAGraph(), torch.zeros(1, device="cuda")
            with torch.cuda.graph(graph):
                cell += 1
            graph.replay()
            found["graphs"] = cell.item() == 1
        except RuntimeError as error:
            found["graphs"] = str(error)
    write_json(path, found)


def driver() -> str | None:
    try:
        query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        return subprocess.run(query, capture_output=True, text=True, timeout=60, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        return None


Rows = list[dict[str, Any]]


def numbers(stage: str, folder: Path) -> Rows:
    """The key numbers that a stage left in its folder, as rows of a table; none where it left none."""
    if stage in ("kernels", "runtime"):
        suites = ElementTree.parse(folder / "junit.xml").iter("testsuite") if (folder / "junit.xml").is_file() else ()
        return [{key: suite.get(key) for key in ("tests", "failures", "errors", "skipped")} for suite in suites]
    if stage == "calibrate" and (folder / "profile.json").is_file():
        costs = CostProfile.load(folder / "profile.json")
        return [{"batch": b, "plain pass, ms": f"{1e3 * costs.ar_seconds(b):.2f}", "K_max": costs.knee(b)}
                for b in costs.batches]  # fmt: skip
    if stage.startswith("sglang-"):
        return sglang_rows(folder)
    rows: Rows = []
    for path in sorted(folder.glob("**/*.json")):
        result, step = json.loads(path.read_text()), path.relative_to(folder).parts[0]
        if path.name == "kernels.json":
            used = [(kernel, use) for kernel, targets in result["kernels"].items() for use in targets.values()]
            launches = {f"launches a step, {when}": result["totals"][when]["launches"] for when in ("before", "after")}
            spilled = sum(use["spilled"] > 0 for _, use in used)
            rows.append({"compiled": len(used), "that spill": spilled, **launches})
        elif path.name == "losslessness.json":
            keys = ("requests", "tokens", "diverged_requests")
            rows += [{"step": step, "dtype": d, **{k: of[k] for k in keys}} for d, of in result["dtypes"].items()]
        elif path.name == "result.json" and stage == "bench":
            rows += [{"step": step, **bench_row(cell)} for cell in result["cells"]]
        elif path.name == "result.json":
            rows += [load_row(cell) for cell in result["cells"]]
    return rows


def bench_row(cell: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "in flight": cell["concurrency"], "arm": cell["arm"], "tokens/s": Interval(**cell["throughput"]).text(1),
        "speed-up": Interval(**cell["speedup"]).text(2, "x") if cell["speedup"] else "1",
        "MAT": f"{cell['mat']:.2f}" if cell["mat"] else "-", "outputs differing": differing(cell),
    }  # fmt: skip


def load_row(cell: Mapping[str, Any]) -> dict[str, Any]:
    ratio = cell["ratios"].get("tokens_per_second")
    return {
        "workload": cell["workload"], "arm": cell["arm"],
        "tokens/s": Interval(**cell["rates"]["tokens_per_second"]).text(1),
        "against none": Interval(**ratio).text(2, "x") if ratio else "-",
        **{f"{n}, ms p50": f"{1e3 * of['p50']:.1f}" if (of := cell["latency"][n]) else "-" for n in ("ttft", "tpot")},
        "outputs differing": differing(cell), "failed": sum(cell["errors"].values()),
    }  # fmt: skip


def differing(cell: Mapping[str, Any]) -> str:
    outputs = cell["outputs"]
    return f"{outputs['differing']} of {outputs['requests']}" if outputs else "-"


def sglang_rows(folder: Path) -> Rows:
    """A server's load against that without speculation: blocks of the same prompts, though not interleaved."""
    plain, rows = records(folder.parent / "sglang-none"), []
    for workload, blocks in records(folder).items():
        base = plain.get(workload, []) if folder.name != "sglang-none" else []
        found = cell(blocks, base if len(base) == len(blocks) else None, None)
        rows.append(load_row({"workload": workload, "arm": folder.name.removeprefix("sglang-"), **found}))
    return rows


def records(folder: Path) -> dict[str, list[LoadRecord]]:
    """By workload, the blocks in order."""
    found: dict[str, list[LoadRecord]] = {}
    for row in sorted(read_lines(folder / "blocks.jsonl"), key=lambda row: int(row["unit"]["block"])):
        found.setdefault(row["unit"]["workload"], []).append(LoadRecord.from_json(row["record"]))
    return found


def write_report(out: Path, here: dict[str, Any], stages: Sequence[Stage], state: Mapping[str, Any]) -> None:
    """``report.json`` and ``report.md``."""
    entries, text = [], ["# GPU validation", "", *(f"- {key}: {value}" for key, value in here.items())]
    for stage in stages:
        entry = {"outcome": "not run", "seconds": 0.0, "tail": [], **state.get(stage.name, {}), "name": stage.name}
        try:
            entry["numbers"] = numbers(stage.name, out / stage.name) if entry["outcome"] in ("done", *FAILED) else []
        except (OSError, ValueError, LookupError, TypeError, ElementTree.ParseError) as error:
            entry |= {"numbers": [], "tail": [*entry["tail"], f"results not readable: {error!r}"]}
        entries.append(entry)
        text += ["", f"## {stage.title}", "", f"`{stage.name}`: **{entry['outcome']}**, {entry['seconds']:.0f} s."]
        text += [stage.note] if stage.note else []
        text += ["", "```", *entry["tail"], "```"] if entry["tail"] else []
        if entry["numbers"]:
            heads = list(entry["numbers"][0])
            cells = [heads, ["---"] * len(heads), *([str(row[h]) for h in heads] for row in entry["numbers"])]
            text += ["" if entry["outcome"] == "done" else "\nUnfinished:\n", *(f"| {' | '.join(c)} |" for c in cells)]
        elif stage.name not in ("environment", "sglang-install"):
            text += ["", "Nothing was measured."]
    write_json(out / "report.json", {"machine": here, "stages": entries})
    (out / "report.md").write_text("\n".join(text) + "\n")


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    try:
        if args.probe:
            return describe(args.probe)
        if args.dry_run:
            for stage in plan(args):
                print(f"# {stage.name}: {stage.title}; at most {stage.minutes * args.patience:.0f} min"
                      + (f"; SKIPPED: {stage.skip}" if stage.skip else ""), *stage.lines(), "", sep="\n")  # fmt: skip
            return
        sys.exit(0 if Validation(args).run() else 1)
    except EchoError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from here")


if __name__ == "__main__":
    main()
