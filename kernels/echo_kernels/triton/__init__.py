"""Implements the operations as Triton kernels, for CUDA and ROCm: an `echo_kernels.interface.Implementation`.

Nothing here waits for the device: grids come from shapes, ragged lengths are read by the kernels.
Indices are therefore not checked; a slot, page or position outside its tensor is undefined behaviour.
Kernels run on the current device, which must be the tensors'. With TRITON_INTERPRET=1, set before the
first import, they run on the CPU, slowly, for tests.
"""

from echo_kernels.reference import linear, linear_int8, pack_int8, pack_weight
from echo_kernels.triton.argmax import best_token
from echo_kernels.triton.attention import tree_attention
from echo_kernels.triton.gate_topk import top_tokens
from echo_kernels.triton.gumbel import gumbel
from echo_kernels.triton.kv import compact_kv
from echo_kernels.triton.norms import add_rms_norm, rms_norm, silu_mul
from echo_kernels.triton.rope import rope_store

__all__ = [
    "add_rms_norm",
    "best_token",
    "compact_kv",
    "gumbel",
    "linear",
    "linear_int8",
    "pack_int8",
    "pack_weight",
    "rms_norm",
    "rope_store",
    "silu_mul",
    "top_tokens",
    "tree_attention",
]
