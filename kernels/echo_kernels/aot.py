"""Compiles every Triton kernel ahead of time, without a GPU, and reports its cost on each target.

Registers, shared memory and spills decide how many programs a processor runs at once, and they are
known before any GPU is at hand: NVIDIA's from the resource usage in the cubin, AMD's from the code
object's metadata. Needs triton, and TRITON_INTERPRET unset (the interpreter replaces the compiler).
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import struct
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import ModuleType

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import KernelInterface

from echo_kernels import triton as package
from echo_kernels.triton.aot_spec import KernelSpec

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
EXECUTABLE = 0x4
"""ELF section flag: holds machine instructions."""


class AotError(RuntimeError):
    """Kernels cannot be compiled here, or one does not compile; the message says the remedy."""


@dataclass(frozen=True)
class Usage:
    """The resources that one specialisation needs on one target."""

    registers: int
    """Vector registers a thread."""
    shared: int
    """Bytes of shared memory (LDS) a program."""
    spilled: int
    """Bytes of stack a thread: registers that did not fit, and arrays that are indexed dynamically."""
    code: int
    """Bytes of machine code."""


def specs() -> tuple[KernelSpec, ...]:
    """Every specialisation that the kernel modules export.

    Raises `AotError` where two share a name or a module with kernels exports none.
    """
    found: list[KernelSpec] = []
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        mine: tuple[KernelSpec, ...] = getattr(module, "AOT", ())
        if not mine and _defines_kernels(module):
            raise AotError(f"{module.__name__} has kernels but no AOT; list how they are to be compiled")
        found += mine
    names = [spec.name for spec in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise AotError(f"two specialisations are called {', '.join(twice)}; give each a name of its own")
    return tuple(found)


def _defines_kernels(module: ModuleType) -> bool:
    return any(
        isinstance(value, KernelInterface) and value.fn.__module__ == module.__name__ for value in vars(module).values()
    )


def compile_all(chosen: Iterable[KernelSpec], targets: Iterable[str] = TARGETS) -> Iterator[tuple[str, str, Usage]]:
    """(name, target, usage) of each specialisation on each target. Raises `AotError`."""
    for spec in chosen:
        for target in targets:
            yield spec.name, target, compile_one(spec, target)


def compile_one(spec: KernelSpec, target: str) -> Usage:
    """Compiles (or takes from triton's cache) one specialisation. Raises `AotError`."""
    if knobs.runtime.interpret:
        raise AotError("TRITON_INTERPRET is set, so nothing can be compiled; unset it and start again")
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages}
    try:
        compiled = triton.compile(_source(spec), target=TARGETS[target], options=options)
    except Exception as error:  # the compiler raises many types
        raise AotError(f"{spec.name} does not compile for {target}: {error}") from error
    if TARGETS[target].backend == "cuda":
        binary = compiled.asm["cubin"]
        registers, spilled = _cuda_usage(binary)
    else:
        binary = compiled.asm["hsaco"]
        registers, spilled = _hip_usage(compiled.asm["amdgcn"])
    return Usage(registers, compiled.metadata.shared, spilled, _code_size(binary))


def _source(spec: KernelSpec) -> ASTSource:
    names: list[str] = spec.kernel.arg_names
    given = {*spec.signature, *spec.constexprs}
    if given != set(names):
        raise AotError(f"{spec.name} must say the type or the value of {', '.join(sorted(given ^ set(names)))}")
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in sorted(spec.aligned)}
    signature = {name: spec.signature.get(name, "constexpr") for name in names}
    return ASTSource(fn=spec.kernel, signature=signature, constexprs=dict(spec.constexprs), attrs=attributes)


def _cuda_usage(cubin: bytes) -> tuple[int, int]:
    """Registers a thread and bytes of stack a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", said)}
    return found["REG"], max(found["STACK"], found["LOCAL"])


def _hip_usage(assembly: str) -> tuple[int, int]:
    """Vector registers a thread and bytes of private segment a thread."""
    fields = ("vgpr_count", "private_segment_fixed_size")
    registers, spilled = (int(re.findall(rf"\.{name}:\s+(\d+)", assembly)[-1]) for name in fields)
    return registers, spilled


def _code_size(elf: bytes) -> int:
    """Bytes in the executable sections of a 64-bit little-endian ELF file."""
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    size, count = struct.unpack_from("<HH", elf, 0x3A)
    headers = (struct.unpack_from("<IIQQQQ", elf, table + i * size) for i in range(count))
    return sum(header[5] for header in headers if header[2] & EXECUTABLE)


def tool_versions() -> dict[str, str]:
    """The versions of the compilers, triton and ptxas."""
    said = subprocess.run([knobs.nvidia.ptxas.path, "--version"], check=True, capture_output=True, text=True).stdout
    release = re.search(r"release (\S+),", said)
    return {"triton": triton.__version__, "ptxas": release.group(1) if release else "unknown"}
