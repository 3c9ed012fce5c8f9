"""Traces of arrivals: Mooncake's, Azure's and plain files are read, and served at their times with their lengths."""

from __future__ import annotations

import copy
import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echo_rl.contracts import Request, SamplingParams
from echo_rl.errors import ConfigError, DatasetError
from echo_rl.workloads.arrival_trace import Arrival, read_arrivals
from echo_rl.workloads.arrivals import Arrivals, facts, parse
from echo_rl.workloads.requests import TraceRequests

MOONCAKE = """{"timestamp": 27000, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47]}
{"timestamp": 30500, "input_length": 6472, "output_length": 26, "hash_ids": []}
"""
AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,4808,10
2023-11-16 18:17:04.0319600,3180,8
"""
AZURE_2024 = "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00.5+00:00,7,9\n2024-05-10 02:00:00+02:00,5,0\n"
PLAIN = "time, prompt_tokens, output_tokens\n1.5,20,3\n\n2,30,4\n"


def trace(folder: Path, text: str, name: str = "trace.txt"):
    path = folder / name
    path.write_text(text)
    return read_arrivals(path)


@pytest.mark.parametrize(
    ("text", "arrivals"),
    [
        (MOONCAKE, (Arrival(0.0, 6955, 52), Arrival(3.5, 6472, 26))),
        (AZURE, (Arrival(0.0, 4808, 10), Arrival(pytest.approx(0.052), 3180, 8))),
        (AZURE_2024, (Arrival(0.0, 5, 1), Arrival(0.5, 7, 9))),  # sorted; an answer of no token counts as one
        (PLAIN, (Arrival(0.0, 20, 3), Arrival(0.5, 30, 4))),
        ('{"time": 3, "prompt_tokens": 2, "output_tokens": 1}', (Arrival(0.0, 2, 1),)),
    ],
)
def test_every_form_is_read_in_seconds_from_the_first(tmp_path, text, arrivals):
    assert trace(tmp_path, text).arrivals == arrivals


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "holds no arrival; expected the fields timestamp, input_length, output_length"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "holds no arrival"),
        ("when,how\n1,2\n", "line 1 of .* names 'when,how'; expected"),
        (PLAIN + "3,40\n", "1 of 3 arrivals cannot be read: line 5 has 2 cells, expected 3"),
        (PLAIN + "soon,4,5\nnan,4,5\n", "2 of 4 .*line 5 has 'soon' as time, expected a number or a date"),
        (PLAIN + "3,0,5\n", "line 5 has '0' as prompt_tokens, expected a whole number of tokens from 1"),
        (PLAIN + "3,7,-1\n", "has '-1' as output_tokens, expected a whole number of tokens from 0"),
        ('{"time": 3}\n{no\n[1]\n7\n"x"', "5 of 5 .*line 1 has the fields time; .*line 2 is no JSON.*; and 2 more"),
        (MOONCAKE.replace("27000", "true"), "line 1 has True as timestamp"),
        (MOONCAKE.replace("6955", "1e999"), "line 1 has inf as input_length"),
    ],
)
def test_what_cannot_be_read_is_named_by_its_line(tmp_path, text, told):
    with pytest.raises(DatasetError, match=told):
        trace(tmp_path, text)
    with pytest.raises(DatasetError, match="does not exist"):
        read_arrivals(tmp_path / "none.csv")


def test_a_file_that_changed_is_read_again(tmp_path):
    assert len(trace(tmp_path, PLAIN).arrivals) == 2
    assert len(trace(tmp_path, PLAIN + "4,5,6\n").arrivals) == 3


def workload(folder: Path, rows, more: str = ""):
    path = folder / "arrivals.jsonl"
    named = (dict(zip(("time", "prompt_tokens", "output_tokens"), row, strict=True)) for row in rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in named))
    return parse(f"trace:{path}{more}")


ROWS = [(0.0, 3, 2), (1.0, 9, 4), (1.0, 5, 6), (4.0, 7, 8)]


def times(arrivals: Arrivals, count: int) -> list[float]:
    found, now = [], 0.0
    while len(found) < count:
        found += [time for time, _ in arrivals.since(now, now, 10**9)]
        now = arrivals.next_time(now)
        found += [now] * len(arrivals.due(now, 10**9))
    return found[:count]


def test_requests_come_at_the_traces_times_from_a_place_that_the_seed_draws_and_then_again(tmp_path):
    slow, fast = workload(tmp_path, ROWS), workload(tmp_path, ROWS, ",2")
    period = 4.0 * 4 / 3
    starts = set()
    for seed in range(12):
        found = times(Arrivals(slow, seed), 9)
        gaps = [b - a for a, b in pairwise(found)]
        circle = [1.0, 0.0, 3.0, period - 4.0]
        starts.add(start := next(n for n in range(4) if gaps[:4] == pytest.approx((circle * 2)[n : n + 4])))
        assert gaps == pytest.approx((circle * 3)[start : start + 8])
        assert times(Arrivals(fast, seed), 9) == pytest.approx([time / 2 for time in found])
    assert len(starts) > 2
    copied = copy.deepcopy(Arrivals(slow, 3))
    assert times(copied, 5) == times(Arrivals(slow, 3), 5)


def test_a_trace_of_one_request_or_of_one_moment_goes_on(tmp_path):
    for rows in ([(5.0, 3, 2)], [(5.0, 3, 2)] * 3):
        found = times(Arrivals(workload(tmp_path, rows), 0), 4)
        assert found[-1] >= 1.0 and found == sorted(found)


def test_texts_name_file_and_speed(tmp_path):
    path = tmp_path / "a,b.csv"
    path.write_text(PLAIN)
    assert parse(f"trace:{path}").speed == 1.0 and parse(f"trace:{path},0.5").speed == 0.5
    assert parse(f"trace:{path},0.5").name == f"trace:{path},0.5"
    assert facts([parse(f"trace:{path}"), parse("closed:1")]) == {
        f"arrivals trace:{path}": f"sha256 {read_arrivals(path).sha256}"
    }
    for wrong in (",0", ",-1", ",inf", ",nan"):
        with pytest.raises(ConfigError, match="speed of an arrivals' trace"):
            parse(f"trace:{path}{wrong}")
    for wrong in ("trace:", "trace"):
        with pytest.raises(ConfigError, match=r"trace:FILE\[,SPEED\]"):
            parse(wrong)


REQUESTS = [Request(f"mine/{n}", tuple(range(100 * n, 100 * n + 6)), SamplingParams(seed=n)) for n in (1, 2, 3)]


def test_prompts_are_cut_or_joined_to_the_lengths_and_answers_have_exactly_theirs(tmp_path):
    trace = workload(tmp_path, ROWS).trace
    source, again = (TraceRequests(trace, REQUESTS, 100, seed=5) for _ in range(2))
    made = [source("") for _ in range(8)]
    lengths = [(len(each.prompt), each.params.max_new_tokens) for each in made]
    begin = lengths.index((3, 2)) % 4
    assert lengths == (([row[1:] for row in ROWS] * 3)[4 - begin :])[:8]
    assert all(each.params.ignore_eos for each in made) and len({each.id for each in made}) == 8
    assert [again("") for _ in range(8)] == made  # the same for every arm
    for request in made:
        own = REQUESTS[int(request.id.split("/")[1][0]) - 1]
        assert request.prompt[-6:] == own.prompt[-len(request.prompt) :] or request.prompt[-6:] == own.prompt
        assert request.params.seed == own.params.seed


def test_lengths_past_the_context_are_clipped_and_counted(tmp_path):
    trace = workload(tmp_path, [(0, 50, 5), (1, 90, 20), (2, 5, 400)]).trace
    assert [arrival.clipped(100) for arrival in trace.arrivals] == [
        Arrival(0.0, 50, 5), Arrival(1.0, 80, 20), Arrival(2.0, 5, 50),
    ]  # fmt: skip
    (remark,) = trace.remarks(100)
    assert remark.startswith("2 of 3 requests") and "context of 100 tokens" in remark
    assert trace.remarks(None) == [] and trace.remarks(500) == []


@given(
    st.lists(st.tuples(st.floats(0, 1e6), st.integers(1, 10**6), st.integers(0, 10**6)), min_size=1, max_size=20),
    st.integers(2, 5_000),
)
def test_any_trace_is_read_back_in_order_and_fits_any_context(tmp_path_factory, rows, context):
    folder = tmp_path_factory.mktemp("trace")
    found = workload(folder, rows).trace.arrivals
    assert [each.time for each in found] == sorted(each.time for each in found) and found[0].time == 0.0
    assert sorted(each.prompt_tokens for each in found) == sorted(row[1] for row in rows)
    for each in found:
        fits = each.clipped(context)
        assert fits.prompt_tokens >= 1 and fits.output_tokens >= 1
        assert fits.prompt_tokens + fits.output_tokens <= context
