"""One drafted level on the device: Triton against the reference, both against the runtime's tree growth."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from echo_kernels import ops_for
from echo_kernels.device_interface import Level
from echo_kernels.device_ops import DeviceOps
from echo_rl.contracts import Frontier, SpecPlan
from echo_rl.runtime.drafters.eagle3 import Drafter
from echo_rl.runtime.drafters.growing import _children, _Expansion, _following, _of_all
from tests.kernels.device_cases import REFERENCE, TRITON, same

both = pytest.mark.parametrize("ops", [REFERENCE, TRITON], ids=["reference", "triton"])


def level(
    ops: DeviceOps, seed: int, batch: int, front: int, vocab: int, children: int, wanted: int, **changed: object
) -> Level:
    """A random level; `changed` replaces arguments of `gate_topk`."""
    g = torch.Generator().manual_seed(seed)
    arguments: dict = {
        "logits": 3 * torch.randn(batch * front, vocab, generator=g),
        "front_scores": -torch.rand(batch, front, generator=g),
        "front_nodes": torch.randint(0, 99, (batch, front), generator=g),
        "alive": torch.rand(batch, generator=g) < 0.7,
        "thresholds": torch.rand(batch, generator=g) * 0.3,
        "vocabulary": torch.randperm(vocab, generator=g) + 10,
        "fan": min(children, vocab),
    }
    arguments["width"] = min(wanted, front * arguments["fan"])
    return ops.gate_topk(**(arguments | changed))


@given(
    st.integers(0, 2**31),
    st.integers(1, 4),
    st.integers(1, 5),
    st.sampled_from([1, 7, 64, 5000]),
    st.integers(1, 6),
    st.integers(1, 9),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
@settings(max_examples=30)
def test_triton_matches_the_reference(seed, batch, front, vocab, fan, width, dtype):
    g = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(batch * front, vocab, generator=g)).to(dtype)  # half precision: many ties
    logits[torch.rand(logits.shape, generator=g) < 0.1] = float("-inf")
    case = (seed, batch, front, vocab, fan, width)
    close(level(TRITON, *case, logits=logits), level(REFERENCE, *case, logits=logits))


def close(actual: Level, expected: Level) -> None:
    """Equal but for the order of candidates whose scores differ by rounding alone."""
    if torch.equal(actual.best, expected.best):
        return same(actual, expected)
    torch.testing.assert_close(actual.best_scores, expected.best_scores, rtol=2e-6, atol=2e-6)
    moved = actual.best != expected.best
    swapped = actual.scores.gather(1, expected.best)
    torch.testing.assert_close(swapped[moved], actual.best_scores[moved], rtol=2e-6, atol=2e-6)
    for name in ("tokens", "parents", "alive"):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name


@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
@settings(max_examples=25)
@both
def test_grows_what_the_runtime_grows(ops: DeviceOps, seed, batch, front, width):
    """The level equals `growing.grow`'s, which only sees the requests still alive, and the controllers' gate."""
    g = torch.Generator().manual_seed(seed)
    alive = torch.rand(batch, generator=g) < 0.7
    alive[0] = True
    logits, scores = torch.randn(batch * front, 40, generator=g), -torch.rand(batch, front, generator=g)
    nodes = torch.arange(front).expand(batch, -1).contiguous()
    vocabulary = torch.randperm(40, generator=g)
    made = ops.gate_topk(logits, scores, nodes, alive, torch.full((batch,), 0.2), vocabulary, width, width)

    drafter = SimpleNamespace(logits=lambda hidden: hidden, vocabulary=vocabulary, ops=ops_for("cpu"))
    drafter.top = lambda hidden, k: Drafter.top(drafter, hidden, k)
    kept = alive.nonzero().squeeze(1)
    some = np.zeros((len(kept), front, 1), dtype=np.bool_)
    places = nodes[kept].numpy()
    expansion = _Expansion(
        kept.numpy(), places, places, scores[kept].numpy(), torch.zeros(some.shape), some, some.reshape(1, -1, front)
    )
    plan = SpecPlan(budget=9, max_depth=3, width=width, gates=((1, 0.2),))
    hidden = logits.view(batch, front, -1)[kept].flatten(0, 1)
    children = _children(drafter, expansion, hidden, plan)
    following = _following(expansion, children, hidden, some, plan, 0, SimpleNamespace(tensor=torch.from_numpy))
    level = _of_all(children, kept.numpy(), batch)
    expected = SimpleNamespace(
        **{name: torch.from_numpy(getattr(level, name)) for name in ("tokens", "scores", "parents")}
    )
    torch.testing.assert_close(made.scores, expected.scores)
    assert torch.equal(made.tokens, expected.tokens) and torch.equal(made.parents, expected.parents)
    assert torch.equal(made.best[kept], torch.from_numpy(following.nodes))
    torch.testing.assert_close(made.best_scores[kept], torch.from_numpy(following.scores))
    passed = alive & (Frontier(1, expected.scores, alive).confidence >= 0.2)
    assert torch.equal(made.alive, passed)


@both
def test_a_spoilt_row_proposes_nothing(ops: DeviceOps):
    logits = torch.zeros(4, 9)
    logits[0, 3], logits[1, 2], logits[2] = float("nan"), float("inf"), float("-inf")
    made = level(ops, 0, 1, 4, 9, 2, 8, logits=logits, alive=torch.tensor([True]), thresholds=torch.zeros(1))
    assert (made.scores[0, :6] == float("-inf")).all() and made.scores[0, 6:].isfinite().all()
    assert made.best[0, :2].tolist() == [6, 7] and made.alive.all()


@both
def test_the_gate_lets_its_own_threshold_through(ops: DeviceOps):
    """A sure token has probability 1, which a gate of 1 lets through; a stopped request stays stopped."""
    logits = torch.tensor([[50.0, -50.0], [0.0, 0.0], [50.0, -50.0]])
    made = ops.gate_topk(
        logits, torch.zeros(3, 1), torch.full((3, 1), -1), torch.tensor([True, True, False]),
        torch.tensor([1.0, 0.6, 0.0]), None, 2, 1,
    )  # fmt: skip
    assert made.alive.tolist() == [True, False, False]
    assert made.tokens.tolist() == [[0, 1], [0, 1], [0, 0]]
    assert made.parents.tolist() == [[-1, -1], [-1, -1], [0, 0]]


BAD = [
    ("rows", ValueError, "logits", {"logits": torch.zeros(5, 9)}),
    ("vocabulary", ValueError, "vocabulary", {"vocabulary": torch.arange(8)}),
    ("fan", ValueError, "fan", {"fan": 10}),
    ("width", ValueError, "width", {"width": 7}),
    ("alive dtype", TypeError, "alive", {"alive": torch.ones(2)}),
    ("logits dtype", TypeError, "logits", {"logits": torch.zeros(4, 9, dtype=torch.int64)}),
]


@pytest.mark.parametrize(("error", "message", "changed"), [bad[1:] for bad in BAD], ids=[bad[0] for bad in BAD])
def test_refuses(error, message, changed):
    with pytest.raises(error, match=message):
        level(REFERENCE, 0, 2, 2, 9, 3, 4, **changed)
