"""Nothing between a step's inputs and its results asks the device anything: run on tensors that hold no data.

The launch runs on fake tensors, which raise where a value is wanted (`item`, `tolist`, `bool`, `nonzero`, a
mask as an index), and in a mode that refuses every tensor of the host (a copy in either direction, a
scalar made there). The kernels are replaced by their shapes: on a GPU they are launches.
"""

from __future__ import annotations

import copy
from dataclasses import fields, is_dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from echo_kernels.device_interface import Level, TreeRows, Walk
from echo_kernels.device_ops import DTYPES, DeviceOps
from echo_kernels.ops import Ops
from echo_rl.config import EngineConfig
from echo_rl.runtime import kv_cache
from echo_rl.runtime.models.linear import Linear
from echo_rl.runtime.step.device import inputs
from echo_rl.runtime.step.device import step as step_module
from echo_rl.runtime.step.device.buckets import Bucket
from echo_rl.runtime.step.device.drafter import DeviceDrafter
from echo_rl.runtime.step.device.inputs import Drawing, DrawKeys, Pairs, Prompts
from echo_rl.runtime.step.device.verification import Verification
from tests import tiny

DEVICE = torch.device("meta")
"""Stands for the GPU: a build of torch without CUDA can't index even a fake CUDA tensor."""


class Crossing(RuntimeError):
    """A host tensor took part in the launch."""


