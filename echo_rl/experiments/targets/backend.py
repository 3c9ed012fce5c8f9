"""A backend in this process as the target of an experiment: its clock, and the requests that it is asked."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from echo_rl.contracts import Backend, Controller, Request, Restartable
from echo_rl.replay.trace import Trace
from echo_rl.workloads import driver
from echo_rl.workloads.arrivals import Arrivals, Workload, parse
from echo_rl.workloads.records import RunRecord
from echo_rl.workloads.requests import Rotation, TraceRequests


@dataclass(frozen=True)
class Target:
    """A backend that controllers serve on, and what it is asked. A request's suite is its id up to the first slash."""

    name: str
    backend: Backend
    requests: tuple[Request, ...]
    clock: Callable[[], float] = time.perf_counter
    idle: Callable[[float], None] | None = None
    """Lets the clock reach a time without work; None sleeps."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Everything that the results depend on; a folder of results belongs to one environment."""
    depth: int | None = None
    """The deepest plan that it can serve, None: any. Deeper plans are cut to it."""
    width: int | None = None
    """The widest plan that it can serve, None: any."""
    context: int | None = None
    """The most tokens of a prompt and its answer, where it serves any; None: recorded requests alone, whose lengths a
    trace of arrivals can't change."""

    def workload(self, text: str) -> Workload:
        """Raises `ConfigError` on a workload that cannot be read."""
        return parse(text, dict.fromkeys(request.id.split("/")[0] for request in self.requests))

    def serve(self, controller: Controller, requests: Iterable[Request], concurrency: int, seed: int = 0) -> RunRecord:
        """Requests to the last, so many in flight; the seed decides a replay's noise. Raises as `driver.serve`."""
        self._restart(seed)
        return driver.serve(self.backend, controller, requests, concurrency, clock=self.clock)

    def drive(
        self,
        controller: Controller,
        workload: Workload,
        seed: int,
        steps: int | None = None,
        seconds: float | None = None,
        tag: str = "",
    ) -> RunRecord:
        """One run of a workload; the seed decides its arrivals, its requests and, on replay, its noise.

        `tag` tells its request ids from those of other runs. Raises what `driver.drive` raises.
        """
        self._restart(seed)
        arrivals, source = Arrivals(workload, seed), self._source(workload, seed, tag)
        return driver.drive(
            self.backend, controller, arrivals, source, steps=steps, seconds=seconds, clock=self.clock, idle=self.idle
        )

    def remarks(self, workload: Workload) -> list[str]:
        """Says where a workload is not served as it was recorded."""
        if workload.trace is None:
            return []
        if self.context is None:
            return [f"{workload.name} on {self.name}: its times alone, the lengths are those of the recorded responses"]
        return [f"{workload.name} on {self.name}: {remark}" for remark in workload.trace.remarks(self.context)]

    def _source(self, workload: Workload, seed: int, tag: str) -> Callable[[str], Request]:
        if workload.trace is None or self.context is None:
            return Rotation(self.requests, seed, tag)
        return TraceRequests(workload.trace, self.requests, self.context, seed, tag)

    def _restart(self, seed: int) -> None:
        if isinstance(self.backend, Restartable):
            self.backend.restart(seed)


def facts(trace: Trace) -> dict[str, str]:
    """The lines of an environment that tell the trace whose requests are served."""
    return {"trace": f"{trace.provenance}, {len(trace.responses)} responses", "trace digest": trace.digest}
