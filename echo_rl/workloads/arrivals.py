"""Describes workloads as cycled phases, and draws the seeded arrivals that they make.

Knows nothing of prompts or servers: an arrival is the name of the suite to draw a request from.
Times are seconds since the workload began, rates are requests a second.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from echo_rl.errors import ConfigError
from echo_rl.workloads.arrival_trace import ArrivalTrace, read_arrivals
from echo_rl.workloads.datasets import MIX

FOREVER = math.inf


@dataclass(frozen=True)
class Phase:
    """A stretch of time under one kind of load: closed (`concurrency`) or open (`rate`), never both."""

    seconds: float
    concurrency: int | None = None
    """Requests held in flight; a new one arrives the moment one finishes."""
    rate: float | None = None
    """Poisson arrivals a second, whatever is in flight."""
    rate_end: float | None = None
    """The rate changes linearly to this one over the phase; None holds it."""
    suites: tuple[str, ...] = ()
    """Each request comes from one of these, all equally likely; empty: from any."""

    def __post_init__(self) -> None:
        if not self.seconds > 0:
            raise ConfigError(f"a phase lasts {self.seconds} s; give a positive number")
        if (self.concurrency is None) == (self.rate is None):
            raise ConfigError("a phase needs either a concurrency or a rate, and not both")
        if self.concurrency is not None and (self.concurrency < 1 or self.rate_end is not None):
            raise ConfigError(f"a closed phase needs concurrency >= 1 (not {self.concurrency}) and no rate_end")
        rates = (self.rate or 0.0, self.rate_end or 0.0)
        if not all(0.0 <= rate < math.inf for rate in rates):
            raise ConfigError(f"arrival rates are {rates}; give finite numbers >= 0")
        if self.rate_end is not None and self.seconds == FOREVER:
            raise ConfigError("a ramp must end; give its phase finite seconds")

    @property
    def expected(self) -> float:
        """Mean number of open arrivals in the phase."""
        if self.rate is None:
            return 0.0
        last = self.rate if self.rate_end is None else self.rate_end
        return 0.5 * (self.rate + last) * self.seconds if self.rate + last > 0 else 0.0

    def time_of(self, count: float) -> float:
        """Seconds into an open phase at which the mean number of arrivals reaches `count`, below `expected`.

        Solves ``rate * t + slope * t**2 / 2 = count`` in the form without cancellation.
        """
        assert self.rate is not None
        slope = 0.0 if self.rate_end is None else (self.rate_end - self.rate) / self.seconds
        root = math.sqrt(max(0.0, self.rate * self.rate + 2.0 * slope * count))
        return min(self.seconds, 2.0 * count / (self.rate + root)) if count else 0.0


@dataclass(frozen=True)
class Workload:
    """Phases one after the other, from the start again after the last."""

    name: str
    phases: tuple[Phase, ...]
    trace: ArrivalTrace | None = None
    """Recorded arrivals that stand for the phases' open ones."""
    speed: float = 1.0
    """How many times as fast as they were recorded those come."""

    def __post_init__(self) -> None:
        if not any(phase.concurrency or phase.expected for phase in self.phases):
            raise ConfigError(f"workload {self.name!r} brings no request; give it a concurrency or a rate above 0")
        if len(self.phases) > 1 and any(phase.seconds == FOREVER for phase in self.phases):
            raise ConfigError(f"workload {self.name!r} has a phase that never ends; give each finite seconds")

    def check(self, suites: Collection[str]) -> None:
        """Raises `ConfigError` where it names a suite that is not one of these."""
        missing = {suite for phase in self.phases for suite in phase.suites} - set(suites)
        if missing:
            raise ConfigError(f"workload {self.name!r} needs requests of {sorted(missing)}; give some")


def closed(concurrency: int) -> Workload:
    """So many requests in flight, always."""
    return Workload(f"closed:{concurrency}", (Phase(FOREVER, concurrency=concurrency),))


def poisson(rate: float) -> Workload:
    """Independent arrivals at a constant rate."""
    return Workload(f"poisson:{rate:g}", (Phase(FOREVER, rate=rate),))


def bursty(low_rate: float, high_rate: float, on_seconds: float, off_seconds: float) -> Workload:
    """Arrivals at the high rate for `on_seconds`, then at the low one for `off_seconds`."""
    name = f"bursty:{low_rate:g},{high_rate:g},{on_seconds:g},{off_seconds:g}"
    return Workload(name, (Phase(on_seconds, rate=high_rate), Phase(off_seconds, rate=low_rate)))


def ramp(low: float, high: float, seconds: float) -> Workload:
    """A rate that rises from low to high, then starts again."""
    return Workload(f"ramp:{low:g},{high:g},{seconds:g}", (Phase(seconds, rate=low, rate_end=high),))


def shift(suites: Sequence[str], seconds: float, concurrency: int) -> Workload:
    """A closed loop whose requests come from one suite after the other, `seconds` from each."""
    phases = tuple(Phase(seconds, concurrency=concurrency, suites=(suite,)) for suite in suites)
    return Workload(f"shift:{seconds:g},{concurrency}", phases)


def recorded(path: str, speed: float = 1.0) -> Workload:
    """The arrivals of a file, so many times as fast as they came. Raises `ConfigError`."""
    if not 0 < speed < math.inf:
        raise ConfigError(f"the speed of an arrivals' trace is {speed:g}; give a number above 0")
    trace = read_arrivals(Path(path))
    name = f"trace:{path}" if speed == 1.0 else f"trace:{path},{speed:g}"
    rate = speed * len(trace.arrivals) / trace.period
    return Workload(name, (Phase(FOREVER, rate=rate),), trace, speed)


