"""Builds the C++ extension once and loads it. Knows compilers and cache folders, no operation.

The compiled file's name holds a hash of everything it depends on (sources, flags, torch, Python and
the processor, since it is compiled for the processor at hand), so a stale file is never loaded. It
is built in a temporary folder and moved into place in one step: a build that is interrupted, or two
builds at the same time, leave nothing half-written.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import platform
import sys
import sysconfig
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import cast

import torch

from echo_kernels.interface import Implementation

NAME = "echo_kernels_cpp"
CSRC = Path(__file__).parent / "csrc"
CFLAGS = (
    "-O3",
    "-march=native",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-fopenmp",
)
REMEDY = "install a C++17 compiler (g++ or clang++) and `pip install ninja`, or set ECHO_KERNELS=reference"
log = logging.getLogger(__name__)


class BuildError(RuntimeError):
    """The extension cannot be built or loaded here; the message says the remedy."""


def load_extension() -> Implementation:
    """The compiled backend, built first if the cache has none. Raises `BuildError`."""
    target = cache_folder() / f"{NAME}-{fingerprint()}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not target.exists():
        _build(target)
    return _import(target)


def cache_folder() -> Path:
    """TORCH_EXTENSIONS_DIR where it is set, else a folder under the user's cache."""
    chosen = os.environ.get("TORCH_EXTENSIONS_DIR")
    return Path(chosen) if chosen else Path.home() / ".cache" / "echo-rl" / "extensions"


def fingerprint() -> str:
    """A hash of all that the compiled file depends on."""
    digest = hashlib.sha256()
    for part in (*CFLAGS, torch.__version__, sys.version, os.environ.get("CXX", ""), _processor()):
        digest.update(part.encode() + b"\0")
    for path in _files("*"):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _files(pattern: str) -> Iterable[Path]:
    return sorted(path for path in CSRC.glob(pattern) if path.suffix in (".cpp", ".h"))


def _processor() -> str:
    """The text that -march=native depends on: the instruction sets, where the system lists them."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line
    return platform.machine() + platform.processor()


def _build(target: Path) -> None:
    log.info("building the C++ kernels (once, under a minute) into %s", target.parent)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        from torch.utils import cpp_extension  # slow to import: only a build pays for it

        with tempfile.TemporaryDirectory(prefix="build-", dir=target.parent) as folder:
            cpp_extension.load(
                name=NAME,
                sources=[str(path) for path in _files("*.cpp")],
                extra_cflags=list(CFLAGS),
                extra_ldflags=["-fopenmp"],
                build_directory=folder,
                verbose=False,
            )
            os.replace(next(Path(folder).glob(f"{NAME}*.so")), target)
    except (OSError, RuntimeError, ImportError, StopIteration) as error:
        raise BuildError(f"the build failed ({_last_line(error)}); {REMEDY}") from error


def _import(path: Path) -> Implementation:
    spec = importlib.util.spec_from_file_location(NAME, path)
    assert spec is not None and spec.loader is not None
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        raise BuildError(f"{path} does not load ({error}); delete it and try again, or {REMEDY}") from error
    return cast(Implementation, module)


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
