"""The plugin against the real SGLang, on a CPU: it loads, its hooks hold, and SGLang's own code agrees with ours.

Nothing is served: that needs a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from echo_rl.contracts import Forest, LoadView, SpecPlan
from echo_rl.controllers import registry
from echo_rl.controllers.selection import per_request_top_k
from echo_rl.costs.profile import CostProfile
from echo_rl.integrations.sglang import contract, trees
from echo_rl.integrations.sglang.settings import PluginConfig, Shape
from echo_rl.runtime.drafters.folder import default_taps, draft_to_target, load_drafter
from echo_rl.utils.archives import shipped_checkpoints
from scripts.gpu.plan import MODES, Args, servers, settings
from tests import tiny
from tests.integrations.sglang_fakes import parallel, plugin_state, require_sglang

LIBRARY = require_sglang()
DRAFTER = shipped_checkpoints() / "smollm2-135m-eagle3"
TREES = {"mode": "trees", "controller": "fixed", "profile": "packaged"}
CHAIN = {"controller": "ppo", "profile": "packaged", "gates": "packaged"}


@pytest.mark.parametrize("finding", contract.check(), ids=lambda f: f.symbol.name)
def test_the_contract_holds(finding):
    assert not finding.problem


@pytest.mark.parametrize("mode", ["adaptive", "trees"])
def test_the_installed_version_is_accepted(mode):
    contract.require(mode)


# --------------------------------------------------------------------------- loading, in a process of its own

RUN = """
import sys, importlib.metadata as metadata
from tests.integrations.sglang_fakes import require_sglang
library = require_sglang()
from echo_rl.integrations.sglang import doctor
import sglang.srt.plugins as plugins
points = [metadata.EntryPoint(doctor.NAME, doctor.ENTRY, doctor.GROUP)]
{others}
plugins.entry_points = lambda group: points if group == doctor.GROUP else []
plugins.load_plugins()
{then}
print("SERVING")
"""


def run(tmp_path, config, then="", others=""):
    path = tmp_path / "echo.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    env = {**os.environ, "ECHO_RL_CONFIG": str(path), "CUDA_VISIBLE_DEVICES": ""}
    code = RUN.format(then=then, others=others)
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=170)


def served(done):
    assert done.returncode == 0 and "SERVING" in done.stdout, done.stderr[-3000:]


def test_chains_are_hooked_everywhere(tmp_path):
    then = """
from echo_rl.integrations.sglang.adaptive import ChainPolicy
from sglang.srt.speculative import adaptive_spec_params, eagle_worker_v2
from sglang.srt.model_executor import model_runner
from sglang.srt.managers.scheduler import Scheduler
assert issubclass(adaptive_spec_params.AdaptiveSpeculativeParams, ChainPolicy)
assert eagle_worker_v2.AdaptiveSpeculativeParams is adaptive_spec_params.AdaptiveSpeculativeParams
assert model_runner.resolve_candidate_steps_from_config(None) == [0, 1, 2, 3, 5, 7]
assert hasattr(Scheduler.run_batch, "__wrapped__")
"""
    served(run(tmp_path, CHAIN, then))


def test_trees_are_hooked_everywhere(tmp_path):
    then = """
