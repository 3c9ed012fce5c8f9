"""Modelled cost profiles: hand-computed parts, shapes of the curves, and a label that can't be lost."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.research import roofline as benchmark
from echo_rl.cli import main
from echo_rl.costs.batched_profile import BatchedCostProfile
from echo_rl.costs.profile import CostProfile
from echo_rl.costs.roofline.hardware import HARDWARE, Assumptions
from echo_rl.costs.roofline.models import MODELS, Experts
from echo_rl.costs.roofline.surface import ModelledGrid, modelled_profile, roofline
from echo_rl.errors import ConfigError
from tests.recorded import random_trace

DENSE, MOE = roofline("h100", "llama-3.1-8b"), roofline("h100", "qwen3-235b-a22b", 8)
MACHINES = {"dense": DENSE, "split": roofline("mi300x", "llama-3.3-70b", 4), "moe": MOE}
SMALL = ModelledGrid(batches=(1, 8, 64, 256), contexts=(128, 1024), widths=(1, 3, 8), depths=(1, 3, 8))
PROFILES = {name: modelled_profile(source, SMALL) for name, source in MACHINES.items()}


@pytest.mark.parametrize(
    ("name", "billions", "active"),
    [("llama-3.1-8b", 8.03, 7.5), ("llama-3.3-70b", 70.55, 69.5), ("qwen3-235b-a22b", 235.1, 21.5)],
)
def test_sizes_add_up_to_the_published_parameters(name, billions, active):
    sizes = MODELS[name].target
    assert sizes.parameters / 1e9 == pytest.approx(billions, rel=2e-3)
    assert (sizes.active + sizes.vocabulary * sizes.hidden) / 1e9 == pytest.approx(active, rel=0.01)


def test_one_row_of_plain_decoding_reads_every_weight_once():
    """8B at batch 1: all but the embedding's 16 GB minus 1 GB, at 0.8 of 3.35 TB/s, and 10 kernels a layer."""
    parts = DENSE.verify(1, 1, 0)
    weights = 2 * (8.030e9 - 128_256 * 4096) / (0.8 * 3.35e12)
    assert parts.linear + parts.head == pytest.approx(weights, rel=2e-3)
    assert parts.launch == pytest.approx(320 * 2e-6)
    assert parts.experts == parts.reduce == 0.0


def test_many_rows_cost_their_arithmetic():
    rows, sizes = 8192, DENSE.model.target
    assert DENSE.verify(8, rows, 0).linear == pytest.approx(2.0 * rows * sizes.active / (0.7 * 989.4e12), rel=1e-6)


def test_a_request_reads_its_own_context_once_for_all_its_rows():
    """KV of 8B: 128 kB a token."""
    longer = DENSE.verify(4, 4, 3000).attention - DENSE.verify(4, 4, 1000).attention
    assert longer == pytest.approx(4 * 2000 * 131_072 / (0.8 * 3.35e12))
    assert DENSE.verify(4, 24, 3000).attention < 1.01 * DENSE.verify(4, 4, 3000).attention


def test_collectives_move_twice_a_layer_and_gather_the_logits():
    split, sizes = MACHINES["split"], MACHINES["split"].model.target
    growth = split.verify(8, 1008, 0).reduce - split.verify(8, 8, 0).reduce
    values = 1000 * (sizes.layers * 2 * 2 * sizes.hidden + sizes.vocabulary)
    assert growth == pytest.approx(values * 2 * (3 / 4) / (0.7 * 448e9))
    assert split.verify(1, 1, 0).reduce > (2 * sizes.layers + 1) * split.assumed.collective


@pytest.mark.parametrize("source", MACHINES.values(), ids=MACHINES)
@settings(max_examples=60)
@given(batch=st.integers(1, 300), nodes=st.integers(0, 4000), more=st.integers(1, 500), context=st.integers(0, 40_000))
def test_more_work_never_takes_less_time(source, batch, nodes, more, context):
    seconds = source.verify(batch, batch + nodes, context).total
    assert source.verify(batch, batch + nodes + more, context).total > seconds
    assert source.verify(batch, batch + nodes, context + more).total >= seconds
    assert source.verify(batch + more, batch + nodes + more, context).total > seconds


@pytest.mark.parametrize("source", MACHINES.values(), ids=MACHINES)
@settings(max_examples=40)
@given(batch=st.integers(1, 300), width=st.integers(1, 10), depth=st.integers(1, 8), more=st.integers(1, 4))
def test_more_drafting_never_takes_less_time(source, batch, width, depth, more):
    seconds = source.draft(batch, width, depth, 512)
    assert source.draft(batch, width, depth + more, 512) > seconds
    assert source.draft(batch, width + more, depth, 512) >= seconds
    assert source.draft(batch + more, width, depth, 512) > seconds


