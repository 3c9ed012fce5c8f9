"""Counts the launches, waits and bytes of one decode step, before and after fusing (see kernels.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import JITFunction

from echo_kernels import device_reference, reference
from echo_kernels import triton as fused
from echo_kernels.device_interface import Candidates, DrawKeys
from echo_kernels.triton import gate_topk, pack, verify
from echo_rl.contracts import Forest, SamplingParams, SpecPlan
from echo_rl.controllers.registry import make
from echo_rl.controllers.selection import global_top_k
from echo_rl.controllers.selection import pack as pack_selection
from echo_rl.runtime.drafters.eagle3 import Drafter
from echo_rl.runtime.drafters.growing import _children, _Expansion, _following, _gate
from echo_rl.runtime.layout import Layout
from echo_rl.runtime.scheduler import Batch
from echo_rl.runtime.verification import RowLogits, SuperTree, accept, flatten

FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias", "lift_fresh"}
FREE |= {"_unsafe_view", "_reshape_alias", "_local_scalar_dense", "view", "unbind"}
"""Operations that move nothing."""
GATHERS = {"index", "gather", "index_select", "embedding", "scatter_", "index_put_", "scatter", "index_copy"}
"""Operations that touch as much of a table as they return or are given, not all of it."""
WAITS = {
    "cpu",
    "tolist",
    "item",
    "__bool__",
    "__int__",
    "__float__",
    "nonzero",
    "equal",
    "bincount",
    "repeat_interleave",
}
"""Functions after which the host knows something that the device computed."""


@dataclass(frozen=True)
class Shape:
    """One decode step: Llama-3.1-8B, EAGLE-3 head with 32,000 draft tokens."""

    batch: int = 8
    context: int = 1024
    nodes: int = 8
    """Drafted nodes verified a request."""
    depth: int = 5
    width: int = 4
    temperature: float = 0.7
    layers: int = 32
    hidden: int = 4096
    inner: int = 14336
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    vocab: int = 128256
    draft_vocab: int = 32000
    page: int = 16

    @property
    def rows(self) -> int:
        return self.batch * (self.nodes + 1)


@dataclass
class Counts:
    launches: int = 0
    waits: int = 0
    bytes: int = 0


class _Operations(TorchDispatchMode):
    """Counts what reaches the device, and the bytes it reads and writes."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in FREE or func.is_view:
            return result
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        made = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        if name in GATHERS:  # the table counts as much as what is taken from it or put into it
            table, given = given[0], given[1:]
            moved = given[-1] if name in ("index_put_", "scatter_", "scatter", "index_copy") else made[0]
            given, made = [*given, moved], [table if name in ("scatter", "index_copy") else moved]
        self.counts.launches += 1
        self.counts.bytes += sum(t.nbytes for t in given + made)
        return result


