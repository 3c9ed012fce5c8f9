"""The closed loop: concurrency held, times recorded, early ends cleaned up."""

from __future__ import annotations

import pytest

from echo_rl.contracts import Request, SamplingParams
from echo_rl.errors import ConfigError, RequestError
from echo_rl.workloads.arrivals import Arrivals, parse
from echo_rl.workloads.driver import drive, serve
from echo_rl.workloads.records import RunRecord, pool


def requests(count: int, tokens: int = 4, prompt: str = "hi") -> list[Request]:
    ids = tuple(ord(character) for character in prompt)
    return [Request(f"r{i}", ids, SamplingParams(max_new_tokens=tokens)) for i in range(count)]


def run(engine, controller, wanted, concurrency, **more) -> RunRecord:
    return serve(engine, controller, wanted, concurrency, clock=engine.clock, **more)


def test_plain_decoding_is_one_token_a_step_and_every_token_has_a_time(fake_engine, make_controller):
    record = run(fake_engine, make_controller("none"), requests(1, tokens=3), 1)
    (request,) = record.requests
    assert request.token_times == (1.0, 2.0, 3.0)
    assert (request.arrival, request.finish, request.finish_reason) == (0.0, 3.0, "length")
    assert request.tokens == tuple(ord("a") + 2 + i for i in range(3))
    assert record.seconds == 3.0 and record.output_tokens == 3 and len(record.steps) == 3


def test_a_speculating_steps_tokens_share_its_time(fake_engine, make_controller):
    record = run(fake_engine, make_controller("echo"), requests(1, tokens=6), 1)
    assert record.requests[0].token_times == (1.0, 2.0, 2.0, 2.0, 2.0, 3.0)
    assert [step.committed for step in record.steps] == [0, 4, 4]


def test_concurrency_is_held_and_arrivals_follow_finishes(fake_engine, make_controller):
    record = run(fake_engine, make_controller("none"), requests(5, tokens=2), 2)
    assert [request.id for request in record.requests] == [f"r{i}" for i in range(5)]
    assert [request.arrival for request in record.requests] == [0.0, 0.0, 2.0, 2.0, 4.0]
    assert max(step.batch_size + step.prefill_tokens for step in record.steps) == 2


def test_every_output_is_shown_to_the_callback(fake_engine, make_controller):
    seen = []
    record = run(fake_engine, make_controller("chain"), requests(2, tokens=5), 2, on_output=seen.append)
    assert sum(len(output.tokens) for output in seen) == record.output_tokens == 10


def test_a_refused_request_ends_the_run_and_frees_the_engine(fake_engine, make_controller):
    with pytest.raises(RequestError):
        run(fake_engine, make_controller("none"), requests(1) + requests(1, prompt="no!"), 2)
    assert fake_engine.cancelled == ["r0"] and not fake_engine.has_work


def test_an_interrupt_cancels_what_is_in_flight(fake_engine, make_controller):
    fake_engine.fail_after = 2
    with pytest.raises(KeyboardInterrupt):
        run(fake_engine, make_controller("none"), requests(3, tokens=9), 2)
    assert fake_engine.cancelled == ["r0", "r1"] and not fake_engine.has_work


def test_concurrency_below_one_and_a_busy_engine_are_refused(fake_engine, make_controller):
    with pytest.raises(ConfigError, match="at least 1"):
        run(fake_engine, make_controller("none"), requests(1), 0)
    fake_engine.add(requests(1)[0])
    with pytest.raises(ConfigError, match="another run"):
        run(fake_engine, make_controller("none"), requests(1), 1)


def test_an_engine_that_loses_a_request_is_reported_not_waited_for(fake_engine, make_controller):
    fake_engine.add = lambda request: None
    fake_engine.cancel = lambda request_id: None
    with pytest.raises(RuntimeError, match="no work while 1 requests"):
        run(fake_engine, make_controller("none"), requests(1), 1)


def test_a_record_survives_json(fake_engine, make_controller):
    record = run(fake_engine, make_controller("echo"), requests(3, tokens=7), 2)
    assert RunRecord.from_json(record.to_json()) == record


def test_pooling_adds_seconds_and_joins_requests(fake_engine, make_controller):
    one = run(fake_engine, make_controller("none"), requests(2), 1)
    two = run(fake_engine, make_controller("none"), requests(1), 1)
    both = pool([one, two])
    assert both.seconds == one.seconds + two.seconds
    assert len(both.requests) == 3 and len(both.steps) == len(one.steps) + len(two.steps)
    with pytest.raises(ConfigError):
        pool([])


# ----------------------------------------------------------------------------- open workloads