def test_a_dense_pass_is_flat_up_to_the_ridge_and_then_linear():
    ridge = DENSE.flops / DENSE.bandwidth  # rows at which a bf16 weight's arithmetic takes as long as reading it
    assert 200 < ridge < 320
    seconds = {rows: DENSE.verify(1, rows, 128).total for rows in (1, 8, round(ridge / 2), 1024, 2048, 4096, 8192)}
    assert seconds[8] < 1.01 * seconds[1] and seconds[round(ridge / 2)] < 1.12 * seconds[1]
    slopes = [(seconds[2 * r] - seconds[r]) / r for r in (1024, 2048, 4096)]
    assert slopes == pytest.approx([slopes[0]] * 3, rel=1e-3)
    assert slopes[0] > 8 * (seconds[8] - seconds[1]) / 7


def test_experts_are_touched_as_tokens_grow():
    experts = Experts(count=128, chosen=8)
    touched = [experts.touched(rows) for rows in (0, 1, 2, 16, 64, 4096)]
    assert touched[:3] == pytest.approx([0.0, 8.0, 15.5])  # a second token's 8 fall on 120 / 128 new ones
    assert touched == sorted(touched) and 125 < touched[4] < touched[5] <= 128


def test_a_mixture_pays_for_its_first_rows_and_then_is_flat_for_longer():
    """From 1 to 16 rows the weights that are read grow tenfold; from 64 on nearly all are read already."""
    experts = {rows: MOE.verify(1, rows, 128).experts for rows in (1, 16, 64, 512)}
    assert experts[16] / experts[1] == pytest.approx(Experts(128, 8).touched(16) / 8, rel=0.05)
    assert experts[512] < 1.35 * experts[64]
    few, many = (MOE.verify(1, r, 128).total / MOE.verify(1, 1, 128).total for r in (6, 16))
    assert few > 1.5 and many > 2.5  # where the dense model's are free
    assert DENSE.verify(1, 16, 128).total < 1.02 * DENSE.verify(1, 1, 128).total


def test_the_crossover_moves_the_right_way():
    def even(hardware="h100", model="llama-3.1-8b", tp=1, batch=128, **assumed):
        profile = modelled_profile(roofline(hardware, model, tp, assumed=Assumptions(**assumed)), SMALL)
        return benchmark.break_even(profile, (batch,))[str(batch)]

    assert even(batch=32) < even(batch=128) < even(batch=256)
    assert even("h200") > even()  # plain decoding gains from bandwidth, verification doesn't
    assert even(compute=0.9) < even() < even(compute=0.5)
    assert even(memory=0.6) < even()
    assert even(model="qwen3-235b-a22b", tp=8, batch=256) < even(batch=256)
    assert even(model="qwen3-235b-a22b", tp=8, batch=4) > even(batch=4)
    assert 3.5 < even(batch=256) < 4.5  # of the 4 tokens that three levels can bring at all


def test_splitting_and_small_weights_are_faster():
    plain = {tp: roofline("h100", "llama-3.3-70b", tp).verify(1, 1, 128).total for tp in (4, 8)}
    assert plain[4] / 2 < plain[8] < plain[4]
    assert roofline("h100", "llama-3.1-8b", dtype="fp8").verify(1, 1, 0).linear == pytest.approx(
        DENSE.verify(1, 1, 0).linear / 2, rel=0.01
    )
    assert MOE._kv_heads(MOE.model.target) == 1  # four KV heads on eight GPUs: copied, not halved


@pytest.mark.parametrize("name", MACHINES)
@settings(max_examples=60)
@given(batch=st.sampled_from(SMALL.batches), nodes=st.integers(0, 60), context=st.integers(128, 1024))
def test_the_profile_is_the_roofline_between_its_knots(name, batch, nodes, context):
    rows = batch * (1 + nodes)
    exact = MACHINES[name].verify(batch, rows, context).total
    assert PROFILES[name].verify_seconds(batch, rows, context) == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("b300", "llama-3.1-8b"), "there is no hardware 'b300'; known: h100"),
        (("h100", "llama-9"), "known: llama-3.1-8b"),
        (("h100", "llama-3.3-70b", 1), "give a larger tp"),
        (("h100", "llama-3.1-8b", 3), "give a divisor"),
        (("h100", "llama-3.1-8b", 0), "give a divisor"),
        (("h100", "llama-3.1-8b", 1, "int4"), "give bfloat16 or fp8"),
    ],
)
def test_what_cannot_be_modelled_is_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        roofline(*arguments)


