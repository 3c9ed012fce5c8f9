"""The plugin's parts against fakes of SGLang's objects: contract, refusals, ranks, scheduler view, chains, doctor."""

from __future__ import annotations

import contextlib
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from echo_rl.errors import ConfigError
from echo_rl.integrations.sglang import adaptive, contract, plugin
from echo_rl.integrations.sglang.contract import SYMBOLS, ContractBroken, check, require
from echo_rl.integrations.sglang.doctor import examine
from echo_rl.integrations.sglang.load_observer import LoadObserver
from echo_rl.integrations.sglang.metrics import COUNTERS, Exporter
from echo_rl.integrations.sglang.ranks import RankGroup, SingleRank
from echo_rl.integrations.sglang.settings import ENVIRONMENT, PluginConfig, Shape
from echo_rl.integrations.sglang.state import require_topology
from echo_rl.integrations.sglang.steering import Decision
from echo_rl.integrations.sglang.trees import require_swaps
from tests.integrations.sglang_fakes import batch, load, parallel, plugin_state, raises_config, scheduler

# --------------------------------------------------------------------------- contract


def fake(symbol):
    """An object that is as the contract records it."""
    if symbol.kind == "property":
        return property(lambda self: None)
    if symbol.kind == "enum":
        return type("E", (), {"__members__": {}})
    if symbol.kind == "str":
        return "x"
    body = "; ".join(f"{name}" for name in symbol.mentions) or "pass"
    scope: dict = {}
    exec(f"def f({', '.join(symbol.parameters)}): {body}", scope)
    if symbol.kind == "class":
        exec(f"class f:\n def __init__({', '.join(('self', *symbol.parameters))}): pass", scope)
    return scope["f"]


def recorded(**changed):
    known = {contract.ROOT + symbol.name: fake(symbol) for symbol in SYMBOLS}
    return {**known, **changed}.__getitem__


def test_what_is_as_recorded_passes():
    findings = check(resolve=recorded())
    assert [f for f in findings if f.problem] == [] and len(findings) == len(SYMBOLS)
    assert len({symbol.name for symbol in SYMBOLS}) == len(SYMBOLS)


@pytest.mark.parametrize(
    ("name", "found", "says"),
    [
        ("managers.scheduler.Scheduler.run_batch", lambda self, batch: None, "takes"),
        ("managers.schedule_batch.Req.seqlen", lambda self: 1, "is a function, not a property"),
        ("plugins.hook_registry.HookType", lambda: 1, "is a function, not a enum"),
        ("speculative.eagle_worker_v2.EAGLEWorkerV2.apply_runtime_state", lambda self, state: None, "no longer refers"),
    ],
)
def test_what_differs_is_named(name, found, says):
    problems = {f.symbol.name: f.problem for f in check(resolve=recorded(**{contract.ROOT + name: found})) if f.problem}
    assert problems.keys() == {name} and says in problems[name]


def test_a_missing_symbol_is_named(monkeypatch):
    monkeypatch.setattr(contract, "installed_version", lambda: contract.RECORDED)
    require("trees", resolve=recorded())
    with pytest.raises(ContractBroken, match=r"run_batch: missing \(KeyError"):
        known = recorded()
        require("trees", resolve=lambda name: known(name + ("x" if name.endswith("run_batch") else "")))


def test_another_version_needs_consent(monkeypatch):
    monkeypatch.setattr(contract, "installed_version", lambda: "0.9.0")
    with pytest.raises(ContractBroken, match=r"0.9.0 is installed.*untested_version"):
        require("adaptive", resolve=recorded())
    require("adaptive", untested_version=True, resolve=recorded())


def test_names_include_nested_functions():
    def outer():
        def inner():
            return some_name  # noqa: F821

        return inner

    assert "some_name" in contract.names_in(outer)


# --------------------------------------------------------------------------- loading


def test_unconfigured_it_does_nothing(monkeypatch):
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    plugin.register()


@pytest.mark.parametrize(
    ("content", "says"),
    [('{"controller": "nobody"}', "nobody"), ('{"controller": "echo"}', "profile"), ("{", "JSON")],
)
def test_what_is_wrong_ends_the_process(monkeypatch, tmp_path, content, says):
    path = tmp_path / "c.json"
    path.write_text(content)
    monkeypatch.setenv(ENVIRONMENT, str(path))
    monkeypatch.setattr(plugin, "require", lambda mode, untested: None)
    with pytest.raises(SystemExit, match=f"refuses to start SGLang.*{says}") as ended:
        plugin.register()
    assert not isinstance(ended.value, Exception), "SGLang logs and goes on after every Exception"


def test_an_unforeseen_error_ends_the_process_too(monkeypatch, tmp_path):
    path = tmp_path / "c.json"
    path.write_text('{"controller": "none"}')
    monkeypatch.setenv(ENVIRONMENT, str(path))
    monkeypatch.setattr(plugin, "require", lambda mode, untested: 1 / 0)
    with pytest.raises(SystemExit, match="ZeroDivisionError"):
        plugin.register()


