"""The controllers that clients may choose: those with plain options, and an operator's checkpoint by its name.

No text of a request ever becomes a path: options that name files are refused, and a checkpoint is looked
up among the folders that are there.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from echo_rl.controllers import registry
from echo_rl.controllers.arm import Arm
from echo_rl.controllers.policy.network import read_manifest
from echo_rl.errors import ConfigError, PolicyError
from echo_rl.server.specs import public_spec

NEEDS_A_RECORDING = ("oracle",)
"""Controllers that need a recording of the future and so can't serve."""


@dataclass(frozen=True)
class ControllerCatalog:
    """The controllers and checkpoints that this server offers."""

    checkpoints: Path
    first: str
    """Specification of the controller that the server started with."""

    def names(self) -> tuple[str, ...]:
        return tuple(name for name in registry.names() if name not in NEEDS_A_RECORDING)

    def options(self, name: str) -> dict[str, Any]:
        """Returns the options that may be set, with their defaults."""
        family = fields(registry.CONTROLLERS[name].options)
        return {field.name: field.default for field in family if _is_plain(field.type)}

    def takes_checkpoint(self, name: str) -> bool:
        return any(field.name == "path" for field in fields(registry.CONTROLLERS[name].options))

    def policies(self) -> tuple[str, ...]:
        """Returns the names of the folders that hold a policy."""
        try:
            folders = sorted(self.checkpoints.iterdir())
        except OSError:
            return ()
        return tuple(folder.name for folder in folders if folder.is_dir() and _holds_policy(folder))

    def spec(self, text: str, checkpoint: str | None = None) -> str:
        """Returns the specification for the engine; what `public_spec` shows of one is taken for that very one.

        Raises `ConfigError` on whatever is not offered.
        """
        if checkpoint is None:
            if text == public_spec(self.first):
                return self.first
            text, checkpoint = _split_policy(text)
        arm = Arm.parse(text)
        if arm.controller not in self.names():
            raise ConfigError(f"no controller of that name can be chosen; known: {', '.join(self.names())}")
        offered = self.options(arm.controller)
        for option, value in arm.options.items():
            if option not in offered:
                raise ConfigError(f"{arm.controller} has no option of that name over HTTP; known: {_listed(offered)}")
            if not isinstance(value, int | float):
                raise ConfigError(f"{option} must be a number, true or false")
        if checkpoint is None:
            return text
        if not self.takes_checkpoint(arm.controller):
            raise ConfigError(f"{arm.controller} takes no checkpoint")
        folder = self._folder(checkpoint)
        spec = f"{text},path={folder}" if arm.options else f"{arm.controller}:path={folder}"
        if public_spec(spec) != public_spec(self.first):
            return spec
        if Path(str(Arm.parse(self.first).options["path"])).resolve() != folder.resolve():
            raise ConfigError(
                f"checkpoint {checkpoint} would look like the policy that this server began with; rename its folder"
            )
        return self.first

    def _folder(self, checkpoint: str) -> Path:
        names = self.policies()
        if checkpoint not in names:
            raise ConfigError(f"no checkpoint of that name; known: {_listed(names)}")
        folder = self.checkpoints / checkpoint
        if set(",=") & set(str(folder)):
            raise ConfigError(f"the folder of checkpoint {checkpoint} has ',' or '=' in its path; rename it")
        return folder


def _split_policy(text: str) -> tuple[str, str | None]:
    """Returns a specification without its policy, and that policy's name: ``checkpoint=NAME`` or ``path=NAME``."""
    head, _, tail = text.partition(":")
    options = tail.split(",")
    policy = next((option for option in options if option.startswith(("checkpoint=", "path="))), None)
    if policy is None:
        return text, None
    options.remove(policy)
    return f"{head}:{','.join(options)}" if options else head, policy.partition("=")[2]


def _is_plain(annotation: Any) -> bool:
    """Returns whether an option is a number or a Boolean; a text or a record may name a file."""
    return str(annotation).removesuffix(" | None") in ("int", "float", "bool")


def _holds_policy(folder: Path) -> bool:
    try:
        read_manifest(folder)
    except PolicyError:
        return False
    return True


def _listed(names: Any) -> str:
    return ", ".join(names) or "none"
