"""Plays bandits over a few ready-made shapes, one for each size of batch: no model of acceptance or cost.

Source: BanditSpec (arXiv 2505.15141: UCB and EXP3 over configurations) and Nightjar (arXiv 2512.22420: the batch
size as context, no speculation among the arms, switching costs). Only steps that don't prefill teach anything.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

from echo_rl.contracts import AUTOREGRESSIVE, LoadView, SpecPlan, StepReport
from echo_rl.controllers.base import BaseController
from echo_rl.controllers.baselines.dynamic import Values
from echo_rl.errors import ConfigError

Arm = tuple[float, int, int]
"""(nodes a request, depth, width); 0 nodes is plain decoding."""
Rule = Literal["ucb", "exp3"]

PLAIN_ARM: Arm = (0.0, 1, 1)


@dataclass(frozen=True)
class BanditOptions:
    arms: tuple[Arm, ...] = (PLAIN_ARM, (1.0, 1, 1), (3.0, 3, 1), (7.0, 4, 3), (15.0, 6, 4))
    """The shapes to choose from, as (nodes a request, depth, width)."""
    rule: Rule = "ucb"
    """``ucb``: the least lower confidence bound of the loss; ``exp3``: at random, by the summed losses."""
    explore: float = 0.1
    """UCB: width of the confidence bound, as a share of the slowest arm's loss. EXP3: share of uniform choices."""
    memory: float = 200.0
    """Choices in a context after which one has faded, from the counts that UCB explores by and from EXP3's regret. An
    arm's mean loss is over its last eight or so, so that a change is noticed."""
    hold: int = 4
    """Steps for which a choice stands."""
    switching: float = 0.02
    """Loss of leaving the arm in use, in units of the slowest arm's time a token."""
    seed: int = 0
    """The seed of EXP3's draws."""
    TUNABLE: ClassVar[Values] = {"rule": get_args(Rule), "explore": (0.03, 0.1, 0.3), "hold": (4, 16)}

    def __post_init__(self) -> None:
        if len(set(self.arms)) != len(self.arms) or len(self.arms) < 2:
            raise ConfigError(f"bandit arms are {self.arms}; give at least two, each once")
        for nodes, depth, width in self.arms:
            if not 0.0 <= nodes < math.inf or not 1 <= depth <= 8 or not 1 <= width <= 8:
                raise ConfigError(f"bandit arm {(nodes, depth, width)}: give nodes >= 0, depth and width in 1 to 8")
        if self.rule not in get_args(Rule):
            raise ConfigError(f"bandit rule is {self.rule!r}; give one of {', '.join(get_args(Rule))}")
        if not 0.0 < self.explore <= 1.0 or self.switching < 0.0:
            raise ConfigError(f"bandit explore {self.explore}, switching {self.switching}: give (0, 1] and >= 0")
        if not self.memory > 1.0 or self.hold < 1:
            raise ConfigError(f"bandit memory {self.memory}, hold {self.hold}: give more than 1, and at least 1")


@dataclass
class _Choice:
    """The arm in use, the steps since it was chosen, and what they cost."""

    octave: int
    arm: int
    chance: float = 1.0
    steps: int = 0
    seconds: float = 0.0
    tokens: float = 0.0  # of one request
    switched: bool = False


@dataclass
class _Context:
    """The statistics of one batch octave's choices. Losses are seconds a token of one request."""

    arms: int
    pulls: list[float] = field(init=False)
    """Fading counts of choices by arm."""
    losses: list[float] = field(init=False)
    """Running mean losses by arm."""
    regret: list[float] = field(init=False)
    """EXP3's fading sums of importance-weighted losses by arm."""

    def __post_init__(self) -> None:
        self.pulls, self.losses, self.regret = ([0.0] * self.arms for _ in range(3))

    @property
    def scale(self) -> float:
        """Seconds a token of the slowest arm tried."""
        return max(self.losses)

    def learn(self, choice: _Choice, switching: float, memory: float) -> None:
        arm, loss, kept = choice.arm, choice.seconds / choice.tokens, 1.0 - 1.0 / memory
        self.pulls = [n * kept for n in self.pulls]
        self.regret = [r * kept for r in self.regret]
        self.pulls[arm] += 1.0
        self.losses[arm] += (loss - self.losses[arm]) / min(self.pulls[arm], 8.0)
        self.regret[arm] += (min(1.0, loss / self.scale) + switching * choice.switched) / choice.chance


class Bandit(BaseController):
    """Plays the arm with the least loss, and the others often enough to know (UCB), or at random by loss (EXP3).

    Source: BanditSpec (arXiv 2505.15141) and Nightjar (arXiv 2512.22420). The loss of a choice is the seconds a token
    of its steps, over those of the slowest arm; leaving the arm in use costs `switching` on top. A choice stands for
    `hold` steps or until the batch leaves its octave.
    """

    name = "bandit"

    def __init__(self, options: BanditOptions) -> None:
        super().__init__(options)
        self._random = random.Random(options.seed)
        self._contexts: dict[int, _Context] = {}
        self._choice: _Choice | None = None

    def propose(self, load: LoadView) -> SpecPlan:
        octave, choice = load.batch_size.bit_length(), self._choice
        if choice is None or choice.octave != octave or choice.steps >= self.options.hold:
            self._settle()
            choice = self._choice = self._choose(octave)
        nodes, depth, width = self.options.arms[choice.arm]
        budget = round(nodes * load.batch_size)
        return SpecPlan(budget, min(depth, load.max_nodes), width) if budget else AUTOREGRESSIVE

    def observe(self, report: StepReport) -> None:
        choice, batch = self._choice, report.load.batch_size
        if choice is None or not batch:
            return
        choice.steps += 1
        if not report.load.prefill_tokens:
            choice.seconds += report.times.total
            choice.tokens += report.committed / batch

    def _settle(self) -> None:
        """Learn from the choice that ends."""
        choice = self._choice
        if choice is not None and choice.tokens > 0.0:
            context = self._contexts[choice.octave]
            context.learn(choice, self.options.switching, self.options.memory)

    def _choose(self, octave: int) -> _Choice:
        context = self._contexts.setdefault(octave, _Context(len(self.options.arms)))
        untried = [arm for arm, loss in enumerate(context.losses) if not loss]
        if untried:
            return _Choice(octave, untried[0])
        current = self._choice.arm if self._choice is not None else -1
        if self.options.rule == "ucb":
            return _Choice(octave, self._optimistic(context, current))
        chances = self._chances(context)
        arm = self._random.choices(range(context.arms), chances)[0]
        return _Choice(octave, arm, chances[arm], switched=arm != current)

    def _optimistic(self, context: _Context, current: int) -> int:
        """The least lower confidence bound of the loss, with what leaving the arm in use costs."""
        total, options = math.log(1.0 + sum(context.pulls)), self.options
        bounds = [
            loss / context.scale
            - options.explore * math.sqrt(2.0 * total / pulls)
            + options.switching * (arm != current)
            for arm, (loss, pulls) in enumerate(zip(context.losses, context.pulls, strict=True))
        ]
        return min(range(context.arms), key=bounds.__getitem__)

    def _chances(self, context: _Context) -> list[float]:
        """EXP3's probabilities: exponential in the summed losses, mixed with uniform choices."""
        arms, explore = context.arms, self.options.explore
        rate = math.sqrt(2.0 * math.log(arms) / (arms * self.options.memory))
        least = min(context.regret)
        weights = [math.exp(rate * (least - loss)) for loss in context.regret]
        total = sum(weights)
        return [(1.0 - explore) * weight / total + explore / arms for weight in weights]
