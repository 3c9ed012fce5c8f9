"""Controllers ranked on replay: constructed cases, intervals, the best fixed plan, resumption."""

from __future__ import annotations

import json
import time
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from echo_rl.controllers import registry
from echo_rl.controllers.wrappers.base import ControllerWrapper
from echo_rl.costs.batched_profile import BatchedCostProfile
from echo_rl.costs.files import packaged
from echo_rl.costs.profile import CostProfile
from echo_rl.errors import ConfigError, PolicyError, TraceError, UnknownController
from echo_rl.experiments.arms import made_of
from echo_rl.experiments.evaluate import EvalConfig, Replayer, best_fixed, evaluate, halving
from echo_rl.experiments.rank import HINDSIGHT, Block, mean_speedup, report
from tests.policies import constant_policy
from tests.profiles import hinge_profile
from tests.recorded import random_trace

SHAPES = ((0, 1, 1), (0.5, 1, 1), (1, 1, 1), (2, 2, 1), (3, 3, 2), (7, 4, 3), (15, 5, 4))
CONFIG = EvalConfig(concurrency=(1, 4), blocks=2, requests=3)


@pytest.fixture(scope="module")
def costs() -> BatchedCostProfile:
    return BatchedCostProfile(CostProfile.load(packaged("profile.json")))


@pytest.fixture(scope="module")
def trace():
    return random_trace(width=8, depth=8)


def block(rate: float, seconds: float = 10.0) -> Block:
    return Block(round(rate * seconds), seconds, 5, 20, 10, deciding=0.25)


def blocks(rates: dict[int, list[float]]) -> dict[int, list[Block]]:
    return {load: [block(rate) for rate in row] for load, row in rates.items()}


def simulated(result) -> dict:
    """Without what this machine's clock said."""
    return result | {"cells": [{**cell, "deciding": None} for cell in result["cells"]]}


def by_arm(result, key: str) -> dict[str, dict]:
    return {row["arm"]: row for row in result[key]}


def test_a_constructed_case_is_ranked():
    """`tall` wins at 1 by so much that it wins overall; `flat` wins at 8; `twin` can't be told from `tall`."""
    measured = {
        "none": blocks({1: [100, 110], 8: [400, 440]}),
        "echo": blocks({1: [200, 220], 8: [400, 440]}),
        "flat": blocks({1: [100, 110], 8: [800, 880]}),
        "tall": blocks({1: [900, 990], 8: [200, 220]}),
        "twin": blocks({1: [910, 979], 8: [100, 110]}),
        HINDSIGHT: blocks({1: [950, 1045], 8: [900, 990]}),
        "oracle:depth=3": blocks({1: [999, 1099], 8: [999, 1099]}),
    }
    result = report((1, 8), measured)
    ranking = by_arm(result, "ranking")
    assert list(ranking) == ["oracle:depth=3", HINDSIGHT, "tall", "twin", "echo", "flat", "none"]
    assert [row["rank"] for row in ranking.values()] == [None, None, 1, 2, 3, 4, 5]
    assert [(w["arm"], w["tied"]) for w in result["winners"]] == [("tall", ["twin"]), ("flat", [])]
    assert (ranking["tall"]["wins"], ranking["flat"]["wins"], ranking["echo"]["wins"]) == (1, 1, 0)
    assert ranking["tall"]["speedup"]["estimate"] == pytest.approx((9 * 0.5) ** 0.5)
    assert ranking["tall"]["over_reference"]["estimate"] == pytest.approx((4.5 * 0.5) ** 0.5)
    (cell,) = (c for c in result["cells"] if c["arm"] == "tall" and c["concurrency"] == 8)
    assert cell["speedup"]["estimate"] == pytest.approx(0.5) and cell["throughput"]["estimate"] == pytest.approx(210)
    assert cell["mat"] == 2.0 and (cell["steps"], cell["seconds"]) == (10, 20.0)
    assert cell["deciding"] == pytest.approx(0.025)


def test_one_block_tells_nobody_apart():
    measured = {"none": blocks({1: [100]}), "echo": blocks({1: [200]}), "tall": blocks({1: [900]})}
    (winner,) = report((1,), measured)["winners"]
    assert (winner["arm"], winner["tied"]) == ("tall", ["echo", "none"])


def test_the_interval_over_loads_knows_that_small_loads_serve_the_same_prompts():
    """An arm that is the faster the harder a block's prompts are, at both loads alike: no narrower than at one load."""
    g = np.random.default_rng(0)
    hard = np.exp(g.normal(0, 0.3, 8))
    plain = {load: [block(100) for _ in hard] for load in (1, 2)}
    ours = {load: [replace(block(100), seconds=block(100).seconds * h) for h in hard] for load in (1, 2)}
    both, one = (
        by_arm(report(loads, {"none": pick(plain, loads), "echo": pick(ours, loads)}), "ranking")["echo"]["speedup"]
        for loads in ((1, 2), (1,))
    )
    assert both == pytest.approx(one)


