"""The entry point that SGLang calls in each of its processes (group ``sglang.srt.plugins``).

SGLang only logs what a plugin raises and would go on without it. A server that silently runs other rules than
it was told to is worse than none, so whatever is wrong here ends the process with a message (`REFUSED`).
Without ``ECHO_RL_CONFIG`` the plugin does nothing: SGLang runs as it is.
"""

from __future__ import annotations

import logging
import os
import pkgutil
from collections.abc import Callable, Sequence
from typing import Any

from echo_rl.errors import EchoError
from echo_rl.integrations.sglang import adaptive, trees
from echo_rl.integrations.sglang.adaptive import Hook
from echo_rl.integrations.sglang.contract import ContractBroken, require
from echo_rl.integrations.sglang.settings import ENVIRONMENT, PluginConfig
from echo_rl.integrations.sglang.state import PluginState

log = logging.getLogger(__name__)

RUN_BATCH = "sglang.srt.managers.scheduler.Scheduler.run_batch"
REFUSED = "echo-rl refuses to start SGLang"


def register() -> None:
    """Registers this plugin's hooks. Raises `SystemExit` with a message where they would not hold.

    `SystemExit`, because SGLang catches every `Exception` of a plugin.
    """
    path = os.environ.get(ENVIRONMENT)
    if not path:
        log.info("%s is not set: SGLang's speculation stays as it is", ENVIRONMENT)
        return
    try:
        install(PluginConfig.load(path))
    except SystemExit:
        raise
    except EchoError as error:
        raise SystemExit(f"{REFUSED}: {error}") from error
    except BaseException as error:
        log.exception("echo-rl could not be set up")
        raise SystemExit(f"{REFUSED}: {type(error).__name__}: {error}") from error


def install(config: PluginConfig) -> PluginState:
    """Checks everything that can be checked before a model is loaded, then registers. Raises `EchoError`."""
    require(config.mode, config.untested_version)
    config.make()  # a controller that can't be made must not be found out when the first worker is
    config.costs()
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    state = PluginState(config)
    mode = {"adaptive": adaptive, "trees": trees}[config.mode]
    hooks = (*mode.hooks(state), (RUN_BATCH, _before_batch(state), "BEFORE"))
    before = {target: pkgutil.resolve_name(target) for target, _, _ in hooks}
    for target, hook, how in hooks:
        HookRegistry.register(target, hook, HookType[how])
    verify_after_apply(HookRegistry, hooks, before)
    return state


def _before_batch(state: PluginState) -> Callable[..., None]:
    """Returns a plain function, since SGLang wraps functions and classes only."""

    def before_batch(*args: Any, **kwargs: Any) -> None:
        state.before_batch(*args, **kwargs)

    return before_batch


def verify_after_apply(registry: Any, hooks: Sequence[Hook], before: dict[str, Any]) -> None:
    """Makes the registry verify, once it has applied its hooks, that ours are in place.

    SGLang logs a hook that it can't apply and serves without it, and a later plugin may replace a class again.
    """
    apply = registry.apply_hooks

    def apply_and_verify() -> None:
        apply()
        try:
            verify(hooks, before)
        except ContractBroken as error:
            raise SystemExit(f"{REFUSED}: {error}") from error

    registry.apply_hooks = staticmethod(apply_and_verify)


def verify(hooks: Sequence[Hook], before: dict[str, Any]) -> None:
    """Raises `ContractBroken`, naming the hooks that are not in place."""
    missing = []
    for target, hook, how in hooks:
        found = pkgutil.resolve_name(target)
        in_place = found is hook if isinstance(hook, type) and how == "REPLACE" else found is not before[target]
        missing += [] if in_place else [target]
    if missing:
        raise ContractBroken(
            f"SGLang did not apply the hooks on {', '.join(missing)} (its log says why); check for other plugins "
            "on the same targets (SGLANG_PLUGINS restricts which are loaded)"
        )
