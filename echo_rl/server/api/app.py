"""The HTTP application over one engine client."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from fastapi import FastAPI

from echo_rl import __version__
from echo_rl.server import logs, ui
from echo_rl.server.api import admin, errors, health, openai
from echo_rl.server.api.auth import Keys, admin_check, api_check
from echo_rl.server.api.controller_catalog import ControllerCatalog
from echo_rl.server.api.front import Front
from echo_rl.server.api.limits import Admission, BodyLimit
from echo_rl.server.api.metrics import Metrics
from echo_rl.server.api.request_stats import RequestStats, RequestStatsMiddleware
from echo_rl.server.client.engine_client import EngineClient
from echo_rl.server.config import ServerConfig
from echo_rl.utils.archives import shipped_checkpoints

if TYPE_CHECKING:
    from echo_rl.runtime.tokenizer import Tokenizer

QUIET = ("/health", "/health/live", "/health/ready", "/metrics")
"""Routes that are polled and so are not logged."""


def create_app(
    engine_client: EngineClient,
    tokenizer: Tokenizer,
    config: ServerConfig,
    keys: Keys,
    model: str,
) -> FastAPI:
    """Returns the application; its `Front` is at ``app.state.front``.

    `model` is the engine's model (a name or a path). The controller that is active now is the server's first, see
    `ControllerCatalog`. `config.host` must be the IP address that is really listened on: without an admin key it
    decides whether there is an /admin at all.
    """
    name = config.model_name(model)
    front = Front(engine_client, tokenizer, config, name, Metrics(name, engine_client), Admission(config.max_queue))
    app = FastAPI(title="echo-rl", version=__version__, summary="OpenAI-compatible serving with speculative decoding")
    app.state.front = front
    require_admin = admin_check(keys, config.host)
    app.include_router(openai.make_router(front, api_check(keys)))
    catalog = ControllerCatalog(config.checkpoints or shipped_checkpoints(), engine_client.controller)
    app.include_router(admin.make_router(front, catalog, require_admin))
    app.include_router(health.make_router(front))
    app.include_router(ui.make_router(engine_client, require_admin))
    errors.install(app)
    app.add_middleware(BodyLimit, limit=config.max_body_bytes)
    app.add_middleware(RequestStatsMiddleware, done=partial(_request_done, front))
    return app


def _request_done(front: Front, stats: RequestStats) -> None:
    front.metrics.request_done(stats)
    if stats.route not in QUIET:
        logs.write("request", **stats.log_fields)
