"""The verification walk on the device: Triton against the reference, both against the runtime's `accept`."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from echo_kernels.device_interface import DrawKeys, TreeRows, Walk
from echo_kernels.device_ops import DeviceOps, device_ops_for
from echo_kernels.device_reference import draw_rows
from echo_rl.contracts import SamplingParams, Verdict
from echo_rl.runtime.sampling import _filtered
from echo_rl.runtime.verification import RowLogits, SuperTree, accept
from tests.kernels.device_cases import REFERENCE, TRITON, budget, forest, same

both = pytest.mark.parametrize("ops", [REFERENCE, TRITON], ids=["reference", "triton"])
VOCAB = 60


def tree(seed: int, batch: int, depth: int, width: int, k: int) -> TreeRows:
    return REFERENCE.pack_top(forest(seed, batch, depth, width), torch.arange(batch), budget(k), k, k, depth)


def keys(params: list[SamplingParams], positions: list[int]) -> DrawKeys:
    return DrawKeys(
        torch.tensor([p.temperature for p in params]),
        torch.tensor([p.seed for p in params]),
        torch.tensor(positions),
    )


def let_walk(rows: TreeRows, logits: Tensor, drawn_by: DrawKeys, seed: int) -> None:
    """Make some child the token drawn at its parent, so that walks get somewhere."""
    g = torch.Generator().manual_seed(seed)
    drawn = draw_rows(logits, rows, drawn_by)[0].tolist()
    children: dict[int, list[int]] = {}
    for row, parent in enumerate(rows.parents.tolist()):
        if 0 <= parent < row:
            children.setdefault(parent, []).append(row)
    for parent, mine in children.items():
        if torch.rand((), generator=g) < 0.7:
            lucky = mine[int(torch.randint(len(mine), (), generator=g))]
            for row in mine:  # siblings keep different tokens
                if int(rows.tokens[row]) == drawn[parent]:
                    rows.tokens[row] = VOCAB + 1
            rows.tokens[lucky] = drawn[parent]


def verdict_of(walk: Walk) -> Verdict:
    """The device's answer as the runtime's record."""
    lengths, failed = walk.lengths.tolist(), walk.failed.tolist()
    return Verdict(
        tuple(tuple(row[:n]) for row, n in zip(walk.accepted.tolist(), lengths, strict=True)),
        tuple(tuple(r[: n + 1 - f]) for r, n, f in zip(walk.tokens.tolist(), lengths, failed, strict=True)),
        frozenset(b for b, f in enumerate(failed) if f),
    )


def by_runtime(rows: TreeRows, logits: Tensor, params: list[SamplingParams], positions: list[int]) -> Verdict:
    tokens, parents = rows.tokens.tolist(), rows.parents.tolist()
    children = {(p, t): r for r, (p, t) in enumerate(zip(parents, tokens, strict=True)) if 0 <= p < r}
    super_tree = SuperTree(rows.tokens, rows.depths, None, tuple(rows.starts[:-1].tolist()), children)
    every_row = RowLogits(logits, {row: row for row in range(len(logits))})
    return accept(super_tree, every_row, params, positions)


sampling = st.builds(
    SamplingParams, temperature=st.sampled_from([0.0, 0.6, 1.0]), seed=st.integers(0, 2**63 - 1),
    top_k=st.sampled_from([0, 0, 3]), top_p=st.sampled_from([1.0, 0.7]),
)  # fmt: skip
requests = st.lists(st.tuples(sampling, st.integers(0, 5000)), min_size=1, max_size=4)


@given(st.integers(0, 2**31), requests, st.integers(1, 4), st.integers(1, 3), st.integers(0, 25), st.booleans())
@settings(max_examples=25)
@both
def test_decides_what_the_runtime_decides(ops: DeviceOps, seed, asked, depth, width, k, spoil):
    params, positions = [p for p, _ in asked], [n for _, n in asked]
    rows = tree(seed, len(asked), depth, width, k)
    g = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(len(rows.tokens), VOCAB, generator=g)
    if spoil:
        logits[torch.rand(len(logits), generator=g) < 0.2, 7] = float("nan")
    mine = keys(params, positions)
    let_walk(rows, logits, mine, seed)
    expected = by_runtime(rows, logits, params, positions)
    assert verdict_of(ops.verify_tree(filtered(logits, rows, params), rows, mine, depth)) == expected


def filtered(logits: Tensor, rows: TreeRows, params: list[SamplingParams]) -> Tensor:
    """The input of the device: logits with the tokens that top-k and top-p drop at -inf."""
    of_row = [params[max(owner, 0)] for owner in rows.owner.tolist()]
    noisy = torch.tensor([p.temperature > 0 for p in of_row])
    scaled = logits / torch.tensor([[p.temperature or 1.0] for p in of_row])
    dropped = (_filtered(scaled, of_row) == float("-inf")) & noisy[:, None]
    return logits.masked_fill(dropped, float("-inf"))


@given(st.integers(0, 2**31), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.integers(0, 3))
@settings(max_examples=12)
def test_triton_matches_the_reference(seed, dtype, max_depth):
    """Over several pieces of the vocabulary; max_depth below the tree's cuts the walk short."""
    rows = tree(seed, 3, 3, 2, 5)
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(rows.tokens), 9000, generator=g).to(dtype)
    temperatures = [0.0, 0.5, 1.5]
    params = [SamplingParams(t, seed=int(torch.randint(2**62, (), generator=g))) for t in temperatures]
    mine = keys(params, [0, 17, 4000])
    let_walk(rows, logits, mine, seed)
    same(TRITON.verify_tree(logits, rows, mine, max_depth), REFERENCE.verify_tree(logits, rows, mine, max_depth))


