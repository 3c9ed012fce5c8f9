"""The plugin's configuration file: what it reads and what it refuses."""

from __future__ import annotations

import json

import pytest

from echo_rl.controllers import registry
from echo_rl.errors import ConfigError
from echo_rl.integrations.sglang.settings import ALLOWED, CHAINS, EXAMPLE, TREES, PluginConfig, Shape

GOOD = {"controller": "echo", "profile": "packaged", "gates": "packaged"}


def test_toml_and_json_mean_the_same(tmp_path):
    toml = tmp_path / "a.toml"
    toml.write_text(
        'controller = "echo"\nprofile = "packaged"\ngates = "packaged"\n[options]\nnodes = 2.0\n'
        "[[shapes]]\nsteps = 0\n[[shapes]]\nsteps = 3\nmax_batch = 8\n"
    )
    data = {**GOOD, "options": {"nodes": 2.0}, "shapes": [{"steps": 0}, {"steps": 3, "max_batch": 8}]}
    path = tmp_path / "a.json"
    path.write_text(json.dumps(data))
    config = PluginConfig.load(toml)
    assert config == PluginConfig.load(path)
    assert config.choices == (Shape(0, 1), Shape(3, 4, 8)) and config.launch == Shape(3, 4, 8)
    assert config.make().name == "echo"


def test_the_example_is_a_configuration(tmp_path):
    (tmp_path / "echo.toml").write_text(EXAMPLE)
    config = PluginConfig.load(tmp_path / "echo.toml")
    assert config.make().name == "ppo" and config.launch.steps == 3


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"contoller": "echo"}, "did you mean 'controller'"),
        ({"mode": "chains"}, "adaptive, trees"),
        ({"controller": "oracle"}, "can't decide for mode"),
        ({"controller": "dspark", "mode": "trees"}, "can't decide for mode 'trees'"),
        ({"controller": 3}, "controller is 3"),
        ({"profile": 3}, "profile is 3"),
        ({"options": 3}, "options must be a table"),
        ({"untested_version": "yes"}, "true or false"),
        ({"shapes": {"steps": 1}}, "list of tables"),
        ({"shapes": [{"width": 1}]}, "no steps"),
        ({"shapes": [{"steps": 0}, {"steps": 2.5}]}, "whole number"),
        ({"shapes": [{"steps": 0}, {"steps": True, "width": 2}]}, "whole number"),
        ({"shapes": [{"steps": 0}, {"steps": 2, "wdith": 3}]}, "did you mean 'width'"),
        ({"shapes": [{"steps": 0}, {"steps": 2, "width": 2}]}, "steps \\+ 1 or more"),
        ({"shapes": [{"steps": 0, "width": 2}]}, "1 for 0 steps"),
        ({"shapes": [{"steps": 0}, {"steps": 2, "max_batch": 0}]}, "at least 1"),
        ({"shapes": [{"steps": 2}]}, "plain decoding for every batch"),
        ({"shapes": [{"steps": 0, "max_batch": 4}, {"steps": 2}]}, "plain decoding for every batch"),
        ({"shapes": [{"steps": 0}, {"steps": 2}, {"steps": 2, "max_batch": 4}]}, "repeat one"),
        ({"shapes": [{"steps": 0}, {"steps": 2, "width": 8}]}, "drafts chains"),
        ({"mode": "trees", "shapes": [{"steps": 0}, {"steps": 5}, {"steps": 2, "width": 8}]}, "also be the deepest"),
    ],
    ids=str,
)
def test_refusals(change, says):
    with pytest.raises(ConfigError, match=says):
        PluginConfig.of({**GOOD, **change})


def test_a_controller_must_be_named():
    with pytest.raises(ConfigError, match="no controller"):
        PluginConfig.of({})


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.yaml", "", "toml or .json"),
        ("a.toml", "mode = ", "not valid TOML"),
        ("a.json", "{", "not valid JSON"),
        ("a.json", "[]", "one table"),
        ("a.json", '{"controller": "nobody"}', "a.json: controller 'nobody'"),
    ],
)
def test_unusable_files(tmp_path, name, content, says):
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=says):
        PluginConfig.load(tmp_path / name)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="can't be read"):
        PluginConfig.load(tmp_path / "none.toml")


@pytest.mark.parametrize("key", ["profile", "gates"])
def test_costs_and_gates_have_no_silent_default(key):
    with pytest.raises(ConfigError, match=f"needs '{key}'.*calibrate"):
        PluginConfig.of({k: v for k, v in GOOD.items() if k != key}).make()


def test_costs_are_needed_where_a_rule_looks_at_seconds():
    with pytest.raises(ConfigError, match="needs 'profile'"):
        PluginConfig(controller="sglang_adaptive").costs()
    assert PluginConfig(controller="chain").costs() is None
    assert PluginConfig(controller="chain", profile="packaged").costs() is not None


def test_costs_are_named_in_one_place():
    with pytest.raises(ConfigError, match="beside the controller"):
        PluginConfig.of({**GOOD, "options": {"profile": "x"}}).make()


def test_a_wrong_option_is_refused():
    with pytest.raises(ConfigError, match="nods"):
        PluginConfig.of({**GOOD, "options": {"nods": 1}}).make()


@pytest.mark.parametrize(("mode", "name"), [(mode, name) for mode, names in ALLOWED.items() for name in names])
def test_every_controller_on_offer_can_be_made(mode, name):
    assert PluginConfig.of({**GOOD, "controller": name, "mode": mode}).make().name == name


def test_offers_are_known_controllers():
    assert set(CHAINS) | set(TREES) <= set(registry.names())


def test_a_shape_is_open_to_batches_within_its_limit():
    assert Shape.chain(3).allows(999)
    assert Shape.chain(3, 8).allows(8) and not Shape.chain(3, 8).allows(9)
