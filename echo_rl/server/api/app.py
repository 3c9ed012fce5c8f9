"""The HTTP application: one front over one host."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import FastAPI

from echo_rl import __version__
from echo_rl.server import ui
from echo_rl.server.api import admin, errors, health, logs, openai
from echo_rl.server.api.auth import Keys, admin_guard, api_guard
from echo_rl.server.api.choices import Choices
from echo_rl.server.api.front import Front, TextCodec
from echo_rl.server.api.limits import Admission, BodyLimit
from echo_rl.server.api.metrics import Metrics
from echo_rl.server.api.request_stats import RequestStats, RequestStatsMiddleware
from echo_rl.server.client.engine_client import EngineClient
from echo_rl.server.config import ServerConfig
from echo_rl.utils.archives import shipped_checkpoints

QUIET = ("/health", "/health/live", "/health/ready", "/metrics")
"""Routes that are polled, and so leave no line in the log."""


def create_app(
    host: EngineClient, tokenizer: TextCodec, config: ServerConfig, keys: Keys | None = None, model: str = "smollm2"
) -> FastAPI:
    """The application; its `Front` is at ``app.state.front``.

    `model` is the engine's model (a name or a path). The controller in force now is the server's first, see
    `Choices`. `config.host` must be the IP address that is really listened on: without an admin key it decides
    whether there is an /admin at all. Raises `ConfigError` where the keys can't be read.
    """
    keys = Keys.load(config) if keys is None else keys
    name = config.model_name(model)
    front = Front(host, tokenizer, config, name, Metrics(name), Admission(config.max_queue))
    host.on_stats(front.metrics.step)
    app = FastAPI(title="echo-rl", version=__version__, summary="OpenAI-compatible serving with speculative decoding")
    app.state.front = front
    for_admin = admin_guard(keys, config.host)
    app.include_router(openai.make_router(front, api_guard(keys)))
    choices = Choices(config.checkpoints or shipped_checkpoints(), host.controller)
    app.include_router(admin.make_router(front, choices, for_admin))
    app.include_router(health.make_router(front))
    app.include_router(ui.make_router(host, for_admin))
    errors.install(app)
    app.add_middleware(BodyLimit, limit=config.max_body_bytes)
    app.add_middleware(RequestStatsMiddleware, done=_noting(front))
    return app


def _noting(front: Front) -> Callable[[RequestStats], None]:
    def done(trail: RequestStats) -> None:
        front.metrics.request_done(trail)
        if trail.route not in QUIET:
            logs.request_done(trail)

    return done