from sglang.srt.speculative import eagle_worker_v2 as worker
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
from sglang.srt.mem_cache import allocation_sizing
assert hasattr(worker.EagleDraftWorker.draft_forward, "__wrapped__")
assert hasattr(worker.select_top_k_tokens, "__wrapped__")
assert hasattr(allocation_sizing.get_alloc_len_per_decode, "__wrapped__")
from sglang.srt.server_args import ServerArgs
made = SpeculativeAlgorithm.EAGLE3.create_worker(ServerArgs(model_path=MODEL, device="cpu"))
assert issubclass(made, worker.EAGLEWorkerV2) and made.__name__ == "EchoEAGLEWorkerV2", made
assert not made.__abstractmethods__
""".replace("MODEL", repr(str(DRAFTER)))
    served(run(tmp_path, TREES, then))


def test_sglang_sizes_itself_by_our_steps(tmp_path):
    """Its own argument resolution, with shapes that its default ladder doesn't have."""
    folder = tiny.target_folder(tmp_path / "target")
    shapes = [{"steps": steps} for steps in (0, 2, 6)]
    then = f"""
from sglang.srt.server_args import ServerArgs
from sglang.srt.arg_groups.overrides import max_speculative_num_draft_tokens, resolved_view
args = ServerArgs(model_path={str(folder)!r}, device="cpu", speculative_algorithm="EAGLE3", speculative_num_steps=6,
    speculative_draft_model_path={str(DRAFTER)!r}, speculative_eagle_topk=1, speculative_adaptive=True)
args.resolve_once()
view = resolved_view(args)
assert view.speculative_adaptive and view.speculative_num_draft_tokens == 7
assert max_speculative_num_draft_tokens(args) == 7
"""
    served(run(tmp_path, {**CHAIN, "shapes": shapes}, then))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"controller": "nobody"}, "nobody"),
        ({**CHAIN, "shpes": []}, "did you mean 'shapes'"),
        ({"controller": "ppo"}, "needs"),
        ("{", "not valid JSON"),
    ],
    ids=str,
)
def test_sglang_does_not_start_on_a_bad_configuration(tmp_path, config, says):
    done = run(tmp_path, config)
    assert done.returncode != 0 and "SERVING" not in done.stdout
    assert "echo-rl refuses to start SGLang" in done.stderr and says in done.stderr


def test_sglang_does_not_start_where_another_plugin_takes_our_place(tmp_path):
    (tmp_path / "rival_plugin.py").write_text(
        "def register():\n"
        "    from sglang.srt.plugins.hook_registry import HookRegistry, HookType\n"
        "    from echo_rl.integrations.sglang.adaptive import PARAMS\n"
        "    HookRegistry.register(PARAMS, type('Rival', (), {}), HookType.REPLACE)\n"
    )
    others = (
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "points.append(metadata.EntryPoint('rival', 'rival_plugin:register', doctor.GROUP))"
    )
    done = run(tmp_path, CHAIN, others=others)
    assert done.returncode != 0 and "did not apply" in done.stderr and "AdaptiveSpeculativeParams" in done.stderr


def test_without_a_configuration_sglang_stays_as_it_is(tmp_path):
    then = """
from sglang.srt.speculative import adaptive_spec_params
assert adaptive_spec_params.AdaptiveSpeculativeParams.__module__.startswith("sglang.")
"""
    env = {k: v for k, v in os.environ.items() if k != "ECHO_RL_CONFIG"}
    code = RUN.format(then=then, others="")
    served(subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=170))


def test_the_doctor_passes(tmp_path):
    path = tmp_path / "c.json"
    path.write_text(json.dumps(CHAIN))
    from echo_rl.integrations.sglang.doctor import examine

    failed = [row for row in examine(str(path)) if not row.ok]
    assert [row.what for row in failed] in ([], ["entry point"]), "an uninstalled source tree has no entry point"


def test_the_gpu_validation_gives_sglang_options_that_it_has(tmp_path):
    """Its own parser reads the commands; the steered servers start as the plugin demands."""
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser(allow_abbrev=False)
    ServerArgs.add_cli_args(parser)
    given = Args(out=tmp_path, model=str(DRAFTER), drafter=str(DRAFTER))
    read = {name: parser.parse_args(command[3:]) for name, (_, command) in servers(given, "python").items()}
    assert {name: options.speculative_algorithm for name, options in read.items()} == {
        "none": None, "eagle3": "EAGLE3", "adaptive": "EAGLE3", "trees": "EAGLE3",
    }  # fmt: skip
    assert [bool(read[name].speculative_adaptive) for name in read] == [False, False, True, False]
    for mode in MODES:
        launch = PluginConfig.of(settings(given, mode)).launch
        options = read[mode]
        assert (options.speculative_num_steps, options.speculative_num_draft_tokens) == (launch.steps, launch.width)


# --------------------------------------------------------------------------- chains, through SGLang's controller


