"""The checkpoints that ship: whole, and found with and without a source tree."""

from __future__ import annotations

import hashlib
import json
import sysconfig
import tomllib
from pathlib import Path

import pytest

from echo_rl.utils import archives

ROOT = Path(__file__).parent.parent.parent
CHECKPOINTS = ROOT / "checkpoints"


def test_an_installation_without_sources_has_its_own(monkeypatch, tmp_path):
    monkeypatch.delenv("ECHO_RL_CHECKPOINTS", raising=False)
    assert archives.shipped_checkpoints() == CHECKPOINTS
    monkeypatch.setattr(archives, "__file__", str(tmp_path / "site-packages" / "echo_rl" / "utils" / "archives.py"))
    assert archives.shipped_checkpoints() == Path(sysconfig.get_path("data")) / "share" / "echo-rl" / "checkpoints"
    monkeypatch.setenv("ECHO_RL_CHECKPOINTS", str(tmp_path))
    assert archives.shipped_checkpoints() == tmp_path


def test_a_wheel_installs_all_of_them_there():
    files = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["data-files"]
    installed = {
        Path(to).relative_to("share/echo-rl/checkpoints") / path.name: path
        for to, globs in files.items()
        for pattern in globs
        for path in ROOT.glob(pattern)
    }
    assert installed == {p.relative_to(CHECKPOINTS): p for p in CHECKPOINTS.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", ["ppo", "smollm2-135m-eagle3"])
def test_a_manifest_names_its_weights(name):
    folder = CHECKPOINTS / name
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert json.loads((folder / "manifest.json").read_text())["sha256"] == weights
