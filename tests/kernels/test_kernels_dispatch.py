"""The one switch: which backend, when it is forced, and what happens without a compiler."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from echo_kernels import ENV_VAR, Ops, backend, build, dispatch, ops_for


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No choice carries over from or to another test."""
    monkeypatch.delenv(ENV_VAR, raising=False)
    for chosen in (dispatch._best_cpu_ops, dispatch._cpp_ops):
        chosen.cache_clear()
    yield
    for chosen in (dispatch._best_cpu_ops, dispatch._cpp_ops):
        chosen.cache_clear()


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")


def test_cpu_takes_cpp_once(cpp: Ops) -> None:
    assert backend("cpu") == "cpp"
    assert ops_for("cpu") is ops_for(torch.device("cpu"))


def test_other_devices_take_the_reference() -> None:
    assert backend("meta") == backend("cuda:0") == "reference"


def test_environment_forces_a_backend(monkeypatch: pytest.MonkeyPatch, cpp: Ops) -> None:
    monkeypatch.setenv(ENV_VAR, "reference")
    assert backend("cpu") == "reference"
    monkeypatch.setenv(ENV_VAR, "cpp")
    assert backend("cpu") == "cpp"
    with pytest.raises(ValueError, match="cpu only"):
        backend("cuda")


def test_unknown_name_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENV_VAR, "fast")
    with pytest.raises(ValueError, match="cpp, reference"):
        backend("cpu")


@pytest.mark.usefixtures("no_compiler")
def test_falls_back_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert backend("cpu") == backend("cpu") == "reference"
    warnings = [r.getMessage() for r in caplog.records if r.name == "echo_kernels.dispatch"]
    assert len(warnings) == 1 and "install a C++17 compiler" in warnings[0]


@pytest.mark.usefixtures("no_compiler")
def test_a_forced_backend_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENV_VAR, "cpp")
    with pytest.raises(build.BuildError):
        backend("cpu")


def test_a_damaged_file_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(build, "_build", lambda target: target.write_bytes(b"not a library"))
    with pytest.raises(build.BuildError, match="delete it"):
        build.load_extension()


def test_fingerprint_follows_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    before = build.fingerprint()
    monkeypatch.setenv("CXX", "another-compiler")
    assert build.fingerprint() != before
