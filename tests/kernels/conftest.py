"""The two CPU backends as fixtures. Tests of the C++ one are skipped, with the reason, where it cannot be built."""

from __future__ import annotations

import pytest
import torch

from echo_kernels import Ops
from echo_kernels.build import BuildError
from echo_kernels.dispatch import _cpp_ops, _reference_ops


@pytest.fixture(scope="session")
def reference() -> Ops:
    return _reference_ops()


@pytest.fixture(scope="session")
def cpp() -> Ops:
    try:
        return _cpp_ops()
    except BuildError as error:
        pytest.skip(f"the C++ backend is not available: {error}")


@pytest.fixture(params=["reference", "cpp"])
def ops(request: pytest.FixtureRequest) -> Ops:
    """Each backend in turn, for what must hold of both."""
    return request.getfixturevalue(request.param)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param
