"""/v1: OpenAI's models, completions and chat completions."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends

from echo_rl.server.api.auth import AuthCheck
from echo_rl.server.api.completion_response import CompletionResponse
from echo_rl.server.api.front import Front
from echo_rl.server.api.openai_format import ChatFormat, TextFormat
from echo_rl.server.api.replies import FAILURES, ChatReply, CompletionReply, Model, ModelList, completion_responses
from echo_rl.server.api.schemas import ChatRequest, CompletionRequest


def make_router(front: Front, check: AuthCheck) -> APIRouter:
    router = APIRouter(prefix="/v1", dependencies=[Depends(check)], tags=["OpenAI"])

    @router.get("/models", responses=FAILURES)
    async def models() -> ModelList:
        """The one model that is served."""
        return ModelList(data=[_model(front)])

    @router.get("/models/{name:path}", responses=FAILURES)
    async def model(name: str) -> Model:
        """The served model, by its name."""
        front.check_model(name)
        return _model(front)

    @router.post("/completions", response_model=None, responses=completion_responses(CompletionReply))
    async def completions(body: CompletionRequest) -> Any:
        """Continue one or several prompts."""
        return CompletionResponse(front, body, TextFormat())

    @router.post("/chat/completions", response_model=None, responses=completion_responses(ChatReply))
    async def chat(body: ChatRequest) -> Any:
        """Answer a conversation."""
        return CompletionResponse(front, body, ChatFormat())

    return router


def _model(front: Front) -> Model:
    info = front.engine_client.ready_info if front.engine_client.ready else None
    return Model(id=front.model, created=front.created, max_model_len=info.max_context if info else None)
