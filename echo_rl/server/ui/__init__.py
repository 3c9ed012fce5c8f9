"""The live view: one page at ``/ui`` and its stream of live data.

``app.include_router(make_router(client, check))`` mounts it. The page and its files hold no data and
need no key; the stream and what opens it are behind `check`. Nothing is loaded from elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Depends, HTTPException, Request, Response
from fastapi.responses import StreamingResponse
from fastapi.staticfiles import StaticFiles

from echo_rl.server.client.engine_client import EngineClient
from echo_rl.server.ui.sessions import SESSION_SECONDS, Sessions
from echo_rl.server.ui.stream import Viewers

AuthCheck = Callable[..., Any]
"""A FastAPI dependency that raises `HTTPException` (401, 403) without access to the live data."""

POLICY = "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'"
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def make_router(client: EngineClient, check: AuthCheck) -> APIRouter:
    """Returns the routes under ``/ui``; they stay out of the OpenAPI schema, since one of them never ends.

    ``GET /ui`` the page, ``GET /ui/static/{name}`` its files, ``GET /ui/events`` the live data (guarded).
    A browser's EventSource sends no key, so the page asks ``POST /ui/session`` (guarded) for a token and
    opens ``GET /ui/stream?token=`` with it: the same data.
    """
    router = APIRouter(prefix="/ui", include_in_schema=False)
    static = StaticFiles(packages=[(__name__, "static")])
    sessions, viewers = Sessions(), Viewers(client)

    @router.get("/static/{name}")
    async def asset(request: Request, name: str) -> Response:
        response = await static.get_response(name, request.scope)
        response.headers.update(HEADERS)
        return response

    @router.get("")
    async def page(request: Request) -> Response:
        return await asset(request, "index.html")

    @router.post("/session", dependencies=[Depends(check)])
    async def session(response: Response) -> dict[str, Any]:
        response.headers["Cache-Control"] = "no-store"
        return {"token": sessions.issue(), "expires_in": SESSION_SECONDS, "ready": client.ready}

    @router.get("/events", dependencies=[Depends(check)])
    async def events() -> Response:
        return open_stream(client, viewers)

    @router.get("/stream")
    async def by_token(token: str = "") -> Response:
        if not sessions.redeem(token):
            raise HTTPException(401, "the stream's token is used up or expired; POST /ui/session gives a new one")
        return open_stream(client, viewers)

    return router


def open_stream(client: EngineClient, viewers: Viewers) -> Response:
    """Raises `HTTPException` 503 where the server is not ready or there are too many viewers."""
    if not client.ready:
        raise HTTPException(503, "the server is not ready", {"Retry-After": "2"})
    if viewers.full:
        raise HTTPException(503, f"{viewers.count} viewers are connected already", {"Retry-After": "10"})
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(viewers.stream(), media_type="text/event-stream", headers=headers)
