"""Fixtures that every test may use: a fake engine of known behaviour, and the real model's folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: tiny models gain nothing from more, a busy machine loses

from echo_rl.contracts import (
    AUTOREGRESSIVE,
    LoadView,
    PhaseTimes,
    Request,
    RequestOutput,
    SpecPlan,
    StepReport,
)
from echo_rl.errors import EchoError, RequestError

# How long an example takes says how busy the machine is.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


class FakeClock:
    """A clock that moves only when it is set."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class FakeController:
    """Accepts `gain` drafted tokens a step and request; 0 is plain decoding."""

    def __init__(self, name: str, gain: int = 0) -> None:
        self.name = name
        self.gain = gain
        self.observed: list[StepReport] = []

    def plan(self, load: LoadView) -> SpecPlan:
        if not self.gain:
            return AUTOREGRESSIVE
        return SpecPlan(budget=2 * self.gain * load.batch_size, max_depth=self.gain)

    def observe(self, report: StepReport) -> None:
        self.observed.append(report)


class FakeTokenizer:
    """One id a character."""

    def chat(self, messages: Sequence[dict[str, str]]) -> tuple[int, ...]:
        return self.encode("".join(message["content"] for message in messages))

    def encode(self, text: str, special: bool = False) -> tuple[int, ...]:
        return tuple(ord(character) for character in text)

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(i) for i in ids)

    def token_bytes(self, token: int) -> bytes:
        return chr(token).encode()


class FakeEngine:
    """Token i of a request is ``'a' + (prompt length + i) % 26``; every step takes `step_seconds` of the fake clock.

    A request prefills in its first step, which gives it one token, then decodes. A prompt that holds
    ``!`` is refused with `RequestError`.
    """

    has_drafter = True

    def __init__(self, clock: FakeClock | None = None, step_seconds: float = 1.0) -> None:
        self.clock = clock or FakeClock()
        self.step_seconds = step_seconds
        self.tokenizer = FakeTokenizer()
        self.max_context = 2_048
        self.live: dict[str, Request] = {}
        self.made: dict[str, int] = {}
        self.cancelled: list[str] = []
        self.served: list[tuple[str, str]] = []  # (controller, request) in the order of admission
        self.waiting_name: list[str] = []
        self.fail_after: int | None = None
        self.steps = 0

    @property
    def has_work(self) -> bool:
        return bool(self.live)

    def add(self, request: Request) -> None:
        if ord("!") in request.prompt:
            raise RequestError("the prompt holds '!'; take it out")
        self.live[request.id] = request
        self.made[request.id] = 0
        self.waiting_name.append(request.id)

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)
        del self.live[request_id]

    def step(self, controller: FakeController) -> StepReport:
        if self.fail_after is not None and self.steps >= self.fail_after:
            raise KeyboardInterrupt
        self.steps += 1
        self.served += [(controller.name, request_id) for request_id in self.waiting_name]
        self.waiting_name = []
        decoding = [request_id for request_id in self.live if self.made[request_id]]
        load = LoadView(len(decoding), len(self.live) - len(decoding), 0, 1.0, 0.1, 64)
        plan = controller.plan(load) if decoding else AUTOREGRESSIVE
        gain = plan.max_depth if plan.speculates else 0
        outputs = tuple(
            self._output(request_id, 1 + (gain if self.made[request_id] else 0)) for request_id in [*self.live]
        )
        self.clock.now += self.step_seconds
        report = StepReport(
            load=load,
            plan=plan,
            outputs=outputs,
            drafted=plan.budget,
            verified=gain * len(decoding),
            accepted=gain * len(decoding),
            committed=(1 + gain) * len(decoding),
            reached_by_depth=(len(decoding),) * gain,
            accepted_by_depth=(len(decoding),) * gain,
            times=PhaseTimes(verify=0.75 * self.step_seconds, draft=0.125 * self.step_seconds),
        )
        controller.observe(report)
        return report

    def _output(self, request_id: str, count: int) -> RequestOutput:
        request, made = self.live[request_id], self.made[request_id]
        count = min(count, request.params.max_new_tokens - made)
        base = len(request.prompt) + made
        tokens = tuple(ord("a") + (base + i) % 26 for i in range(count))
        self.made[request_id] = made + count
        done = self.made[request_id] >= request.params.max_new_tokens
        if done:
            del self.live[request_id]
        return RequestOutput(request_id, tokens, self.tokenizer.decode(tokens), "length" if done else None)


@pytest.fixture
def fake_engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def make_engine() -> Callable[..., FakeEngine]:
    return FakeEngine


@pytest.fixture
def make_controller() -> Callable[..., FakeController]:
    """Stands in for `registry.make`: ``none``, ``chain`` and ``echo`` with a `gain` option."""

    def make(name: str, **options: Any) -> FakeController:
        return FakeController(name, options.get("gain", {"none": 0, "chain": 1, "echo": 3}[name]))

    return make


@pytest.fixture(scope="session")
def model_folder() -> Path:
    """The real SmolLM2 folder. Where it can't be had the test is skipped, except in CI, where that is a failure."""
    from echo_rl.runtime.models.default_model import fetch_smollm2

    try:
        return fetch_smollm2()
    except EchoError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"no model: {error}")
