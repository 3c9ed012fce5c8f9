"""Reads an arm: a controller with its options as they are written on a command line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from echo_rl.errors import ConfigError


@dataclass(frozen=True)
class Arm:
    """A controller with its options, as written: ``echo`` or ``echo:max_depth=4,width=2``."""

    controller: str
    options: Mapping[str, Any]

    @classmethod
    def parse(cls, text: str) -> Arm:
        """Values are JSON where they parse as such, else strings. Raises `ConfigError`."""
        controller, _, tail = text.partition(":")
        options: dict[str, Any] = {}
        for item in filter(None, tail.split(",")):
            key, equals, value = item.partition("=")
            if not equals or not key:
                raise ConfigError(f"cannot read {item!r} in the arm {text!r}; write name:option=value,option=value")
            options[key.strip()] = _value(value.strip())
        if not controller:
            raise ConfigError(f"the arm {text!r} names no controller")
        return cls(controller, options)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
