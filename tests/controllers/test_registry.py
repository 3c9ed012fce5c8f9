"""Making controllers by name."""

from __future__ import annotations

import pytest

from echo_rl.contracts import Controller
from echo_rl.controllers import make, names
from echo_rl.errors import ConfigError, UnknownController


def test_every_name_makes_a_controller_of_that_name():
    for name in names():
        controller = make(name)
        assert isinstance(controller, Controller) and controller.name == name


def test_unknown_name_lists_the_known_and_the_nearest():
    with pytest.raises(UnknownController, match=r"'ecco'.*did you mean 'echo'\?.*known:.*none.*eagle3"):
        make("ecco")


def test_unknown_option_names_the_nearest():
    with pytest.raises(ConfigError, match=r"no option 'step'; did you mean 'steps'\?"):
        make("chain", step=3)
    with pytest.raises(ConfigError, match=r"'none' has no option 'steps' \(known: none\)"):
        make("none", steps=3)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("chain", {"steps": 0}),
        ("chain", {"steps": "three"}),
        ("chain", {"steps": 2.5}),
        ("fixed", {"nodes": float("inf")}),
        ("fixed", {"depth": True}),
        ("echo", {"nodes": float("nan")}),
        ("eagle3", {"total": 0}),
        ("echo", {"nodes": -1.0}),
        ("echo", {"planner": {"period": 4}}),
        ("echo", {"profile": "no/such/file.json"}),
        ("echo_fixed", {"tau": 2.0}),
    ],
)
def test_bad_values_are_config_errors(name, options):
    with pytest.raises(ConfigError):
        make(name, **options)


def test_lists_from_a_command_line_will_do_for_tuples():
    assert make("static", paths=[[0], [0, 0], [1]]).paths == [(0,), (1,), (0, 0)]
