"""Every Triton kernel compiles for every target without a GPU, and needs no more than a processor has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from echo_kernels import aot

ROOT = Path(__file__).resolve().parents[2]
RECORDED = ROOT / "benchmarks" / "results" / "kernels.json"
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}
"""Most shared memory (LDS) of one program."""
SPILLED = 16
"""Most bytes of stack a thread: what a prologue may put aside. Spills in a loop are tens of bytes and cost time."""
REGISTERS = {"sm_80": 255, "sm_90": 255, "gfx942": 512}
COMPILE = """
import json
from dataclasses import asdict
from echo_kernels import aot
last = {id(spec.kernel): spec for spec in aot.specs()}  # one specialisation of each kernel: its largest
print(json.dumps([(name, target, asdict(usage)) for name, target, usage in aot.compile_all(last.values())]))
"""

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted only where there is no GPU")


@pytest.fixture(scope="module")
def recorded() -> dict:
    return json.loads(RECORDED.read_text())


@pytest.fixture(scope="module")
def compiled() -> list:
    """(name, target, usage) of one specialisation of each kernel, compiled now in a process without the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT / "kernels")
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check_bounds(name: str, target: str, usage: dict) -> None:
    assert 0 < usage["registers"] <= REGISTERS[target], (name, target, usage)
    assert usage["shared"] <= SHARED[target], (name, target, usage)
    assert usage["spilled"] <= SPILLED, f"{name} spills {usage['spilled']} bytes a thread on {target}"
    assert 0 < usage["code"] < 128 * 1024, (name, target, usage)


def test_each_kernel_compiles_within_bounds(compiled):
    assert {target for _, target, _ in compiled} == set(aot.TARGETS)
    assert len(compiled) >= 10 * len(aot.TARGETS)
    for name, target, usage in compiled:
        check_bounds(name, target, usage)


def test_the_record_holds_every_specialisation_within_bounds(recorded):
    assert set(recorded["kernels"]) == {spec.name for spec in aot.specs()}, "run benchmarks.kernels.cost again"
    for name, targets in recorded["kernels"].items():
        assert set(targets) == set(aot.TARGETS)
        for target, usage in targets.items():
            check_bounds(name, target, usage)


def test_fusing_leaves_nothing_that_waits_for_the_device(recorded):
    assert all(entry["after"]["waits"] == 0 for entry in recorded["step"])
    for entry in recorded["step"]:
        assert entry["after"]["launches"] <= entry["before"]["launches"]
        if entry["name"] != "choose_and_flatten":  # before, the host reckons there: that moves nothing on the device
            assert entry["after"]["bytes"] < entry["before"]["bytes"], entry["name"]
    before, after = recorded["totals"]["before"], recorded["totals"]["after"]
    assert after["launches"] * 10 < before["launches"] and after["bytes"] * 10 < before["bytes"]


@interpreted
def test_the_interpreter_is_refused_with_the_remedy():
    with pytest.raises(aot.AotError, match="unset it"):
        aot.compile_one(aot.specs()[0], "sm_90")


def test_an_argument_without_a_type_is_named(monkeypatch):
    monkeypatch.setattr("triton.knobs.runtime.interpret", False)
    spec = next(s for s in aot.specs() if s.name == "gumbel")
    with pytest.raises(aot.AotError, match="gumbel must say .* vocab"):
        aot.compile_one(replace(spec, signature={k: v for k, v in spec.signature.items() if k != "vocab"}), "sm_90")


def test_two_specialisations_of_one_name_are_refused(monkeypatch):
    from echo_kernels.triton import verify

    monkeypatch.setattr(verify, "AOT", (*verify.AOT, verify.AOT[0]))
    with pytest.raises(aot.AotError, match="verify_draw_bf16"):
        aot.specs()


def test_a_module_that_forgets_its_kernels_is_refused(monkeypatch):
    from echo_kernels.triton import pack

    monkeypatch.setattr(pack, "AOT", ())
    with pytest.raises(aot.AotError, match="no AOT"):
        aot.specs()
