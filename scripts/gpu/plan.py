"""Which stages there are, and the commands of those that need this project alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from echo_rl.costs.files import calibrated
from echo_rl.errors import ConfigError
from scripts.gpu.sglang_stages import sglang_stages
from scripts.gpu.steps import ECHO, ROOMY, Args, Stage, Step, benchmark, load, module, tests

WAYS = tuple((step, ("--step", step, *ROOMY)) for step in ("device", "eager"))
"""How the engine serves: everything is measured both ways."""


def plan(args: Args) -> tuple[Stage, ...]:
    """All stages in order. Raises `ConfigError`."""
    out, url = args.out.resolve(), f"http://127.0.0.1:{args.port}"
    stages = (*kernel_stages(out), *engine_stages(args, out, url), *sglang_stages(args, out, url))
    unknown = set(args.again) - {stage.name for stage in stages}
    if unknown:
        raise ConfigError(f"no stage {', '.join(unknown)}; give some of {', '.join(s.name for s in stages)}")
    return stages


def kernel_stages(out: Path) -> Iterator[Stage]:
    describe = module("scripts.gpu.machine", str(out / "environment" / "machine.json"))
    yield Stage("environment", "The machine", 5, (describe,))
    yield Stage("kernels", "Kernels on the device against their reference", 90, tests("kernels", out))
    yield Stage("compile", "Kernels compiled ahead of time", 60, (benchmark("kernels.cost", out / "compile"),))
    timings = module("benchmarks.kernels.timings", "--out", str(out / "timings" / "timings.json"))
    note = "Median of one launch with cold caches; the reference is torch on the same device. Shapes of a Llama-3.1-8B."
    yield Stage("timings", "Kernels timed against their reference", 30, (timings,), note=note)


def engine_stages(args: Args, out: Path, url: str) -> Iterator[Stage]:
    note = "Tiny models on the GPU."
    on_gpu = tests("runtime", out, ECHO_RL_TEST_DEVICE="cuda")
    yield Stage("runtime", "Tests of the engine and its device step", 45, on_gpu, note=note)
    parity = (
        module("benchmarks.engine.parity", "--out", str(out / "parity" / f"{dtype}.json"), "--dtype", dtype, *ROOMY)
        for dtype in ("float32", "bfloat16")
    )
    note = "In bfloat16 tokens may differ where two of them nearly tie; in float32 the stage fails if any does."
    title = "The device step, launched and replayed from CUDA graphs, against the eager step"
    yield Stage("parity", title, 30, tuple(parity), note=note, thorough=True)
    profile = out / "calibrate" / "profile.json"
    cost = (*ECHO, "calibrate", "cost", "--out", str(profile.parent), *ROOMY)
    keep = ("install", "-D", str(profile), str(calibrated("profile.json")))
    note = (
        "Passes are replayed from graphs, as they are served. Controllers on this machine use these costs from then on."
    )
    yield Stage("calibrate", "Costs of drafting and verifying", 60, (Step(cost), Step(keep)), note=note)
    same = [benchmark("engine.losslessness", out / "losslessness" / step, *engine) for step, engine in WAYS]
    note = "In bfloat16 tokens may differ where two of them nearly tie: how nearly is in losslessness.json."
    yield Stage("losslessness", "Tokens against plain decoding", 180, tuple(same), note=note, thorough=True)
    sweep = (*ECHO, "bench", "--arms", "none", "eagle3", "echo", "ppo", "--concurrency", "1", "8", "32", "64")
    bench = tuple(Step((*sweep, *engine, "--out", str(out / "bench" / step))) for step, engine in WAYS)
    yield Stage("bench", "Controllers in the engine", 180, bench, thorough=True)
    serve = (*ECHO, "serve", "--controller", "none", "--port", str(args.port), *ROOMY)
    arms = ("--arms", "none", "echo", "ppo")
    yield Stage("serve", "Controllers through HTTP", 60, (Step(load(url, out / "serve", *arms), serve, url),))
