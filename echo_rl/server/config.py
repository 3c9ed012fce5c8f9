"""Settings of the server: frozen records, each default stated once. They load no torch: every room reads them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from echo_rl.errors import ConfigError


@dataclass(frozen=True)
class ServerConfig:
    """Names the address to listen on, the keys and the bounds. Raises `ConfigError` on values out of range."""

    host: str = "127.0.0.1"
    """Address to listen on. Without an admin key, /admin answers on a loopback address alone."""
    port: int = 8000
    """0 takes a free one, which the log names."""
    served_model_name: str | None = None
    """The model's name for clients; by default its own name, or the last part of its folder's path."""
    max_queue: int = 256
    """Most completions unfinished at once, waiting ones included; more are refused with 429."""
    max_tokens: int | None = None
    """Most output tokens that a completion may ask for; None leaves it to the context."""
    max_prompt_tokens: int | None = None
    """Longest prompt; None leaves it to the context."""
    max_body_bytes: int = 1_048_576
    """Largest request body; a larger one is refused with 413."""
    request_timeout: float = 600.0
    """Seconds after which a request is cancelled (504, or an error event in a stream)."""
    timeout_keep_alive: int = 75
    """Seconds that a connection stays open without a request. Clients that keep connections close theirs sooner, so
    that none sends a request into one that is being closed."""
    drain_seconds: float = 30.0
    """Seconds that requests in flight get to finish after SIGTERM or SIGINT; a second signal ends them at once."""
    api_key_file: Path | None = None
    """File with the key that /v1 asks for; else $ECHO_RL_API_KEY; with neither, /v1 is open."""
    admin_key_file: Path | None = None
    """File with the key that /admin asks for; else $ECHO_RL_ADMIN_KEY."""
    checkpoints: Path | None = None
    """Folder whose policies /admin may put in force by name; by default the shipped ones."""
    log_format: Literal["json", "text"] = "text"
    """One line per request and admin action; prompts, outputs and keys are never logged."""

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65_536:
            raise ConfigError(f"port is {self.port}; give 0 (a free one) to 65535")
        for field in fields(self):
            value = getattr(self, field.name)
            if (
                field.name.startswith(("max_", "request_", "timeout_", "drain_"))
                and value is not None
                and not 0 < value < 2**40
            ):
                raise ConfigError(f"{field.name} is {value}; give a number above 0")

    def model_name(self, model: str) -> str:
        """Returns the name by which clients know an engine's `model`, a name or a path."""
        folder = Path(model)
        return self.served_model_name or (folder.name if folder.is_dir() or folder.is_absolute() else model)


@dataclass(frozen=True)
class ControllerManagerOptions:
    """A server's rules for its controllers."""

    fallback: str = "echo"
    """Specification of the controller that decides wherever the active one fails."""
    deadline: float = 0.25
    """Seconds that a decision may take."""
    trial_steps: int = 200
    """Steps within which a new controller that is retired makes way for the one before it."""
    build_seconds: float = 60.0
    """Seconds that building a controller and its dry run may take."""


@dataclass(frozen=True)
class ExperimentOptions:
    """The controllers that an experiment compares, its length, and its rule to stop early. Raises `ConfigError`."""

    control: str
    """Specification of the controller that stays in force afterwards."""
    treatment: str
    """Specification of the controller that is compared with it."""
    block_seconds: float = 20.0
    """Seconds of a block in which the engine works."""
    blocks: int = 20
    """Most blocks of each arm."""
    harm: float = 1.0
    """The experiment stops as soon as the interval of treatment over control lies wholly below this ratio; 0 never
    stops it. That interval is wider than the one shown, by as many analyses as are made (Bonferroni)."""
    seed: int = 0
    """The seed that the order of the arms is drawn from."""

    def __post_init__(self) -> None:
        if not 0.0 < self.block_seconds < float("inf"):
            raise ConfigError(f"block_seconds is {self.block_seconds}; give a number above 0")
        if self.blocks < 1:
            raise ConfigError(f"blocks is {self.blocks}; give at least 1 of each arm (3 make an interval)")
        if not 0.0 <= self.harm <= 1.0:
            raise ConfigError(f"harm is {self.harm}; give a ratio in [0, 1], 0 for never")