def pick(served, loads):
    return {load: served[load] for load in loads}


def test_replayed_arms_serve_the_same_requests(trace, costs):
    replayer = Replayer(CONFIG, trace, costs, registry.make)
    served = [[r.id.split("#")[0] for r in replayer.requests(2, n)] for n in range(5)]
    assert [len(ids) for ids in served] == [4] * 5
    laps = [number for ids in served for number in ids]
    assert len(set(laps[:12])) == 12 and set(laps[12:]) <= set(laps[:12])  # none repeats before all were served
    assert laps[:8] != laps[12:]
    tokens = {arm: [b.tokens for b in replayer.measure(arm, 4, range(2))] for arm in ("none", "chain")}
    assert tokens["none"] == tokens["chain"]


def test_deciding_is_timed_beside_the_simulated_time(trace, costs):
    """A slow controller serves exactly as a quick one does, and is seen to be slow."""

    class Slow(ControllerWrapper):
        def plan(self, load):
            time.sleep(0.002)
            return super().plan(load)

    def slowly(name, **options):
        return Slow(registry.make(name, **options))

    quick, slow = (
        Replayer(CONFIG, trace, costs, make).measure("fixed:nodes=2,depth=2,width=1", 1, range(2))
        for make in (registry.make, slowly)
    )
    for a, b in zip(quick, slow, strict=True):
        assert replace(a, deciding=0) == replace(b, deciding=0)
        assert a.deciding > 0 and b.deciding > 0.001 * b.steps


def test_a_policy_that_was_trained_again_is_measured_again(trace, costs, tmp_path):
    """An arm is told apart by what is in its files, not by their names."""
    arm, served = f"ppo:path={tmp_path / 'policy'}", []
    for action in ((0, 0, 0, 0, 0), (4, 2, 1, 0, 0)):
        constant_policy(action).save(tmp_path / "policy", {})
        replayer = Replayer(CONFIG, trace, costs, registry.make, tmp_path / "cells.jsonl")
        served += replayer.measure(arm, 1, range(1))
    assert served[0].steps > served[1].steps


def planning_by_costs() -> list[str]:
    families = registry.CONTROLLERS.items()
    return [name for name, family in families if "profile" in {field.name for field in fields(family.options)}]


@pytest.mark.parametrize("name", planning_by_costs())
def test_an_arm_whose_profile_was_measured_again_is_another(name, tmp_path):
    path, known = tmp_path / "profile.json", []
    for level in (1e-3, 2e-3, 2e-3):
        hinge_profile(level=level).save(path)
        known.append(made_of(registry.make(name, profile=str(path))))
    assert known[0] != known[1] == known[2]


