"""The environments by name: registered once, light until made, and usable through `gymnasium.make`."""

from __future__ import annotations

import subprocess
import sys
import warnings

import gymnasium
import pytest
from gymnasium.utils.env_checker import check_env

import echo_rl
from echo_rl.codec import ActionTable
from echo_rl.config import EngineConfig
from echo_rl.contracts import Request, SamplingParams
from echo_rl.env.spec_env import SpecEnv
from echo_rl.errors import ConfigError, TraceError
from echo_rl.experiments.environments import LIVE, REPLAY, make_live, make_replay
from echo_rl.replay.recorder import RecordOptions, record
from echo_rl.replay.trace import Trace
from tests import tiny

TABLE = ActionTable(depths=(1, 2, 3), widths=(1, 2, 3))


@pytest.fixture(scope="module")
def trace(tmp_path_factory) -> Trace:
    folder, options = tmp_path_factory.mktemp("recorded"), RecordOptions(depth=3, width=3, batch=4)
    engine = tiny.engine(folder / "model", max_expanded=options.expanded)
    wanted = [Request(f"tiny/{n}", (70 + n,) * 5, SamplingParams(max_new_tokens=12, ignore_eos=True)) for n in range(4)]
    return record(engine, wanted, frozenset(), options, folder / "parts")


def test_registering_is_idempotent_and_loads_no_torch():
    code = (
        "import sys, warnings, gymnasium, echo_rl; warnings.simplefilter('error');"
        "echo_rl.register_envs(); echo_rl.register_envs();"
        f"assert {{'{LIVE}', '{REPLAY}'}} <= set(gymnasium.registry); sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr or "registering loads torch"


@pytest.mark.parametrize("noise", [False, True])
def test_the_replay_is_made_by_name_and_passes_the_checker(trace, noise):
    echo_rl.register_envs()
    options = {"trace": trace, "table": TABLE, "noise": noise, "workloads": ("closed:2", "poisson:20"), "horizon": 16}
    made = gymnasium.make(REPLAY, **options)
    assert isinstance(made.unwrapped, SpecEnv) and made.unwrapped.options.horizon == 16
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(made.unwrapped)
    made.close()


def test_a_recording_comes_as_a_file_too_and_one_workload_as_one_text(trace, tmp_path):
    trace.save(tmp_path / "trace.safetensors")
    env = make_replay(tmp_path / "trace.safetensors", "closed:1", table=TABLE)
    _, info = env.reset(seed=0)
    assert info == {"workload": "closed:1"} and env.step([3, 2, 2, 2, 0])[4]["budget"] == 1.0
    env.close()


def test_an_action_table_past_the_recording_or_the_engine_is_refused(trace):
    with pytest.raises(TraceError, match="3 levels of width 3"):
        make_replay(trace)
    with pytest.raises(ConfigError, match="max_expanded=40"):
        make_live(EngineConfig(max_expanded=40))
