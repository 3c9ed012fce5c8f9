"""Times passes as an engine with a device step runs them: padded to its buckets, replayed from its graphs.

The engine's own step is run on made-up sequences and its phases are read as a report would give them. What a
profile says of sizes between two buckets is then linear between what those buckets take.
"""

from __future__ import annotations

import math

from echo_rl.calibrate.in_situ import Usual, every_step
from echo_rl.contracts import AUTOREGRESSIVE, LoadView, PhaseTimes, SpecPlan, StepReport
from echo_rl.controllers.base import BaseController
from echo_rl.errors import ConfigError
from echo_rl.runtime.engine import Engine
from echo_rl.runtime.probe import Probe
from echo_rl.runtime.scheduler import Batch
from echo_rl.runtime.step.base import Clock
from echo_rl.runtime.step.device.step import DeviceStep

RUNS = 4
"""Most runs of a size until one is served as usual: the first compiles, the second captures the graphs."""


class Planned(BaseController):
    """The default rules, which the device follows by itself; the plan comes from elsewhere."""

    name = "planned"

    def propose(self, load: LoadView) -> SpecPlan:
        raise NotImplementedError("a pass that is timed has its plan already")


class Replays:
    """Tells steps that replayed all graphs they could from those that ran a body anew or captured one.

    Asked after every step. On a device without graphs every step is usual.
    """

    def __init__(self, step: DeviceStep) -> None:
        self._graphs = step.graphs
        self._seen = (0, 0)
        self.usual(False)

    def usual(self, prompts: bool) -> bool:
        """True where the step since the last call was served as usual; one with `prompts` verifies as launched."""
        counts = self._graphs.counts
        plain, captured = counts.plain - self._seen[0], counts.captured - self._seen[1]
        self._seen = (counts.plain, counts.captured)
        return not len(self._graphs) or (plain == int(prompts) and not captured)

    def of(self, report: StepReport) -> bool:
        """`usual` of the step that the report is of."""
        return self.usual(report.load.prefill_tokens > 0)


class DevicePasses(Probe):
    """A `Probe` of an engine with a device step. Raises `ConfigError` if the engine has another or has work."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        if not isinstance(engine.serving, DeviceStep):
            raise ConfigError("the engine serves no steps on the device; give --step device")
        self._step = engine.serving
        self._rule, self._replays = Planned(), Replays(engine.serving)

    def verify(self, batch: int, rows: int, context: int) -> float:
        """Seconds of verifying `rows` rows in all, roots included; more requests share them than `batch` where they
        are more than so many trees may have."""
        requests = max(batch, -(-rows // (1 + self._engine.config.max_nodes)))
        nodes = rows - requests
        return self._times(requests, _tree(nodes, requests), context).verify

    def draft(self, batch: int, width: int, depth: int, context: int) -> float:
        """Seconds of catching up with two committed tokens a request and growing a tree without gates."""
        return self._times(batch, SpecPlan(batch * width, depth, width), context).draft

    def _times(self, batch: int, plan: SpecPlan, context: int) -> PhaseTimes:
        """The times of the first run that is served as usual. Raises `ConfigError` where the device can't serve the
        plan."""
        for _ in range(RUNS):
            served, times = self._step.counts.device, self._run(batch, plan, context)
            if self._step.counts.device == served:
                raise ConfigError(
                    f"the device can't draft {plan.max_depth} levels of width {plan.width} itself; leave them out of "
                    "the grid, or measure with --step eager"
                )
            if self._replays.usual(False):
                break
        return times

    def _run(self, batch: int, plan: SpecPlan, context: int) -> PhaseTimes:
        most = self._engine.config.max_batch_size
        if batch > most:
            raise ConfigError(f"{batch} requests are more than max_batch_size ({most}); measure fewer, or raise it")
        nodes = max(plan.expanded, min(plan.budget, self._engine.config.max_nodes))
        with self._sequences(batch, context, 1 + nodes) as sequences:
            clock = Clock()
            self._step.run(Batch(sequences, (), ()), plan, self._rule, clock)
        return clock.times()


def passes(engine: Engine) -> Probe:
    """The probe that times the engine's passes in the way that it serves."""
    return DevicePasses(engine) if isinstance(engine.serving, DeviceStep) else Probe(engine)


def usual(engine: Engine) -> Usual:
    """The test of which live steps of the engine a profile may rest on."""
    return Replays(engine.serving).of if isinstance(engine.serving, DeviceStep) else every_step


def _tree(nodes: int, requests: int) -> SpecPlan:
    """A plan of that many nodes in all in trees of one or two levels, no wider than they must be."""
    if nodes < 1:
        return AUTOREGRESSIVE
    each = -(-nodes // requests)
    width = math.ceil((math.sqrt(1 + 4 * each) - 1) / 2)  # width + width**2 >= each
    return SpecPlan(nodes, 1 if each <= width else 2, width)