@pytest.mark.parametrize("wrong", [{"memory": 0.0}, {"compute": 1.5}, {"kernel": -1e-6}, {"step": 3.0}])
def test_assumptions_are_checked(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Assumptions(**wrong)


def test_published_figures_are_those_of_dense_arithmetic():
    """The H100 datasheet prints 1,979 for bf16: that is with 2:4 sparsity."""
    assert HARDWARE["h100"].bf16 < 1e15 and all(h.fp8 == pytest.approx(2 * h.bf16, rel=1e-3) for h in HARDWARE.values())


# --- the label


def test_the_label_survives_a_file(tmp_path):
    PROFILES["moe"].save(tmp_path / "profile.json")
    loaded = CostProfile.load(tmp_path / "profile.json")
    assert loaded == PROFILES["moe"] and loaded.modelled
    assert loaded.title.startswith("modelled H100 SXM x8, qwen3-235b-a22b")
    assert "nothing measured" in loaded.provenance and "compute 0.7" in loaded.provenance
    assert replace(loaded, noise=0.1).modelled


def test_a_file_without_the_field_was_measured(tmp_path):
    path = tmp_path / "profile.json"
    replace(PROFILES["dense"], modelled=False).save(path)
    record = json.loads(path.read_text())
    del record["body"]["modelled"]
    path.write_text(json.dumps(record))
    assert not CostProfile.load(path).modelled


def test_measured_profiles_keep_the_repr_that_ledgers_know():
    assert "modelled=" not in repr(replace(PROFILES["dense"], modelled=False))


@pytest.mark.parametrize("change", [{"device": "cpu"}, {"provenance": ""}, {"modelled": "yes"}])
def test_a_modelled_profile_cannot_pass_as_measured(change):
    with pytest.raises(ConfigError, match="modelled"):
        replace(PROFILES["dense"], **change)


def test_the_command_writes_and_says_modelled(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("ECHO_RL_CACHE", str(tmp_path / "cache"))
    small = ["calibrate", "roofline", "--hardware", "h200", "--model", "llama-3.1-8b", "--memory", "0.7", "--out"]
    assert main([*small, str(tmp_path / "h200.json")]) == 0
    assert "modelled H200 SXM x1" in capsys.readouterr().out
    assert "memory 0.7" in CostProfile.load(tmp_path / "h200.json").provenance
    assert main([*small, str(tmp_path / "cache" / "calibration" / "profile.json")]) == 2
    assert "measured costs belong" in capsys.readouterr().err


# --- the benchmark


def test_a_batch_larger_than_the_trace_is_served_in_full():
    """80 requests at once out of 12 recorded ones; plain decoding is then exactly as fast as the profile says."""
    args = benchmark.Args(warmup=30, steps=40)
    profile = replace(PROFILES["dense"], prefill_weight=0.0, catch_up=0.0)
    trace = random_trace(width=8, depth=8)
    plain = benchmark.measured(args, trace, profile, benchmark.BASELINE, 80, 0)
    assert plain["mat"] == 1.0 and plain["speculating"] == 0.0
    steps = (
        plain["tokens"] / 80
    )  # with all of them decoding: these all end at once, and their prompts have a step alone
    assert steps == args.steps - 1
    assert plain["seconds"] / steps == pytest.approx(profile.step_seconds(80, 0, 0, 0, 128))
    light = benchmark.measured(args, trace, profile, benchmark.EAGLE, 80, 0)
    assert light["verified"] == pytest.approx(5.0, abs=0.2) and 1.5 < light["mat"] <= 4.0
    assert light == benchmark.measured(args, trace, profile, benchmark.EAGLE, 80, 0)


@pytest.mark.parametrize("arm", [*benchmark.ARMS, *benchmark.PINNED])
def test_every_arm_plans_by_the_modelled_profile_within_the_trace(arm):
    args, trace = benchmark.Args(warmup=2, steps=6), random_trace(width=8, depth=8)
    found = benchmark.measured(args, trace, PROFILES["dense"], arm, 3, 0)
    assert found["tokens"] > 0 and (arm == benchmark.BASELINE or found["verified"] > 1.0)
    controller = benchmark.make(arm, PROFILES["dense"])
    assert getattr(controller, "profile", PROFILES["dense"]) == PROFILES["dense"]


def test_where_an_arm_begins_to_lose():
    def cells(*speeds):
        return [
            {"arm": "a", "concurrency": 2**i, "speedup": {"estimate": speed}} for i, speed in enumerate(speeds)
        ]  # fmt: skip

    assert benchmark.losing_from(cells(1.5, 1.2, 0.9, 0.5), "a") == 4
    assert benchmark.losing_from(cells(0.9, 1.2, 1.1), "a") is None
    assert benchmark.losing_from(cells(0.9, 0.8), "a") == 1


def test_break_even_is_the_ratio_of_the_steps():
    profile = PROFILES["moe"]
    found = benchmark.break_even(profile, (8, 64), context=500)
    arrays = BatchedCostProfile(profile)
    seconds = arrays.verify(64, 64 * 6, 500) + arrays.draft(64, 3, 3) + arrays.overhead(64, 320, True)
    assert found["64"] == pytest.approx(float(seconds / (arrays.verify(64, 64, 500) + arrays.overhead(64, 0, False))))
