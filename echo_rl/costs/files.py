"""Finds calibration files, this machine's own and those that ship; reads and writes their versioned records."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from echo_rl.errors import ConfigError
from echo_rl.utils.archives import cache_root
from echo_rl.utils.files import replacing


def calibrated(name: str) -> Path:
    """Path of this machine's own calibration file, whether or not it has been made: in the package's cache folder."""
    return cache_root() / "calibration" / name


def own_or_packaged(name: str) -> Path:
    """This machine's own calibration file if there is one, else the packaged one."""
    own = calibrated(name)
    return own if own.is_file() else packaged(name)


def packaged(name: str) -> Path:
    """Path of a calibration file that ships with the package."""
    return Path(str(files("echo_rl").joinpath("costs", "data", name)))


def read_record(path: str | Path, kind: str, version: int) -> dict[str, Any]:
    """The body of a versioned JSON record. Raises `ConfigError` naming the file and what is wrong with it."""
    try:
        record = json.loads(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"cannot read the {kind} {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON ({error}); calibrate again") from error
    body = record.get("body") if isinstance(record, dict) and record.get("kind") == kind else None
    if not isinstance(body, dict):
        raise ConfigError(f"{path} is not a {kind}")
    if record.get("version") != version:
        raise ConfigError(f"{path} has version {record.get('version')}, this release reads {version}; calibrate again")
    return body


def write_record(path: str | Path, kind: str, version: int, body: Mapping[str, Any]) -> None:
    """Write a versioned JSON record; the file is replaced whole or not at all."""
    with replacing(path) as part:
        part.write_text(json.dumps({"kind": kind, "version": version, "body": body}) + "\n")
