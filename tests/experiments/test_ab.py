"""The A/B comparison on fake engines: order, pairing, intervals, resuming, decisions, the report."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from rich.console import Console

from echo_rl.cli.ab import Ab
from echo_rl.contracts import Request, SamplingParams
from echo_rl.controllers.wrappers.fitted import FittedController
from echo_rl.errors import ConfigError
from echo_rl.experiments.ab import run_ab, run_on
from echo_rl.experiments.plan import AbConfig, Run
from echo_rl.experiments.report import html as report_html
from echo_rl.experiments.report import tables
from echo_rl.experiments.report.ab import Decisions, by_batch, over_time, target_result
from echo_rl.experiments.report.measures import compare_outputs, rates
from echo_rl.experiments.targets.backend import Target
from echo_rl.experiments.targets.live import check_recorded_by
from echo_rl.utils import statistics
from echo_rl.workloads import metrics
from echo_rl.workloads.records import RequestRecord, RunRecord, pool
from echo_rl.workloads.requests import Rotation

REQUESTS = tuple(
    Request(f"{suite}/{i}", tuple(range(70, 73 + i)), SamplingParams(max_new_tokens=8))
    for suite in ("chat", "code")
    for i in range(5)
)
CONFIG = AbConfig(("none", "echo"), ("closed:2", "poisson:0.2"), blocks=4, seconds=40.0)
QUIET = Console(quiet=True)


@pytest.fixture
def venue(make_engine):
    def make(**more) -> Target:
        engine = make_engine(**more)
        idle = lambda until: setattr(engine.clock, "now", until)  # noqa: E731
        return Target("replay", engine, REQUESTS, engine.clock, idle, {"engine": "fake"})

    return make


def ids(run: RunRecord) -> list[str]:
    return [request.id for request in run.requests]


def test_arms_run_a_b_b_a_within_each_workload():
    order = [(t.workload, t.block, t.arm) for t in CONFIG.runs if t.workload == "closed:2"]
    assert "".join(arm[0] for _, _, arm in order) == "neenenne"
    pairs = CONFIG.runs
    assert all(a.block == b.block and a.workload == b.workload for a, b in zip(pairs[::2], pairs[1::2], strict=True))


def test_arms_meet_the_same_requests_at_the_same_times(venue, make_controller, tmp_path):
    runs = run_on(venue(), CONFIG, make_controller, tmp_path, QUIET)
    for block in range(4):
        a, b = (runs[Run(block, "poisson:0.2", arm)] for arm in CONFIG.arms)
        both = min(len(a.requests), len(b.requests))
        assert both > 2 and ids(a)[:both] == ids(b)[:both]
        pairs = zip(a.requests[:both], b.requests[:both], strict=True)
        assert all(x.arrival == pytest.approx(y.arrival) for x, y in pairs)
    names = [name for t, run in runs.items() if (t.arm, t.workload) == ("echo", "closed:2") for name in ids(run)]
    assert len(names) == len(set(names)), "the blocks of an arm share ids"


def test_controllers_are_warmed_and_keep_what_they_learn(venue, make_controller, tmp_path):
    made = []

    def make(name, **options):
        made.append(make_controller(name, **options))
        return made[-1]

    run_on(venue(), CONFIG, make, tmp_path, QUIET)
    served = [len(controller.observed) for controller in made if controller.observed]
    assert len(served) == 4 and min(served) > 20  # one an arm and workload


def test_the_result_is_paired_and_in_plain_json(venue, make_controller, tmp_path):
    result = run_ab([venue()], CONFIG, make_controller, tmp_path, QUIET)
    (found,) = result["venues"]
    closed, opened = found["cells"]
    ratio = closed["ratios"]["tokens_per_second"]
    assert ratio["estimate"] == pytest.approx(8 / 3, rel=0.05) and ratio["blocks"] == 4  # 8 steps against 3
    assert closed["headline"] == "tokens_per_second" and opened["headline"] == "tokens_per_request_second"
    assert opened["ratios"]["tokens_per_second"]["estimate"] < 1.5 < opened["ratios"][opened["headline"]]["estimate"]
    assert closed["outputs"]["differing"] == 0 and closed["outputs"]["tokens"] > 100
    assert closed["arms"][0]["mat"] == 1.0 and closed["arms"][1]["mat"] == 4.0
    assert closed["arms"][0]["cut"] <= 2 * 4
    assert json.loads((tmp_path / "ab.json").read_text()) == json.loads(json.dumps(result))
    rendered = tables.ab(found, "none", "echo", 1000)
    assert rendered.row_count == 3


def test_an_interrupted_comparison_runs_only_what_is_missing(venue, make_controller, tmp_path):
    whole = venue()
    run_ab([whole], CONFIG, make_controller, tmp_path / "whole", QUIET)
    stopped = venue()
    stopped.backend.fail_after = 300
    with pytest.raises(KeyboardInterrupt):
        run_ab([stopped], CONFIG, make_controller, tmp_path / "parts", QUIET)
    lines = (tmp_path / "parts" / "replay" / "blocks.jsonl").read_text()
    assert 0 < lines.count("\n") < 16
    again = venue()
    run_ab([again], CONFIG, make_controller, tmp_path / "parts", QUIET)
    path = tmp_path / "parts" / "replay" / "blocks.jsonl"
    assert path.read_text().startswith(lines) and path.read_text().count("\n") == 16
    assert again.backend.steps < whole.backend.steps
    once_more = venue()
    run_ab([once_more], CONFIG, make_controller, tmp_path / "parts", QUIET)
    assert once_more.backend.steps == 0
    other = AbConfig(CONFIG.arms, CONFIG.workloads, blocks=3, seconds=40.0)
    with pytest.raises(ConfigError, match="another blocks"):
        run_ab([venue()], other, make_controller, tmp_path / "parts", QUIET)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arms": ("none",)}, "two arms"),
        ({"arms": ("none", "none")}, "each once"),
        ({"workloads": ()}, "at least one"),
        ({"workloads": ("flood:3",)}, "no workload"),
        ({"seconds": None}, "seconds or steps"),
        ({"blocks": 0}, "blocks"),
        ({"workloads": ("poisson:0.00001",)}, "no token came"),
    ],
)
def test_impossible_comparisons_are_refused(change, message, venue, make_controller, tmp_path):
    values = {"arms": ("none", "echo"), "workloads": ("closed:1",), "blocks": 1, "seconds": 5.0} | change
    with pytest.raises(ConfigError, match=message):
        config = AbConfig(**values)
        run_ab([venue()], config, make_controller, tmp_path, QUIET)


# ----------------------------------------------------------------------------- numbers


def synthetic(seconds: list[float], tokens: int = 100) -> list[RunRecord]:
    def request(name: int, end: float) -> RequestRecord:
        return RequestRecord(str(name), 3, 0.0, end, tuple(range(tokens)), tuple(np.linspace(0, end, tokens)), "stop")

    return [RunRecord("x", 1, end, (request(i, end),), ()) for i, end in enumerate(seconds)]


def test_the_interval_covers_the_true_ratio_though_blocks_differ_widely():
    generator, hits = np.random.default_rng(0), 0
    for _ in range(40):
        shared = generator.lognormal(0.0, 0.8, 12)  # prompts and drift: the same for both arms
        a = synthetic(list(shared * generator.lognormal(0.0, 0.05, 12)))
        b = synthetic(list(shared / 1.25 * generator.lognormal(0.0, 0.05, 12)))
        ratio = statistics.rate_ratio(*(rates(side, "tokens_per_second") for side in (b, a)))
        assert ratio.high - ratio.low < 0.2  # unpaired blocks would give about 1
        hits += ratio.low <= 1.25 <= ratio.high
    assert hits >= 32


def test_jain_and_the_worst_tenth_by_hand():
    assert metrics.jain([1.0, 2.0, 3.0]) == pytest.approx(36 / (3 * 14))
    assert metrics.jain([5.0] * 4) == 1.0 and metrics.jain([1.0, 0.0, 0.0, 0.0]) == 0.25
    assert metrics.jain([]) is None and metrics.jain([0.0]) is None
    assert metrics.worst_tenth([float(i) for i in range(1, 21)]) == pytest.approx(1.5 / 10.5)
    assert metrics.worst_tenth([2.0, 4.0]) == pytest.approx(2 / 3) and metrics.worst_tenth([]) is None


def test_cut_requests_count_for_tokens_and_not_for_latency():
    done = RequestRecord("a", 3, 0.0, 4.0, (1, 2), (2.0, 4.0), "length")
    cut = RequestRecord("b", 3, 0.0, 9.0, (1, 2, 3), (7.0, 8.0, 9.0), "cancelled")
    run = RunRecord("x", 2, 10.0, (done, cut), ())
    summary = metrics.summary(run, metrics.SLO(3.0, 2.0))
    assert summary["output_tokens"] == 5 and summary["tokens_per_second"] == 0.5
    assert summary["latency"]["ttft"]["p99"] == 2.0 and summary["latency"]["e2e"]["p99"] == 4.0
    assert summary["goodput"] == 0.1 and metrics.request_speeds(run) == [0.5]


def test_outputs_are_compared_where_both_arms_have_them():
    def run(*served: RequestRecord) -> RunRecord:
        return RunRecord("x", 1, 1.0, served, ())

    def one(name: str, tokens: tuple[int, ...], reason: str = "stop") -> RequestRecord:
        return RequestRecord(name, 1, 0.0, 1.0, tokens, (1.0,) * len(tokens), reason)

    whole, cut, other = one("a", (1, 2, 3)), one("a", (1, 2), "cancelled"), one("b", (7,))
    assert compare_outputs(run(whole, other), run(cut)) == {
        "requests": 1, "tokens": 2, "differing": 0, "first_difference": {},
    }  # fmt: skip
    assert compare_outputs(run(whole), run(one("a", (1, 2))))["first_difference"] == {"a": 2}  # nobody cut it


def test_the_mean_over_loads_is_geometric():
    plain = [statistics.Rate(10, 1.0)] * 3
    double, half = [statistics.Rate(20, 1.0)] * 3, [statistics.Rate(10, 2.0)] * 3
    mean = statistics.mean_ratio([double, half], [plain, plain])
    assert (mean.estimate, mean.low, mean.high) == pytest.approx((1.0, 1.0, 1.0)) and mean.side() == 0
    assert statistics.mean_ratio([double, double], [plain, plain]).side() == 1
    with pytest.raises(ConfigError):
        statistics.mean_ratio([double], [plain, plain])
    with pytest.raises(ConfigError):
        statistics.mean_ratio([double[:2], half], [plain[:2], plain])


# ----------------------------------------------------------------------------- decisions


def test_decisions_are_told_apart_by_batch_size_and_time(venue, make_controller):
    none, echo = (venue(), make_controller("none")), (venue(), make_controller("echo"))
    a, b = (
        place.drive(controller, place.workload("closed:3"), seed=0, seconds=30.0).steps
        for place, controller in (none, echo)
    )
    (row,) = by_batch(a, b)
    assert row["batch"] == "3-4" and row["a"]["plain"] == 1.0 and row["a"]["depth"] is None
    assert (row["b"]["nodes"], row["b"]["budget"], row["b"]["depth"], row["b"]["plain"]) == (6.0, 18.0, 3.0, 0.0)
    stretches = over_time(a, b, times=5)
    assert [round(s["time"], 9) for s in stretches] == [3.0, 9.0, 15.0, 21.0, 27.0]
    steps = sum(s["b"]["steps"] for s in stretches if s["b"])
    assert steps == sum(step.batch_size > 0 for step in b)
    assert Decisions.of([step for step in a if not step.batch_size]) is None


def test_a_rotation_gives_each_suite_in_turn_and_unique_ids():
    rotation, again = Rotation(REQUESTS, 3, "7."), Rotation(REQUESTS, 3, "7.")
    asked = ["", "code", "code", "", "chat"] * 6
    given = [rotation(suite) for suite in asked]
    assert given == [again(suite) for suite in asked]
    assert len({request.id for request in given}) == len(given)
    assert all(r.id.startswith(f"{s}/") for r, s in zip(given, asked, strict=True) if s)
    codes = [r.id.split("#")[0] for r, s in zip(given, asked, strict=True) if s == "code"]
    assert len(set(codes[:5])) == 5  # none comes twice before all came once
    assert [Rotation(REQUESTS, seed)("").id for seed in range(5)] != [given[0].id] * 5
    with pytest.raises(ConfigError, match="suite 'math'"):
        rotation("math")


def test_plans_are_cut_to_what_the_venue_can_serve(make_controller, caplog):
    from echo_rl.contracts import LoadView

    load = LoadView(2, 0, 0, 1.0, 0.1, 64)
    fitted = FittedController(make_controller("echo"), depth=2, width=None)
    assert (fitted.plan(load).max_depth, fitted.plan(load).budget) == (2, 12) and fitted.cuts == 2
    assert len(caplog.records) == 1
    assert FittedController(make_controller("echo"), None, None).plan(load).max_depth == 3
    assert not FittedController(make_controller("none"), 0, 0).plan(load).speculates


# ----------------------------------------------------------------------------- report


def test_the_report_needs_nothing_else_and_escapes_what_it_is_given(venue, make_controller, tmp_path):
    evil = '<script>alert("x")</script>$\\frac{&'
    place = venue()
    place = Target(evil, place.backend, place.requests, place.clock, place.idle, {evil: evil})
    make = lambda name, **options: make_controller("echo" if "script" in name else name)  # noqa: E731
    config = AbConfig(("none", evil), ("closed:2",), blocks=2, seconds=20.0, slo=metrics.SLO(1.0, 0.5))
    page = report_html.ab_page(run_ab_without_files(place, config, make, tmp_path))
    assert "<script" not in page and "&lt;script&gt;" in page
    assert not re.search(
        r"(?i)https?:|//[a-z]|url\(|@import|<link|<iframe|\bon\w+=", re.sub(r"base64,[^\"]+", "", page)
    )
    sources = re.findall(r'src="([^"]{30})', page)
    assert len(sources) == 3 and all(source.startswith("data:image/png;base64,iVBOR") for source in sources)
    assert "default-src 'none'" in page and page.count("<table") == page.count("</table") >= 6


def run_ab_without_files(place: Target, config: AbConfig, make, out) -> dict:
    """The result of `run_ab` in a folder whose name the venue's does not decide."""
    runs = run_on(place, config, make, out, QUIET)
    found = target_result(place, config, runs)
    wanted = {"blocks": config.blocks, "seconds": config.seconds, "steps": None, "seed": 0}
    slo = {"ttft": 1.0, "tpot": 0.5}
    return {"a": config.arms[0], "b": config.arms[1], "config": wanted | {"slo": slo}, "venues": [found]}


