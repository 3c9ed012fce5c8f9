"""Finds the cache folder and the shipped checkpoints; fetches archives of published packages, never installed or
run."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

from echo_rl.errors import EchoError

TIMEOUT_S = 600


class PackageUnavailable(EchoError, RuntimeError):
    """An archive could not be fetched, or is not the pinned one."""


def cache_root() -> Path:
    """``$ECHO_RL_CACHE``, or ``~/.cache/echo-rl``."""
    return Path(os.environ.get("ECHO_RL_CACHE") or Path.home() / ".cache" / "echo-rl")


def shipped_checkpoints() -> Path:
    """``$ECHO_RL_CHECKPOINTS``, or the `checkpoints` of the source tree, or the installed ones without one."""
    if folder := os.environ.get("ECHO_RL_CHECKPOINTS"):
        return Path(folder)
    source = Path(__file__).resolve().parents[2] / "checkpoints"
    return source if source.is_dir() else Path(sysconfig.get_path("data"), "share", "echo-rl", "checkpoints")


@dataclass(frozen=True)
class Archive:
    """One pinned file of a package index: a wheel, or a source distribution where `wheel` is false."""

    package: str
    version: str
    file: str
    sha256: str
    wheel: bool = True

    def fetch(self, folder: Path) -> Path:
        """The archive's path in `folder`, downloaded first where it is absent.

        Raises `PackageUnavailable`, with the remedy, when it can't be had or has another sha256.
        """
        path = folder / self.file
        if not path.is_file():
            self._download(folder)
        with open(path, "rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != self.sha256:
            raise PackageUnavailable(
                f"{path} has sha256 {found[:12]}..., expected {self.sha256[:12]}...; delete it and try again"
            )
        return path

    def _download(self, folder: Path) -> None:
        """An interrupted download leaves nothing under the final name."""
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as partial:
            reason = _pip_download(self, partial)
            fetched = Path(partial) / self.file
            if not fetched.is_file():
                raise PackageUnavailable(
                    f"cannot fetch {self.package}=={self.version}: {reason}; check the connection to your package "
                    f"index, or put {self.file} into {folder}"
                )
            os.replace(fetched, folder / self.file)


def _pip_download(archive: Archive, dest: str) -> str:
    """Runs pip; returns why there may be no file, the last line that pip said."""
    kind = "--only-binary" if archive.wheel else "--no-binary"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
    command += [kind, ":all:", "--dest", dest, f"{archive.package}=={archive.version}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return f"pip was still busy after {TIMEOUT_S} s"
    return (done.stderr.strip().splitlines() or ["pip fetched another file"])[-1]
