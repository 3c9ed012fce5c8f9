"""Finds the folders of a target and of a drafter: the embedded ones, folders of your own, or models of the Hub."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from echo_rl.config import EngineConfig
from echo_rl.errors import ConfigError, WeightsError
from echo_rl.runtime.models import hub
from echo_rl.runtime.models.default_model import fetch_smollm2
from echo_rl.utils.archives import shipped_checkpoints

DEFAULT_MODEL = "smollm2"
DEFAULT_DRAFTER = "smollm2-135m-eagle3"


def pinned(config: EngineConfig) -> EngineConfig:
    """The settings with the commits of what they take from the Hub as revisions, downloaded first where need be.

    Whoever loads by them, in whatever process and however often, gets the same files without asking the Hub again.
    Raises `WeightsError`, and `ConfigError` for the revision of what is not the Hub's.
    """
    return replace(
        config,
        revision=_commit(config.model, config.revision),
        drafter_revision=_commit(config.drafter, config.drafter_revision),
    )


def resolve_model(model: str, revision: str | None = None) -> Path:
    """The folder of a model. Raises `WeightsError` where it can't be had, saying how to get it, and `ConfigError` for
    the revision of what is not the Hub's."""
    if hub.is_hub_name(model):
        return hub.fetch(model, revision)
    _refuse_revision(model, revision)
    if model == DEFAULT_MODEL:
        return fetch_smollm2()
    return _own_folder(model, "model", f"a Hugging Face folder or name (owner/name), or '{DEFAULT_MODEL}' (embedded)")


def resolve_drafter(drafter: str | None, model: str, revision: str | None = None) -> Path | None:
    """The folder of a drafter; None for no drafter. Raises as `resolve_model`."""
    if drafter is not None and hub.is_hub_name(drafter):
        return hub.fetch(drafter, revision)
    _refuse_revision(drafter, revision)
    if drafter is None or (drafter == "default" and model != DEFAULT_MODEL):
        return None
    folder = str(shipped_checkpoints() / DEFAULT_DRAFTER) if drafter == "default" else drafter
    return _own_folder(
        folder, "drafter", "an EAGLE-3 folder or name (owner/name), or None to serve without speculation"
    )


def _commit(name: str | None, revision: str | None) -> str | None:
    if name is not None and hub.is_hub_name(name):
        return hub.fetch(name, revision).name
    _refuse_revision(name, revision)
    return None


def _refuse_revision(name: str | None, revision: str | None) -> None:
    if revision is not None:
        raise ConfigError(
            f"revision '{revision}' is of no use: '{name}' is not taken from the Hugging Face Hub; leave it out"
        )


def _own_folder(path: str, kind: str, wanted: str) -> Path:
    folder = Path(path)
    if not folder.is_dir():
        raise WeightsError(f"no {kind} folder at '{path}'; give {wanted}")
    return folder
