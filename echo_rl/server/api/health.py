"""/health for probes, /metrics for Prometheus."""

from __future__ import annotations

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel

from echo_rl.server.api.errors import ApiError
from echo_rl.server.api.front import Front, dead_engine
from echo_rl.server.api.replies import FAILURES


class Health(BaseModel):
    live: bool
    """The process answers and its engine is loading, serving or being started again."""
    ready: bool
    """The engine is loaded and the server is not shutting down."""
    draining: bool


def make_router(front: Front) -> APIRouter:
    router = APIRouter(tags=["Operation"])

    def state() -> Health:
        return Health(live=front.engine_client.alive, ready=front.ready, draining=front.draining)

    @router.get("/health/live", responses=FAILURES)
    async def live() -> Health:
        """503 once the engine is dead for good: start the server again then."""
        if not front.engine_client.alive:
            raise dead_engine()
        return state()

    @router.get("/health/ready", responses=FAILURES)
    @router.get("/health", responses=FAILURES)
    async def ready() -> Health:
        """503 while the engine loads, or the server shuts down: send no requests then."""
        if front.engine_client.dead:
            raise dead_engine()
        if not front.ready:
            raise ApiError(503, "shutting down" if front.draining else "the engine is loading", code="unavailable")
        return state()

    @router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Prometheus' text format."""
        return Response(front.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return router
