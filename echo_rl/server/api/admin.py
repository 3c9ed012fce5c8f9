"""/admin: the active controller, A/B experiments, and what the server holds."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends
from pydantic import BaseModel, Field

from echo_rl.errors import ConfigError
from echo_rl.server import logs
from echo_rl.server.api.auth import AuthCheck
from echo_rl.server.api.controller_catalog import ControllerCatalog
from echo_rl.server.api.errors import ApiError
from echo_rl.server.api.front import Front
from echo_rl.server.api.replies import FAILURES
from echo_rl.server.config import ExperimentOptions
from echo_rl.server.specs import public_report, public_spec

Spec = Annotated[str, Field(min_length=1, max_length=1024, description="As on the command line: name:option=value,...")]
T = TypeVar("T")


class ControllerChoice(BaseModel):
    """A controller with options, and perhaps a policy of the operator's folder."""

    controller: Spec
    checkpoint: Annotated[str, Field(min_length=1, max_length=255)] | None = None


class Experiment(BaseModel):
    """Alternate two controllers over blocks of time."""

    control: Spec | ControllerChoice
    treatment: Spec | ControllerChoice
    block_seconds: float = Field(ExperimentOptions.block_seconds, gt=0.0, le=3600.0, allow_inf_nan=False)
    blocks: int = Field(ExperimentOptions.blocks, ge=1, le=10_000, description="Blocks of each arm at most.")
    harm: float = Field(
        ExperimentOptions.harm,
        ge=0.0,
        le=1.0,
        allow_inf_nan=False,
        description="Stop once treatment over control lies wholly below this ratio; 0 never stops.",
    )
    seed: int = Field(ExperimentOptions.seed, ge=0, lt=2**63, description="The seed of the order of the arms.")


class ControllerState(BaseModel):
    controller: str
    previous: str | None = None
    """The controller before the change."""


class Offer(BaseModel):
    name: str
    options: dict[str, Any]
    """The options that may be set, with their defaults."""
    takes_checkpoint: bool


class Offers(BaseModel):
    controllers: list[Offer]
    checkpoints: list[str]


class ExperimentState(BaseModel):
    state: str
    """``none``, ``running``, ``done``, ``stopped`` or ``harm``."""
    value: dict[str, Any]
    """Arms, blocks, throughput of each, ratio with its interval, reason of the end."""


class Stats(BaseModel):
    ready: bool
    alive: bool
    draining: bool
    in_flight: int
    admitted: int
    """Completions that hold a place of the queue."""
    restarts: int
    controller: str
    fallbacks: dict[str, int]
    """Decisions that ECHO took over since the start, by cause."""
    rollbacks: int
    """Times that a new controller failed its trial and the one before it came back."""
    serving: dict[str, int]
    """Steps by how the engine served them; empty where it counts nothing."""
    environment: dict[str, str]
    core: dict[str, Any]
    """The core's own account; its ``kv`` is "conserved" or says what is not. Empty while there is no core."""


def make_router(front: Front, catalog: ControllerCatalog, check: AuthCheck) -> APIRouter:
    router = APIRouter(prefix="/admin", dependencies=[Depends(check)], tags=["Admin"], responses=FAILURES)
    client = front.engine_client

    @router.get("/controllers")
    async def controllers() -> Offers:
        """The controllers and checkpoints that can be chosen."""
        offers = [
            Offer(name=name, options=catalog.options(name), takes_checkpoint=catalog.takes_checkpoint(name))
            for name in catalog.names()
        ]
        return Offers(controllers=offers, checkpoints=list(catalog.policies()))

    @router.get("/controller")
    async def controller() -> ControllerState:
        """The active controller."""
        return ControllerState(controller=public_spec(client.controller))

    @router.put("/controller")
    async def set_controller(choice: ControllerChoice) -> ControllerState:
        """Let another controller decide from the next step on; nothing in flight is lost. An unsound one is refused."""
        spec = _spec(catalog, choice)
        previous = client.controller
        front.loaded_engine()
        await _reply(client.set_controller(spec))
        logs.write("admin controller", controller=public_spec(spec), previous=public_spec(previous))
        return ControllerState(controller=public_spec(spec), previous=public_spec(previous))

    @router.get("/ab")
    async def experiment() -> ExperimentState:
        """The running experiment, or the last one."""
        return _state(front)

    @router.post("/ab")
    async def start(body: Experiment) -> ExperimentState:
        """Start an experiment. 409 while another one runs."""
        control, treatment = _spec(catalog, body.control), _spec(catalog, body.treatment)
        front.loaded_engine()
        if client.experiment is not None and client.experiment.state == "running":
            raise ApiError(409, "an experiment is running; stop it first", code="experiment_running")
        options = body.model_dump(include={"block_seconds", "blocks", "harm", "seed"})
        await _reply(client.start_experiment(ExperimentOptions(control, treatment, **options)))
        logs.write("admin ab start", control=public_spec(control), treatment=public_spec(treatment), **options)
        return _state(front)

    @router.delete("/ab")
    async def stop() -> ExperimentState:
        """End the experiment; its control stays in force. Does nothing where none runs."""
        front.loaded_engine()
        if client.experiment is not None and client.experiment.state == "running":
            await _reply(client.stop_experiment())
            logs.write("admin ab stop")
        return _state(front)

    @router.get("/stats")
    async def stats() -> Stats:
        """Count what the server holds."""
        info = client.ready_info if client.ready else None
        return Stats(
            ready=front.ready,
            alive=client.alive,
            draining=front.draining,
            in_flight=client.in_flight,
            admitted=front.admission.unfinished,
            restarts=client.restarts,
            controller=public_spec(client.controller),
            fallbacks=client.fallbacks,
            rollbacks=client.rollbacks,
            serving=client.serving,
            environment=info.environment if info else {},
            core=public_report(await client.inspect()) if info else {},
        )

    return router


def _spec(catalog: ControllerCatalog, choice: str | ControllerChoice) -> str:
    """Returns the full specification. Raises `ConfigError`, which the client gets as 400."""
    return catalog.spec(choice) if isinstance(choice, str) else catalog.spec(choice.controller, choice.checkpoint)


def _state(front: Front) -> ExperimentState:
    report = front.engine_client.experiment
    return ExperimentState(
        state=report.state if report else "none", value=public_report(report.value) if report else {}
    )


async def _reply(work: Awaitable[T]) -> T:
    """Returns the core's reply. Raises `ApiError` 400 where it refuses, which changes nothing."""
    try:
        return await work
    except ConfigError as error:
        raise ApiError(400, str(error), code="refused") from error
