"""Access by keys: one for /v1, another one for /admin and the live view."""

from __future__ import annotations

import hmac
import os
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

from fastapi import Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from echo_rl.errors import ConfigError
from echo_rl.server.api.errors import ApiError
from echo_rl.server.config import ServerConfig

AuthCheck = Callable[..., Awaitable[None]]
"""A FastAPI dependency that raises `ApiError` without access. A coroutine, since FastAPI runs others in a thread."""

FORWARDED = ("forwarded", "via", "x-forwarded-for", "x-real-ip")
"""Headers that proxies add: the client behind one may be anybody."""


@dataclass(frozen=True)
class Keys:
    """The keys that the server asks for; None asks for none."""

    api: bytes | None = field(default=None, repr=False)
    admin: bytes | None = field(default=None, repr=False)

    @classmethod
    def load(cls, config: ServerConfig, environment: Mapping[str, str] = os.environ) -> Keys:
        """Reads them from files, else from the environment. Raises `ConfigError` on an unreadable file or empty key."""
        return cls(
            _key(config.api_key_file, "ECHO_RL_API_KEY", environment),
            _key(config.admin_key_file, "ECHO_RL_ADMIN_KEY", environment),
        )


def api_check(keys: Keys) -> AuthCheck:
    """Returns a check for the API key; it passes everybody where there is none."""
    bearer = HTTPBearer(auto_error=False, description="The API key, where the server has one.")

    async def check(given: HTTPAuthorizationCredentials | None = Security(bearer)) -> None:  # noqa: B008
        if keys.api is not None:
            _require(keys.api, given)

    return check


def admin_check(keys: Keys, bound: str) -> AuthCheck:
    """Returns a check for the admin key; without one it passes this machine, where the server listens to it alone.

    `bound` is the address that the server listens on.
    """
    bearer = HTTPBearer(auto_error=False, scheme_name="Admin", description="The admin key, where the server has one.")
    closed = not is_loopback(bound)

    async def check(request: Request, given: HTTPAuthorizationCredentials | None = Security(bearer)) -> None:  # noqa: B008
        if keys.admin is not None:
            _require(keys.admin, given)
        elif closed or not _is_local(request):
            raise ApiError(
                403,
                "without an admin key this is served to this machine alone, by a server that listens on a loopback "
                "address; start it with ECHO_RL_ADMIN_KEY or --admin-key-file",
                code="admin_key_missing",
            )

    return check


def is_loopback(address: str) -> bool:
    """Returns whether it is an IP address that only this machine reaches. Names are not trusted to be one."""
    try:
        return ip_address(address).is_loopback
    except ValueError:
        return False


def _is_local(request: Request) -> bool:
    """Returns whether this machine asks directly and by its own name; a foreign page's browser names another host."""
    if request.client is None or any(header in request.headers for header in FORWARDED):
        return False
    name = request.url.hostname or ""
    return is_loopback(request.client.host) and (name == "localhost" or is_loopback(name))


def _require(key: bytes, given: HTTPAuthorizationCredentials | None) -> None:
    """Compares the key with the header, which arrives decoded as Latin-1, whatever its bytes mean."""
    if given is None or not hmac.compare_digest(given.credentials.encode("latin-1"), key):
        raise ApiError(
            401,
            "give the right key as 'Authorization: Bearer KEY'",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


def _key(file: Path | None, variable: str, environment: Mapping[str, str]) -> bytes | None:
    if file is None:
        text, source = environment.get(variable), f"${variable}"
    else:
        try:
            text, source = file.read_text(), str(file)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the key file {file}: {error}") from error
    if text is None:
        return None
    if not text.strip():
        raise ConfigError(f"the key in {source} is empty; write one there, or leave it out")
    return text.strip().encode()
