"""Every operation refuses what it cannot compute, on each backend, with a message that names the argument."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from echo_kernels import Ops


def f(*size: int) -> Tensor:
    return torch.zeros(*size)


def i32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def rope(o: Ops, **changed: object) -> Tensor:
    arguments: dict = {
        "qkv": f(2, 32), "cos": f(9, 8), "sin": f(9, 8), "positions": torch.zeros(2, dtype=torch.int64),
        "slots": torch.arange(2), "k_cache": f(4, 1, 8), "v_cache": f(4, 1, 8), "num_heads": 2,
    }  # fmt: skip
    return o.rope_store(**(arguments | changed))


def attend(o: Ops, **changed: object) -> Tensor:
    arguments: dict = {
        "q": f(2, 4, 8), "k_cache": f(32, 2, 8), "v_cache": f(32, 2, 8), "block_tables": i32(0, 1)[None],
        "block_size": 16, "q_start": i32(0, 2), "ctx_lens": i32(3), "kv_lens": i32(5),
        "mask": torch.ones(2, 2, dtype=torch.bool), "scale": 1.0,
    }  # fmt: skip
    return o.tree_attention(**(arguments | changed))


BAD: list[tuple[str, type[Exception], str, Callable[[Ops], object]]] = [
    ("norm width", ValueError, "weight", lambda o: o.rms_norm(f(2, 8), f(7), 1e-5)),
    ("norm dtype", TypeError, "weight", lambda o: o.rms_norm(f(2, 8), f(8).bfloat16(), 1e-5)),
    ("norm rank", ValueError, "x", lambda o: o.rms_norm(f(8), f(8), 1e-5)),
    ("norm strided", ValueError, "x", lambda o: o.rms_norm(f(8, 2).T, f(8), 1e-5)),
    ("norm int", TypeError, "x", lambda o: o.rms_norm(f(2, 8).int(), f(8), 1e-5)),
    ("residual shape", ValueError, "residual", lambda o: o.add_rms_norm(f(2, 8), f(3, 8), f(8), 1e-5)),
    ("residual dtype", TypeError, "residual", lambda o: o.add_rms_norm(f(2, 8), f(2, 8).double(), f(8), 1e-5)),
    ("odd gates", ValueError, "gate_up", lambda o: o.silu_mul(f(2, 7))),
    ("rope width", ValueError, "qkv", lambda o: rope(o, qkv=f(2, 31))),
    ("rope tables", ValueError, "cos", lambda o: rope(o, cos=f(9, 4))),
    ("rope table dtype", TypeError, "sin", lambda o: rope(o, sin=f(9, 8).bfloat16())),
    ("rope positions", ValueError, "positions", lambda o: rope(o, positions=torch.arange(3))),
    ("rope slots dtype", TypeError, "slots", lambda o: rope(o, slots=i32(0, 1))),
    ("rope cache dtype", TypeError, "k_cache", lambda o: rope(o, k_cache=f(4, 1, 8).bfloat16())),
    ("rope caches differ", ValueError, "v_cache", lambda o: rope(o, v_cache=f(5, 1, 8))),
    ("rope weight", ValueError, "q_weight", lambda o: rope(o, q_weight=f(7))),
    ("attention heads", ValueError, "KV heads", lambda o: attend(o, q=f(2, 3, 8))),
    ("attention dim", ValueError, "KV heads", lambda o: attend(o, q=f(2, 4, 16))),
    ("attention cache", ValueError, "v_cache", lambda o: attend(o, v_cache=f(31, 2, 8))),
    ("attention lengths dtype", TypeError, "kv_lens", lambda o: attend(o, kv_lens=torch.tensor([5]))),
    ("attention lengths", ValueError, "q_start", lambda o: attend(o, q_start=i32(0, 1, 2))),
    ("attention mask rows", ValueError, "mask", lambda o: attend(o, mask=torch.ones(3, 2, dtype=torch.bool))),
    ("attention mask dtype", TypeError, "mask", lambda o: attend(o, mask=f(2, 2))),
    ("attention block size", ValueError, "block_size", lambda o: attend(o, block_size=0)),
    ("compact lengths", ValueError, "src", lambda o: o.compact_kv([f(1, 4)], torch.arange(2), torch.arange(3))),
    ("compact dtype", TypeError, "dst", lambda o: o.compact_kv([f(1, 4)], torch.arange(2), i32(0, 1))),
    (
        "compact strided",
        ValueError,
        r"pools\[0\]",
        lambda o: o.compact_kv([f(4, 3).T], torch.arange(2), torch.arange(2)),
    ),
    ("compact index", IndexError, "4", lambda o: o.compact_kv([f(1, 4)], torch.tensor([4]), torch.tensor([0]))),
    ("gumbel dtype", TypeError, "seeds", lambda o: o.gumbel(i32(1), torch.tensor([1]), 5, "cpu")),
    ("gumbel lengths", ValueError, "positions", lambda o: o.gumbel(torch.tensor([1]), torch.tensor([1, 2]), 5, "cpu")),
    ("gumbel vocab", ValueError, "vocab", lambda o: o.gumbel(torch.tensor([1]), torch.tensor([1]), 0, "cpu")),
]


@pytest.mark.parametrize(("error", "message", "call"), [bad[1:] for bad in BAD], ids=[bad[0] for bad in BAD])
def test_refuses(ops: Ops, error: type[Exception], message: str, call: Callable[[Ops], object]) -> None:
    with pytest.raises(error, match=message):
        call(ops)


def test_the_same_calls_unspoiled_pass(ops: Ops) -> None:
    assert rope(ops).shape == (2, 2, 8)
    assert attend(ops).shape == (2, 4, 8)


def test_cpp_names_the_way_out_for_other_dtypes(cpp: Ops) -> None:
    with pytest.raises(TypeError, match="ECHO_KERNELS=reference"):
        cpp.silu_mul(f(2, 8).half())
