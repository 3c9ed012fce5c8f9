"""The control problem as a Gymnasium environment over any backend. Knows no controller by name and no model."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol

import gymnasium as gym
import numpy as np
from numpy.typing import ArrayLike, NDArray

from echo_rl.codec import ObservationEncoder
from echo_rl.contracts import Backend, Controller, Request, SpecPlan
from echo_rl.costs.batched_profile import BatchedCostProfile
from echo_rl.env.options import MEANS, SpecEnvOptions, action_space, checked, observation_space
from echo_rl.env.reward import RewardMeter
from echo_rl.env.session import Clock, TimedStep, WorkloadSession
from echo_rl.errors import ConfigError
from echo_rl.replay.timing import plain_step

Observation = NDArray[np.float32]


class Steerable(Controller, Protocol):
    """A controller whose plans are set from outside."""

    def steer(self, plan: SpecPlan) -> None:
        """Set what `plan` answers, cut to what the load admits."""
        ...


class SpecEnv(gym.Env[Observation, NDArray[np.int64]]):
    """Decides how much to speculate in the next serving step, from the server's load, acceptance and costs.

    The backend serves a workload; before every step that has decoding requests the action sets
    that step's speculation. Steps that process prompts alone pass inside `reset` and `step` without being
    counted or charged, and so does the time in which no request is there. Time between
    calls (choosing actions, learning) does not pass on the server.

    ## Action space
    ``MultiDiscrete([13, 8, 6, 10, 7])``: one index into each column of the action table (`codec.ActionTable`):

    | knob | values |
    |---|---|
    | verified nodes a request, averaged over the batch | 0, 0.25, 0.5, 1, 2, 3, 5, 7, 9, 15, 23, 31, 47 |
    | levels drafted | 1, 2, 3, 4, 5, 6, 7, 8 |
    | nodes expanded a level | 1, 2, 3, 4, 6, 8 |
    | least best-path probability to draft on (-1: ECHO's gates) | -1, 0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8 |
    | least calibrated path probability of a verified node | 0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5 |

    Zero nodes is plain decoding, whatever the other knobs say. Nodes times batch, rounded, is the budget of the
    whole batch: a hard cap. An action of another shape, with other than whole numbers or outside the
    table raises `ConfigError` and changes nothing: the same step may be tried again.

    ## Observation space
    ``Box(30,)``, float32, each entry clipped to its range; B is the number of decoding requests of the
    coming step, "running" a moving average over past steps (`codec.ObservationEncoder`):

    | entries | meaning | min | max |
    |---|---|---|---|
    | 0 | decoding requests, log2(B) / 6 | 0 | 1.5 |
    | 1 | prompt tokens in the coming step, / 256 | 0 | 2 |
    | 2 | requests not yet admitted, log2(1 + n) / 6 | 0 | 2 |
    | 3 | mean context of the decoding requests, log2(1 + n) / 11 | 0 | 1.5 |
    | 4 | share of the KV cache in use | 0 | 1 |
    | 5 | arrivals a step, running, log2(1 + n) / 6 | 0 | 2 |
    | 6-13 | acceptance at depths 0 to 7, running | 0 | 1 |
    | 14-16 | drafter's first-token confidence over the requests, quantiles .1, .5, .9, running | 0 | 1 |
    | 17 | last budget a request, log2(1 + n) / 6 | 0 | 1.5 |
    | 18 | last depth, / 8 | 0 | 1.5 |
    | 19 | last width, / 8 | 0 | 2 |
    | 20 | tokens a request and step while speculating, running, / 9 | 0 | 1 |
    | 21 | share of the budget that was used, running | 0 | 1 |
    | 22 | plain steps since speculating, log2(1 + n) / 10 | 0 | 1.5 |
    | 23-28 | predicted time of a step with .5, 1, 3, 7, 15, 31 nodes a request over a plain one, log2 / 4 | -1 | 2 |
    | 29 | predicted time of one drafted level over a plain step | 0 | 2 |

    Times are predicted by the cost profile, corrected by what steps of all sizes have taken so far (`CostCorrector`).

    ## Reward
    By default `tokens / batch - speedup * seconds / plain`: the step's tokens a request less what the same time
    would have brought at the running speed-up over plain decoding. Tokens are those of decoding requests, and seconds
    are the step's less what its prompt tokens are predicted to take, since no action changes either. It is the
    average-reward form of throughput: what maximises it maximises tokens a second. `reward.RewardMeter` defines it
    and the other forms. With `action_repeat` above 1 the serving steps' rewards are summed.

    `info` of a step: the reward's terms ``gain``, ``cost`` and ``penalty`` (they sum to it); ``tokens`` that
    requests got, ``seconds`` taken, ``plain_seconds`` (predicted plain decoding time for these tokens), and the
    step's ``batch``, ``budget``, ``depth`` and ``width``. `info` of a reset: the ``workload``'s name.

    ## Start
    `reset` cancels all requests in flight, draws a workload, forgets all statistics (but, unless it is given a
    seed, the usual speeds that the reward's running ratios begin at) and serves up to the first step with a
    decoding request. Requests are drawn with replacement, and arrive by the workload, from the environment's
    generator: with a deterministic backend equal seeds give equal transitions.

    ## Episode end
    A server does not end: nothing terminates. An episode is truncated after `horizon` steps, so the
    value of what would follow has to be bootstrapped from the last observation.

    ## Version history
    - v0: first version (`codec.CODEC_VERSION` 3; 1 had factors on ECHO's gates in place of gates at every level,
      2 told the profile's times uncorrected, and the running ratios of measured to predicted time beside them).
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": []}  # type: ignore[misc]

    def __init__(
        self,
        backend: Backend,
        controller: Steerable,
        requests: Sequence[Request],
        costs: BatchedCostProfile,
        options: SpecEnvOptions | None = None,
        clock: Clock = time.perf_counter,
        idle: Callable[[float], None] | None = None,
    ) -> None:
        """`controller` extends and selects by plans that the environment sets; the suite of a request is its id up to
        the first slash. `idle(until)` lets `clock` reach that time without work; None sleeps.

        The backend is the environment's alone until `close`. Raises `ConfigError` where there are no
        requests or a workload names a suite that has none.
        """
        self.options = options or SpecEnvOptions()
        self._costs, self._controller = costs, controller
        self._server = WorkloadSession(backend, controller, requests, clock, idle)
        for workload in self.options.workloads:
            self._server.check(workload)
        self._meter = RewardMeter(self.options.reward)
        self.observation_space = observation_space()
        self.action_space = action_space(self.options.table)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin an episode. Raises `ConfigError` where the backend holds requests of somebody else."""
        super().reset(seed=seed, options=options)
        workload = self.options.workloads[int(self.np_random.integers(len(self.options.workloads)))]
        self._server.open(workload, self.np_random)
        self._encoder = ObservationEncoder(self._costs.profile)
        if seed is not None:
            self._meter = RewardMeter(self.options.reward)
        self._meter.reset(np.ones(1, dtype=np.bool_))
        self._steps = 0
        load = self._server.advance(self._encoder.update)
        return self._encoder.observe(load), {"workload": workload.name}

    def step(self, action: ArrayLike) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Serve `action_repeat` steps under this action.

        Raises `ConfigError` on a bad action or before the first reset, and what the backend raises;
        after the latter the environment must be reset.
        """
        indices, load = tuple(checked(action, self.action_space).tolist()), self._server.load
        self.options.table.knobs(np.array(indices))  # refuses what is outside the table
        if load is None:
            raise ConfigError("the environment has no step to decide on; call reset() first")
        rows = []
        for _ in range(self.options.action_repeat):
            self._controller.steer(self.options.table.plan(indices, load, self.options.gates))
            served = self._server.serve(self._controller.plan(load))
            self._encoder.update(served.report)
            rows.append(self._judge(served))
            load = self._server.advance(self._encoder.update)
        self._steps += 1
        info = {name: sum(row[name] for row in rows) for name in rows[0]}
        info |= {name: info[name] / len(rows) for name in MEANS}
        reward = info.pop("reward")
        return self._encoder.observe(load), reward, False, self._steps >= self.options.horizon, info

    def close(self) -> None:
        """Cancel what is in flight; the backend is idle afterwards. A reset begins anew."""
        self._server.clear()

    def _judge(self, served: TimedStep) -> dict[str, float]:
        """The reward, its terms and the facts of a step."""
        load, plan, seconds = served.report.load, served.report.plan, max(served.seconds, 1e-9)
        good = sum(seconds <= self.options.reward.slo_tpot * n for n in served.gains) / max(len(served.gains), 1)
        at = (np.array([float(x)]) for x in (load.batch_size, load.mean_context, load.prefill_tokens))
        plain = plain_step(self._costs, *at)
        decoded, batch = np.array([float(sum(served.gains))]), np.array([float(load.batch_size)])
        numbers = (decoded, plain.besides(np.array([seconds])), plain.decode, batch, np.array([good]))
        terms = {name: float(values[0]) for name, values in self._meter.score(*numbers).items()}
        return terms | {
            "tokens": float(served.tokens),
            "seconds": served.seconds,
            "plain_seconds": float(plain.worth(decoded, batch)[0]),
            "batch": float(load.batch_size),
            "budget": float(plan.budget),
            "depth": float(plan.max_depth if plan.speculates else 0),
            "width": float(plan.width if plan.speculates else 0),
        }
