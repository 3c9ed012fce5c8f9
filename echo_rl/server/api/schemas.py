"""The bodies that clients may send to /v1: OpenAI's fields, and a few more. Unknown fields are ignored."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    StrictInt,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from echo_rl.contracts import MAX_LOGPROBS, SamplingParams

if TYPE_CHECKING:
    from echo_rl.runtime.tokenizer import Tokenizer

SEEDS = 2**63
EVERY_TOKEN = "Covers every token, also those of a stop string and of the turn's end, which the text leaves out."


@dataclass(frozen=True)
class Only:
    """Marks a field of which this server supports these values alone; null always means absent."""

    allowed: tuple[Any, ...] = ()

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"enum": [None, *self.allowed]}

    def _check(self, value: Any) -> None:
        if value is not None and value not in self.allowed:
            raise PydanticCustomError("unsupported", "this server does not support it; leave it out")


Absent = Annotated[Any, Only()]
Zero = Annotated[Any, Only((0,))]
One = Annotated[Any, Only((1,))]
Off = Annotated[Any, Only((False,))]
Empty = Annotated[Any, Only(([],))]
NoBias = Annotated[Any, Only(({},))]
PlainText = Annotated[Any, Only(({"type": "text"},))]
TextAlone = Annotated[Any, Only((["text"],))]
NoChoice = Annotated[Any, Only(("none", "auto"))]
NonEmpty = Annotated[str, Field(min_length=1, max_length=256)]
Token = Annotated[StrictInt, Field(ge=0, lt=2**31)]
Tokens = Annotated[list[Token], Field(min_length=1)]
Texts = Annotated[list[str], Field(min_length=1)]


class StreamOptions(BaseModel):
    include_usage: bool | None = False


class Sampling(BaseModel):
    """The fields of both kinds of completion. Defaults are OpenAI's: temperature 1, a random seed."""

    model_config = ConfigDict(extra="ignore")
    default_limit: ClassVar[int | None] = None
    """Output tokens where the client gives no limit; None allows what the context leaves."""

    model: str | None = Field(None, description="The served model's name; absent means it.")
    n: int | None = Field(1, ge=1, le=128, description="Completions of the prompt; the i-th is drawn with seed + i.")
    temperature: float | None = Field(1.0, ge=0.0, le=2.0, allow_inf_nan=False)
    top_p: float | None = Field(1.0, gt=0.0, le=1.0, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=-1, lt=2**31, description="Extension: 0 and -1 keep all tokens.")
    seed: int | None = Field(None, ge=-SEEDS, lt=SEEDS)
    stop: NonEmpty | Annotated[list[NonEmpty], Field(max_length=16)] | None = None
    ignore_eos: bool | None = Field(False, description="Extension: go on past the end-of-text token.")
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    speculation: Literal["on", "off"] | None = Field("on", description="Extension: off decodes one token a step.")
    presence_penalty: Zero = None
    frequency_penalty: Zero = None
    logit_bias: NoBias = None
    tools: Empty = None
    tool_choice: NoChoice = None
    functions: Empty = None
    response_format: PlainText = None
    # Fields of vLLM and SGLang that change what is drawn, so that they must not be ignored.
    repetition_penalty: One = None
    min_p: Zero = None
    min_tokens: Zero = None
    stop_token_ids: Empty = None
    structured_outputs: Absent = None
    guided_json: Absent = None
    guided_regex: Absent = None
    guided_choice: Absent = None
    guided_grammar: Absent = None
    chat_template_kwargs: NoBias = None
    continue_final_message: Off = None

    @model_validator(mode="after")
    def _check_streaming(self) -> Sampling:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("stream_options", "stream_options needs stream to be true")
        return self

    @property
    def copies(self) -> int:
        return self.n or 1

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def params(self, max_new_tokens: int) -> list[SamplingParams]:
        """Returns how each of the n completions of one prompt is drawn."""
        seed = secrets.randbits(63) if self.seed is None else self.seed
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [
            SamplingParams(
                temperature=1.0 if self.temperature is None else self.temperature,
                top_k=max(0, self.top_k or 0),
                top_p=1.0 if self.top_p is None else self.top_p,
                seed=(seed + i) % SEEDS,
                max_new_tokens=max_new_tokens,
                stop=tuple(stop),
                ignore_eos=bool(self.ignore_eos),
            )
            for i in range(self.copies)
        ]


class CompletionRequest(Sampling):
    """Continue one or several prompts."""

    default_limit = 16

    prompt: str | Texts | Tokens | Annotated[list[Tokens], Field(min_length=1)]
    max_tokens: int | None = Field(None, ge=1, lt=2**31, description="16 where it is absent.")
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS, description=EVERY_TOKEN)
    best_of: int | None = Field(None, description="Must equal n where it is given.")
    echo: Off = None
    suffix: Absent = None

    @model_validator(mode="after")
    def _check_best_of(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != self.copies:
            raise PydanticCustomError("unsupported", "best_of other than n is not supported; leave it out")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """Returns each prompt, as text or as ids."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)

    @property
    def prompt_count(self) -> int:
        return len(self.prompts)

    @property
    def characters(self) -> int:
        """Returns how many characters `encode` tokenises."""
        return sum(len(prompt) for prompt in self.prompts if isinstance(prompt, str))

    def encode(self, tokenizer: Tokenizer) -> list[tuple[int, ...]]:
        """Returns the tokens of each prompt."""
        return [tokenizer.encode(p, special=True) if isinstance(p, str) else tuple(p) for p in self.prompts]

    @property
    def limit(self) -> int | None:
        return self.max_tokens

    @property
    def top_alternatives(self) -> int | None:
        return self.logprobs


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One turn. ``developer`` is read as ``system``."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]

    @property
    def plain(self) -> dict[str, str]:
        """Returns the turn as chat templates take it."""
        role = "system" if self.role == "developer" else self.role
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": role, "content": text}


class ChatRequest(Sampling):
    """Answer a conversation."""

    prompt_count: ClassVar[int] = 1

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31, description="Goes before max_tokens.")
    logprobs: bool | None = Field(False, description=EVERY_TOKEN)
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    audio: Absent = None
    modalities: TextAlone = None
    function_call: NoChoice = None

    @model_validator(mode="after")
    def _check_logprobs(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError("top_logprobs", "top_logprobs needs logprobs to be true")
        return self

    @property
    def characters(self) -> int:
        return sum(len(message.plain["content"]) for message in self.messages)

    def encode(self, tokenizer: Tokenizer) -> list[tuple[int, ...]]:
        return [tokenizer.chat([message.plain for message in self.messages])]

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def top_alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


Body = CompletionRequest | ChatRequest
