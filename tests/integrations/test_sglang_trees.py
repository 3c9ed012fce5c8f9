"""Trees against fakes of SGLang's worker: prepared states, launch checks, gates on the device, the KV reserve."""

from __future__ import annotations

import contextlib
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from echo_rl.integrations.sglang import trees
from echo_rl.integrations.sglang.settings import PluginConfig, Shape
from tests.integrations.sglang_fakes import batch, parallel, plugin_state, raises_config, scheduler

TREES = PluginConfig(
    mode="trees", controller="fixed", options={"nodes": 7.0, "depth": 4},
    shapes=(Shape.chain(0), Shape(2, 4), Shape(4, 8), Shape(4, 16)),
)  # fmt: skip


@pytest.fixture
def fake_sglang(monkeypatch):
    """As much of SGLang as the tree worker calls; `spec` is what the server was started with."""
    spec = SimpleNamespace(
        speculative_adaptive=False, speculative_eagle_topk=4, speculative_num_steps=4, speculative_num_draft_tokens=16
    )
    exec_bag = SimpleNamespace(graph=SimpleNamespace(cuda_graph_bs_decode=[8, 1, 2, 4]))
    names = {
        "sglang.srt.runtime_context": {
            "get_spec": lambda: spec, "get_parallel": parallel, "get_exec": lambda: exec_bag,
        },
        "sglang.srt.model_executor.cuda_graph_config": {
            "Backend": SimpleNamespace(DISABLED="disabled"), "Phase": SimpleNamespace(DECODE="decode"),
        },
        "sglang.srt.speculative.eagle_worker_v2": {
            "check_cuda_graph_backend": lambda phase, backend: False,
            "draft_tp_context": lambda layout: contextlib.nullcontext(),
            "speculative_moe_backend_context": contextlib.nullcontext,
            "speculative_moe_a2a_backend_context": contextlib.nullcontext,
        },
        "sglang.srt.speculative.adaptive_runtime_state": {"SpecRuntimeState": SimpleNamespace},
    }  # fmt: skip
    for name, attributes in names.items():
        parts = name.split(".")
        for i in range(1, len(parts) + 1):
            path = ".".join(parts[:i])
            if i == len(parts) or path not in sys.modules:
                monkeypatch.setitem(sys.modules, path, ModuleType(path))
        vars(sys.modules[name]).update(attributes)
        monkeypatch.setattr(sys.modules[name.rpartition(".")[0]], parts[-1], sys.modules[name], raising=False)
    return spec


class StockWorker:
    """What `EAGLEWorkerV2` does with states."""

    def __init__(self):
        self.topk, self.device = 4, "cpu"
        self.speculative_num_steps, self.speculative_num_draft_tokens = 4, 16
        runner = SimpleNamespace(attn_backend="t", decode_cuda_graph_runner="tg")
        self._target_worker = SimpleNamespace(model_runner=runner)
        self._draft_worker = SimpleNamespace(
            parallel_layout=None, draft_attn_backend="d", cuda_graph_runner="dg", draft_extend_attn_backend="e",
            cuda_graph_runner_for_draft_extend="eg",
        )  # fmt: skip
        self.built, self.applied = [], []

    def init_cuda_graphs(self):
        self.built.append("stock")

    def build_adaptive_runtime_state(self, speculative_num_steps, speculative_num_draft_tokens, cuda_graph_bs=None):
        self.built.append((speculative_num_steps, speculative_num_draft_tokens, cuda_graph_bs))
        return SimpleNamespace(
            speculative_num_steps=speculative_num_steps, speculative_num_draft_tokens=speculative_num_draft_tokens
        )

    def apply_runtime_state(self, state):
        if self.speculative_num_steps == state.speculative_num_steps:
            return
        self.speculative_num_steps = state.speculative_num_steps
        self.speculative_num_draft_tokens = state.speculative_num_draft_tokens
        self.applied.append((state.speculative_num_steps, state.speculative_num_draft_tokens))


def tree_worker(config=TREES):
    state, gating = plugin_state(config), trees.Gating()
    worker = trees.tree_worker(StockWorker, state, gating)()
    worker.init_cuda_graphs()
    return state, gating, worker


def test_every_shape_is_prepared_once(fake_sglang):
    _, _, worker = tree_worker()
    sizes = [1, 2, 4, 8]
    assert worker.built == ["stock", (0, 1, sizes), (2, 4, sizes), (4, 8, sizes)], "the launch shape is SGLang's own"
    assert type(worker).__name__ == "EchoStockWorker"


