"""Metrics against numbers worked out by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest

from echo_rl.contracts import PhaseTimes
from echo_rl.errors import ConfigError
from echo_rl.utils import statistics
from echo_rl.workloads import metrics
from echo_rl.workloads.driver import RequestRecord, RunRecord, StepRecord


def step(batch=2, budget=0, verified=0, committed=2, reached=(), accepted=(), seconds=1.0, **times) -> StepRecord:
    return StepRecord(
        end=0.0,
        seconds=seconds,
        batch_size=batch,
        prefill_tokens=0,
        waiting=0,
        context=10.0,
        budget=budget,
        depth=2 if budget else 0,
        width=1 if budget else 0,
        drafted=budget,
        verified=verified,
        accepted=sum(accepted),
        committed=committed,
        reached_by_depth=reached,
        accepted_by_depth=accepted,
        times=PhaseTimes(**times),
    )


def request(times, arrival=0.0, reason="length") -> RequestRecord:
    finish = times[-1] if times else arrival
    return RequestRecord("r", 3, arrival, finish, tuple(range(len(times))), tuple(times), reason)


def run(requests=(), steps=(), seconds=10.0) -> RunRecord:
    return RunRecord("echo", 2, seconds, tuple(requests), tuple(steps))


def test_plain_decoding_has_a_mat_of_one():
    assert metrics.mean_accepted_tokens([step(batch=3, committed=3), step(batch=1, committed=1)]) == 1.0


def test_mat_is_tokens_per_request_step():
    steps = [step(batch=2, committed=7), step(batch=1, committed=2), step(batch=0, committed=0)]
    assert metrics.mean_accepted_tokens(steps) == 3.0
    assert metrics.mean_accepted_tokens([step(batch=0, committed=0)]) is None


def test_acceptance_by_depth_pads_ragged_steps():
    steps = [step(reached=(4, 2), accepted=(2, 1)), step(reached=(4,), accepted=(3,)), step()]
    reached, accepted = metrics.depth_counts(steps)
    assert (reached, accepted) == ((8, 2), (5, 1))
    assert metrics.acceptance_by_depth(reached, accepted) == (0.625, 0.5)
    assert metrics.depth_counts([step(reached=(2, 1), accepted=(1,))]) == ((2, 1), (1, 0))
    assert metrics.acceptance_by_depth((4, 0), (1, 0)) == (0.25, None)


def test_budget_utilisation_counts_only_speculating_steps():
    assert metrics.budget_utilisation([step(budget=10, verified=4), step(budget=6, verified=6), step()]) == 0.625
    assert metrics.budget_utilisation([step()]) is None


def test_phase_seconds_account_for_the_whole_step():
    total = metrics.phase_seconds([step(seconds=1.0, verify=0.5, draft=0.25), step(seconds=2.0, verify=2.0)])
    assert (total["verify"], total["draft"], total["other"]) == (2.5, 0.25, 0.25)
    assert sum(total.values()) == 3.0


def test_latencies_of_one_request():
    one = request([2.0, 3.0, 3.0, 3.0, 5.0], arrival=0.5)
    assert metrics.ttft(one) == 1.5
    assert metrics.tpot(one) == 0.75
    assert metrics.inter_token_latencies(one) == pytest.approx([1 / 3] * 3 + [2.0])
    assert sum(metrics.inter_token_latencies(one)) == pytest.approx(3.0)


def test_latencies_that_do_not_exist_are_none():
    assert metrics.ttft(request([])) is None
    assert metrics.tpot(request([1.0])) is None
    assert metrics.inter_token_latencies(request([1.0])) == []
    assert metrics.latency([None]) is None


def test_percentiles_interpolate():
    summary = metrics.latency([1.0, 2.0, 3.0, 4.0, None])
    assert summary is not None
    assert (summary.mean, summary.p50) == (2.5, 2.5)
    assert summary.p95 == pytest.approx(3.85) and summary.p99 == pytest.approx(3.97)


def test_goodput_counts_requests_within_both_limits():
    fine, slow_start, slow_tokens = request([1.0, 1.5]), request([3.0, 3.5]), request([1.0, 3.0])
    short, failed = request([1.0]), request([1.0, 1.5], reason="error")
    record = run([fine, slow_start, slow_tokens, short, failed], seconds=4.0)
    assert metrics.goodput(record, metrics.SLO(ttft=2.0, tpot=1.0)) == 0.5


def test_a_rate_pools_blocks_rather_than_averaging_their_rates():
    interval = statistics.rate([statistics.Rate(10, 1.0), statistics.Rate(10, 3.0)])
    assert interval.estimate == 5.0 and interval.blocks == 2
    assert interval.low is not None and interval.high is not None
    assert interval.low < 10 / 3 and interval.high > 10.0  # two blocks tell little


def test_pairing_cancels_noise_that_both_arms_share():
    slow = [1.0, 5.0, 2.0, 9.0, 1.5, 7.0]
    theirs = [statistics.Rate(100, seconds) for seconds in slow]
    ours = [statistics.Rate(100, seconds / 2) for seconds in slow]
    ratio = statistics.rate_ratio(ours, theirs)
    assert (ratio.estimate, ratio.low, ratio.high) == pytest.approx((2.0, 2.0, 2.0))


@pytest.mark.parametrize("blocks", [2, 3, 4, 6, 20])
def test_the_interval_covers_the_truth_about_as_often_as_it_says(blocks):

    generator, hits, trials = np.random.default_rng(1), 0, 200
    for _ in range(trials):
        base = [statistics.Rate(1.0, s) for s in generator.lognormal(0, 0.2, blocks)]
        noise = generator.lognormal(0, 0.1, blocks)
        ours = [statistics.Rate(1.0, r.seconds / 1.5 * n) for r, n in zip(base, noise, strict=True)]
        ratio = statistics.rate_ratio(ours, base, resamples=400)
        hits += ratio.low <= 1.5 <= ratio.high
    assert 0.89 <= hits / trials <= 0.99


def test_one_block_has_no_interval_and_unequal_arms_are_refused():
    one = statistics.rate([statistics.Rate(4, 2.0)])
    assert (one.estimate, one.low, one.high) == (2.0, None, None)
    assert one.text(1, "x") == "2.0x"
    assert statistics.Interval(1.234, 1.1, 1.3, 4).text(2, "x") == "1.23x [1.10, 1.30]"
    with pytest.raises(ConfigError, match="2 and 1"):
        statistics.rate_ratio([statistics.Rate(1, 1)] * 2, [statistics.Rate(1, 1)])
    with pytest.raises(ConfigError, match="at least one"):
        statistics.rate([])


def test_the_summary_is_json(fake_engine, make_controller):
    empty = metrics.summary(run(seconds=0.0))
    full = metrics.summary(run([request([1.0, 2.0])], [step(budget=2, verified=1, reached=(2,), accepted=(1,))]))
    assert empty["tokens_per_second"] == 0.0 and empty["mat"] is None
    assert json.loads(json.dumps(full))["latency"]["tpot"]["mean"] == 1.0
    assert full["tokens_per_second"] == 0.2