def test_plain_decoding_and_a_good_plan_are_told_apart(trace, costs, tmp_path):
    """Verification on this machine's profile costs little at batch 1, so a chain of 1 must beat 60 nodes at 4."""
    config = replace(CONFIG, arms=("chain:steps=1", "fixed:nodes=60,depth=5,width=4"))
    result = evaluate(config, trace, costs, registry.make, tmp_path)
    ranking = list(by_arm(result, "ranking"))
    assert set(ranking) == {"none", "echo", *config.arms}
    assert ranking.index("chain:steps=1") < ranking.index("fixed:nodes=60,depth=5,width=4")
    cells = {(c["arm"], c["concurrency"]): c for c in result["cells"]}
    assert cells["none", 1]["mat"] == 1.0 < cells["chain:steps=1", 1]["mat"] <= 2.0
    assert cells["none", 4]["speedup"]["estimate"] == 1.0 == cells["echo", 4]["over_reference"]["estimate"]
    assert json.loads((tmp_path / "result.json").read_text())["ranking"] == result["ranking"]
    assert (tmp_path / "speedup.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("concurrency", [1, 6])
def test_hindsight_is_no_worse_than_any_fixed_arm(trace, costs, concurrency):
    config = EvalConfig(concurrency=(concurrency,), blocks=4, requests=2)
    replayer = Replayer(config, trace, costs, registry.make)
    rates = {}
    for n, d, w in SHAPES:
        arm = f"fixed:nodes={n:g},depth={d},width={w}"
        served = replayer.measure(arm, concurrency, range(4))
        rates[arm] = sum(b.tokens for b in served) / sum(b.seconds for b in served)
    best, served = best_fixed(replayer, concurrency, SHAPES, keep=1.0)
    assert rates[best] == max(rates.values())
    assert rates[best] == pytest.approx(sum(b.tokens for b in served) / sum(b.seconds for b in served))
    assert len(set(rates.values())) > 3


def test_hindsight_is_an_arm_without_a_rank(trace, costs):
    result = evaluate(replace(CONFIG, concurrency=(2,), hindsight=True), trace, costs, registry.make)
    ranking = by_arm(result, "ranking")
    assert ranking[HINDSIGHT]["rank"] is None and ranking["echo"]["rank"] in (1, 2)
    assert result["hindsight"]["2"].startswith("fixed:nodes=")
    assert {w["arm"] for w in result["winners"]} <= {"none", "echo"}


def test_plans_that_were_not_recorded_are_not_searched(trace, costs):
    replayer = Replayer(replace(CONFIG, blocks=1), trace, costs, registry.make)
    best, _ = best_fixed(replayer, 1, ((1, 1, 1), (3, trace.max_depth + 1, 1), (3, 2, 9)))
    assert best == "fixed:nodes=1,depth=1,width=1"


RATES = st.lists(st.lists(st.floats(1, 9), min_size=6, max_size=6), min_size=1, max_size=9)


@settings(max_examples=60)
@given(RATES, st.integers(1, 6), st.floats(0.1, 1), st.booleans())
def test_halving_never_drops_an_arm_that_is_ahead_of_the_winner(rates, count, keep, protect):
    """On the blocks that both served, the winner is at least as good as whatever was taken out."""
    seen: dict[str, list[float]] = {str(i): [] for i in range(len(rates))}

    def measure(arm: str, part: range) -> bool:
        assert part.start == len(seen[arm])
        seen[arm] += [rates[int(arm)][n] for n in part]
        return True

    left = halving(tuple(seen), count, measure, lambda arm: sum(seen[arm]), keep, always=("0",) if protect else ())
    assert set(left) == {arm for arm, values in seen.items() if len(values) == count}
    assert [sum(seen[arm]) for arm in left] == sorted((sum(seen[arm]) for arm in left), reverse=True)
    for values in seen.values():
        assert sum(seen[left[0]][: len(values)]) >= sum(values) or (protect and left[0] == "0")
    assert "0" in left or not protect
    assert len(left) == len(rates) or (keep < 1.0 and count > 1)


def test_halving_takes_out_what_cannot_be_measured():
    assert halving(("a", "b"), 2, lambda arm, part: arm == "b", lambda arm: 1.0) == ["b"]
    assert halving(("a",), 2, lambda arm, part: False, lambda arm: 1.0) == []


def test_an_interrupted_run_goes_on(trace, costs, tmp_path):
    made: list[str] = []

    def make(name, **options):
        made.append(name)
        if len(made) == stop:
            raise KeyboardInterrupt
        return registry.make(name, **options)

    config = replace(CONFIG, arms=("chain",))
    stop = 0
    whole = evaluate(config, trace, costs, make, tmp_path / "whole")
    everything = len(made)
    made.clear()
    stop = everything - 1
    with pytest.raises(KeyboardInterrupt):
        evaluate(config, trace, costs, make, tmp_path / "part")
    cells = tmp_path / "part" / "cells.jsonl"
    cells.write_text(cells.read_text() + '{"key": "cut sh')
    stop = 0
    made.clear()
    again = evaluate(config, trace, costs, make, tmp_path / "part")
    assert simulated(again) == simulated(whole) and len(made) < everything
    made.clear()
    assert evaluate(config, trace, costs, make, tmp_path / "part") == again
    assert made == ["none", "echo", "chain"] * 2  # only to see that they can be made, and of what
    evaluate(replace(config, arms=("static", "chain")), trace, costs, make, tmp_path / "part")
    assert made.count("static") == 4 and made.count("chain") == 4


def test_a_folder_of_another_trace_is_refused(trace, costs, tmp_path):
    evaluate(CONFIG, trace, costs, registry.make, tmp_path)
    for config, other in ((CONFIG, random_trace(1, width=8, depth=8)), (replace(CONFIG, seed=1), trace)):
        with pytest.raises(ConfigError, match="delete it"):
            evaluate(config, other, costs, registry.make, tmp_path)


def test_arms_that_cannot_be_replayed_are_named(trace, costs):
    def make(name, **options):
        if name == "ppo":
            raise PolicyError("no policy here; train one")
        return registry.make(name, **options)

    wide = "fixed:nodes=3,depth=2,width=9"
    result = evaluate(replace(CONFIG, arms=(wide, "ppo")), trace, costs, make)
    assert set(result["left_out"]) == {wide, "ppo"}
    assert "record with --width 9" in result["left_out"][wide]
    assert set(by_arm(result, "ranking")) == {"none", "echo"}
    with pytest.raises(TraceError, match="'echo', which"):
        evaluate(CONFIG, trace, costs, lambda name, **o: make("fixed", width=9) if name == "echo" else make(name, **o))


@pytest.mark.parametrize(
    ("arm", "error"), [("echoo", UnknownController), ("echo:nodse=3", ConfigError), ("chain:steps=0", ConfigError)]
)
def test_arms_that_do_not_exist_are_refused_at_once(trace, costs, tmp_path, arm, error):
    with pytest.raises(error):
        evaluate(replace(CONFIG, arms=("chain", arm)), trace, costs, registry.make, tmp_path)
    assert len((tmp_path / "cells.jsonl").read_text().splitlines()) == 1  # nothing but the settings


def test_a_learner_keeps_what_it_learnt(trace, costs):
    """One controller serves the warm-up and all blocks of a load; another load gets a new one."""
    made: list[str] = []
    replayer = Replayer(CONFIG, trace, costs, lambda name, **o: made.append(name) or registry.make(name, **o))
    replayer.measure("chain", 1, range(2))
    replayer.measure("chain", 1, range(2))
    replayer.measure("chain", 4, range(2))
    assert made == ["chain"] * 3  # the first one only to tell what it is made of


def test_a_load_above_the_usual_batch_limit_is_served_at_once(trace, costs):
    replayer = Replayer(EvalConfig(concurrency=(80,), blocks=1, warmup=0), trace, costs, registry.make)
    (block,) = replayer.measure("none", 80, range(1))
    assert block.rows / block.steps > 64


def test_the_command_says_that_a_profile_is_modelled(trace, tmp_path, capsys, monkeypatch):
    from echo_rl.cli.evaluate import Eval

    monkeypatch.setenv("COLUMNS", "160")
    trace.save(tmp_path / "trace.safetensors")
    (profile,) = (replace(CostProfile.load(packaged("profile.json")), **labels) for labels in (
        {"modelled": True, "device": "modelled X100", "provenance": "modelled, nothing measured"},
    ))  # fmt: skip
    profile.save(tmp_path / "profile.json")
    planned: list[CostProfile] = []
    by = registry.planning_by
    monkeypatch.setattr(registry, "planning_by", lambda given: planned.append(given) or by(given))
    command = Eval(
        ("evict",), (1,), blocks=2, requests=2, trace=tmp_path / "trace.safetensors", full=True, out=tmp_path / "out",
        profile=tmp_path / "profile.json",
    )  # fmt: skip
    assert command.run() == 0
    assert planned == [profile] and by(profile)("evict").profile is profile
    assert capsys.readouterr().out.count("Costs: modelled X100") == 2
    machine = json.loads((tmp_path / "out" / "result.json").read_text())["machine"]
    assert machine == {"modelled": True, "title": "modelled X100, smollm2 bfloat16"}


def test_settings_are_checked():
    for change in ({"blocks": 0}, {"concurrency": ()}, {"concurrency": (0,)}, {"requests": 0}, {"warmup": -1}):
        with pytest.raises(ConfigError, match="at least"):
            EvalConfig(**change)
    with pytest.raises(ConfigError, match="names a load twice"):
        EvalConfig(concurrency=(8, 8, 16))


def test_mean_speedup_is_geometric():
    plain = {1: [block(100)], 2: [block(100)]}
    assert mean_speedup({1: [block(400)], 2: [block(100)]}, plain) == pytest.approx(2.0)


def test_the_command_prints_the_ranking(trace, tmp_path, capsys, monkeypatch):
    from echo_rl.cli.evaluate import Eval

    monkeypatch.setenv("COLUMNS", "160")
    trace.save(tmp_path / "trace.safetensors")
    tuned = tmp_path / "tuned.json"
    tuned.write_text(json.dumps({"chain": {"options": {"steps": 2}}}))
    command = Eval(
        ("chain", "eagle3"), (1,), blocks=2, requests=2, trace=Path(tmp_path / "trace.safetensors"), tuned=tuned,
        full=True, out=tmp_path / "out",
    )  # fmt: skip
    assert command.run() == 0
    text = capsys.readouterr().out
    assert "chain:steps=2" in text and "Left out: eagle3" in text and "MAT" in text
    served = {c["arm"]: c["tokens"] for c in json.loads((tmp_path / "out" / "result.json").read_text())["cells"]}
    assert set(served) == {"none", "echo", "chain:steps=2"}