def test_a_step_switches_to_the_decided_shape(fake_sglang):
    state, _, worker = tree_worker()
    state.before_batch(scheduler(), batch("decode", 10, 20))
    worker.activate_step_by_batch(2)
    assert worker.applied == [(4, 8)], "7 nodes a request: width 8, though the steps are the launch shape's"
    worker.on_verify_complete_cpu([2, 1], 2)
    assert state.steering.counts.verified == 14
    worker.activate_step_by_batch(2)
    assert worker.applied == [(4, 8)], "nothing to swap"


@pytest.mark.parametrize(
    "change",
    [
        {"speculative_adaptive": True},
        {"speculative_eagle_topk": 1},
        {"speculative_eagle_topk": None},
        {"speculative_num_steps": 5},
        {"speculative_num_draft_tokens": 8},
    ],
    ids=str,
)
def test_a_server_started_otherwise_is_refused(fake_sglang, change):
    vars(fake_sglang).update(change)
    with raises_config("--speculative-num-draft-tokens 16"):
        tree_worker()


def test_a_shape_wider_than_its_candidates_is_refused(fake_sglang):
    vars(fake_sglang).update(speculative_num_steps=4, speculative_num_draft_tokens=64)
    shapes = (Shape.chain(0), Shape(1, 6), Shape(4, 64))
    with raises_config("needs 5 candidates, 1 steps at top-k 4 draft 4"):
        tree_worker(PluginConfig(mode="trees", controller="fixed", shapes=shapes))


def test_other_workers_are_not_taken_over(fake_sglang):
    sys.modules["sglang.srt.speculative.eagle_worker_v2"].EAGLEWorkerV2 = StockWorker
    create = {target: hook for target, hook, _ in trees.hooks(plugin_state(TREES))}[trees.CREATE_WORKER]
    assert issubclass(create(lambda algorithm, args: StockWorker, None, None), StockWorker)
    with raises_config("would draft with int"):
        create(lambda algorithm, args: int, None, None)


def test_the_kv_reserve_never_shrinks():
    values, reserve = iter([40, 8, 16, 40]), trees.KVReserve()
    assert [reserve(lambda: next(values)) for _ in range(4)] == [40] * 4


class TestGates:
    def test_a_weak_request_is_scaled_once_and_others_not_at_all(self):
        scores = torch.tensor([[0.5, 0.1], [0.15, 0.05]])
        probs = torch.rand(4, 3) + 0.1
        out = trees.weaken(probs, scores, torch.tensor(0.2))
        assert torch.equal(out[:2], probs[:2])
        assert torch.equal(out[2:], probs[2:] * trees.STOPPED)
        again = trees.weaken(out, scores * torch.tensor([[1.0], [trees.STOPPED]]), torch.tensor(0.2))
        assert torch.equal(again, out)

    def test_no_gate_changes_nothing(self):
        probs = torch.rand(4, 3)
        assert torch.equal(trees.weaken(probs, torch.rand(2, 2), torch.tensor(0.0)), probs)

    def test_only_the_hooked_drafting_is_gated(self):
        gating, seen = trees.Gating(), []

        def select(i, p, index, hidden, scores, k):
            seen.append(float(p.sum()))

        def drafting(worker, forward_batch):
            gating.select(select, 1, torch.ones(2, 2), None, None, torch.full((1, 2), 0.1), 2)

        drafting(None, None)
        gating.draft_forward(drafting, None, None)
        gating.place(3, "cpu")
        drafting(None, None)
        gating.set((0.5,))
        gating.draft_forward(drafting, None, None)
        drafting(None, None)
        gating.set(())
        gating.draft_forward(drafting, None, None)
        assert seen == [4.0, 4.0, 4.0, 4.0 * trees.STOPPED, 4.0, 4.0]

    def test_the_first_level_has_no_gate_before_it(self):
        gating, seen = trees.Gating(), []
        gating.place(2, "cpu")
        gating.set((0.9, 0.9))

        def drafting(worker, forward_batch):
            for i in range(4):
                gating.select(lambda *a: seen.append(float(a[1].sum())), i, torch.ones(1, 1), None, None,
                              torch.full((1, 1), 0.5), 1)  # fmt: skip

        gating.draft_forward(drafting, None, None)
        assert seen == [1.0, trees.STOPPED, trees.STOPPED, 1.0]

    def test_drafting_that_raises_leaves_no_gate_behind(self):
        gating = trees.Gating()
        gating.place(1, "cpu")
        with pytest.raises(ZeroDivisionError):
            gating.draft_forward(lambda worker, forward_batch: 1 / 0, None, None)
        assert not gating._drafting
