"""The environments' names in Gymnasium's registry. Holds strings alone: what they name is imported when one is made.

Importing `echo_rl` registers them without importing Gymnasium: at once where that is loaded already, else at the end of
its first import. (Gymnasium reads no entry points of installed packages since version 1.0.)
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

LIVE, REPLAY = "EchoRL/Live-v0", "EchoRL/Replay-v0"
GYMNASIUM = "gymnasium"


def register_envs() -> None:
    """Make both names known to `gymnasium.make` and `gymnasium.make_vec`; does nothing the second time."""
    from gymnasium.envs.registration import register, registry

    makers = "echo_rl.learning.environments"
    if LIVE not in registry:
        register(LIVE, f"{makers}:make_live", nondeterministic=True)
    if REPLAY not in registry:
        register(REPLAY, f"{makers}:make_replay", vector_entry_point=f"{makers}:make_replay_vec")


def register_with_gymnasium() -> None:
    """Register now if Gymnasium is loaded, else once it is. Imports nothing."""
    if GYMNASIUM in sys.modules:
        register_envs()
    elif not any(isinstance(finder, _OnceLoaded) for finder in sys.meta_path):
        sys.meta_path.insert(0, _OnceLoaded())


class _OnceLoaded(MetaPathFinder):
    """Watches for the import of Gymnasium, and leaves the list of finders when it comes."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Gymnasium's own spec, whose loader registers the environments when it has run the module."""
        if fullname != GYMNASIUM:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        loader, execute = spec.loader, spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            register_envs()

        loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
