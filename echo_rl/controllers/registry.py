"""Registers every controller by name and makes them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any

from echo_rl.contracts import Controller
from echo_rl.controllers.baselines import bandit, batch_level, cost_aware, dynamic, fixed, goodput, oracle, sequoia
from echo_rl.controllers.echo import echo
from echo_rl.controllers.policy import ppo
from echo_rl.costs.profile import CostProfile
from echo_rl.errors import ConfigError, UnknownController


@dataclass(frozen=True)
class Family:
    """A controller class and the frozen dataclass of its options (whose field docs are their help)."""

    controller: type[Any]
    options: type[Any]


CONTROLLERS: Mapping[str, Family] = MappingProxyType(
    {
        family.controller.name: family
        for family in (
            Family(fixed.NoSpeculation, fixed.NoneOptions),
            Family(fixed.Chain, fixed.ChainOptions),
            Family(fixed.Static, fixed.StaticOptions),
            Family(fixed.Fixed, fixed.FixedOptions),
            Family(fixed.Eagle3, fixed.Eagle3Options),
            Family(dynamic.Eagle2, dynamic.Eagle2Options),
            Family(dynamic.Ddd, dynamic.DddOptions),
            Family(dynamic.Talon, dynamic.TalonOptions),
            Family(dynamic.OptTree, dynamic.OptTreeOptions),
            Family(sequoia.Sequoia, sequoia.SequoiaOptions),
            Family(cost_aware.Smart, cost_aware.SmartOptions),
            Family(cost_aware.Cast, cost_aware.CastOptions),
            Family(cost_aware.Evict, cost_aware.EvictOptions),
            Family(batch_level.Tetris, batch_level.TetrisOptions),
            Family(batch_level.SglangAdaptive, batch_level.SglangAdaptiveOptions),
            Family(batch_level.DSpark, batch_level.DSparkOptions),
            Family(goodput.TurboSpec, goodput.TurboSpecOptions),
            Family(goodput.AdaSpec, goodput.AdaSpecOptions),
            Family(bandit.Bandit, bandit.BanditOptions),
            Family(echo.Echo, echo.EchoOptions),
            Family(echo.EchoDense, echo.EchoOptions),
            Family(echo.EchoFixed, echo.EchoFixedOptions),
            Family(echo.EchoUnscheduled, echo.EchoOptions),
            Family(ppo.Ppo, ppo.PpoOptions),
            Family(oracle.Oracle, oracle.OracleOptions),
        )
    }
)


def names() -> tuple[str, ...]:
    return tuple(CONTROLLERS)


def make(name: str, **options: Any) -> Controller:
    """A new controller.

    Raises `UnknownController` for a name that is not registered and `ConfigError` for an option that the
    controller does not have or a value that it refuses.
    """
    if name not in CONTROLLERS:
        raise UnknownController(f"no controller is called {name!r}{_nearest(name, names())}")
    family = CONTROLLERS[name]
    known = {field.name: field.default for field in fields(family.options)}
    for option, value in options.items():
        if option not in known:
            raise ConfigError(f"controller {name!r} has no option {option!r}{_nearest(option, tuple(known))}")
        options[option] = _checked(f"{name} {option}", value, known[option])
    try:
        controller: Controller = family.controller(family.options(**options))
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"controller {name!r} cannot use these options: {error}") from error
    return controller


def planning_by(profile: CostProfile) -> Callable[..., Controller]:
    """`make` for another machine: controllers that plan by costs take this profile unless their options name one."""

    def made(name: str, **options: Any) -> Controller:
        family = CONTROLLERS.get(name)
        if family is not None and any(field.name == "profile" for field in fields(family.options)):
            options = {"profile": profile, **options}
        return make(name, **options)

    return made


def _checked(name: str, value: Any, default: Any) -> Any:
    """The value of an option, a list as a tuple; raises `ConfigError` where its kind isn't the default's."""
    if isinstance(value, list):
        return tuple(_checked(name, part, None) for part in value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name} is {value}; give a finite number")
    if type(default) is bool and type(value) is not bool:
        raise ConfigError(f"{name} is {value!r}; give true or false")
    if type(default) is int and type(value) is not int:
        raise ConfigError(f"{name} is {value!r}; give a whole number")
    return value


def _nearest(word: str, known: tuple[str, ...]) -> str:
    close = get_close_matches(word, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{hint} (known: {', '.join(known) or 'none'})"