class TestSeal:
    def registry(self, apply):
        return type("Registry", (), {"apply_hooks": staticmethod(apply)})

    def module(self, monkeypatch, **names):
        module = ModuleType("sealed_target")
        vars(module).update(names)
        monkeypatch.setitem(sys.modules, "sealed_target", module)
        return module

    def test_hooks_in_place_pass(self, monkeypatch):
        module = self.module(monkeypatch, f=len, C=int)
        registry = self.registry(lambda: vars(module).update(f=max, C=str))
        hooks = (("sealed_target.f", len, "AROUND"), ("sealed_target.C", str, "REPLACE"))
        plugin.verify_after_apply(registry, hooks, {"sealed_target.f": len, "sealed_target.C": int})
        registry.apply_hooks()

    @pytest.mark.parametrize("applied", [{}, {"f": max}, {"f": max, "C": float}])
    def test_one_that_was_not_applied_ends_the_process(self, monkeypatch, applied):
        module = self.module(monkeypatch, f=len, C=int)
        registry = self.registry(lambda: vars(module).update(applied))
        hooks = (("sealed_target.f", len, "AROUND"), ("sealed_target.C", str, "REPLACE"))
        plugin.verify_after_apply(registry, hooks, {"sealed_target.f": len, "sealed_target.C": int})
        with pytest.raises(SystemExit, match=r"did not apply.*sealed_target.C"):
            registry.apply_hooks()


# --------------------------------------------------------------------------- state, observer, metrics


def test_an_unbound_host_refuses_to_serve():
    state = plugin_state(PluginConfig(controller="chain"))
    with raises_config("--speculative-num-steps 7 --speculative-eagle-topk 1 --speculative-adaptive"):
        state.before_batch(scheduler(), batch("decode", 5))


@pytest.mark.parametrize("field", ["pp_size", "attn_dp_size"])
def test_other_topologies_are_refused(field):
    with raises_config("leave it out"):
        require_topology(parallel(**{field: 2}))


@pytest.mark.parametrize("option", ["enable_two_batch_overlap", "enable_pdmux"])
def test_options_under_which_states_cannot_be_swapped_are_refused(option):
    require_swaps(SimpleNamespace(**{option: False}))
    with raises_config("can't change shapes under --" + option.replace("_", "-")):
        require_swaps(SimpleNamespace(**{option: True}))


def test_one_worker_a_process():
    state = plugin_state(PluginConfig(controller="chain"))
    state.bind(parallel(), 1)
    with raises_config("two speculative workers"):
        state.bind(parallel(), 1)


def test_the_scheduler_is_seen_as_a_load():
    observer = LoadObserver()
    assert not observer.observe(scheduler(waiting=1), batch("extend", 40, 60))
    assert observer.observe(scheduler(waiting=3, used=0.75), batch("decode", 40, 60))
    view = observer.load(2)
    assert (view.batch_size, view.waiting, view.mean_context, view.kv_used, view.arrived) == (2, 3, 50.0, 0.75, 5)
    assert view.prefill_tokens == 0
    observer.observe(scheduler(waiting=3), batch("decode", 41, 61))
    assert observer.load(2).arrived == 0


def test_a_prompt_in_chunks_arrives_once():
    observer = LoadObserver()
    for _ in range(3):
        observer.observe(scheduler(), batch("extend", 512))
    observer.observe(scheduler(), batch("decode", 1536))
    assert observer.load(1).arrived == 1


def test_a_batch_of_another_size_keeps_what_is_known():
    observer = LoadObserver()
    observer.observe(scheduler(waiting=2), batch("decode", 30))
    assert (observer.load(4).batch_size, observer.load(4).waiting, observer.load(4).mean_context) == (4, 2, 30.0)


def test_prefill_between_steps_marks_the_next_untimed():
    state = plugin_state(PluginConfig(controller="chain"))
    state.bind(parallel(), 1)
    state.before_batch(scheduler(), batch("decode", 5))
    state.decide(1)
    assert not state.steering._interrupted
    state.before_batch(scheduler(), batch("extend", 5))
    assert state.steering._interrupted


def test_true_counts_are_exported():
    prometheus = pytest.importorskip("prometheus_client")
    registry = prometheus.CollectorRegistry()
    state = plugin_state(PluginConfig(controller="chain"))
    state.bind(parallel(), 1)
    exporter = Exporter(state.steering, "chain", registry)
    for accepts in ([1, 0], [3, 3]):
        state.steering.launch(load(2))
        state.steering.complete(accepts, 2)
        exporter.export()
    value = {name: registry.get_sample_value(f"{name}_total", {"controller": "chain"}) for name, _ in COUNTERS.values()}
    assert value["echo_rl:spec_verified_tokens"] == 12 and value["echo_rl:spec_accepted_tokens"] == 7
    assert value["echo_rl:spec_committed_tokens"] == 11 and value["echo_rl:spec_steps"] == 2


# --------------------------------------------------------------------------- ranks


def test_alone_decides_for_itself():
    ranks = SingleRank()
    ranks.require_same("x")
    assert ranks.leads and ranks.agree(lambda: Decision(2, (0.5,))) == Decision(2, (0.5,))