class _Host(TorchFunctionMode):
    """Counts where the host waits for the device, and copies from the host."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        by_mask = name == "__getitem__" and any(
            isinstance(t, torch.Tensor) and t.dtype is torch.bool for t in tree_leaves(args[1])
        )
        self.counts.waits += name in WAITS or by_mask
        self.counts.launches += func in (torch.tensor, torch.from_numpy)
        return func(*args, **kwargs)


def traced(work: Callable[[], Any]) -> Counts:
    """What one call does. Triton kernels are counted and not run: nothing may depend on their results."""
    counts = Counts()

    def launch(kernel: JITFunction, *args: Any, **kwargs: Any) -> None:
        given = {t.data_ptr(): t.nbytes for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)}
        counts.launches += 1
        counts.bytes += sum(given.values())

    with mock.patch.object(JITFunction, "run", launch), _Host(counts), _Operations(counts):
        work()
    return counts


@dataclass(frozen=True)
class Case:
    """One operation of the step, twice."""

    name: str
    calls: int
    """Times a step."""
    before: Callable[[], Any]
    after: Callable[[], Any]
    least: int | None = None
    """Bytes that the fused form must move, where its arguments are more than it touches."""


def model_cases(s: Shape) -> Iterator[Case]:
    """The target's operations between its matrix products, in bfloat16."""
    n, width = s.rows, (s.heads + 2 * s.kv_heads) * s.head_dim
    x, residual, weight = half(n, s.hidden), half(n, s.hidden), half(s.hidden)
    yield both("rms_norm", 1, lambda ops: ops.rms_norm(x, weight, 1e-5))
    yield both(
        "add_rms_norm", 2 * s.layers, lambda ops: ops.add_rms_norm(x, residual, weight, 1e-5),
        least=4 * x.nbytes + weight.nbytes,
    )  # fmt: skip
    gate_up = half(n, 2 * s.inner)
    yield both("silu_mul", s.layers, lambda ops: ops.silu_mul(gate_up))
    pages = -(-(s.context + s.nodes + 1) // s.page)
    slots = s.batch * pages * s.page
    k_cache, v_cache = half(slots, s.kv_heads, s.head_dim), half(slots, s.kv_heads, s.head_dim)
    qkv, cos, places = half(n, width), torch.randn(s.context, s.head_dim), torch.arange(n)
    yield both(
        "rope_store", s.layers,
        lambda ops: ops.rope_store(qkv, cos, cos, places, places, k_cache, v_cache, s.heads, None, None, 0.0),
        least=2 * qkv.nbytes + 2 * n * s.head_dim * 4 + 2 * places.nbytes,
    )  # fmt: skip
    q = half(n, s.heads, s.head_dim)
    tables = torch.arange(s.batch * pages, dtype=torch.int32).view(s.batch, pages)
    starts = torch.arange(s.batch + 1, dtype=torch.int32) * (s.nodes + 1)
    ctx = torch.full((s.batch,), s.context, dtype=torch.int32)
    kv = ctx + s.nodes + 1
    mask = torch.ones(n, s.nodes + 1, dtype=torch.bool)
    yield both(
        "tree_attention", s.layers,
        lambda ops: ops.tree_attention(
            q, k_cache, v_cache, tables, s.page, starts, ctx, kv, mask, s.head_dim**-0.5
        ),
        least=2 * q.nbytes + 2 * s.batch * (s.context + s.nodes + 1) * s.kv_heads * s.head_dim * 2 + mask.nbytes,
    )  # fmt: skip
    pool = half(s.layers, 4 * n, s.kv_heads, s.head_dim)
    moved = s.batch * 2
    yield both(
        "compact_kv", 1, lambda ops: ops.compact_kv((pool, pool), places[:moved], places[moved : 2 * moved]),
        least=2 * 4 * s.layers * moved * s.kv_heads * s.head_dim * 2,
    )  # fmt: skip


def both(name: str, calls: int, call: Callable[[Any], Any], least: int | None = None) -> Case:
    return Case(name, calls, lambda: call(reference), lambda: call(fused), least)


def half(*size: int) -> torch.Tensor:
    return torch.randn(*size, dtype=torch.bfloat16)


def decision_cases(s: Shape) -> Iterator[Case]:
    """Draft a level and gate it, choose and pack the nodes, verify."""
    sequences = tuple(
        SimpleNamespace(blocks=list(range(b * 80, b * 80 + 80)), kv_len=s.context, tokens=[1]) for b in range(s.batch)
    )
    batch = Batch(drafting=sequences, plain=(), chunks=())  # type: ignore[arg-type]
    layout = Layout(sequences, s.page, torch.get_default_device())  # type: ignore[arg-type]
    yield _gate_case(s, layout)
    forest = _forest(s)
    k = s.batch * s.nodes
    candidates = Candidates(forest.tokens, forest.parents, forest.depths, forest.scores)
    budget, roots = torch.tensor([k], dtype=torch.int32), torch.ones(s.batch, dtype=torch.int64)

    def packed() -> None:
        rows = pack.pack_top(candidates, roots, budget, k, 60, s.depth)
        owner = torch.zeros(k + s.batch, dtype=torch.int64)  # stands for rows.owner, which was not computed
        logical = layout.kv_lens[owner] + torch.arange(len(owner)) - rows.starts[owner]
        (layout.kv_lens[owner] + rows.depths, layout.slots(owner, logical.clamp(0, s.context)))

    yield Case(
        "choose_and_flatten", 1,
        lambda: flatten(batch, pack_selection(forest, global_top_k(forest, k, 60)), layout), packed,
    )  # fmt: skip
    yield _verify_case(s, flatten(batch, pack_selection(forest, global_top_k(forest, k, 60)), layout))


def _gate_case(s: Shape, layout: Layout) -> Case:
    logits = half(s.batch * s.width, s.draft_vocab)
    scores, nodes = -torch.rand(s.batch, s.width), torch.arange(s.width).expand(s.batch, -1).contiguous()
    vocabulary, alive = torch.arange(s.draft_vocab), torch.ones(s.batch, dtype=torch.bool)
    some, features = np.zeros((s.batch, s.width, 1), dtype=np.bool_), torch.zeros(s.batch, s.width, 1)
    places, beams = nodes.numpy(), np.ones((1, s.batch, s.width), dtype=np.bool_)
    front = _Expansion(np.arange(s.batch), places, places, scores.numpy(), features, some, beams)
    plan = SpecPlan(budget=9, max_depth=s.depth, width=s.width, gates=((1, 1e-9),))
    drafter: Any = SimpleNamespace(
        ops=SimpleNamespace(top_tokens=reference.top_tokens), logits=lambda hidden: hidden, vocabulary=vocabulary
    )
    drafter.top = lambda hidden, k: Drafter.top(drafter, hidden, k)
    extend = make("eagle3").extend

    def before() -> None:
        level = _children(drafter, front, logits, plan)
        following = _following(front, level, logits, some, plan, 0, layout)
        _gate(following, alive.numpy(), level, 1, plan, extend, layout)

    thresholds = torch.zeros(s.batch)
    return Case(
        "gate_topk", s.depth, before,
        lambda: gate_topk.gate_topk(logits, scores, nodes, alive, thresholds, vocabulary, s.width, s.width),
    )  # fmt: skip


def _forest(s: Shape) -> Forest:
    """Every node of a level hangs below the level's first ones; scores fall with depth."""
    sizes = [s.width] + [s.width**2] * (s.depth - 1)
    depths = torch.arange(s.depth).repeat_interleave(torch.tensor(sizes))
    nodes = len(depths)
    parents = torch.full((s.batch, nodes), -1)
    for node in range(s.width, nodes):
        parents[:, node] = (node - s.width) // s.width if node < s.width + s.width**2 else node - s.width**2
    scores = -torch.rand(s.batch, nodes) - depths
    return Forest(torch.randint(0, s.vocab, (s.batch, nodes)), parents, depths, scores, torch.zeros(s.batch).long())


def _verify_case(s: Shape, tree: SuperTree) -> Case:
    """Walks that accept half of each request's levels, as a fair draw."""
    logits = half(s.rows, s.vocab)
    params = [SamplingParams(temperature=s.temperature, seed=b) for b in range(s.batch)]
    positions = [s.context] * s.batch
    reached: dict[tuple[int, int], int] = {}
    while True:  # let the walk go on to the first child of each row, down to half the depth
        verdict = accept(
            SuperTree(tree.tokens, tree.positions, tree.view, tree.roots, reached), _rows(logits), params, positions
        )
        added = False
        for root, path, tokens in zip(tree.roots, verdict.accepted, verdict.tokens, strict=True):
            row = root + 1 + path[-1] if path else root
            child = next((c for (parent, _), c in tree.children.items() if parent == row), None)
            if child is not None and len(path) < s.depth // 2:
                reached[row, tokens[-1]] = child
                added = True
        if not added:
            break
    walked = SuperTree(tree.tokens, tree.positions, tree.view, tree.roots, reached)
    keys = DrawKeys(torch.full((s.batch,), s.temperature), torch.arange(s.batch), torch.tensor(positions))
    candidates = Candidates(*(getattr(_forest(s), name) for name in ("tokens", "parents", "depths", "scores")))
    budget = torch.tensor([s.batch * s.nodes], dtype=torch.int32)
    rows = device_reference.pack_top(
        candidates, torch.ones(s.batch, dtype=torch.int64), budget, s.batch * s.nodes, 60, s.depth
    )
    return Case(
        "verify_tree", 1, lambda: accept(walked, _rows(logits), params, positions),
        lambda: verify.verify_tree(logits, rows, keys, s.depth),
    )  # fmt: skip


def _rows(logits: torch.Tensor) -> RowLogits:
    return RowLogits(logits, {row: row for row in range(len(logits))})


def step_entries(s: Shape) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    entries = []
    for case in (*model_cases(s), *decision_cases(s)):
        before, after = traced(case.before), traced(case.after)
        after.bytes = case.least or after.bytes
        entries.append({"name": case.name, "calls": case.calls, "before": asdict(before), "after": asdict(after)})
    return entries


def totals(entries: list[dict[str, Any]], s: Shape) -> dict[str, Any]:
    sums = {
        side: {key: sum(e["calls"] * e[side][key] for e in entries) for key in ("launches", "waits", "bytes")}
        for side in ("before", "after")
    }
    return {**sums, "matrix_products": 4 * s.layers + 1 + 5 * s.depth}
