"""The backends as fixtures. Tests of one that is not available here are skipped, with the reason."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from echo_kernels import Ops
from echo_kernels.build import BuildError
from echo_kernels.dispatch import TRITON_DTYPES, _cpp_ops, _reference_ops

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # triton reads it once, when a kernel is defined


@pytest.fixture(scope="session")
def reference() -> Ops:
    return _reference_ops()


@pytest.fixture(scope="session")
def cpp() -> Ops:
    try:
        return _cpp_ops()
    except BuildError as error:
        pytest.skip(f"the C++ backend is not available: {error}")


@pytest.fixture(scope="session")
def triton_ops() -> Iterator[Ops]:
    """The Triton kernels on the GPU if there is one, else interpreted; called with tensors on the CPU either way."""
    pytest.importorskip("triton")
    from echo_kernels import triton
    from tests.kernels.triton_device import OnDevice, exact_bfloat16

    if torch.cuda.is_available():
        yield Ops(OnDevice(triton, "cuda"), "triton", TRITON_DTYPES)  # type: ignore[arg-type]
    else:
        with exact_bfloat16():
            yield Ops(triton, "triton", TRITON_DTYPES)


@pytest.fixture(params=["reference", "cpp"])
def ops(request: pytest.FixtureRequest) -> Ops:
    """Each backend in turn, for what must hold of both."""
    return request.getfixturevalue(request.param)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param