def _rank(rank, path, results):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    group = RankGroup(dist.new_group([0, 1], backend="gloo"), levels=3)
    seen = [group.agree(lambda: Decision(5 + rank, (0.1, 0.0, 0.25)))]
    group.require_same("same")
    with contextlib.suppress(ConfigError):
        group.require_same(f"config of rank {rank}")
        seen.append("not refused")

    def fail():
        raise ValueError("leader broke")

    try:
        group.agree(fail)
    except (ValueError, RuntimeError) as error:
        seen.append(type(error).__name__)
    results[rank] = (group.leads, *seen)
    dist.destroy_process_group()


def test_all_ranks_do_what_the_leader_decides(tmp_path):
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_rank, args=(str(tmp_path / "meet"), results), nprocs=2)
        decision = Decision(5, (0.1, 0.0, 0.25))
        assert results[0] == (True, decision, "ValueError")
        assert results[1] == (False, decision, "RuntimeError")


# --------------------------------------------------------------------------- chains


def policy(config=None, initial=7, sized=8, file=None):
    state = plugin_state(config or PluginConfig(controller="chain", options={"steps": 3}))
    chain = object.__new__(type("P", (adaptive.ChainPolicy,), {"state": state}))
    chain.start(initial, file, parallel(), sized)
    return chain


def test_the_policy_answers_sglang():
    chain = policy()
    assert chain.candidate_steps == [0, 1, 2, 3, 5, 7]
    assert chain.get_steps_for_batch(4) == 3
    assert chain.on_verify_complete([1, 2, 3, 0], 4) is None
    assert chain.state.steering.counts.accepted == 6


def test_graphs_are_captured_where_a_shape_can_run():
    config = PluginConfig(controller="chain", shapes=(Shape.chain(0), Shape.chain(3, 10), Shape.chain(7, 2)))
    chain = policy(config)
    assert chain.cuda_graph_bs_for_step(3) is None
    chain.set_cuda_graph_bs([32, 1, 2, 4, 8, 16])
    assert chain.cuda_graph_bs_for_step(0) == [1, 2, 4, 8, 16, 32]
    assert chain.cuda_graph_bs_for_step(3) == [1, 2, 4, 8, 16], "a batch of 10 is padded to 16"
    assert chain.cuda_graph_bs_for_step(7) == [1, 2]


@pytest.mark.parametrize(("initial", "sized"), [(5, 8), (7, 6), (7, None)])
def test_a_server_of_another_size_is_refused(initial, sized):
    with raises_config("--speculative-num-steps 7"):
        policy(initial=initial, sized=sized)


def test_sglangs_own_steps_file_is_refused():
    with raises_config("leave out --speculative-adaptive-config"):
        policy(file="steps.json")
    candidates = {target: hook for target, hook, _ in adaptive.hooks(plugin_state(PluginConfig(controller="chain")))}
    assert candidates[adaptive.CANDIDATES](None) == [0, 1, 2, 3, 5, 7]
    with raises_config("speculative-adaptive-config"):
        candidates[adaptive.CANDIDATES]("steps.json")


# --------------------------------------------------------------------------- doctor


def test_doctor_without_sglang(monkeypatch):
    monkeypatch.setattr("echo_rl.integrations.sglang.doctor.installed_version", lambda: None)
    (row,) = examine()
    assert not row.ok and "install sglang==0.5.23" in row.detail


def test_doctor_names_what_differs(monkeypatch, tmp_path, capsys):
    from echo_rl.cli.sglang import Doctor

    path = tmp_path / "c.json"
    path.write_text('{"controller": "nobody"}')
    module = "echo_rl.integrations.sglang.doctor"
    monkeypatch.setattr(f"{module}.installed_version", lambda: "0.5.23")
    monkeypatch.setattr(f"{module}.check", lambda mode: check(mode, recorded()))
    rows = {row.what: row for row in examine(str(path))}
    assert not rows["configuration"].ok and "nobody" in rows["configuration"].detail
    assert rows["SGLang"].ok and rows[contract.ROOT + SYMBOLS[0].name].ok
    assert Doctor(path).run() == 1
    assert "configuration" in capsys.readouterr().out


def test_doctor_reads_the_plugin_filter(monkeypatch):
    from echo_rl.integrations.sglang import doctor

    point = SimpleNamespace(value=doctor.ENTRY)
    monkeypatch.setattr(doctor, "entry_points", lambda **_: [point])
    monkeypatch.delenv("SGLANG_PLUGINS", raising=False)
    assert doctor.entry_point().ok
    monkeypatch.setenv("SGLANG_PLUGINS", "other")
    assert "leaves it out" in doctor.entry_point().detail
    monkeypatch.setattr(doctor, "entry_points", lambda **_: [])
    assert "install echo-rl again" in doctor.entry_point().detail


def test_the_entry_point_is_where_the_doctor_looks():
    from echo_rl.integrations.sglang import doctor

    module, name = doctor.ENTRY.split(":")
    assert module == plugin.__name__ and getattr(plugin, name) is plugin.register
