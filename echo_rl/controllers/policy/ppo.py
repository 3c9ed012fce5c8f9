"""Runs ECHO with its plan from elsewhere: set from outside (`Steered`), or by a learned policy (`Ppo`).

Gates and scheduler stay ECHO's; only the knobs are learned. Imports no training library.
"""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from echo_rl.codec import ObservationEncoder
from echo_rl.contracts import AUTOREGRESSIVE, LoadView, SpecPlan, StepReport
from echo_rl.controllers.echo.echo import CalibratedSelection, Echo, EchoOptions
from echo_rl.controllers.echo.gates import GateCalibration
from echo_rl.controllers.policy.network import Policy
from echo_rl.controllers.probing import PlainProbe
from echo_rl.costs.profile import CostProfile
from echo_rl.errors import ConfigError
from echo_rl.utils.archives import shipped_checkpoints

Action = tuple[int, ...]
MOST_UNREAD = 32
"""Steps that may pass between two decisions before they are learned from; without decoding requests none is taken."""

MOST_PLANS = 4096
"""Most plans that are kept."""
PLAIN_PROBE_AFTER = 256
"""Speculative steps after which a plain one is due, see `PlainProbe`. Where speculation doubles the speed that is .2 %
of it."""

log = logging.getLogger(__name__)


class Steered(CalibratedSelection):
    """Follows the plan that `steer` set last; plain decoding until then."""

    name = "steered"

    def __init__(self, calibration: GateCalibration | str | Path | None = None) -> None:
        super().__init__(calibration)
        self._plan = AUTOREGRESSIVE

    def steer(self, plan: SpecPlan) -> None:
        self._plan = plan

    def propose(self, load: LoadView) -> SpecPlan:
        return self._plan


@dataclass(frozen=True)
class PpoOptions:
    path: Policy | str | Path | None = None
    """The policy, or its folder; None takes the one that ships with the package."""
    profile: CostProfile | str | Path | None = None
    """The machine's costs, or their file; None takes this machine's own, else the packaged one."""
    calibration: GateCalibration | str | Path | None = None
    """The drafter's gates, or their file; None takes this machine's own, else the packaged one."""
    deterministic: bool = True
    """Take the likeliest action; otherwise draw one, as in training."""
    seed: int = 0
    """The seed of the drawn actions."""

    def __post_init__(self) -> None:
        if not isinstance(self.deterministic, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ConfigError("ppo deterministic must be true or false, seed a whole number >= 0")


class Ppo(CalibratedSelection):
    """A learned policy over ECHO's gates and scheduler. It decides anew every `Policy.repeat` decoding steps.

    In between, a rare plain step shows what plain decoding costs by now: a policy that keeps to one size would
    never learn where the cost profile is wrong. A step that also reads prompts never gets more than its K_max
    (`CostProfile.knee`): nodes past it would delay first tokens and gain nothing.

    Where it can't (it raises, or its numbers are not finite) ECHO decides in its stead: counted in
    `fallbacks`, logged the first time. From then on ECHO's planner follows every step, which a sound
    policy doesn't pay for.
    """

    name = "ppo"

    def __init__(self, options: PpoOptions) -> None:
        super().__init__(options.calibration)
        given = options.path
        self.policy = given if isinstance(given, Policy) else Policy.load(shipped() if given is None else given)
        self.echo = Echo(EchoOptions(options.profile, self.calibration))
        self.materials = (*self.echo.materials, self.policy)
        self.fallbacks = 0
        self._encoder = ObservationEncoder(self.echo.profile)
        self._unread: deque[StepReport] = deque()  # not yet learned from
        self._gates = self.calibration.sparse(max(self.policy.table.depths))
        self._generator = None if options.deterministic else np.random.default_rng(options.seed)
        self._action: Action | None = None  # None: this decision is ECHO's
        self._left = 0  # steps for which it still stands
        self._plain_probe = PlainProbe()
        self._probing = False  # the step in progress is a probe of plain decoding
        self._plans: dict[tuple[Action, int], SpecPlan] = {}

    @property
    def decision_steps(self) -> int:
        """Returns the decoding steps that one decision stands for."""
        return self.policy.repeat

    def propose(self, load: LoadView) -> SpecPlan:
        if not self._left:
            self._action, self._left = self._decide(load), self.decision_steps
        self._left -= 1
        self._probing = self._action is not None and self._plain_probe.due(load, PLAIN_PROBE_AFTER)  # ECHO has its own
        if self._probing:
            return AUTOREGRESSIVE
        if self._action is None:
            return self.echo.propose(load)
        key = (self._action, load.batch_size)
        if key not in self._plans:
            if len(self._plans) >= MOST_PLANS:  # actions that are drawn are ever new
                self._plans.clear()
            self._plans[key] = self.policy.table.plan(self._action, load, self._gates)
        return self._beside_prompts(self._plans[key], load) if load.prefill_tokens else self._plans[key]

    def observe(self, report: StepReport) -> None:
        self._plain_probe.observe(report, self._probing)
        self._probing = False
        self._unread.append(report)
        if len(self._unread) > MOST_UNREAD:
            self._catch_up()
        if self.fallbacks:
            self.echo.observe(report)

    def _beside_prompts(self, plan: SpecPlan, load: LoadView) -> SpecPlan:
        most = self.echo.planner.knee(load)
        if plan.budget <= most:
            return plan
        return replace(plan, budget=most) if most else AUTOREGRESSIVE

    def _decide(self, load: LoadView) -> Action | None:
        try:
            self._catch_up()
            return self.policy.act(self._encoder.observe(load), self._generator)
        except Exception as error:  # a server must go on, whatever a policy does
            if not self.fallbacks:
                log.warning("the policy cannot decide (%s: %s); ECHO does instead", type(error).__name__, error)
            self.fallbacks += 1
            return None

    def _catch_up(self) -> None:
        """Learn from the steps since the last decision: nobody asks in between, and together they cost less."""
        while self._unread:
            self._encoder.update(self._unread.popleft())


def shipped() -> Path:
    """Folder of the policy that ships with the project."""
    return shipped_checkpoints() / "ppo"
