"""The engine on tiny random models: lossless under any controller, KV conserved, budget never exceeded."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from echo_rl.contracts import AUTOREGRESSIVE, Forest, Frontier, LoadView, Request, SamplingParams, Selection, SpecPlan
from echo_rl.controllers.base import BaseController
from echo_rl.controllers.selection import pack
from echo_rl.errors import ConfigError, PlanViolation, RequestError
from echo_rl.runtime.engine import Engine
from tests import tiny
from tests.runtime.driving import requests, run


class Plain(BaseController):
    name = "plain"

    def propose(self, load: LoadView) -> SpecPlan:
        return AUTOREGRESSIVE


class Erratic(BaseController):
    """Decides at random: any legal behaviour of a controller may come from it."""

    name = "erratic"

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.rng = random.Random(seed)
        self.reports = []

    def propose(self, load: LoadView) -> SpecPlan:
        if self.rng.random() < 0.2:
            return AUTOREGRESSIVE
        gates = tuple((d, 0.5) for d in range(5) if self.rng.random() < 0.5)
        return SpecPlan(self.rng.randint(1, 60), self.rng.randint(1, 5), self.rng.randint(1, 8), gates)

    def extend(self, frontier: Frontier, plan: SpecPlan) -> torch.Tensor:
        return torch.tensor([self.rng.random() < 0.7 for _ in frontier.alive], device=frontier.alive.device)

    def select(self, forest: Forest, plan: SpecPlan) -> Selection:
        """A random pick, closed under ancestors, within the budget."""
        mask = torch.zeros_like(forest.exists)
        nodes = [tuple(n) for n in forest.exists.nonzero().tolist()]
        self.rng.shuffle(nodes)
        for row, node in nodes[: 2 * plan.budget]:
            chain = []
            while node >= 0 and not mask[row, node]:
                chain.append(node)
                node = int(forest.parents[row, node])
            if int(mask.sum()) + len(chain) <= plan.budget and int(mask[row].sum()) + len(chain) <= self._node_cap:
                mask[row, chain] = True
        return pack(forest, mask)

    def observe(self, report):
        self.reports.append(report)


@pytest.fixture(scope="module")
def tiny_engine(tmp_path_factory) -> Engine:
    return tiny.engine(tmp_path_factory.mktemp("tiny"), prefill_chunk=16)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("batch", [1, 4, 16])
def test_any_controller_gives_the_tokens_of_plain_decoding(tiny_engine, batch, temperature):
    todo = requests(batch, temperature)
    plain = run(tiny_engine, Plain(), todo)
    assert all(len(tokens) == 24 for tokens in plain.values())
    controllers = [Erratic(seed) for seed in range(4)]
    for erratic in controllers:
        assert run(tiny_engine, erratic, todo) == plain
    accepted = sum(r.accepted for erratic in controllers for r in erratic.reports)
    assert accepted > 0, "nothing was ever accepted: the test shows nothing"


def test_rejected_drafts_leave_no_trace_in_what_the_drafter_reads(tiny_engine):
    def features(controller: BaseController) -> dict[str, torch.Tensor]:
        """[tokens in the cache, F] of every request, as they were before its last step."""
        found = {}
        for request in requests(6, 0.8):
            tiny_engine.add(request)
        while tiny_engine.has_work:
            tiny_engine.step(controller)
            for sequence in tiny_engine._sequences.values():
                positions = np.arange(sequence.kv_len)
                slots = tiny_engine.runner.layout([sequence]).host_slots(np.zeros_like(positions), positions)
                found[sequence.id] = tiny_engine.runner.cache.features[slots]
        return found

    plain, erratic = features(Plain()), Erratic(6)
    for name, found in features(erratic).items():
        torch.testing.assert_close(found, plain[name][: len(found)], atol=1e-4, rtol=1e-4)
    assert any(0 < report.accepted < report.verified for report in erratic.reports)


def test_tokens_do_not_depend_on_the_batch(tiny_engine):
    todo = requests(8, 0.8, top_k=12, top_p=0.9)
    together = run(tiny_engine, Plain(), todo)
    alone = {r.id: run(tiny_engine, Plain(), [r])[r.id] for r in todo}
    assert together == alone


def test_seeds_and_filters_change_the_output(tiny_engine):
    base = requests(1, 0.8)[0]
    other_seed = replace(base, params=replace(base.params, seed=99))
    greedy_by_filter = replace(base, params=replace(base.params, top_k=1))
    greedy = replace(base, params=replace(base.params, temperature=0.0))
    outs = [run(tiny_engine, Plain(), [r])["r0"] for r in (base, other_seed, greedy_by_filter, greedy)]
    assert outs[0] != outs[1]
    assert outs[2] == outs[3] != outs[0]


def test_reports_add_up(tiny_engine):
    erratic = Erratic(5)
    todo = requests(6, 0.8)
    outputs = run(tiny_engine, erratic, todo)
    for r in erratic.reports:
        assert r.committed == r.accepted + r.load.batch_size
        assert sum(r.accepted_by_depth) == r.accepted
        assert all(a <= reached for a, reached in zip(r.accepted_by_depth, r.reached_by_depth, strict=True))
        assert r.accepted <= r.verified <= r.drafted
    first_tokens = len(todo)
    assert sum(r.committed for r in erratic.reports) + first_tokens >= sum(map(len, outputs.values()))


def test_budget_zero_does_not_run_the_drafter(tiny_engine, monkeypatch):
    def fail(*args: object) -> None:
        raise AssertionError("the drafter ran")

    monkeypatch.setattr(tiny_engine.runner.drafter, "forward", fail)
    run(tiny_engine, Plain(), requests(3, 0.0))


def test_drafter_catches_up_after_a_long_plain_stretch(tiny_engine):
    class Late(BaseController):
        name = "late"
        steps = 0

        def propose(self, load: LoadView) -> SpecPlan:
            self.steps += 1
            return SpecPlan(8, 3, 2) if self.steps > 30 else AUTOREGRESSIVE

    todo = requests(2, 0.0, tokens=60)
    assert run(tiny_engine, Late(), todo) == run(tiny_engine, Plain(), todo)


def test_cancel_frees_at_once(tiny_engine):
    for request in requests(4, 0.0):
        tiny_engine.add(request)
    tiny_engine.step(Plain())
    for i in range(4):
        tiny_engine.cancel(f"r{i}")
        tiny_engine.check_integrity()
    tiny_engine.cancel("unknown")
    assert not tiny_engine.has_work and tiny_engine.block_manager.used_share == 0.0


def test_requests_wait_for_memory_and_all_finish(tmp_path):
    small = tiny.engine(tmp_path, kv_tokens=256, block_size=8)
    todo = requests(6, 0.0)
    assert run(small, Erratic(1), todo) == run(small, Plain(), todo)


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Request("a", ()), "empty"),
        (Request("a", (1,) * 300), "exceed the context"),
        (Request("a", (5, 256)), "outside"),
        (Request("a", (5, -1)), "outside"),
        (Request("a", (1,), SamplingParams(max_new_tokens=1000)), "exceed the context"),
    ],
)
def test_requests_that_cannot_be_served_are_refused(tiny_engine, request_, words):
    with pytest.raises(RequestError, match=words):
        tiny_engine.add(request_)
    tiny_engine.check_integrity()
    assert not tiny_engine.has_work


def test_duplicate_ids_are_refused(tiny_engine):
    request = requests(1, 0.0)[0]
    tiny_engine.add(request)
    with pytest.raises(RequestError, match="in use"):
        tiny_engine.add(request)
    tiny_engine.cancel(request.id)


def test_a_request_larger_than_the_cache_is_refused(tmp_path):
    small = tiny.engine(tmp_path, kv_tokens=128)
    with pytest.raises(RequestError, match="KV cache"):
        small.add(Request("a", (1,) * 100, SamplingParams(max_new_tokens=20)))


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_k": -1},
        {"top_k": 2**63},
        {"max_new_tokens": 0},
        {"seed": -1},
        {"stop": ("a", "")},
    ],
)
def test_bad_sampling_parameters_are_refused(values):
    with pytest.raises(RequestError, match="give"):
        SamplingParams(**values)


def test_speculating_without_a_drafter_says_what_to_do(tmp_path):
    bare = tiny.engine(tmp_path, drafter=None)
    bare.add(requests(1, 0.0)[0])
    bare.step(Plain())

    class Eager(Plain):
        def propose(self, load: LoadView) -> SpecPlan:
            return SpecPlan(4)

    with pytest.raises(ConfigError, match="no drafter"):
        bare.step(Eager())
    bare.check_integrity()


def test_a_selection_over_budget_is_stopped(tiny_engine):
    class Greedy(Plain):
        def propose(self, load: LoadView) -> SpecPlan:
            return SpecPlan(2, 2, 4)

        def select(self, forest: Forest, plan: SpecPlan) -> Selection:
            return pack(forest, forest.exists)

    tiny_engine.add(requests(1, 0.0)[0])
    tiny_engine.step(Plain())
    with pytest.raises(PlanViolation, match="selected"):
        tiny_engine.step(Greedy())
    tiny_engine.cancel("r0")
    tiny_engine.check_integrity()


def test_logits_that_are_not_finite_fail_one_request_only(tmp_path):
    poisoned = tiny.engine(tmp_path)
    poisoned.runner.target.embed[200] = float("nan")
    good, bad = (Request(n, (t, 7, 8), SamplingParams(max_new_tokens=6)) for n, t in (("good", 5), ("bad", 200)))
    alone = run(poisoned, Plain(), [good])["good"]
    poisoned.add(good)
    poisoned.add(bad)
    outputs, reasons = [], {}
    while poisoned.has_work:
        for output in poisoned.step(Erratic(0)).outputs:
            outputs += output.tokens if output.id == "good" else []
            reasons[output.id] = (output.finish_reason, output.error)
        poisoned.check_integrity()
    assert outputs == alone
    assert reasons["good"][0] == "length"
    assert reasons["bad"][0] == "error" and "not finite" in reasons["bad"][1]


@pytest.mark.parametrize("step", ["eager", "device"])
def test_a_drafted_token_that_breaks_the_model_changes_nothing(tmp_path, step):
    """It is rejected anyway, but its values are not finite and lie beside the request's own."""

    class Poisonous(Erratic):
        def select(self, forest: Forest, plan: SpecPlan) -> Selection:
            selection = super().select(forest, plan)
            return replace(selection, tokens=torch.full_like(selection.tokens, poison))

    engine, todo = tiny.engine(tmp_path, step=step), requests(3, 0.8, tokens=12)
    plain = run(engine, Plain(), todo)
    seen = {token for r in todo for token in (*r.prompt, *plain[r.id])}
    poison = next(token for token in range(tiny.VOCAB) if token not in seen)
    engine.runner.target.embed[poison] = float("nan")
    assert run(engine, Poisonous(0), todo) == plain


