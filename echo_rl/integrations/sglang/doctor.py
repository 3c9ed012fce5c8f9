"""Checks whether this plugin and the installed SGLang fit, and shows the rows of a table. Starts no server."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points

from rich.table import Table
from rich.text import Text

from echo_rl.errors import EchoError
from echo_rl.integrations.sglang.contract import RECORDED, ROOT, check, installed_version
from echo_rl.integrations.sglang.settings import ENVIRONMENT, PluginConfig
from echo_rl.utils.terminal import fitted

GROUP = "sglang.srt.plugins"
ENTRY = "echo_rl.integrations.sglang.plugin:register"
NAME = "echo-rl"


@dataclass(frozen=True)
class Row:
    """The outcome of one check."""

    what: str
    ok: bool
    detail: str = ""
    """The fault and its remedy, or the finding."""


def examine(config: str | None = None) -> tuple[Row, ...]:
    """Makes every check, in order; `config` is a configuration file, else the one that the environment names."""
    version = installed_version()
    if version is None:
        return (Row("SGLang", False, f"not installed here; install sglang=={RECORDED}"),)
    path = config or os.environ.get(ENVIRONMENT)
    settings, mode = _configuration(path)
    fits = version == RECORDED
    remedy = version if fits else f"{version}, recorded from {RECORDED}; install sglang=={RECORDED}"
    symbols = (Row(ROOT + f.symbol.name, not f.problem, f.problem or "as recorded") for f in check(mode))
    return Row("SGLang", fits, remedy), entry_point(), settings, *symbols


def entry_point() -> Row:
    """Checks whether SGLang would find and load the plugin."""
    found = [point.value for point in entry_points(group=GROUP, name=NAME)]
    if found != [ENTRY]:
        return Row("entry point", False, f"{GROUP} has {found or 'nothing'} under {NAME}; install echo-rl again")
    allowed = [name.strip() for name in os.environ.get("SGLANG_PLUGINS", "").split(",") if name.strip()]
    if allowed and NAME not in allowed:
        return Row("entry point", False, f"SGLANG_PLUGINS={','.join(allowed)} leaves it out; add {NAME}")
    return Row("entry point", True, ENTRY)


def _configuration(path: str | None) -> tuple[Row, str | None]:
    """Returns the row, and the mode whose symbols are to be checked; None means both."""
    if not path:
        return Row("configuration", True, f"{ENVIRONMENT} is not set: the plugin would do nothing"), None
    try:
        config = PluginConfig.load(path)
        config.make()
        config.costs()
    except EchoError as error:
        return Row("configuration", False, str(error)), None
    return Row("configuration", True, f"{path}: mode {config.mode}, controller {config.controller}"), config.mode


def table(rows: Sequence[Row], width: int) -> Table:
    """Shows one row a check, for a terminal of that width."""
    marks = {True: Text("ok", "green"), False: Text("no", "bold red")}
    return fitted("SGLang plugin", ("check", "", "found"), [((r.what, marks[r.ok], r.detail), {}) for r in rows], width)
