"""Shows a controller's specification to clients without the folders that it names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SPEC_KEYS = ("controller", "previous", "control", "treatment")
"""Keys under which reports hold a controller's specification."""


def public_spec(spec: str) -> str:
    """Returns the specification with only the last part of every path."""
    head, colon, tail = spec.partition(":")
    return head + colon + ",".join(map(_last_part, tail.split(",")))


def public_report(value: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the report of an experiment or a core with every specification in its public form."""
    shown = {key: public_spec(value[key]) for key in SPEC_KEYS if isinstance(value.get(key), str)}
    inner = {key: public_report(item) for key, item in value.items() if isinstance(item, Mapping)}
    return {**value, **inner, **shown}


def _last_part(item: str) -> str:
    key, equals, value = item.partition("=")
    return key + equals + value.rpartition("/")[2]
