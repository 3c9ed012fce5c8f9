"""Defines the specification by which a kernel is compiled ahead of time, as plain data.

Each kernel module exports ``AOT``, a tuple of these, one for every specialisation worth checking;
`echo_kernels.aot` compiles them for the targets it knows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class KernelSpec:
    """One specialisation of one kernel."""

    name: str
    """Unique over all modules: kernel, then what sets this specialisation apart (``attention_bf16_d128_b16``)."""
    kernel: Any
    """The ``triton.jit`` function."""
    signature: Mapping[str, str]
    """Type of every run-time argument by name, as triton writes it (``*bf16``, ``*i1``, ``i32``, ``fp32``)."""
    constexprs: Mapping[str, Any]
    """Value of every ``tl.constexpr`` argument by name (None for a pointer that is not there)."""
    num_warps: int = 4
    """Warps a program (wavefronts on AMD)."""
    num_stages: int = 2
    """Depth of the software pipeline of the loops."""
    aligned: frozenset[str] = field(default_factory=frozenset)
    """Run-time arguments divisible by 16 (pointers and strides), as the launcher would find them."""
