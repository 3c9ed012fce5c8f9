"""Describes the answers of /v1 for the OpenAPI document. They are written from dictionaries, not through these."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    error: ErrorBody


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TextLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class TextChoice(BaseModel):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"]


class CompletionReply(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


class Alternative(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class ChatToken(Alternative):
    top_logprobs: list[Alternative]


class ChatLogprobs(BaseModel):
    content: list[ChatToken]
    refusal: None = None


class AssistantMessage(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


class ChatReply(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "echo-rl"
    max_model_len: int | None = None
    """Longest prompt plus output in tokens, once the engine is loaded."""


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


FAILURES: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorReply, "description": "The request can't be served as it is"},
    "5XX": {"model": ErrorReply, "description": "The server can't serve it (now)"},
}
"""Document errors as they are; this also keeps FastAPI's own 422 out of the document."""


def completion_responses(reply: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """Both forms of an answer, and errors."""
    stream: dict[str, Any] = {"text/event-stream": {}}
    return {200: {"model": reply, "description": "The answer, or a stream of chunks", "content": stream}, **FAILURES}
