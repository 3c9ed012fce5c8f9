"""Scores serving steps, those of E environments at once ([E] arrays). Knows nothing of requests or actions.

Serving has no end, so the goal is the average reward: tokens a second. `tokens - rho * seconds` with
rho the running throughput has its optimum exactly there (a step is good iff it beats the running rate).
The wrong rewards of published ablations, accept length alone and time alone (LTD, arXiv 2603.01639:
3.59x and 3.45x against 4.13x), are here to be measured against.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from echo_rl.errors import ConfigError

Floats = NDArray[np.float64]
OCTAVES = 8
"""Batch sizes from 128 on share one usual speed."""
USUAL_RATE = 0.5
"""The usual speeds move this much slower than an environment's own."""
Form = Literal["relative", "throughput", "tokens", "time", "goodput"]


@dataclass(frozen=True)
class RewardOptions:
    form: Form = "relative"
    """``relative``, ``throughput``, ``goodput``, or one of the wrong ones for an ablation: ``tokens``, ``time``."""
    rate: float = 0.01
    """Share of a new step in the running throughput that a step is measured against."""
    scale: float = 16.0
    """Tokens that count as 1 in the ``throughput`` form, whose size grows with the batch."""
    slo_tpot: float = 0.05
    """Seconds a token that a request may take under ``goodput``."""
    slo_weight: float = 1.0
    """The amount that ``goodput`` takes off for a step in which no request kept to that."""

    def __post_init__(self) -> None:
        if self.form not in get_args(Form):
            raise ConfigError(f"no reward is called {self.form!r}; give one of {', '.join(get_args(Form))}")
        if not 0.0 < self.rate <= 1.0:
            raise ConfigError(f"reward rate is {self.rate}; give a share in (0, 1]")
        if not (0.0 < self.scale < math.inf and 0.0 < self.slo_tpot < math.inf and 0.0 <= self.slo_weight < math.inf):
            raise ConfigError("reward needs scale > 0, slo_tpot > 0 and slo_weight >= 0, all finite")


