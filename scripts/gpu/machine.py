"""Describes what the results depend on: GPU, driver, torch, triton, whether a CUDA graph replays.

python -m scripts.gpu.machine FILE
"""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from echo_rl import __version__
from echo_rl.utils.machine import machine
from echo_rl.utils.result_store import write_json
from scripts.gpu.plan import ROOT


def describe() -> dict[str, Any]:
    """`gpu` is None where torch sees none."""
    found: dict[str, Any] = {"gpu": None, "echo_rl": __version__, "commit": said("git", "rev-parse", "HEAD")}
    found |= machine(torch=torch.__version__, cuda=str(torch.version.cuda), hip=str(torch.version.hip))
    found |= {name: version(name) for name in ("triton", "transformers", "numpy")}
    if torch.cuda.is_available():
        known = torch.cuda.get_device_properties(0)
        found |= {"gpu": known.name, "memory_gb": round(known.total_memory / 1e9), "gpus": torch.cuda.device_count()}
        query = ("nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm,mig.mode.current")
        found |= {"driver, power, clock, MIG": said(*query, "--format=csv,noheader"), "graphs": graphs()}
    return found


def graphs() -> bool | str:
    """Whether a CUDA graph replays, or why it can't be captured."""
    try:
        graph, cell = torch.cuda.CUDAGraph(), torch.zeros(1, device="cuda")
        with torch.cuda.graph(graph):
            cell += 1
        graph.replay()
        return cell.item() == 1
    except RuntimeError as error:
        return str(error)


def version(package: str) -> str | None:
    return next((d.version for d in metadata.distributions(name=package)), None)


def said(*command: str) -> str | None:
    """The first line that a command prints; None where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, cwd=ROOT)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.split("\n")[0]


if __name__ == "__main__":
    write_json(Path(sys.argv[1]), describe())
