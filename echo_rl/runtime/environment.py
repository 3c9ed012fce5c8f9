"""Loads an engine and describes what its timings depend on."""

from __future__ import annotations

import torch

from echo_rl import __version__
from echo_rl.config import EngineConfig
from echo_rl.costs.files import own_or_packaged
from echo_rl.runtime.device import resolve
from echo_rl.runtime.engine import Engine
from echo_rl.runtime.models.locate import pinned, resolve_drafter
from echo_rl.utils.machine import machine
from echo_rl.utils.result_store import digest


def load_engine(config: EngineConfig) -> tuple[Engine, dict[str, str]]:
    """The engine, and what its timings depend on. Raises what `Engine.load` raises."""
    config = pinned(config)
    return Engine.load(config), environment_of(config)


def environment_of(config: EngineConfig) -> dict[str, str]:
    """Everything that the timings of such an engine depend on, found without loading it.

    Raises `ConfigError` for a device or format that isn't here, `WeightsError` for a drafter that isn't.
    """
    device, dtype = resolve(config.device, config.dtype)
    config = pinned(config)
    return machine(
        version=__version__,
        torch=torch.__version__,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        dtype=str(dtype).removeprefix("torch."),
        threads=str(config.threads or torch.get_num_threads()),
        model=config.model_source,
        drafter=_drafter(config),
        engine=_settings(config),
        calibration=digest(own_or_packaged("profile.json"), own_or_packaged("gates.json")),
    )


def _drafter(config: EngineConfig) -> str:
    """The Hub's name and commit, or the weights' digest; ``none`` for no drafter."""
    folder = resolve_drafter(config.drafter, config.model, config.drafter_revision)
    if folder is None or config.drafter_revision:
        return config.drafter_source if folder else "none"
    single = folder / "model.safetensors"
    return digest(*([single] if single.is_file() else sorted(folder.glob("model*.safetensors"))))


def _settings(config: EngineConfig) -> str:
    """The settings that aren't the default's, in words; without those that an environment gives as they came out."""
    named = ("model", "revision", "drafter", "drafter_revision", "device", "dtype", "threads")
    own = {name: value for name, value in vars(config).items() if name not in named}
    return ", ".join(f"{k} {v}" for k, v in own.items() if v != getattr(EngineConfig, k)) or "default"