def test_a_verdict_is_given_only_where_the_interval_says_so():
    judge = report_html.verdict
    assert judge(statistics.Interval(1.2, 1.1, 1.3, 4)) == "B is faster"
    assert judge(statistics.Interval(0.8, 0.7, 0.9, 4)) == "A is faster"
    assert judge(statistics.Interval(1.2, 0.9, 1.5, 4)) == "no clear difference"
    assert judge(statistics.Interval(1.2, None, None, 1)) == "one block: no interval"


# ----------------------------------------------------------------------------- on a real replay


def test_the_command_compares_on_the_packaged_trace(tmp_path, capsys):
    command = Ab(
        a="none", b="chain", workloads=("closed:2", "poisson:4"), blocks=2, seconds=None, steps=30, out=tmp_path
    )
    assert command.run() == 0
    result = json.loads((tmp_path / "ab.json").read_text())
    (found,) = result["venues"]
    assert found["venue"] == "replay" and all(cell["outputs"]["differing"] == 0 for cell in found["cells"])
    assert found["cells"][0]["arms"][1]["mat"] > 1.2
    assert (tmp_path / "ab.html").read_text().startswith("<!DOCTYPE html>")
    assert "ab.html" in capsys.readouterr().out


def test_a_trace_of_another_model_is_refused(capsys):
    model, environment = "/models/Qwen3-0.6B", {"drafter": "abc"}
    with pytest.raises(ConfigError, match="recorded from smollm2, the engine serves /models/Qwen3-0.6B; record one"):
        check_recorded_by(model, environment, "smollm2, drafter abc, bfloat16", Console())
    for provenance in ("/else/Qwen3-0.6B, drafter abc, float32", "", "tiny"):
        check_recorded_by(model, environment, provenance, Console())
        assert capsys.readouterr().out == ""
    check_recorded_by(model, environment, "Qwen3-0.6B, drafter xyz, float32", Console())
    assert "another drafter recorded the trace" in capsys.readouterr().out


def test_the_live_engine_gives_equal_outputs_and_is_left_empty(tmp_path):
    from echo_rl.controllers import registry
    from tests import tiny

    engine = tiny.engine(tmp_path)
    requests = tuple(
        Request(f"tiny/{i}", (70 + i, 71, 72), SamplingParams(temperature=0.8, seed=i, max_new_tokens=16))
        for i in range(4)
    )
    config = AbConfig(("none", "chain"), ("closed:3", "poisson:200"), blocks=2, seconds=None, steps=25)
    result = run_ab([Target("live", engine, requests)], config, registry.make, tmp_path / "out", QUIET)
    for cell in result["venues"][0]["cells"]:
        assert cell["outputs"]["differing"] == 0 < cell["outputs"]["tokens"]
        assert cell["arms"][1]["mat"] > cell["arms"][0]["mat"] == 1.0
    assert not engine.has_work
    engine.check_integrity()


def test_pooling_driven_runs_keeps_the_most_in_flight(venue, make_controller):
    place = venue()
    runs = [place.drive(make_controller("none"), place.workload(f"closed:{n}"), 0, steps=5) for n in (3, 2)]
    assert pool(runs).concurrency == 3
