"""The closed loop: concurrency held, times recorded, early ends cleaned up."""

from __future__ import annotations

import pytest

from echo_rl.contracts import Request, SamplingParams
from echo_rl.errors import ConfigError, RequestError
from echo_rl.loop import RunRecord, pool, serve


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
