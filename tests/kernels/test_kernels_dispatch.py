"""The one switch: which backend, when it is forced, and what happens without a compiler."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import echo_kernels
from echo_kernels import ENV_VAR, Ops, backend, build, dispatch, ops_for


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No choice carries over from or to another test."""
    monkeypatch.delenv(ENV_VAR, raising=False)
    choices = (dispatch._best_cpu_ops, dispatch._cpp_ops, dispatch._best_gpu_ops, dispatch._triton_ops)
    for chosen in choices:
        chosen.cache_clear()
    yield
    for chosen in choices:
        chosen.cache_clear()


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")


@pytest.fixture
def no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "echo_kernels.triton", None)
    monkeypatch.delattr(echo_kernels, "triton", raising=False)


def test_cpu_takes_cpp_once(cpp: Ops) -> None:
    assert backend("cpu") == "cpp"
    assert ops_for("cpu") is ops_for(torch.device("cpu"))


def test_other_devices_take_the_reference() -> None:
    assert backend("meta") == "reference"


def test_gpus_take_triton_once() -> None:
    pytest.importorskip("triton")
    assert backend("cuda:0") == "triton"
    assert ops_for("cuda") is ops_for(torch.device("cuda:1"))


def test_environment_forces_a_backend(monkeypatch: pytest.MonkeyPatch, cpp: Ops) -> None:
    monkeypatch.setenv(ENV_VAR, "reference")
    assert backend("cpu") == "reference"
    monkeypatch.setenv(ENV_VAR, "cpp")
    assert backend("cpu") == "cpp"
    with pytest.raises(ValueError, match="cpu only"):
        backend("cuda")


def test_triton_runs_on_a_cpu_only_when_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv(ENV_VAR, "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backend("cpu") == backend("cuda") == "triton"
    monkeypatch.delenv("TRITON_INTERPRET")
    assert backend("cuda") == "triton"
    for device in ("cpu", "meta"):
        with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
            backend(device)


@pytest.mark.usefixtures("no_triton")
def test_a_gpu_without_triton_falls_back_with_one_warning(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with caplog.at_level(logging.WARNING):
        assert backend("cuda") == backend("cuda:0") == "reference"
    warnings = [r.getMessage() for r in caplog.records if r.name == "echo_kernels.dispatch"]
    assert len(warnings) == 1 and "pip install triton" in warnings[0]
    monkeypatch.setenv(ENV_VAR, "triton")
    with pytest.raises(dispatch.TritonMissing, match="pip install triton"):
        backend("cuda")


def test_unknown_name_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENV_VAR, "fast")
    with pytest.raises(ValueError, match="triton, cpp, reference"):
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
