"""Describes the machine that timings were taken on."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def machine(**more: str) -> dict[str, str]:
    """Everything that timings depend on: the processor and what the caller adds (device, dtype, torch version)."""
    return {"cpu": _cpu_name(), "cores": str(os.cpu_count()), "python": platform.python_version(), **more}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
