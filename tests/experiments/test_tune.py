"""Options searched on replay: the better ones are found, defaults stay in, and a run can go on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest

from echo_rl.contracts import LoadView, SpecPlan
from echo_rl.controllers import registry
from echo_rl.controllers.base import BaseController
from echo_rl.controllers.registry import Family
from echo_rl.costs.batched_profile import BatchedCostProfile
from echo_rl.costs.files import packaged
from echo_rl.costs.profile import CostProfile
from echo_rl.errors import ConfigError, HeldOutError, UnknownController
from echo_rl.experiments.tune import TuneConfig, arm_text, candidates, load_tuned, tune
from echo_rl.workloads.datasets import SUITES
from tests.recorded import random_trace

CONFIG = TuneConfig(("wasteful",), concurrency=(1, 4), blocks=2, requests=3)


@dataclass(frozen=True)
class WastefulOptions:
    nodes: int = 60
    width: int = 4
    mode: str = "slow"
    TUNABLE: ClassVar[Mapping[str, tuple[Any, ...]]] = {"nodes": (0, 30, 60), "width": (2, 4, 99)}

    def __post_init__(self) -> None:
        if self.nodes == 30 and self.width == 2:
            raise ConfigError("these do not go together")


class Wasteful(BaseController):
    """Verifies far too much by default; on a random trace, plain decoding (0 nodes) is best."""

    name = "wasteful"

    def __init__(self, options: WastefulOptions) -> None:
        super().__init__()
        self.options = options

    def propose(self, load: LoadView) -> SpecPlan:
        return SpecPlan(self.options.nodes * load.batch_size, 3, self.options.width)


FAMILIES = {**registry.CONTROLLERS, "wasteful": Family(Wasteful, WastefulOptions)}


def make(name, **options):
    return Wasteful(WastefulOptions(**options)) if name == "wasteful" else registry.make(name, **options)


@pytest.fixture(scope="module")
def costs() -> BatchedCostProfile:
    """A machine on which no node is free, so that plain decoding of a random trace is the best."""
    return BatchedCostProfile(replace(CostProfile.load(packaged("profile.json")), node_overhead=2e-3))


@pytest.fixture(scope="module")
def trace():
    return random_trace()


def test_better_options_are_found(trace, costs, tmp_path):
    """Width 99 was never recorded and (30, 2) is refused: both only lose their candidates."""
    tuned = tune(CONFIG, trace, costs, make, tmp_path, families=FAMILIES)
    found = tuned["wasteful"]
    assert found["options"] == {"nodes": 0, "width": 2}
    assert found["score"] == 1.0 > found["default_score"] > 0
    assert found["tried"] == 9
    assert json.loads((tmp_path / "tuned.json").read_text()) == tuned
    assert load_tuned(tmp_path / "tuned.json") == {"wasteful": "wasteful:nodes=0,width=2"}


def test_controllers_without_tunable_options_keep_their_defaults(trace, costs):
    config = TuneConfig(("none", "fixed"), concurrency=(2,), blocks=1, requests=3)
    tuned = tune(config, trace, costs, families={name: FAMILIES[name] for name in ("none", "fixed")})
    assert tuned["none"] == {"options": {}, "score": 1.0, "default_score": 1.0, "tried": 1}
    assert tuned["fixed"]["options"] == {} and tuned["fixed"]["score"] == tuned["fixed"]["default_score"] != 1.0


def test_defaults_that_cannot_be_replayed_have_no_score(trace, costs):
    @dataclass(frozen=True)
    class Wide(WastefulOptions):
        width: int = 50

    def make_wide(name, **options):
        return Wasteful(Wide(**options)) if name == "wasteful" else make(name, **options)

    found = tune(CONFIG, trace, costs, make_wide, families={"wasteful": Family(Wasteful, Wide)})["wasteful"]
    assert found["default_score"] is None and found["options"]["nodes"] == 0
    (alone,) = tune(
        CONFIG, trace, costs, lambda n, **o: make_wide(n) if n == "wasteful" else make(n, **o),
        families={"wasteful": Family(Wasteful, type("Bare", (Wide,), {"TUNABLE": {}}))},
    ).values()  # fmt: skip
    assert alone == {"options": {}, "score": None, "default_score": None, "tried": 1}


def test_an_interrupted_search_goes_on(trace, costs, tmp_path):
    made: list[str] = []

    def counting(name, **options):
        made.append(name)
        if len(made) == stop:
            raise KeyboardInterrupt
        return make(name, **options)

    stop = 0
    whole = tune(CONFIG, trace, costs, counting, tmp_path / "whole", families=FAMILIES)
    everything, stop = len(made), len(made) - 2
    made.clear()
    with pytest.raises(KeyboardInterrupt):
        tune(CONFIG, trace, costs, counting, tmp_path / "part", families=FAMILIES)
    stop = 0
    made.clear()
    assert tune(CONFIG, trace, costs, counting, tmp_path / "part", families=FAMILIES) == whole
    assert 0 < len(made) < everything / 2


def test_candidates_are_the_grid_or_a_seeded_part_with_the_defaults():
    family = FAMILIES["wasteful"]
    grid = candidates(family, 99)
    assert grid[0] == {} and len(grid) == 9 and {"nodes": 60, "width": 4} not in grid
    part = candidates(family, 4, seed=1)
    assert part[0] == {} and len(part) == 4 and all(options in grid for options in part)
    assert part == candidates(family, 4, seed=1)
    assert any(part != candidates(family, 4, seed=seed) for seed in range(2, 6))
    assert candidates(family, 9) == grid and len(candidates(family, 8)) == 8
    assert candidates(family, 1) == [{}] == candidates(FAMILIES["none"], 5)
    wrong = type("Wrong", (WastefulOptions,), {"TUNABLE": {"nods": (1, 2)}})
    with pytest.raises(ConfigError, match="nods"):
        candidates(Family(Wasteful, wrong), 5)


def test_arm_texts_say_the_options_exactly():
    assert arm_text("ddd", {}) == "ddd"
    assert arm_text("ddd", {"tau": -2.0, "top_k": 4}) == "ddd:tau=-2.0,top_k=4"
    assert arm_text("x", {"mode": "fast", "on": True}) == "x:mode=fast,on=true"
    for value in ((5, 7), "1.5", "a,b"):
        with pytest.raises(ConfigError, match="arm"):
            arm_text("x", {"value": value})


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "tuned.json"
    for text in (None, "{", "[1]", '{"ddd": {}}', '{"ddd": {"options": 3}}'):
        if text is not None:
            path.write_text(text)
        with pytest.raises(ConfigError, match="echo-rl tune"):
            load_tuned(path)


def test_unknown_controllers_and_caps_are_refused(trace, costs):
    with pytest.raises(UnknownController, match="wastefull"):
        tune(TuneConfig(("wastefull",)), trace, costs, make, families=FAMILIES)
    with pytest.raises(ConfigError, match="cap"):
        TuneConfig(cap=0)
    with pytest.raises(ConfigError, match="at least"):
        tune(TuneConfig(("none",), blocks=0), trace, costs, make, families=FAMILIES)


def test_recordings_of_suites_that_are_held_out_are_refused(trace, costs, monkeypatch):
    monkeypatch.setitem(SUITES, "code", replace(SUITES["gsm8k"], held_out=True))
    with pytest.raises(HeldOutError, match="code is held out"):
        tune(CONFIG, trace, costs, make, families=FAMILIES)


def test_the_command_writes_what_it_found(trace, tmp_path, capsys, monkeypatch):
    from echo_rl.cli.tune import Tune

    monkeypatch.setenv("COLUMNS", "160")
    trace.save(tmp_path / "trace.safetensors")
    command = Tune(
        TuneConfig(("chain",), (1,), blocks=1, requests=2), trace=tmp_path / "trace.safetensors", out=tmp_path / "out"
    )  # fmt: skip
    assert command.run() == 0
    assert "chain" in capsys.readouterr().out
    assert load_tuned(tmp_path / "out" / "tuned.json")["chain"].startswith("chain")
    assert (
        replace(command, held_out=0.0, out=tmp_path / "all").run() == 0
    )  # every prompt, as the other commands take it
