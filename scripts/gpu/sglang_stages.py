"""The commands that measure SGLang in an environment of its own: without speculation, as it comes, and steered."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from echo_rl.integrations.sglang.contract import RECORDED
from echo_rl.integrations.sglang.settings import ENVIRONMENT, PACKAGED, PluginConfig
from scripts.gpu.steps import ECHO, ROOT, Args, Stage, Step, load

MODES = ("adaptive", "trees")
INSTALL = "sglang-install"
BFLOAT16 = "bfloat16: outputs may differ from those without speculation where two tokens nearly tie."


def sglang_stages(args: Args, out: Path, url: str) -> Iterator[Stage]:
    skip = "" if args.model and args.drafter else "no --model and --drafter were given"
    python = str(out / INSTALL / "venv" / "bin" / "python")
    yield Stage(INSTALL, f"SGLang {RECORDED} with the plugin", 60, install(args, out / INSTALL, python), skip=skip)
    for mode, (title, serve) in servers(args, python).items():
        env = {ENVIRONMENT: str(out / f"sglang-{mode}.json")} if mode in MODES else {}
        measure = Step(load(url, out / f"sglang-{mode}"), serve, url, env)
        check = [Step((python, "-m", "echo_rl.cli", "sglang", "doctor"), env=env)] if env else []
        note = f"{BFLOAT16} {costs_note(args)}" if env else BFLOAT16
        yield Stage(f"sglang-{mode}", f"SGLang, {title}", 90, (*check, measure), INSTALL, skip, note)


def install(args: Args, home: Path, python: str) -> tuple[Step, ...]:
    modelled = ("calibrate", "roofline", "--hardware", "h100", "--model", "llama-3.1-8b", "--out")
    return (
        Step((sys.executable, "-m", "venv", "--clear", str(home / "venv"))),
        Step((python, "-m", "pip", "install", f"sglang=={RECORDED}", "--editable", f"{ROOT}[sglang]")),
        Step((python, "-m", "echo_rl.cli", "sglang", "doctor")),
        *([] if args.profile else [Step((*ECHO, *modelled, str(home / "profile.json")))]),
    )


def servers(args: Args, python: str) -> dict[str, tuple[str, tuple[str, ...]]]:
    """By name: what it is, and the command that starts it."""
    base = (
        *(python, "-m", "sglang.launch_server", "--model-path", str(args.model), "--port", str(args.port)),
        *("--dtype", "bfloat16", "--max-running-requests", "64", "--cuda-graph-max-bs-decode", "64"),
        "--disable-radix-cache",
    )
    draft = ("--speculative-algorithm", "EAGLE3", "--speculative-draft-model-path", str(args.drafter))
    found = {"none": ("without speculation", base), "eagle3": ("stock EAGLE-3", (*base, *draft, *shape(5, 4, 8)))}
    for mode in MODES:
        launch = PluginConfig.of(settings(args, mode)).launch
        more = shape(launch.steps, 1 if mode == "adaptive" else 8, launch.width)
        adaptive = ("--speculative-adaptive",) if mode == "adaptive" else ()
        found[mode] = (f"the plugin, mode {mode}", (*base, *draft, *more, *adaptive))
    return found


def shape(steps: int, top_k: int, width: int) -> tuple[str, ...]:
    names = ("num-steps", "eagle-topk", "num-draft-tokens")
    return tuple(p for n, v in zip(names, (steps, top_k, width), strict=True) for p in (f"--speculative-{n}", str(v)))


def settings(args: Args, mode: str) -> dict[str, Any]:
    """The plugin's configuration file."""
    profile = args.profile or args.out / INSTALL / "profile.json"
    return {"controller": args.controller, "mode": mode, "profile": str(profile.resolve()), "gates": PACKAGED}


def costs_note(args: Args) -> str:
    kind = f"those of {args.profile}" if args.profile else "modelled, not measured"
    return f"Controller {args.controller}; its costs are {kind}, its gates those of another drafter."