class AdaptiveWorker:
    """SGLang's `AdaptiveSpecWorker` protocol, without a model."""

    def __init__(self, steps):
        self.speculative_num_steps, self.built, self.applied = steps, {}, []

    def build_adaptive_runtime_state(self, speculative_num_steps, speculative_num_draft_tokens, cuda_graph_bs=None):
        self.built[speculative_num_steps] = (speculative_num_draft_tokens, cuda_graph_bs)
        return SimpleNamespace(speculative_num_steps=speculative_num_steps)

    def apply_runtime_state(self, state):
        self.speculative_num_steps = state.speculative_num_steps
        self.applied.append(state.speculative_num_steps)


def test_sglangs_adaptive_controller_follows_our_decisions(monkeypatch):
    from sglang.srt import runtime_context
    from sglang.srt.speculative.adaptive_runtime_state import AdaptiveController

    from echo_rl.integrations.sglang.adaptive import ChainPolicy

    monkeypatch.setattr(runtime_context, "get_parallel", parallel)
    monkeypatch.setattr(runtime_context, "max_speculative_num_draft_tokens", lambda: 8)
    shapes = (Shape.chain(0), Shape.chain(1), Shape.chain(3, 8), Shape.chain(7, 2))
    state = plugin_state(PluginConfig(controller="chain", options={"steps": 5}, shapes=shapes))
    worker = AdaptiveWorker(7)
    controller = AdaptiveController(worker, type("P", (ChainPolicy,), {"state": state})(initial_steps=7))
    controller.register(SimpleNamespace(speculative_num_steps=7))
    controller.init_states(cuda_graph_bs=[1, 2, 4, 8, 16])
    assert worker.built == {0: (1, [1, 2, 4, 8, 16]), 1: (2, [1, 2, 4, 8, 16]), 3: (4, [1, 2, 4, 8])}
    for batch, steps in ((1, 3), (8, 3), (9, 1), (2, 3)):
        controller.activate_step_by_batch(batch)
        assert worker.speculative_num_steps == steps
        controller.on_verify_complete([0] * batch, batch)
    assert state.steering.counts.steps == 4 and state.steering.counts.lost == 0


# --------------------------------------------------------------------------- trees, through SGLang's code


def drafted(batch, top_k, steps, seed, thresholds):
    """SGLang's own choice of levels over a random drafter: per level its scores, tokens and parents."""
    from sglang.srt.speculative import eagle_worker_v2

    g = torch.Generator().manual_seed(seed)
    gating, levels = trees.Gating(), []
    gating.place(steps, "cpu")
    gating.set(thresholds)

    def loop(worker, forward_batch):
        probs = torch.rand(batch, top_k, generator=g).sort(descending=True).values * 0.9
        tokens = torch.randint(1000, (batch, top_k), generator=g)
        hidden, scores = torch.zeros(batch, 4), None
        for i in range(steps):
            _, hidden, scores, info = gating.select(
                eagle_worker_v2.select_top_k_tokens, i, probs, tokens, hidden, scores, top_k
            )
            levels.append(info)
            probs = torch.rand(batch * top_k, top_k, generator=g).sort(descending=True).values * 0.9
            tokens = torch.randint(1000, (batch * top_k, top_k), generator=g)

    gating.draft_forward(loop, None, None)
    return levels


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("thresholds", [(), (0.7,), (0.7, 0.55, 0.4), (0.0, 0.6)], ids=str)
def test_gated_drafting_picks_what_our_scheduler_picks(seed, thresholds):
    """SGLang's rerank of the gated loop = our top-k of the same forest, cut where our gates stop."""
    from sglang.srt.speculative.eagle_utils import organize_draft_results

    batch, top_k, steps, width = 16, 4, 4, 9
    levels = drafted(batch, top_k, steps, seed, thresholds)
    _, picked, _ = organize_draft_results([i[0] for i in levels], [i[1] for i in levels], [i[2] for i in levels], width)
    free = drafted(batch, top_k, steps, seed, ())
    scores = torch.cat([info[0].flatten(1) for info in free], 1)
    depths = torch.cat([torch.full((info[0][0].numel(),), d) for d, info in enumerate(free)])
    stop = torch.full((batch,), steps - 1)
    for depth in reversed(range(steps - 1)):
        tau = thresholds[depth] if depth < len(thresholds) else 0.0
        best = scores[:, depths == depth].topk(top_k).values.amax(1)
        stop = torch.where(best < tau, depth, stop)
    reached = depths[None] <= stop[:, None]
    forest = Forest(
        torch.zeros_like(scores).long(), torch.full_like(scores, -1).long(), depths,
        torch.where(reached, scores.log(), float("-inf")), stop,
    )  # fmt: skip
    mask = per_request_top_k(forest, width - 1)
    for row in range(batch):
        mine = set(mask[row].nonzero().flatten().tolist())
        assert mine <= set(picked[row].tolist()), "all that our gates and scheduler keep is verified"
        spare = set(picked[row].tolist()) - mine
        assert all(int(depths[node]) > int(stop[row]) for node in spare), "what is left over fills up below the stop"
    assert not thresholds or bool((stop < steps - 1).any()), "the case must stop someone"


