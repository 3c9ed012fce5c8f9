"""``echo-rl serve``: the OpenAI-compatible server."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from echo_rl.cli.options import EngineOptions
from echo_rl.config import EngineConfig
from echo_rl.server.config import ServerConfig


@dataclass(frozen=True)
class Serve:
    """Serve OpenAI's API, with /admin to change the controller, /metrics, and a live view at /ui."""

    controller: str = "echo"
    """The controller that decides the speculation at first; options as ``echo:name=value,name=value``."""
    server: Annotated[ServerConfig, tyro.conf.arg(name="")] = field(default_factory=ServerConfig)
    engine: EngineOptions = field(default_factory=EngineConfig)

    def run(self) -> int:
        from echo_rl.runtime.environment import load_engine
        from echo_rl.server.serve import serve

        return serve(self.engine, self.server, self.controller, load_engine)
