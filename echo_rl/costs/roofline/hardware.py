"""Lists accelerators by their published figures, and the shares of these that real kernels are assumed to reach.

Published (dense, per GPU):

- H100 SXM5: 989.4 TFLOP/s bf16, 1,978.9 fp8, 3.35 TB/s HBM3, 80 GB, NVLink 4 at 450 GB/s a direction. NVIDIA H100
  Tensor Core GPU datasheet and architecture white paper (the datasheet prints the sparse figures, twice these).
- H200 SXM: the same chip with 141 GB HBM3e at 4.8 TB/s. NVIDIA H200 Tensor Core GPU datasheet.
- MI300X: 1,307.4 TFLOP/s bf16, 2,614.9 fp8, 5.3 TB/s HBM3, 192 GB, seven Infinity Fabric links of 64 GB/s a
  direction. AMD Instinct MI300X data sheet.

Everything in `Assumptions`, and `Hardware.compute_share`, is an assumption and not a publication.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType

from echo_rl.errors import ConfigError


@dataclass(frozen=True)
class Hardware:
    """One GPU. All but `compute_share` is published, see the module."""

    name: str
    title: str
    bf16: float
    """Dense FLOP/s."""
    fp8: float
    """Dense FLOP/s."""
    bandwidth: float
    """Bytes of memory a second."""
    memory: float
    """Bytes."""
    link: float
    """Bytes a second to the other GPUs of the node, one direction, all links together."""
    compute_share: float
    """Assumed share of the peak that large matrix products reach."""


HARDWARE: Mapping[str, Hardware] = MappingProxyType(
    {
        record.name: record
        for record in (
            Hardware("h100", "H100 SXM", 989.4e12, 1978.9e12, 3.35e12, 80e9, 450e9, compute_share=0.70),
            Hardware("h200", "H200 SXM", 989.4e12, 1978.9e12, 4.8e12, 141e9, 450e9, compute_share=0.70),
            Hardware("mi300x", "MI300X", 1307.4e12, 2614.9e12, 5.3e12, 192e9, 448e9, compute_share=0.45),
        )
    }
)
"""The known accelerators by name. Independent measurements report about 0.7 of the peak for large bf16 products on
Hopper, 0.45 on MI300X."""


@dataclass(frozen=True)
class Assumptions:
    """The figures that no datasheet states. Shares are of the published peak; seconds are per GPU and not
    overlapped."""

    compute: float | None = None
    """Share of the peak FLOP/s in dense matrix products; None takes the hardware's usual one."""
    memory: float = 0.8
    """Share of the memory bandwidth, everywhere."""
    link: float = 0.7
    """Share of the interconnect bandwidth in collectives."""
    grouped: float = 0.6
    """Further share of `compute` that products over many small experts reach (rows padded to tiles)."""
    attention: float = 0.4
    """Further share of `compute` that attention over a tree reaches."""
    kernel: float = 2e-6
    """Seconds that each kernel takes whatever its work, in a captured graph."""
    collective: float = 8e-6
    """Seconds that each all-reduce or gather takes whatever its size."""
    step: float = 5e-4
    """Seconds of a step outside its passes: scheduling, sampling, the host."""
    speculative: float = 5e-4
    """Further seconds of a speculative step: building the tree, the accept walk, moving the KV of accepted nodes."""
    gate: float = 2e-5
    """Seconds of asking at one gate: the host waits for the batch's answer."""
    request: float = 1e-6
    """Seconds a request and step outside the passes."""

    def __post_init__(self) -> None:
        shares = {"memory", "link", "grouped", "attention"} | ({"compute"} if self.compute is not None else set())
        for name in (field.name for field in fields(self)):
            value = getattr(self, name)
            if name in shares and not 0.0 < value <= 1.0:
                raise ConfigError(f"{name} is {value}; give a share of the peak, above 0 and at most 1")
            if name not in shares and value is not None and not 0.0 <= value < 1.0:
                raise ConfigError(f"{name} is {value}; give seconds from 0 to below 1")