class RewardMeter:
    """Scores the steps of E environments, each against its own running speed.

    ``reward = gain + cost + penalty``, term by term:

    ========== ================= ================================ ==========================
    form       gain              cost                             penalty
    ========== ================= ================================ ==========================
    relative   tokens / batch    -speedup * seconds / plain       0
    throughput tokens / scale    -throughput * seconds / scale    0
    goodput    as relative       as relative                      -slo_weight * (1 - good)
    tokens     tokens / batch    0                                0
    time       0                 -seconds / plain                 0
    ========== ================= ================================ ==========================

    `plain` is the predicted time of a plain step at the same load, which brings `batch` tokens; so
    `speedup` (running ``sum(tokens * plain / batch) / sum(seconds)``) is the environment's speed over plain
    decoding. At one load ``relative`` is ``throughput`` up to a constant factor; across loads it
    measures each step against what its own load allows, which takes the load out of the return.
    An episode's running ratios begin as if a whole window at the usual speed of its load had come before its first
    step: the running speed-up at that batch size (by powers of two) over all episodes, at first plain
    decoding's. Begun at plain decoding's each time, rho would be too low for a window and pay for too large trees.
    Environments learn these usual speeds each for itself, or, if they are `shared`, all together.
    """

    def __init__(self, options: RewardOptions, count: int = 1, shared: bool = False) -> None:
        self.options, self._shared = options, shared
        self._fresh = np.ones(count, dtype=np.bool_)
        self._tokens, self._worth, self._seconds = np.ones((3, count))  # running; worth: tokens in plain seconds
        self._usual = np.ones((2, 1 if shared else count, OCTAVES))
        """[2, E or 1, OCTAVES] running worth and seconds, both over plain seconds, by power of two of the batch."""

    @property
    def speedup(self) -> Floats:
        """[E] the running speeds over predicted plain decoding."""
        return self._worth / self._seconds

    @property
    def throughput(self) -> Floats:
        """[E] the running tokens a second of environments that have scored a step."""
        return self._tokens / self._seconds

    def usual(self, batch: Floats) -> Floats:
        """[E] the running speed-ups over plain decoding at these batch sizes, over all episodes."""
        worth, seconds = self._usual[:, self._rows, _octave(batch)]
        return worth / seconds

    def reset(self, chosen: NDArray[np.bool_]) -> None:
        """Forget the running speeds of these environments ([E] bool)."""
        self._fresh |= chosen
        for running in (self._tokens, self._worth, self._seconds):
            running[chosen] = 1.0

    def forget(self, chosen: NDArray[np.bool_]) -> None:
        """Forget the usual speeds of these environments ([E] bool) too; shared ones are forgotten for all."""
        self.reset(chosen)
        self._usual[:, slice(None) if self._shared else chosen] = 1.0

    def score(
        self, tokens: Floats, seconds: Floats, plain_seconds: Floats, batch: Floats, good: Floats | None = None
    ) -> dict[str, Floats]:
        """[E] each: ``reward``, ``gain``, ``cost`` and ``penalty`` of one step; then the running speeds move on.

        Units: tokens, seconds (taken and predicted plain, both > 0) and decoding requests; `good` is the share
        of decoding requests within `slo_tpot` in this step, needed by ``goodput`` alone (`ConfigError`).
        Environments whose batch is 0 score 0 and learn nothing.
        """
        live = batch > 0
        self.begin(live, plain_seconds, batch)
        size = np.maximum(batch, 1.0)
        gain, cost = self._terms(tokens, seconds, plain_seconds, size)
        penalty = self._penalty(good, gain)
        gain, cost, penalty = (np.where(live, term, 0.0) for term in (gain, cost, penalty))
        worth = tokens * plain_seconds / size
        self._learn(live, tokens, worth, seconds)
        self._remember(live, batch, np.stack([worth, seconds]) / plain_seconds)
        return {"reward": gain + cost + penalty, "gain": gain, "cost": cost, "penalty": penalty}

    def _terms(self, tokens: Floats, seconds: Floats, plain: Floats, batch: Floats) -> tuple[Floats, Floats]:
        """Gain and cost."""
        form, scale = self.options.form, self.options.scale
        if form == "throughput":
            return tokens / scale, -self.throughput * seconds / scale
        length, time = tokens / batch, -seconds / plain
        if form == "tokens":
            return length, np.zeros_like(time)
        if form == "time":
            return np.zeros_like(length), time
        return length, self.speedup * time

    def _penalty(self, good: Floats | None, like: Floats) -> Floats:
        if self.options.form != "goodput":
            return np.zeros_like(like)
        if good is None:
            raise ConfigError("the goodput reward needs the share of requests within the SLO; pass `good`")
        penalty: Floats = -self.options.slo_weight * (1.0 - good)
        return penalty

    def begin(self, live: NDArray[np.bool_], plain: Floats, batch: Floats) -> None:
        """The first step of an episode sets the running speeds to the usual ones at its load."""
        first = self._fresh & live
        usual = plain / self.usual(batch)
        for running, value in ((self._tokens, batch), (self._worth, plain), (self._seconds, usual)):
            running[first] = value[first]
        self._fresh &= ~live

    def _learn(self, live: NDArray[np.bool_], tokens: Floats, worth: Floats, seconds: Floats) -> None:
        for running, value in ((self._tokens, tokens), (self._worth, worth), (self._seconds, seconds)):
            running += np.where(live, self.options.rate * (value - running), 0.0)

    def _remember(self, live: NDArray[np.bool_], batch: Floats, over_plain: Floats) -> None:
        """The usual speeds move towards this step's; shared ones by the mean of the environments in each octave."""
        octaves, rate = _octave(batch), USUAL_RATE * self.options.rate
        if not self._shared:
            at = (slice(None), np.flatnonzero(live), octaves[live])
            self._usual[at] += rate * (over_plain[:, live] - self._usual[at])
            return
        for octave in np.unique(octaves[live]):
            mean = over_plain[:, live & (octaves == octave)].mean(1)
            self._usual[:, 0, octave] += rate * (mean - self._usual[:, 0, octave])

    @property
    def _rows(self) -> NDArray[np.int64] | int:
        """The rows of the usual speeds that the environments go by."""
        return 0 if self._shared else np.arange(len(self._fresh))


def _octave(batch: Floats) -> NDArray[np.int64]:
    return np.minimum(np.log2(np.maximum(batch, 1.0)).astype(np.int64), OCTAVES - 1)