def facts(workloads: Iterable[Workload]) -> dict[str, str]:
    """What tells recorded arrivals from others: the content of their files."""
    return {f"arrivals {each.name}": f"sha256 {each.trace.sha256}" for each in workloads if each.trace is not None}


def _recorded(rest: str) -> Workload:
    """`recorded` of ``FILE`` or ``FILE,SPEED``; a name may hold commas."""
    path, comma, last = rest.rpartition(",")
    try:
        return recorded(path, float(last)) if comma else recorded(rest)
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        return recorded(rest)


def parse(text: str, suites: Collection[str] = MIX) -> Workload:
    """The workload that a text like ``closed:8`` stands for.

    ``shift`` goes through the `suites`: those of the mix first, as chat, code and math, then the others as they come.

    Raises `ConfigError` with the form that was expected.
    """
    kind, _, rest = text.partition(":")
    if kind == "trace" and rest:
        return _recorded(rest)
    if kind not in _FORMS:
        forms = ", ".join((*(form for form, _, _ in _FORMS.values()), "trace:FILE[,SPEED]"))
        raise ConfigError(f"no workload is called {text!r}; give one of {forms}")
    form, types, make = _FORMS[kind]
    words = rest.split(",")
    try:
        values = [convert(word) for convert, word in zip(types, words, strict=True)]
    except ValueError as error:
        raise ConfigError(f"workload {text!r} is not of the form {form}") from error
    order = sorted(dict.fromkeys(suites), key=lambda suite: MIX.index(suite) if suite in MIX else len(MIX))
    return make(order, *values) if kind == "shift" else make(*values)


class Arrivals:
    """The arrivals of one workload, in order. `now` must not go back from call to call.

    Open arrivals are a Poisson process of the phases' rate: unit-exponential steps of its mean count
    turned into times; or those of a trace, from a place in it that the seed draws. They depend on the seed alone, never
    on when or how often `due` is called.
    """

    def __init__(self, workload: Workload, seed: int) -> None:
        self._steps, self._open_suites, self._closed_suites = (random.Random(f"{seed}/{n}") for n in range(3))
        self._here = _Cursor(workload.phases)
        self._ahead = _Cursor(workload.phases)  # the phase of the next open arrival
        self._recorded = None if workload.trace is None else workload.trace.order(seed)
        self._speed = workload.speed
        self._count = 0.0  # mean arrivals from that phase's start to the next one
        self._open = any(phase.expected for phase in workload.phases)
        self._next = self._draw()

    def due(self, now: float, in_flight: int) -> list[str]:
        """The suite ("" = any) of every request that has arrived since the last call.

        In a closed phase as many more as its concurrency lacks: they count on their being added.
        """
        suites = []
        while self._next <= now:
            suites.append(_pick(self._ahead.phase, self._open_suites))
            self._next = self._draw()
        self._here.move_to(now)
        missing = (self._here.phase.concurrency or 0) - in_flight - len(suites)
        if missing > 0:
            suites += [_pick(self._here.phase, self._closed_suites) for _ in range(missing)]
        return suites

    def since(self, seen: float, now: float, in_flight: int) -> list[tuple[float, str]]:
        """The time and suite of each request that arrived after `seen` up to `now`.

        Open arrivals come at their own times, closed ones now. `in_flight` are those before them; they
        count on their being added.
        """
        found = []
        while (upcoming := self.next_time(seen)) is not None and upcoming <= now:
            seen = upcoming
            found += [(upcoming, suite) for suite in self.due(upcoming, sys.maxsize)]  # as if full: the open ones alone
        return found + [(now, suite) for suite in self.due(now, in_flight + len(found))]

    def next_time(self, now: float) -> float | None:
        """The time until which an idle server may wait: the next open arrival or change of phase, after `now`.

        None where neither comes: the load is closed for ever, and `due` gives its requests at once.
        """
        self._here.move_to(now)
        upcoming = min(self._next, self._here.end)
        return None if upcoming == FOREVER else upcoming

    def _draw(self) -> float:
        """The time of the next open arrival."""
        if self._recorded is not None:
            return next(self._recorded)[0] / self._speed
        if not self._open:
            return FOREVER
        self._count += self._steps.expovariate(1.0)
        while self._count >= self._ahead.phase.expected:
            self._count -= self._ahead.phase.expected
            self._ahead.advance()
        return self._ahead.start + self._ahead.phase.time_of(self._count)


class _Cursor:
    """A place in the cycle of phases. Only moves forward."""

    def __init__(self, phases: tuple[Phase, ...]) -> None:
        self._phases, self._index = phases, 0
        self.start, self.end = 0.0, phases[0].seconds

    @property
    def phase(self) -> Phase:
        return self._phases[self._index]

    def advance(self) -> None:
        self._index = (self._index + 1) % len(self._phases)
        self.start, self.end = self.end, self.end + self.phase.seconds

    def move_to(self, now: float) -> None:
        while self.end <= now:
            self.advance()


def _pick(phase: Phase, generator: random.Random) -> str:
    return generator.choice(phase.suites) if phase.suites else ""


_FORMS: Mapping[str, tuple[str, tuple[Callable[[str], float], ...], Callable[..., Workload]]] = {
    "closed": ("closed:CONCURRENCY", (int,), closed),
    "poisson": ("poisson:RATE", (float,), poisson),
    "bursty": ("bursty:LOW_RATE,HIGH_RATE,ON_SECONDS,OFF_SECONDS", (float,) * 4, bursty),
    "ramp": ("ramp:LOW_RATE,HIGH_RATE,SECONDS", (float,) * 3, ramp),
    "shift": ("shift:SECONDS,CONCURRENCY", (float, int), shift),
}
