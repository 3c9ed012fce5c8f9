"""Implements `echo_kernels.device_ops` in Triton."""

from __future__ import annotations

from typing import cast

from echo_kernels.device_interface import DeviceImplementation
from echo_kernels.triton import gate_topk, pack, verify


class TritonDevice:
    """The decisions as one object (`DeviceImplementation`)."""

    verify_tree = staticmethod(verify.verify_tree)
    gate_topk = staticmethod(gate_topk.gate_topk)
    pack_top = staticmethod(pack.pack_top)
    pack_mask = staticmethod(pack.pack_mask)


IMPLEMENTATION = cast(DeviceImplementation, TritonDevice())