def counted(suite: str) -> Request:
    counted.number += 1  # type: ignore[attr-defined]
    return Request(f"{suite or 'any'}/{counted.number}", (70, 71), SamplingParams(max_new_tokens=4))  # type: ignore[attr-defined]


@pytest.fixture
def drove(fake_engine, make_controller):
    """`drive` on the fake engine with a workload's text; `idle` moves the clock."""

    def drive_it(text: str, seed: int = 0, **more) -> RunRecord:
        counted.number = 0  # type: ignore[attr-defined]
        clock = fake_engine.clock

        def idle(until: float) -> None:
            assert until > clock.now
            clock.now = until

        arrivals = Arrivals(parse(text, ("chat", "code")), seed)
        return drive(fake_engine, make_controller("none"), arrivals, counted, clock=clock, idle=idle, **more)

    return drive_it


def test_a_closed_workload_is_held_and_its_end_cuts_what_is_in_flight(drove, fake_engine):
    record = drove("closed:2", steps=6)
    assert [(r.arrival, r.finish, r.finish_reason) for r in record.requests] == [
        (0.0, 4.0, "length"), (0.0, 4.0, "length"), (4.0, 6.0, "cancelled"), (4.0, 6.0, "cancelled"),
    ]  # fmt: skip
    assert record.output_tokens == 12 and record.concurrency == 2 and record.seconds == record.busy_seconds == 6.0
    assert record.request_seconds == 12.0
    assert [r.cut for r in record.requests] == [False, False, True, True]
    assert fake_engine.cancelled == ["any/3", "any/4"] and not fake_engine.has_work
    assert RunRecord.from_json(record.to_json()) == record


def test_open_arrivals_keep_their_own_times_and_idle_time_is_not_busy(drove):
    record = drove("poisson:0.3", seconds=60.0)
    expected = Arrivals(parse("poisson:0.3"), 0)
    times, now = [], 0.0
    while (now := expected.next_time(now)) < record.seconds:
        times += [now] * len(expected.due(now, 0))
    assert [r.arrival for r in record.requests] == pytest.approx(times)
    assert record.busy_seconds == len(record.steps) < record.seconds
    assert record.seconds >= 60.0


def test_an_idle_wait_ends_with_the_run(drove):
    record = drove("poisson:0.001", seconds=5.0)
    assert (record.seconds, record.requests, record.steps) == (5.0, (), ())


def test_a_shift_changes_suites_and_bursts_come_and_go(drove):
    record = drove("shift:12,1", seconds=24.0)
    assert [r.id.split("/")[0] for r in record.requests] == ["chat"] * 3 + ["code"] * 3
    bursts = drove("bursty:0.01,2,10,50", seconds=120.0)
    assert sum(r.arrival % 60.0 < 10.0 for r in bursts.requests) > 0.8 * len(bursts.requests) > 10


def test_a_driven_run_is_the_same_for_the_same_seed(make_engine, make_controller):
    def run_it(seed: int) -> RunRecord:
        counted.number, engine = 0, make_engine()  # type: ignore[attr-defined]
        arrivals = Arrivals(parse("ramp:0.2,1,20"), seed)
        idle = lambda until: setattr(engine.clock, "now", until)  # noqa: E731
        return drive(engine, make_controller("echo"), arrivals, counted, steps=40, clock=engine.clock, idle=idle)

    assert run_it(1) == run_it(1) != run_it(2)


def test_a_rounding_error_of_the_clock_does_not_hang_the_wait(fake_engine, make_controller):
    counted.number, fake_engine.clock.now = 0, 1e16  # type: ignore[attr-defined]  # adding 0.4 changes nothing
    arrivals = Arrivals(parse("poisson:3"), 0)
    record = drive(
        fake_engine, make_controller("none"), arrivals, counted, steps=3, clock=fake_engine.clock, idle=lambda t: None
    )
    assert len(record.steps) == 3


def test_every_step_is_shown_and_a_run_without_an_end_is_refused(drove, fake_engine):
    seen = []
    record = drove("closed:1", steps=3, on_step=seen.append)
    assert tuple(seen) == record.steps
    for ends in ({}, {"steps": 0}, {"seconds": -1.0}):
        with pytest.raises(ConfigError, match="needs an end"):
            drove("closed:1", **ends)
    fake_engine.add(requests(1)[0])
    with pytest.raises(ConfigError, match="another run"):
        drove("closed:1", steps=1)


def test_an_error_while_driving_frees_the_engine(drove, fake_engine):
    fake_engine.fail_after = 2
    with pytest.raises(KeyboardInterrupt):
        drove("closed:3", steps=9)
    assert len(fake_engine.cancelled) == 3 and not fake_engine.has_work
