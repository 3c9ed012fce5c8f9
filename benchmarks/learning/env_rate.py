"""How fast the public environments over a replay are: steps a second on one core, with 16 requests in flight.

    OMP_NUM_THREADS=1 taskset -c 0 python -m benchmarks.learning.env_rate

Actions are uniformly random. Seconds are those of the process, so that others on the machine count for less; rates are
medians over rounds. `make_vec` counts the steps of all its environments.
"""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
import tyro
from numpy.typing import NDArray

import echo_rl
from benchmarks.common import CONSOLE, Place, main
from echo_rl.codec import ActionTable
from echo_rl.utils.result_store import write_json

REPLAY = "EchoRL/Replay-v0"
WARM_UP = 10
"""Steps before the first round."""


@dataclass(frozen=True)
class Args:
    """Measure the rate of the replayed environments."""

    quick: bool = False
    """One short round."""
    num_envs: int = 256
    """Environments of `gymnasium.make_vec`."""
    rounds: int = 7
    """Rounds whose median counts."""


def rate(env: Any, actions: NDArray[np.int64], rounds: int) -> float:
    """The calls of `step` a second."""
    env.reset(seed=0)
    for action in actions[:WARM_UP]:
        env.step(action)
    rates = []
    for _ in range(rounds):
        begin = time.process_time()
        for action in actions:
            env.step(action)
        rates.append(len(actions) / (time.process_time() - begin))
    return statistics.median(rates)


def script() -> None:
    args = tyro.cli(Args)
    rounds, calls = (1, 10) if args.quick else (args.rounds, 40)
    settings: dict[str, Any] = {"workloads": "closed:16", "horizon": 10**9}
    one, many = gymnasium.make(REPLAY, **settings), gymnasium.make_vec(REPLAY, args.num_envs, **settings)
    sizes, draw = ActionTable().sizes, np.random.default_rng(0)
    single = rate(one, draw.integers(0, sizes, (10 * calls, len(sizes))), rounds)
    vector = rate(many, draw.integers(0, sizes, (calls, args.num_envs, len(sizes))), rounds) * args.num_envs
    result = {
        "make": {"env_steps_per_second": single},
        "make_vec": {"env_steps_per_second": vector, "num_envs": args.num_envs},
        "in_flight": 16,
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "version": echo_rl.__version__,
    }
    CONSOLE.print(f"{single:,.0f} and {vector:,.0f} environment steps a second")
    write_json(Place("env_rate", args.quick).result, result)


if __name__ == "__main__":
    main(script)
