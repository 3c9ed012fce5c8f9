"""What a GPU validation does: its stages in order, and the processes that each of them is made of. Runs nothing."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from echo_rl.costs.files import calibrated
from echo_rl.errors import ConfigError
from echo_rl.integrations.sglang.contract import RECORDED
from echo_rl.integrations.sglang.settings import ENVIRONMENT, PACKAGED, PluginConfig

ROOT = Path(__file__).resolve().parent.parent.parent
ECHO = (sys.executable, "-m", "echo_rl.cli")
ROOMY = ("--device", "cuda", "--kv-tokens", "131072")
WAYS = tuple((step, ("--step", step, *ROOMY)) for step in ("device", "eager"))
"""The two ways the engine serves a step, with their options: everything is measured both ways."""
INSTALL = "sglang-install"
MODES = ("adaptive", "trees")
"""Modes of the SGLang plugin, each measured in a stage of its own."""
BFLOAT16 = "bfloat16: outputs may differ from those without speculation where two tokens nearly tie."
NEAR_TIES = "In bfloat16 tokens may differ where two of them nearly tie"


@dataclass(frozen=True)
class Args:
    """Validate and measure this project on a GPU."""

    out: Path = Path("results/gpu")
    """Folder of the report, the logs and all results."""
    dry_run: bool = False
    """Print the plan with the exact commands and do nothing."""
    again: tuple[str, ...] = ()
    """Stages to do anew."""
    minutes: float = float("inf")
    """Ends this run after so many minutes; the same command goes on from there."""
    model: str | None = None
    """Target for SGLang: a folder or a Hugging Face name, as ``meta-llama/Llama-3.1-8B-Instruct``; with `drafter`."""
    drafter: str | None = None
    """Its EAGLE-3 drafter, as ``yuhuili/EAGLE3-LLaMA3.1-Instruct-8B``."""
    controller: str = "echo"
    """The controller that decides in SGLang."""
    profile: Path | None = None
    """Costs for that controller; by default those modelled for a Llama-3.1-8B on an H100."""
    port: int = 8123
    """A free port for the servers, one at a time."""
    patience: float = 1.0
    """Multiplies every time limit."""

    def folder(self, stage: str) -> Path:
        return self.out.resolve() / stage

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@dataclass(frozen=True)
class Step:
    """One process, with a server that is up while it runs."""

    command: tuple[str, ...]
    serve: tuple[str, ...] = ()
    """The server's command; empty where none is needed."""
    url: str = ""
    """The address at which the server answers."""
    env: Mapping[str, str] = field(default_factory=dict)
    """What both get beside the environment of this process."""

    def lines(self) -> list[str]:
        """The commands as a shell would take them."""
        known = " ".join(f"{key}={shlex.quote(value)}" for key, value in self.env.items())
        every = [f"{shlex.join(self.serve)} &  # until {self.url}/health answers"] if self.serve else []
        return [f"{known} {line}".strip() for line in [*every, shlex.join(self.command)]]


@dataclass(frozen=True)
class Stage:
    """Steps that succeed or fail together."""

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
    thorough: bool = False
    """Whether the other steps are still run after one has failed."""

    def lines(self) -> list[str]:
        return [line for step in self.steps for line in step.lines()]


def plan(args: Args) -> tuple[Stage, ...]:
    """All stages in order. Raises `ConfigError` for a stage to do again that does not exist."""
    stages = (*kernel_stages(args), *engine_stages(args), *sglang_stages(args))
    unknown = set(args.again) - {stage.name for stage in stages}
    if unknown:
        raise ConfigError(f"no stage {', '.join(unknown)}; give some of {', '.join(s.name for s in stages)}")
    return stages


def kernel_stages(args: Args) -> Iterator[Stage]:
    describe = module("scripts.gpu.machine", str(args.folder("environment") / "machine.json"))
    yield Stage("environment", "The machine", 5, (describe,))
    yield Stage("kernels", "Kernels on the device against their reference", 90, (tests(args, "kernels"),))
    compiled = benchmark("kernels.cost", args.folder("compile"))
    yield Stage("compile", "Kernels compiled ahead of time", 60, (compiled,))
    timings = module("benchmarks.kernels.timings", "--out", str(args.folder("timings") / "timings.json"))
    note = "Median of one launch with cold caches; the reference is torch on the same device. Shapes of a Llama-3.1-8B."
    yield Stage("timings", "Kernels timed against their reference", 30, (timings,), note=note)