def test_stop_strings_cut_the_text_wherever_steps_fall(tiny_engine):
    free = requests(1, 0.0, tokens=40)[0]
    tokens = run(tiny_engine, Plain(), [free])["r0"]
    text = tiny_engine.tokenizer.decode(tokens)
    stop = text[10:13]
    params = replace(free.params, stop=(stop,))
    for controller in (Plain(), Erratic(3), Erratic(4)):
        tiny_engine.add(Request("s", free.prompt, params))
        seen, reason = "", None
        while tiny_engine.has_work:
            for output in tiny_engine.step(controller).outputs:
                seen += output.text
                reason = output.finish_reason
        assert seen == text[: text.index(stop)]
        assert reason == "stop"


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_requests_without_speculation_share_the_batch(tiny_engine, temperature):
    todo = requests(6, temperature)
    plain = run(tiny_engine, Plain(), todo)
    mixed = [replace(r, speculate=i % 2 == 0) for i, r in enumerate(todo)]
    erratic = Erratic(1)
    tiny_engine.trace_trees = True
    assert run(tiny_engine, erratic, mixed) == plain
    tiny_engine.trace_trees = False
    assert sum(r.accepted for r in erratic.reports) > 0
    assert any(r.load.plain and r.plan.speculates for r in erratic.reports)
    shown = {tree.id for r in erratic.reports for tree in r.trees}
    assert shown == {"r0", "r2", "r4"}


