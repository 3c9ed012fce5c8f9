"""/admin: the controller in force, A/B experiments, and what the server holds."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends
from pydantic import BaseModel, Field

from echo_rl.errors import ConfigError
from echo_rl.server.api import logs
from echo_rl.server.api.auth import Guard
from echo_rl.server.api.choices import Choices, public, public_report
from echo_rl.server.api.errors import ApiError
from echo_rl.server.api.front import Front
from echo_rl.server.api.replies import FAILURES
from echo_rl.server.core.experiment import ExperimentOptions

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
    seed: int = Field(ExperimentOptions.seed, ge=0, lt=2**63, description="Of the order of the arms.")


class ControllerState(BaseModel):
    controller: str
    previous: str | None = None
    """Who decided before the change."""


class Offer(BaseModel):
    name: str
    options: dict[str, Any]
    """What may be set, with its default."""
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
    """How the engine served its steps, by way; empty where it counts nothing."""
    environment: dict[str, str]
    core: dict[str, Any]
    """What the engine's core holds; its ``kv`` is "conserved" or says what is not. Empty while there is no core."""


def make_router(front: Front, choices: Choices, guard: Guard) -> APIRouter:
    router = APIRouter(prefix="/admin", dependencies=[Depends(guard)], tags=["Admin"], responses=FAILURES)
    host = front.host

    @router.get("/controllers")
    async def controllers() -> Offers:
        """What can be chosen."""
        offers = [
            Offer(name=name, options=choices.options(name), takes_checkpoint=choices.takes_checkpoint(name))
            for name in choices.names()
        ]
        return Offers(controllers=offers, checkpoints=list(choices.policies()))

    @router.get("/controller")
    async def controller() -> ControllerState:
        """Who decides."""
        return ControllerState(controller=public(host.controller))

    @router.put("/controller")
    async def set_controller(choice: ControllerChoice) -> ControllerState:
        """Let another controller decide from the next step on; nothing in flight is lost. Who is unsound is refused."""
        spec = _spec(choices, choice)
        previous = host.controller
        front.engine()
        await _done(host.set_controller(spec))
        logs.admin_action("controller", controller=public(spec), previous=public(previous))
        return ControllerState(controller=public(spec), previous=public(previous))

    @router.get("/ab")
    async def experiment() -> ExperimentState:
        """The running experiment, or the last one."""
        return _state(front)

    @router.post("/ab")
    async def start(body: Experiment) -> ExperimentState:
        """Start an experiment. 409 while another one runs."""
        control, treatment = _spec(choices, body.control), _spec(choices, body.treatment)
        front.engine()
        if host.experiment is not None and host.experiment.state == "running":
            raise ApiError(409, "an experiment is running; stop it first", code="experiment_running")
        options = body.model_dump(include={"block_seconds", "blocks", "harm", "seed"})
        await _done(host.start_experiment(control, treatment, **options))
        logs.admin_action("ab start", control=public(control), treatment=public(treatment), **options)
        return _state(front)

    @router.delete("/ab")
    async def stop() -> ExperimentState:
        """End the experiment; its control stays in force. Does nothing where none runs."""
        front.engine()
        if host.experiment is not None and host.experiment.state == "running":
            await _done(host.stop_experiment())
            logs.admin_action("ab stop")
        return _state(front)

    @router.get("/stats")
    async def stats() -> Stats:
        """What the server holds."""
        info = host.ready_info if host.ready else None
        return Stats(
            ready=front.ready,
            alive=host.alive,
            draining=front.draining,
            in_flight=host.in_flight,
            admitted=front.admission.unfinished,
            restarts=host.restarts,
            controller=public(host.controller),
            fallbacks=host.fallbacks,
            rollbacks=host.rollbacks,
            serving=host.serving,
            environment=info.environment if info else {},
            core=public_report(await host.inspect()) if info else {},
        )

    return router


def _spec(choices: Choices, choice: str | ControllerChoice) -> str:
    """Raises `ConfigError`, which the client gets as 400."""
    return choices.spec(choice) if isinstance(choice, str) else choices.spec(choice.controller, choice.checkpoint)


def _state(front: Front) -> ExperimentState:
    report = front.host.experiment
    return ExperimentState(
        state=report.state if report else "none", value=public_report(report.value) if report else {}
    )


async def _done(work: Awaitable[T]) -> T:
    """What the core answers. Raises `ApiError` 400 where it refuses, which changes nothing."""
    try:
        return await work
    except ConfigError as error:
        raise ApiError(400, str(error), code="refused") from error