def engine_stages(args: Args) -> Iterator[Stage]:
    on_gpu = tests(args, "runtime", ECHO_RL_TEST_DEVICE="cuda")
    yield Stage("runtime", "Tests of the engine and its device step", 45, (on_gpu,), note="Tiny models on the GPU.")
    parity = (
        module("benchmarks.engine.parity", "--out", f"{args.folder('parity') / dtype}.json", "--dtype", dtype, *ROOMY)
        for dtype in ("float32", "bfloat16")
    )
    title = "The device step, launched and replayed from CUDA graphs, against the eager step"
    note = f"{NEAR_TIES}; in float32 the stage fails if any does."
    yield Stage("parity", title, 30, tuple(parity), note=note, thorough=True)
    profile = args.folder("calibrate") / "profile.json"
    cost = (*ECHO, "calibrate", "cost", "--out", str(profile.parent), *ROOMY)
    keep = ("install", "-D", str(profile), str(calibrated("profile.json")))
    note = "Passes are replayed from graphs, as they are served. Controllers here use these costs from then on."
    yield Stage("calibrate", "Costs of drafting and verifying", 60, (Step(cost), Step(keep)), note=note)
    same = (benchmark("engine.losslessness", args.folder("losslessness") / step, *engine) for step, engine in WAYS)
    note = f"{NEAR_TIES}: how nearly is in losslessness.json."
    yield Stage("losslessness", "Tokens against plain decoding", 180, tuple(same), note=note, thorough=True)
    sweep = (*ECHO, "bench", "--arms", "none", "eagle3", "echo", "ppo", "--concurrency", "1", "8", "32", "64")
    bench = (Step((*sweep, *engine, "--out", str(args.folder("bench") / step))) for step, engine in WAYS)
    yield Stage("bench", "Controllers in the engine", 180, tuple(bench), thorough=True)
    serve = (*ECHO, "serve", "--controller", "none", "--port", str(args.port), *ROOMY)
    measure = Step(load(args, "serve", "--arms", "none", "echo", "ppo"), serve, args.url)
    yield Stage("serve", "Controllers through HTTP", 60, (measure,))


def sglang_stages(args: Args) -> Iterator[Stage]:
    """SGLang in an environment of its own: without speculation, as it comes, and steered by the plugin."""
    skip = "" if args.model and args.drafter else "no --model and --drafter were given"
    python = str(args.folder(INSTALL) / "venv" / "bin" / "python")
    doctor = (python, "-m", "echo_rl.cli", "sglang", "doctor")
    yield Stage(INSTALL, f"SGLang {RECORDED} with the plugin", 60, install(args, python, doctor), skip=skip)
    costs = f"those of {args.profile}" if args.profile else "modelled, not measured"
    steered = f" Controller {args.controller}; its costs are {costs}, its gates those of another drafter."
    for mode, (title, serve) in servers(args, python).items():
        name = f"sglang-{mode}"
        env = {ENVIRONMENT: f"{args.folder(name)}.json"} if mode in MODES else {}
        check = [Step(doctor, env=env)] if env else []
        note = BFLOAT16 + (steered if env else "")
        yield Stage(
            name, f"SGLang, {title}", 90, (*check, Step(load(args, name), serve, args.url, env)), INSTALL, skip, note
        )


def install(args: Args, python: str, doctor: tuple[str, ...]) -> tuple[Step, ...]:
    home = args.folder(INSTALL)
    modelled = ("calibrate", "roofline", "--hardware", "h100", "--model", "llama-3.1-8b", "--out")
    return (
        module("venv", "--clear", str(home / "venv")),
        Step((python, "-m", "pip", "install", f"sglang=={RECORDED}", "--editable", f"{ROOT}[sglang]")),
        Step(doctor),
        *([] if args.profile else [Step((*ECHO, *modelled, str(home / "profile.json")))]),
    )


def servers(args: Args, python: str) -> dict[str, tuple[str, tuple[str, ...]]]:
    """What each server of SGLang is and the command that starts it, by name."""
    base = (
        *(python, "-m", "sglang.launch_server", "--model-path", str(args.model), "--port", str(args.port)),
        *("--dtype", "bfloat16", "--max-running-requests", "64", "--cuda-graph-max-bs-decode", "64"),
        "--disable-radix-cache",
    )
    draft = (*base, "--speculative-algorithm", "EAGLE3", "--speculative-draft-model-path", str(args.drafter))
    found = {"none": ("without speculation", base), "eagle3": ("stock EAGLE-3", (*draft, *shape(5, 4, 8)))}
    for mode in MODES:
        launch, adaptive = PluginConfig.of(settings(args, mode)).launch, mode == "adaptive"
        more = (*shape(launch.steps, 1 if adaptive else 8, launch.width), *["--speculative-adaptive"] * adaptive)
        found[mode] = (f"the plugin, mode {mode}", (*draft, *more))
    return found


def shape(steps: int, top_k: int, width: int) -> tuple[str, ...]:
    names = ("num-steps", "eagle-topk", "num-draft-tokens")
    return tuple(p for n, v in zip(names, (steps, top_k, width), strict=True) for p in (f"--speculative-{n}", str(v)))


def settings(args: Args, mode: str) -> dict[str, Any]:
    """The plugin's configuration file."""
    profile = args.profile or args.folder(INSTALL) / "profile.json"
    return {"controller": args.controller, "mode": mode, "profile": str(profile.resolve()), "gates": PACKAGED}


def module(name: str, *options: str, **env: str) -> Step:
    return Step((sys.executable, "-m", name, *options), env=env)


def benchmark(name: str, folder: Path, *options: str) -> Step:
    """A benchmark that writes into ``folder/results``, so that the committed results stay as they are."""
    return module(f"benchmarks.{name}", *options, ECHO_RL_RESULTS=str(folder / "results"))


def tests(args: Args, name: str, **env: str) -> Step:
    report = f"--junitxml={args.folder(name) / 'junit.xml'}"
    return module("pytest", "-p", "no:cacheprovider", "--timeout=900", report, str(ROOT / "tests" / name), **env)


def load(args: Args, stage: str, *options: str) -> tuple[str, ...]:
    loads = ("closed:1", "closed:8", "closed:32", "closed:64")
    to = ("--url", args.url, "--workloads", *loads, "--seconds", "20", *options, "--out", str(args.folder(stage)))
    return (*ECHO, "load", *to)