def test_a_batch_that_never_speculates_asks_no_controller(tiny_engine):
    erratic = Erratic(1)
    erratic.plan = None  # calling it would raise
    todo = [replace(r, speculate=False) for r in requests(3, 0.0)]
    assert run(tiny_engine, erratic, todo) == run(tiny_engine, Plain(), requests(3, 0.0))


def test_shown_trees_are_what_was_verified(tiny_engine):
    erratic = Erratic(3)
    tiny_engine.trace_trees = True
    run(tiny_engine, erratic, requests(5, 0.0))
    tiny_engine.trace_trees = False
    steps = [r for r in erratic.reports if r.plan.speculates]
    assert steps
    for report in steps:
        assert len(report.trees) == report.load.batch_size
        assert sum(len(t.parents) for t in report.trees) == report.verified
        assert sum(len(t.accepted) for t in report.trees) == report.accepted
        for t in report.trees:
            assert [t.depths[node] for node in t.accepted] == list(range(len(t.accepted)))
            assert all(t.depths[i] == (t.depths[p] + 1 if p >= 0 else 0) for i, p in enumerate(t.parents))
            assert max(t.depths, default=-1) < t.drafted_depth


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_logprobs_are_the_plain_distribution_and_the_same_with_speculation(tiny_engine, temperature):
    todo = [replace(r, logprobs=3 if i else None) for i, r in enumerate(requests(3, temperature))]

    def likelihoods(controller):
        found = {r.id: [] for r in todo}
        for request in todo:
            tiny_engine.add(request)
        while tiny_engine.has_work:
            for output in tiny_engine.step(controller).outputs:
                assert len(output.logprobs) == (len(output.tokens) if output.id != "r0" else 0)
                assert [p.token for p in output.logprobs] == list(output.tokens[: len(output.logprobs)])
                found[output.id] += output.logprobs
        return found

    plain, speculated = likelihoods(Plain()), likelihoods(Erratic(2))
    for key, expected in plain.items():
        for a, b in zip(expected, speculated[key], strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=1e-4) and len(a.top) == 3
            assert a.logprob <= a.top[0][1] + 1e-6 and a.top[0][1] >= a.top[1][1] >= a.top[2][1]
            assert sum(torch.tensor([p for _, p in a.top]).exp().tolist()) <= 1 + 1e-5
            if temperature == 0:
                assert a.top[0] == (a.token, pytest.approx(a.logprob))


def test_too_many_logprobs_are_refused():
    with pytest.raises(RequestError, match="logprobs"):
        Request("r", (1,), logprobs=21)
