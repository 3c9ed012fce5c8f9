"""Makes the Gymnasium environments ``EchoRL/Live-v0`` and ``EchoRL/Replay-v0``, which importing `echo_rl` registers.

    import echo_rl, gymnasium
    env = gymnasium.make("EchoRL/Replay-v0", workloads=("closed:8", "bursty:0.5,8,5,5"))
    envs = gymnasium.make_vec("EchoRL/Replay-v0", num_envs=256, workloads=("closed:16",))

`SpecEnv`'s docstring specifies the problem. What needs torch is imported when a live environment is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gymnasium.vector import AutoresetMode

from echo_rl.codec import ActionTable
from echo_rl.config import EngineConfig
from echo_rl.contracts import SamplingParams, SpecPlan
from echo_rl.controllers.echo.gates import GateCalibration
from echo_rl.costs.batched_profile import BatchedCostProfile
from echo_rl.costs.profile import CostProfile
from echo_rl.env.options import SpecEnvOptions, refuse_rendering
from echo_rl.env.replay_env import ReplayEnv
from echo_rl.env.reward import Form, RewardOptions
from echo_rl.env.spec_env import SpecEnv
from echo_rl.env.vector_env import ReplayEnvOptions, ReplayVectorEnv
from echo_rl.errors import ConfigError
from echo_rl.replay.trace import Trace
from echo_rl.workloads.arrivals import parse
from echo_rl.workloads.datasets import load_prompts
from echo_rl.workloads.requests import chat_requests

WORKLOADS = ("closed:1", "closed:2", "closed:4", "closed:8", "closed:16", "closed:32")


def make_replay(render_mode: str | None = None, **settings: Any) -> ReplayEnv:
    """The environment over a replay in simulated time, made by the settings of `replay_setting`."""
    return ReplayEnv(*replay_setting(**settings), render_mode=render_mode)


def make_replay_vec(
    num_envs: int = 1,
    autoreset_mode: AutoresetMode | str = "SameStep",
    render_mode: str | None = None,
    **settings: Any,
) -> ReplayVectorEnv:
    """So many such environments, stepped together as policies are trained on them."""
    return ReplayVectorEnv(*replay_setting(**settings), num_envs, autoreset_mode, render_mode)


def replay_setting(
    trace: Trace | str | Path | None = None,
    workloads: str | Sequence[str] = WORKLOADS,
    reward: RewardOptions | Form = "relative",
    table: ActionTable | None = None,
    profile: CostProfile | str | Path | None = None,
    calibration: GateCalibration | str | Path | None = None,
    **options: Any,
) -> tuple[Trace, BatchedCostProfile, ReplayEnvOptions]:
    """The parts that a replay's environments are made of.

    `trace`, `profile` and `calibration` are objects or their files; None takes the packaged trace and
    this machine's calibration (the packaged one where there is none). `workloads`: see `workloads.arrivals.parse`.
    `options` are other fields of `ReplayEnvOptions`. Raises `ConfigError` and `TraceError`, and `TypeError` on an
    option that there isn't.
    """
    if not isinstance(trace, Trace):
        trace = Trace.of(Path(trace) if trace else None)
    known = GateCalibration.of(calibration)
    common = _common(workloads, reward, table or ActionTable(), known)
    chosen = ReplayEnvOptions(**common, score_power=known.score_power, **options)
    return trace, BatchedCostProfile(CostProfile.of(profile)), chosen


def make_live(
    engine: EngineConfig | None = None,
    suite: str = "all",
    prompts: int | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    workloads: str | Sequence[str] = WORKLOADS,
    reward: RewardOptions | Form = "relative",
    table: ActionTable | None = None,
    profile: CostProfile | str | Path | None = None,
    calibration: GateCalibration | str | Path | None = None,
    render_mode: str | None = None,
    **options: Any,
) -> SpecEnv:
    """The environment over a live engine of its own, in real time.

    It serves the benchmark prompts of `suite` (the first `prompts` of them; None: all). `options` are other fields of
    `SpecEnvOptions`, the rest is as in `replay_setting`. Raises `ConfigError`, what `Engine.load` and `load_prompts`
    raise, and Gymnasium's `UnsupportedMode` on any render mode.
    """
    from echo_rl.controllers.policy.ppo import Steered
    from echo_rl.runtime.engine import Engine

    refuse_rendering(render_mode)
    gates = GateCalibration.of(calibration)
    chosen = SpecEnvOptions(**_common(workloads, reward, table or ActionTable(), gates), **options)
    config = engine or EngineConfig()
    largest = SpecPlan(1, max(chosen.table.depths), max(chosen.table.widths)).expanded
    if largest > config.max_expanded:
        raise ConfigError(f"the action table expands up to {largest} nodes; raise max_expanded={config.max_expanded}")
    asked = load_prompts(suite, limit=prompts)
    backend = Engine.load(config)

    def params(number: int) -> SamplingParams:
        return SamplingParams(temperature=temperature, seed=number, max_new_tokens=max_new_tokens)

    costs = BatchedCostProfile(CostProfile.of(profile))
    return SpecEnv(backend, Steered(gates), chat_requests(backend, asked, params), costs, chosen)


def _common(
    workloads: str | Sequence[str], reward: RewardOptions | Form, table: ActionTable, calibration: GateCalibration
) -> dict[str, Any]:
    """The settings that the live environment and the replay share."""
    return {
        "workloads": tuple(map(parse, (workloads,) if isinstance(workloads, str) else workloads)),
        "table": table,
        "gates": calibration.sparse(max(table.depths)),
        "reward": reward if isinstance(reward, RewardOptions) else RewardOptions(reward),
    }
