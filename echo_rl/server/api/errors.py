"""Errors as OpenAI's clients expect them: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException

from echo_rl.errors import EchoError
from echo_rl.server.client.supervisor import Unavailable

TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
RETRY_SECONDS = 5
"""Seconds that clients are asked to wait while the engine loads or is started again."""
log = logging.getLogger(__name__)


class ApiError(HTTPException):
    """The failure of one HTTP request."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.message, self.param, self.code = message, param, code

    @property
    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status_code, "server_error" if self.status_code >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status_code, self.headers)


def as_api_error(error: BaseException) -> ApiError:
    """Converts any error. Unforeseen ones are logged and don't show their text."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestValidationError):
        return _invalid(error)
    if isinstance(error, StarletteHTTPException):
        return ApiError(error.status_code, str(error.detail), headers=error.headers)
    if isinstance(error, Unavailable):
        return ApiError(503, str(error), code="unavailable", headers={"Retry-After": str(RETRY_SECONDS)})
    if isinstance(error, EchoError):
        return ApiError(400, str(error))
    log.error("unforeseen error in a request", exc_info=error)
    return ApiError(500, "the server failed on this request; its log says why", code="internal_error")


def install(app: FastAPI) -> None:
    """Makes every error of this app an OpenAI error object."""

    async def handle(request: Request, error: Exception) -> JSONResponse:
        return as_api_error(error).response

    for kind in (RequestValidationError, StarletteHTTPException, EchoError, Exception):
        app.add_exception_handler(kind, handle)


def _invalid(error: RequestValidationError) -> ApiError:
    """Names the first thing that is wrong with the body, the path or the query. Never repeats the input."""
    first = error.errors()[0]
    where = [str(part) for part in first["loc"][1:] if first["type"] != "json_invalid"]
    param = ".".join(where) or None
    return ApiError(400, f"{param}: {first['msg']}" if param else f"the body: {first['msg']}", param)