@both
def test_equal_logits_draw_the_lowest_token(ops: DeviceOps):
    rows = tree(0, 1, 1, 1, 0)
    logits = torch.zeros(1, 9000)
    logits[0, [31, 40, 2000, 8500]] = 1.0  # in one block, in one piece, in another piece
    assert ops.verify_tree(logits, rows, keys([SamplingParams()], [0]), 0).tokens.tolist() == [[31]]


@both
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_row_without_a_finite_maximum_fails_its_request_alone(ops: DeviceOps, value):
    rows = tree(0, 2, 1, 1, 0)
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(1))
    logits[0] = value
    walk = ops.verify_tree(logits, rows, keys([SamplingParams(1.0), SamplingParams()], [3, 3]), 2)
    assert walk.failed.tolist() == [True, False] and walk.lengths.tolist() == [0, 0]
    assert walk.tokens.tolist() == [[-1, -1, -1], [int(logits[1].argmax()), -1, -1]]
    assert (walk.accepted == -1).all()


def test_the_cpu_takes_the_reference():
    assert device_ops_for("cpu").name == "reference"


BAD = [
    ("rows", ValueError, "logits", {"logits": torch.zeros(3, 9)}),
    ("dtype", TypeError, "logits", {"logits": torch.zeros(4, 9, dtype=torch.int32)}),
    ("depth", ValueError, "max_depth", {"max_depth": -1}),
    ("keys", ValueError, "temperatures", {"keys": keys([SamplingParams()] * 3, [0, 0, 0])}),
]


@pytest.mark.parametrize(("error", "message", "changed"), [bad[1:] for bad in BAD], ids=[bad[0] for bad in BAD])
def test_refuses(error, message, changed):
    rows = tree(0, 2, 1, 2, 2)
    good = {"logits": torch.zeros(4, 9), "rows": rows, "keys": keys([SamplingParams()] * 2, [0, 0]), "max_depth": 1}
    assert REFERENCE.verify_tree(**good).lengths.shape == (2,)
    with pytest.raises(error, match=message):
        REFERENCE.verify_tree(**(good | changed))