@pytest.mark.parametrize("seed", range(4))
def test_gated_trees_stay_closed_under_parents(seed):
    """Every picked node's parent is picked: SGLang's tree builder assumes it."""
    from sglang.srt.speculative.eagle_utils import organize_draft_results

    top_k, steps, width = 4, 5, 16
    levels = drafted(6, top_k, steps, seed, (0.8, 0.8, 0.8, 0.8))
    parents, picked, _ = organize_draft_results(
        [i[0] for i in levels], [i[1] for i in levels], [i[2] for i in levels], width
    )
    for row in range(6):
        chosen = set(picked[row].tolist())
        for node in chosen:
            if node >= top_k:
                group = (node - top_k) // top_k  # which expanded node it is a child of, level by level
                assert int(parents[row, 1 + group]) in chosen


def test_a_change_of_width_alone_is_carried_out(monkeypatch):
    """SGLang's own `apply_runtime_state`, under our worker."""
    from sglang.srt.speculative import eagle_worker_v2 as stock

    overrides = []
    monkeypatch.setattr(
        stock, "get_context", lambda: SimpleNamespace(override=lambda source, **values: overrides.append(values))
    )
    state = plugin_state(PluginConfig.of({**TREES}))
    worker_class = trees.tree_worker(stock.EAGLEWorkerV2, state, trees.Gating())
    worker = object.__new__(worker_class)
    runner = SimpleNamespace(attn_backend=None, decode_cuda_graph_runner=None)
    draft = SimpleNamespace(draft_runner=SimpleNamespace(), _rebuild_topk1_chain_buffers=lambda: None)
    vars(worker).update(
        _draft_worker=draft, _target_worker=SimpleNamespace(model_runner=runner),
        speculative_num_steps=5, speculative_num_draft_tokens=32,
    )  # fmt: skip

    def state(steps, width):
        return stock.SpecRuntimeState(steps, width, f"d{width}", f"dg{width}", f"t{width}", f"tg{width}", None, None)

    worker.apply_runtime_state(state(5, 16))
    assert (worker.speculative_num_steps, worker.speculative_num_draft_tokens) == (5, 16)
    assert runner.decode_cuda_graph_runner == "tg16" and draft.cuda_graph_runner == "dg16"
    assert draft.speculative_num_draft_tokens == 16
    assert overrides == [{"speculative_num_steps": 5, "speculative_num_draft_tokens": 16}]
    worker.apply_runtime_state(state(5, 16))
    assert len(overrides) == 1, "nothing to swap"


def test_stock_sglang_would_have_ignored_it(monkeypatch):
    """Why `TreeWorker.apply_runtime_state` exists; once this fails, it can go."""
    from sglang.srt.speculative import eagle_worker_v2 as stock

    worker = object.__new__(stock.EAGLEWorkerV2)
    vars(worker).update(speculative_num_steps=5, speculative_num_draft_tokens=32)
    worker.apply_runtime_state(SimpleNamespace(speculative_num_steps=5, speculative_num_draft_tokens=16))
    assert worker.speculative_num_draft_tokens == 32