class NoHost(TorchDispatchMode):
    """Refuses every operation that reads or makes a tensor anywhere but on the device; counts the others."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves((args, kwargs, result)):
            if isinstance(tensor, torch.Tensor) and tensor.device != DEVICE:
                raise Crossing(f"{func} touches {tensor.device}")
        self.operations += 1
        return result


class Shapes:
    """Kernels and decisions that only make their outputs."""

    def rms_norm(self, x, weight, eps):
        return torch.empty_like(x)

    def add_rms_norm(self, x, residual, weight, eps):
        return torch.empty_like(x), residual

    def rope_store(self, qkv, cos, sin, positions, slots, k_cache, v_cache, heads, *rest):
        return qkv.new_empty(len(qkv), heads, k_cache.shape[2])

    def silu_mul(self, gate_up):
        return gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)

    def tree_attention(self, q, *rest):
        return torch.empty_like(q)

    def compact_kv(self, pools, src, dst):
        pass

    def verify_tree(self, logits, rows, keys, depth):
        batch = rows.starts.shape[0] - 1
        small = logits.new_empty(batch, depth + 1, dtype=torch.int32)
        return Walk(small.long(), small[:, :depth], small[:, 0], small[:, 0].bool())

    def gate_topk(self, logits, scores, nodes, alive, thresholds, vocabulary, fan, width):
        batch, front = scores.shape
        wide, narrow = nodes.new_empty(batch, front * fan), nodes.new_empty(batch, width)
        return Level(wide, wide.float(), wide, narrow, narrow.float(), alive)

    def pack_top(self, candidates, roots, budget, capacity, limit, levels):
        rows, batch = capacity + len(roots), len(roots)
        flat = roots.new_empty(rows, dtype=torch.int32)
        mask = roots.new_empty(rows, limit + 1, dtype=torch.bool)
        return TreeRows(flat.long(), flat, flat, flat, mask, roots.new_empty(batch + 1, dtype=torch.int32))


def on_cuda(value, mode: FakeTensorMode):
    """A copy of models and records whose tensors are fake and on the GPU."""
    if isinstance(value, torch.Tensor):
        with mode:
            return torch.empty(value.shape, dtype=value.dtype, device=DEVICE)
    if isinstance(value, Linear):  # laid out anew: the CPU's products are not a GPU's
        weight, bias = value._operands
        rows = weight.shape[0] * (weight.shape[2] if weight.dim() == 4 else 1)
        with mode:
            return Linear(torch.empty(rows, value.in_features, dtype=value._dtype, device=DEVICE), on_cuda(bias, mode))
    if isinstance(value, (list, tuple)):
        return type(value)(on_cuda(v, mode) for v in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: on_cuda(getattr(value, f.name), mode) for f in fields(value)})
    if type(value).__module__.startswith("echo_rl."):
        twin = copy.copy(value)
        for name, part in vars(value).items():
            setattr(twin, name, on_cuda(part, mode))
        return twin
    return value


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    return tiny.engine(tmp_path_factory.mktemp("fake"))


@pytest.fixture
def world(real, monkeypatch):
    """A device step over fake models on a GPU that is not there, and the mode that it runs in."""
    mode = FakeTensorMode()
    ops = Ops(Shapes(), "shapes", DTYPES)
    runner = SimpleNamespace(device=DEVICE, spare=real.runner.spare, cache=on_cuda(real.runner.cache, mode))
    for name in ("target", "drafter"):
        model = on_cuda(getattr(real.runner, name), mode)
        model.ops = ops
        setattr(runner, name, model)
    monkeypatch.setattr(kv_cache, "ops_for", lambda device: ops)
    monkeypatch.setattr(inputs, "Mirror", FakeMirror)
    monkeypatch.setattr(step_module, "Landing", lambda *sizes: None)
    monkeypatch.setattr(step_module, "Stopwatch", lambda device: SimpleNamespace(mark=lambda which: None))
    with mode:
        made = step_module.DeviceStep(
            runner, EngineConfig(max_batch_size=8, max_nodes=24), None, DeviceOps(Shapes(), "shapes")
        )
    return SimpleNamespace(step=made, mode=mode)


class FakeMirror:
    """A device buffer without its host twin."""

    def __init__(self, shape, dtype, device):
        self.device = torch.empty(shape, dtype=dtype, device=device)


def ints(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, dtype=torch.int64, device=DEVICE)


def prompts() -> Prompts:
    keys = DrawKeys(torch.empty(2, device=DEVICE), ints(2), ints(2))
    drawing = Drawing(keys, ints(2), torch.empty(2, device=DEVICE))
    return Prompts(ints(40), ints(40), ints(40), ints(40), ints(3), ints(3), ints(2), drawing, 30)


BUCKETS = [
    Bucket(4, 0, 0, 0, False),
    Bucket(1, 8, 5, 1, False),
    Bucket(4, 20, 1, 3, False),
    Bucket(6, 64, 4, 3, True),
]


def launch(world, bucket: Bucket, with_prompts: bool = False) -> torch.Tensor:
    with world.mode, NoHost() as mode, torch.inference_mode():
        pairs = Pairs(ints(1500), ints(1500), ints(1500)) if bucket.nodes else None
        result = world.step.launch(bucket, pairs, prompts() if with_prompts else None)
    assert mode.operations > 20
    return result


@pytest.mark.parametrize("with_prompts", [False, True])
@pytest.mark.parametrize("bucket", BUCKETS)
def test_a_launch_reads_nothing(world, bucket, with_prompts):
    result = launch(world, bucket, with_prompts)
    assert result.device == DEVICE and result.dtype == torch.int32
    assert result.shape == (step_module.step_size(bucket, 2 if with_prompts else 0),)


READS = {
    "item": (lambda t: t.flatten()[0].item(), DataDependentOutputException),
    "tolist": (lambda t: t.tolist(), DataDependentOutputException),
    "bool": (lambda t: bool((t > 0).any()), DataDependentOutputException),
    "nonzero": (lambda t: t.nonzero(), DynamicOutputShapeException),
    "mask as index": (lambda t: t[t > 0], DynamicOutputShapeException),
    "repeat by counts": (lambda t: t.repeat_interleave(t.clamp(min=0)), DynamicOutputShapeException),
    "copy to the host": (lambda t: t.cpu(), Crossing),
    "copy from the host": (lambda t: torch.zeros(2).to(t.device), Crossing),
    "host tensor": (lambda t: t + torch.zeros(t.shape), Crossing),
}


@pytest.mark.parametrize("where", [(DeviceDrafter, "_select"), (DeviceDrafter, "_expand"), (Verification, "_keep")])
@pytest.mark.parametrize("read", READS)
def test_a_read_anywhere_is_noticed(world, monkeypatch, where, read):
    """The assertion can fail: each kind of host read, put into each part of the launch, raises."""
    (owner, name), (look, error) = where, READS[read]
    original = getattr(owner, name)

    def reading(self, first, *rest):
        look(world.step._rows.parents)
        return original(self, first, *rest)

    launch(world, BUCKETS[3])
    monkeypatch.setattr(owner, name, reading)
    with pytest.raises(error):
        launch(world, BUCKETS[3])
