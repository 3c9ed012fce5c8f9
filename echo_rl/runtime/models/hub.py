"""Fetches models of the Hugging Face Hub by name, through `huggingface_hub`: its cache, tokens and offline mode."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from echo_rl import __version__
from echo_rl.errors import WeightsError

NEEDED = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
"""The files that a target or a drafter is read from."""
BELOW = "*/*"
"""Files in folders of a repository: other formats and precisions of the same weights."""
COMMIT = re.compile("[0-9a-f]{40}")


def is_hub_name(name: str) -> bool:
    """True for ``owner/name``, unless there is a folder of that name here."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1 and not Path(name).is_dir()


def fetch(name: str, revision: str | None = None) -> Path:
    """The folder of a repository in the cache, downloaded first where it is not complete; its name is the commit.

    `revision` is a branch, a tag or a commit, by default the main branch; a commit in the cache needs no network.
    Raises `WeightsError` that says what to do.
    """
    try:
        folder = Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=list(NEEDED),
                ignore_patterns=[BELOW],
                library_name="echo-rl",
                library_version=__version__,
            )
        )
    except Exception as error:  # the client's own kinds change from release to release
        raise WeightsError(_reason(name, revision, error)) from error
    if not any(folder.glob("model*.safetensors")):
        raise WeightsError(
            f"'{name}' on the Hugging Face Hub has no model.safetensors; use a repository that has, or convert the "
            "weights and give the folder"
        )
    return folder


LOG_IN = "log in with `hf auth login` or set HF_TOKEN"


def _reason(name: str, revision: str | None, error: Exception) -> str:
    """What went wrong, and what to do about it."""
    here = f"there is no folder '{name}' here"
    if isinstance(error, GatedRepoError):
        return f"'{name}' is gated: accept its terms at {constants.ENDPOINT}/{name}, then {LOG_IN}"
    if isinstance(error, RepositoryNotFoundError):
        return f"{here}, and the Hugging Face Hub has no such model; check the spelling, or for a private one {LOG_IN}"
    if isinstance(error, RevisionNotFoundError):
        return (
            f"'{name}' on the Hugging Face Hub has no revision '{revision}'; give one of its branches, tags or commits"
        )
    if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
        return f"the Hugging Face Hub refuses '{name}' ({_line(error)}); {LOG_IN}"
    if not isinstance(error, LocalEntryNotFoundError):
        return f"cannot download '{name}' ({type(error).__name__}: {_line(error)}); try again, what is there is kept"
    wanted = f"{name}, revision {revision}" if revision else name
    lacks = f"the cache in {constants.HF_HUB_CACHE} has no complete {wanted}"
    if constants.HF_HUB_OFFLINE:
        return f"{here}, and {lacks}; it is not downloaded since HF_HUB_OFFLINE is set"
    cause = f" ({_line(error.__cause__)})" if error.__cause__ else ""
    return f"{here}, {lacks}, and {constants.ENDPOINT} cannot be reached{cause}; check the connection, or give a folder"


def _line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "")