def test_the_kv_reserve_holds_through_sglangs_own_sizing(monkeypatch):
    """A shallow step must not shrink what the next, deep one was promised."""
    from sglang.srt.mem_cache import allocation_sizing

    spec = SimpleNamespace(speculative_algorithm="EAGLE3", speculative_num_steps=5, speculative_eagle_topk=8)
    monkeypatch.setattr(allocation_sizing, "get_spec", lambda: spec)
    monkeypatch.setattr(allocation_sizing, "get_alloc_page_size", lambda: 1)
    monkeypatch.setattr(allocation_sizing, "max_speculative_num_draft_tokens", lambda: 32)
    stock, reserve = allocation_sizing.get_alloc_len_per_decode, trees.KVReserve()
    assert reserve(stock) == 40
    spec.speculative_num_steps = 1
    assert stock() == 32 and reserve(stock) == 40


# --------------------------------------------------------------------------- the in-tree rival


class Costs:
    """SGLang's cost tables that say what our profile says."""

    def __init__(self, controller, view, depth):
        most = view.batch_size * depth
        seconds = controller.step_times.speculative(view, np.arange(most + 1.0), 1, depth)
        self.seconds = seconds
        self.tokens = list(range(view.batch_size, view.batch_size + most + 1))

    def sps(self):
        from sglang.srt.speculative.dspark_components.dspark_planner import SpsCostTable

        return SpsCostTable(
            sample_batch_tokens=self.tokens, sample_steps_per_sec=[1.0 / s for s in self.seconds],
            max_batch_tokens=self.tokens[-1],
        )  # fmt: skip

    def additive(self):
        from sglang.srt.speculative.dspark_components.dspark_planner import SpsAdditiveCostTable

        floor = 0.5 * float(self.seconds[0])
        theta = [float(s) - floor for s in self.seconds]
        return SpsAdditiveCostTable(
            bias_seconds=floor, bs_probes=[1, 999], alpha_seconds=[0.0, 0.0], m_probes=self.tokens, theta_seconds=theta
        )


@pytest.mark.parametrize("table", ["sps", "additive"])
@pytest.mark.parametrize("batch", [1, 3, 8, 32])
def test_dspark_verifies_what_sglangs_planner_verifies(batch, table):
    from sglang.kernels.ops.speculative.dspark.dspark_schedule import ScheduleVerifyLensTopk
    from sglang.srt.speculative.dspark_components.dspark_planner import (
        DSparkScheduleConfig,
        compute_verify_token_budget,
    )

    depth, g, budgets = 5, torch.Generator().manual_seed(batch), set()
    for _ in range(20):
        controller = registry.make("dspark", profile=CostProfile.default(), depth=depth)
        view = LoadView(batch, 0, 0, 300.0, 0.2, depth)
        controller.plan(view)  # the load; whether to draft at all is not SGLang's question
        plan = SpecPlan(batch * depth, depth)
        confidence = torch.rand(batch, depth, generator=g, dtype=torch.float64) ** 0.5
        survival = confidence.float().cumprod(1)
        forest = Forest(
            torch.zeros(batch, depth).long(), torch.arange(-1, depth - 1).expand(batch, depth), torch.arange(depth),
            survival.log(), torch.full((batch,), depth - 1),
        )  # fmt: skip
        counts = controller.select(forest, plan).counts
        # min_verify_len 1 is the root; every drafted token comes on top, up to depth + 1
        cfg = DSparkScheduleConfig(gamma=depth, min_verify_len=1)
        decision = compute_verify_token_budget(
            history_survival_probs=survival, sps_table=getattr(Costs(controller, view, depth), table)(), cfg=cfg
        )
        assert int(counts.sum()) == decision.budget
        lengths = ScheduleVerifyLensTopk.torch(confidence=confidence, budget=decision.budget, cfg=cfg)
        assert lengths.tolist() == (counts + 1).tolist()
        budgets.add(decision.budget)
    assert len(budgets) > 1, "the cases must differ"


