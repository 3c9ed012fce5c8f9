"""The Gymnasium environments by name: ``EchoRL/Live-v0`` and ``EchoRL/Replay-v0``.

    import echo_rl, gymnasium
    echo_rl.register_envs()
    env = gymnasium.make("EchoRL/Replay-v0", workloads=("closed:8", "bursty:0.5,8,5,5"))

`SpecEnv`'s docstring specifies the problem. Heavy modules are imported when an environment is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from echo_rl.errors import ConfigError

if TYPE_CHECKING:
    from echo_rl.codec import ActionTable
    from echo_rl.config import EngineConfig
    from echo_rl.controllers.echo.gates import GateCalibration
    from echo_rl.costs.profile import CostProfile
    from echo_rl.env.reward import Form, RewardOptions
    from echo_rl.env.spec_env import SpecEnv, SpecEnvOptions
    from echo_rl.replay.trace import Trace

LIVE, REPLAY = "EchoRL/Live-v0", "EchoRL/Replay-v0"
WORKLOADS = ("closed:1", "closed:2", "closed:4", "closed:8", "closed:16", "closed:32")


def register_envs() -> None:
    """Make both ids known to `gymnasium.make`; does nothing the second time."""
    import gymnasium

    for env_id, maker in ((LIVE, "make_live"), (REPLAY, "make_replay")):
        if env_id not in gymnasium.registry:
            gymnasium.register(env_id, f"echo_rl.experiments.environments:{maker}", nondeterministic=env_id == LIVE)


def make_replay(
    trace: Trace | str | Path | None = None,
    workloads: str | Sequence[str] = WORKLOADS,
    reward: RewardOptions | Form = "relative",
    horizon: int = 512,
    repeat: int = 1,
    table: ActionTable | None = None,
    noise: bool = True,
    profile: CostProfile | str | Path | None = None,
    calibration: GateCalibration | str | Path | None = None,
) -> SpecEnv:
    """The environment over a replay in simulated time.

    `trace`, `profile` and `calibration` are objects or their files; None takes the packaged trace and
    this machine's calibration (the packaged one where there is none). `workloads`: see
    `workload.parse`. Raises `ConfigError` and `TraceError`.
    """
    from echo_rl.controllers.echo.gates import GateCalibration
    from echo_rl.controllers.policy.ppo import Steered
    from echo_rl.costs.batched_profile import BatchedCostProfile
    from echo_rl.costs.profile import CostProfile
    from echo_rl.env.spec_env import SpecEnv
    from echo_rl.replay.backend import ReplayBackend, ReplayOptions
    from echo_rl.replay.trace import Trace

    gates = GateCalibration.of(calibration)
    options = _options(workloads, reward, horizon, repeat, table, gates)
    if not isinstance(trace, Trace):
        trace = Trace.packaged() if trace is None else Trace.load(Path(trace))
    trace.require(max(options.table.depths), max(options.table.widths))
    costs = BatchedCostProfile(CostProfile.of(profile))
    backend = ReplayBackend(trace, costs, ReplayOptions(noise=noise))
    return SpecEnv(backend, Steered(gates), trace.requests(), costs, options, backend.clock, backend.idle)


def make_live(
    engine: EngineConfig | None = None,
    suite: str = "all",
    prompts: int | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    workloads: str | Sequence[str] = WORKLOADS,
    reward: RewardOptions | Form = "relative",
    horizon: int = 512,
    repeat: int = 1,
    table: ActionTable | None = None,
    profile: CostProfile | str | Path | None = None,
    calibration: GateCalibration | str | Path | None = None,
) -> SpecEnv:
    """The environment over a live engine of its own, in real time.

    It serves the benchmark prompts of `suite` (the first `prompts` of them; None: all). The other
    options are those of `make_replay`. Raises `ConfigError` and what `Engine.load` and `load_prompts` raise.
    """
    from echo_rl.config import EngineConfig
    from echo_rl.contracts import SamplingParams, SpecPlan
    from echo_rl.controllers.echo.gates import GateCalibration
    from echo_rl.controllers.policy.ppo import Steered
    from echo_rl.costs.batched_profile import BatchedCostProfile
    from echo_rl.costs.profile import CostProfile
    from echo_rl.env.spec_env import SpecEnv
    from echo_rl.runtime.engine import Engine
    from echo_rl.workloads.datasets import load_prompts
    from echo_rl.workloads.requests import chat_requests

    gates = GateCalibration.of(calibration)
    options = _options(workloads, reward, horizon, repeat, table, gates)
    config = engine or EngineConfig()
    largest = SpecPlan(1, max(options.table.depths), max(options.table.widths)).expanded
    if largest > config.max_expanded:
        raise ConfigError(f"the action table expands up to {largest} nodes; raise max_expanded={config.max_expanded}")
    chosen = load_prompts(suite, limit=prompts)
    backend = Engine.load(config)

    def params(number: int) -> SamplingParams:
        return SamplingParams(temperature=temperature, seed=number, max_new_tokens=max_new_tokens)

    costs = BatchedCostProfile(CostProfile.of(profile))
    return SpecEnv(backend, Steered(gates), chat_requests(backend, chosen, params), costs, options)


def _options(
    workloads: str | Sequence[str],
    reward: RewardOptions | Form,
    horizon: int,
    repeat: int,
    table: ActionTable | None,
    calibration: GateCalibration,
) -> SpecEnvOptions:
    from echo_rl.codec import ActionTable
    from echo_rl.env.reward import RewardOptions
    from echo_rl.env.spec_env import SpecEnvOptions
    from echo_rl.workloads.arrivals import parse

    table = table or ActionTable()
    return SpecEnvOptions(
        workloads=tuple(map(parse, (workloads,) if isinstance(workloads, str) else workloads)),
        table=table,
        gates=calibration.sparse(max(table.depths)),
        reward=reward if isinstance(reward, RewardOptions) else RewardOptions(reward),
        horizon=horizon,
        repeat=repeat,
    )
