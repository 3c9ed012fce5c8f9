"""The environments by name: registered once, light until made, and usable through `gymnasium.make`."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers.vector import RecordEpisodeStatistics

import echo_rl
from echo_rl.codec import ActionTable
from echo_rl.config import EngineConfig
from echo_rl.contracts import Request, SamplingParams
from echo_rl.env.registration import REPLAY
from echo_rl.env.replay_env import ReplayEnv
from echo_rl.env.vector_env import ReplayVectorEnv
from echo_rl.errors import ConfigError, TraceError
from echo_rl.learning.environments import make_live, make_replay
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


MADE = f"env = gymnasium.make('{REPLAY}', noise=False); env.reset(seed=0); env.step([5, 2, 0, 2, 0]);"
ORDERS = {
    "before gymnasium": f"import echo_rl, gymnasium; {MADE}",
    "after gymnasium": f"import gymnasium, echo_rl; {MADE}",
    "by the name alone": f"import gymnasium; gymnasium.make('echo_rl:{REPLAY}');",
    "by the name, imported before": f"import echo_rl, gymnasium; gymnasium.make('echo_rl:{REPLAY}');",
    "below a part of gymnasium": f"import echo_rl, gymnasium.spaces, gymnasium; {MADE}",
    "by hand, twice": f"import gymnasium, echo_rl; echo_rl.register_envs(); echo_rl.register_envs(); {MADE}",
    "again": f"import sys, echo_rl, gymnasium; del sys.modules['echo_rl']; import echo_rl; {MADE}",
}


@pytest.mark.parametrize("order", ORDERS)
def test_importing_registers_whatever_the_order(order):
    """Without a warning; no environment over a replay needs torch."""
    code = (
        f"import warnings; warnings.simplefilter('error'); {ORDERS[order]} import sys; sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr or "a replay loads torch"


def test_importing_alone_loads_neither_gymnasium_nor_torch_nor_numpy():
    code = "import sys, echo_rl; sys.exit(bool({'gymnasium', 'torch', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


WORKERS = """
import gymnasium
import numpy as np
import echo_rl

def make():
    return gymnasium.make("EchoRL/Replay-v0", workloads="closed:2", noise=False)

if __name__ == "__main__":
    envs = gymnasium.vector.AsyncVectorEnv([make, make], context="spawn")
    envs.reset(seed=0)
    envs.step(np.zeros((2, 5), dtype=np.int64))
    envs.close()
"""


def test_spawned_workers_know_the_environments(tmp_path):
    (tmp_path / "workers.py").write_text(WORKERS)
    path = os.pathsep.join([str(Path(echo_rl.__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    command, environment = [sys.executable, tmp_path / "workers.py"], os.environ | {"PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("noise", [False, True])
def test_the_replay_is_made_by_name_and_passes_the_checker(trace, noise):
    options = {"trace": trace, "table": TABLE, "noise": noise, "workloads": ("closed:2", "poisson:20"), "horizon": 16}
    made = gymnasium.make(REPLAY, **options)
    assert isinstance(made.unwrapped, ReplayEnv) and made.unwrapped.options.horizon == 16
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(made.unwrapped)
    made.close()


def test_many_are_made_by_name_and_are_what_one_is(trace):
    options = {"trace": trace, "table": TABLE, "workloads": ("closed:2", "closed:3"), "horizon": 5}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        many, apart = (gymnasium.make_vec(REPLAY, 4, mode, **options) for mode in (None, "sync"))
    assert isinstance(many, ReplayVectorEnv) and many.num_envs == 4
    assert many.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    (seen, infos), (expected, told) = many.reset(seed=7), apart.reset(seed=7)
    assert np.array_equal(seen, expected) and infos["workload"].tolist() == told["workload"].tolist()
    recorded = RecordEpisodeStatistics(many)
    recorded.reset(seed=7)
    for number in range(1, 6):
        *_, truncated, infos = recorded.step(many.action_space.sample())
        assert truncated.all() == (number == 5) == ("final_info" in infos)
    assert infos["episode"]["l"].tolist() == [5] * 4
    recorded.close()
    assert many.closed


def test_unknown_settings_and_render_modes_are_refused(trace):
    for make in (gymnasium.make, gymnasium.make_vec):
        with pytest.raises(gymnasium.error.UnsupportedMode, match="human"):
            make(REPLAY, trace=trace, table=TABLE, render_mode="human")
        with pytest.raises(TypeError, match="colour"):
            make(REPLAY, trace=trace, table=TABLE, colour="red")


def test_a_recording_comes_as_a_file_too_and_one_workload_as_one_text(trace, tmp_path):
    trace.save(tmp_path / "trace.safetensors")
    env = make_replay(trace=tmp_path / "trace.safetensors", workloads="closed:1", table=TABLE)
    _, info = env.reset(seed=0)
    assert info == {"workload": "closed:1"} and env.step([3, 2, 2, 2, 0])[4]["budget"] == 1.0
    env.close()


def test_an_action_table_past_the_recording_or_the_engine_is_refused(trace):
    with pytest.raises(TraceError, match="3 levels of width 3"):
        make_replay(trace=trace)
    with pytest.raises(ConfigError, match="max_expanded=40"):
        make_live(EngineConfig(max_expanded=40))