# --------------------------------------------------------------------------- the shipped drafter in SGLang's loader


@pytest.fixture(scope="module")
def sglang_drafter(tmp_path_factory):
    """The shipped drafter as SGLang's model class loads it, one rank on the CPU."""
    from sglang.srt import runtime_context
    from sglang.srt.distributed import parallel_state
    from sglang.srt.models import llama, llama_eagle3
    from sglang.srt.server_args import ServerArgs
    from transformers import AutoConfig

    runtime_context.publish(
        ServerArgs(model_path=str(DRAFTER), device="cpu"), role="scheduler",
        ranks=runtime_context.SpawnRanks(world_rank=0, gpu_id=0),
    )  # fmt: skip
    meet = tmp_path_factory.mktemp("dist") / "meet"
    parallel_state.init_distributed_environment(
        world_size=1, rank=0, distributed_init_method=f"file://{meet}", local_rank=0, backend="gloo"
    )
    parallel_state.initialize_model_parallel(backend="gloo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llama, "get_rope", lambda *a, **k: torch.nn.Identity())  # no weights; its CPU kernel is vLLM's
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = llama_eagle3.LlamaForCausalLMEagle3(AutoConfig.from_pretrained(DRAFTER))
        finally:
            torch.set_default_dtype(default)
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    model.load_weights(load_file(DRAFTER / "model.safetensors").items())
    yield model
    parallel_state.destroy_model_parallel()
    parallel_state.destroy_distributed_environment()


def test_the_shipped_drafter_fills_sglangs_model(sglang_drafter):
    """SGLang skips names that it doesn't know, so every parameter but the target's embeddings must have been filled."""
    unfilled = {name for name, p in sglang_drafter.named_parameters() if bool(p.isnan().any())}
    assert unfilled == {"model.embed_tokens.weight"}


def test_sglang_holds_the_weights_that_we_do(sglang_drafter):
    config, ours = load_drafter(DRAFTER)
    theirs = dict(sglang_drafter.named_parameters())
    qkv = torch.cat([ours[f"midlayer.self_attn.{p}_proj.weight"] for p in "qkv"])
    gate_up = torch.cat([ours[f"midlayer.mlp.{p}_proj.weight"] for p in ("gate", "up")])
    stacked = {"self_attn.qkv_proj.weight": qkv, "mlp.gate_up_proj.weight": gate_up}
    for name, tensor in stacked.items():
        assert torch.equal(theirs[f"model.layers.0.{name}"], tensor.bfloat16()), name
    single = ("self_attn.o_proj", "mlp.down_proj", "input_layernorm", "hidden_norm", "post_attention_layernorm")
    for name in single:
        assert torch.equal(theirs[f"model.layers.0.{name}.weight"], ours[f"midlayer.{name}.weight"].bfloat16()), name
    assert torch.equal(theirs["model.fc.weight"], ours["fc.weight"].bfloat16())
    assert torch.equal(theirs["model.norm.weight"], ours["norm.weight"].bfloat16())
    assert torch.equal(theirs["lm_head.weight"][: config.draft_vocab], ours["lm_head.weight"].bfloat16())
    assert torch.equal(sglang_drafter.hot_token_id.long(), draft_to_target(ours["d2t"]))


def test_sglang_captures_the_layers_that_we_tap():
    from sglang.srt.models.llama import LlamaForCausalLM

    config, _ = load_drafter(DRAFTER)
    target = SimpleNamespace(
        pp_group=SimpleNamespace(is_last_rank=True),
        model=SimpleNamespace(),
        config=SimpleNamespace(num_hidden_layers=30),
    )
    LlamaForCausalLM.set_eagle3_layers_to_capture(target, list(config.taps))
    assert target.model.layers_to_capture == [tap + 1 for tap in config.taps], "what enters layer k + 1 is tap k"
    LlamaForCausalLM.set_eagle3_layers_to_capture(target, None)
    assert target.model.layers_to_capture == [tap + 1 for tap in default_taps(30)]
