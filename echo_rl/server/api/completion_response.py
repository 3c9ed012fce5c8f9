"""One completion request from admission to its last byte, as an ASGI response.

Everything that must be undone (the places held, the engine's work) is undone where it was done, on whatever way out: an
answer, an error, a timeout, a client that left.
"""

from __future__ import annotations

import asyncio
import codecs
import time
from collections.abc import Coroutine, Sequence
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Any

from fastapi.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from echo_rl.contracts import RequestOutput, TokenLogprob
from echo_rl.server.api.errors import ApiError, as_api_error
from echo_rl.server.api.front import Front
from echo_rl.server.api.openai_format import DONE, ChunkWriter, CompletionFormat, error_event, usage
from echo_rl.server.api.request_stats import CLIENT_GONE, KEY, RequestStats
from echo_rl.server.api.schemas import Body
from echo_rl.server.client.streams import OutputStream

if TYPE_CHECKING:
    from echo_rl.runtime.tokenizer import Tokenizer

LAST_BYTES_SECONDS = 3
"""Seconds that connections get to close once every request has ended: live views never end by themselves, and a client
may have stopped reading."""
STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class Choice:
    """The state of one completion that is being served."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.texts: list[str] = []
        self.logprobs: list[TokenLogprob] = []
        self.offset = 0
        """Length of the text of the tokens whose log-probabilities were sent."""
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self.finish_reason: str | None = None
        self.tokens = 0
        self.first = self.last = 0.0
        """Times at which its first and its last tokens came."""

    def advance(self, tokenizer: Tokenizer, token: int) -> None:
        """Moves `offset` past the text of a token: none of a special one, a character with the last of its parts."""
        alone = tokenizer.decode((token,))
        if not alone and not tokenizer.decode((token, token)):
            return
        text = self._characters.decode(tokenizer.token_bytes(token))
        if not self.offset and text.endswith(alone):
            text = alone  # some decoders drop the space that begins a text
        self.offset += len(text)

    @property
    def tpot(self) -> float | None:
        """Returns the seconds per token after the first, where there are some."""
        return (self.last - self.first) / (self.tokens - 1) if self.tokens > 1 else None


class CompletionResponse(Response):
    """Serves `body`; `form` says how the answer looks."""

    _stats: RequestStats
    """Given by `RequestStatsMiddleware`."""

    def __init__(self, front: Front, body: Body, form: CompletionFormat) -> None:
        super().__init__()
        self._front, self._body, self._form = front, body, form
        self._choices: dict[str, Choice] = {}
        """The choices by their request's id, in the order of their index."""
        self._streaming = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._stats = scope[KEY]
        self._stats.streamed = bool(self._body.stream)
        if not await unless_gone(receive, self._serve(scope, receive, send)):
            self._stats.status = CLIENT_GONE
            self._cut_off("cancelled")

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        front, body = self._front, self._body
        front.loaded_engine()
        front.check_model(body.model)
        try:
            with front.admission.enter(body.copies * body.prompt_count):
                async with asyncio.timeout(front.config.request_timeout):
                    async with aclosing(await self._submit()) as outputs:
                        if body.stream:
                            await self._stream(outputs, send)
                        else:
                            await (await self._answer(outputs))(scope, receive, send)
        except Exception as error:
            await self._fail(self._failure(error), send)

    async def _submit(self) -> OutputStream:
        requests = await self._front.requests(self._stats.id, self._body)
        self._stats.prompt_tokens = sum(len(request.prompt) for request in requests) // self._body.copies
        self._front.metrics.prompt_tokens.inc(self._stats.prompt_tokens)
        self._choices = {request.id: Choice(index) for index, request in enumerate(requests)}
        return self._front.engine_client.submit(*requests)

    async def _next(self, outputs: OutputStream) -> list[tuple[Choice, RequestOutput]]:
        """Returns the outputs since the last time, which it measures; none once every choice is finished.

        Raises `ApiError` on what is no completion.
        """
        new = [(self._choices[output.id], output) for output in await outputs.take()]
        now = time.perf_counter()
        for choice, output in new:
            self._measure(choice, output, now)
        if not new and not all(choice.finish_reason for choice in self._choices.values()):
            raise ApiError(500, "the engine ended this request without a reason", code="engine_error")
        return new

    def _measure(self, choice: Choice, output: RequestOutput, now: float) -> None:
        metrics, stats, count = self._front.metrics, self._stats, len(output.tokens)
        if count:
            if choice.tokens:
                metrics.more_tokens(count, now - choice.last)
            else:
                choice.first = now
                metrics.ttft.observe(now - stats.started)
            choice.last = now
            choice.tokens += count
            stats.first_token = stats.first_token or now
            stats.output_tokens += count
            metrics.generated_tokens.inc(count)
        if output.finish_reason == "error":
            raise ApiError(500, output.error or "the engine failed on this request", code="engine_error")
        if output.finish_reason == "cancelled":
            raise ApiError(503, "the server dropped this request; it is shutting down", code="cancelled")
        if output.finish_reason:
            choice.finish_reason = output.finish_reason
            stats.finish_reasons.append(output.finish_reason)
            metrics.completed(now - stats.started, choice.tpot)

    def _cut_off(self, reason: str) -> None:
        """Gives this reason to every unfinished completion; where none is known yet, to the request as a whole."""
        cut = [choice for choice in self._choices.values() if choice.finish_reason is None]
        for choice in cut:
            choice.finish_reason = reason
        self._stats.finish_reasons += [reason] * (len(cut) if self._choices else 1)

    async def _answer(self, outputs: OutputStream) -> JSONResponse:
        while new := await self._next(outputs):
            for choice, output in new:
                choice.texts.append(output.text)
                choice.logprobs.extend(output.logprobs)
        return JSONResponse(
            {
                "id": self._form.prefix + self._stats.id,
                "object": self._form.kind,
                "created": int(time.time()),
                "model": self._front.model,
                "choices": [self._whole(choice) for choice in self._choices.values()],
                "usage": usage(self._stats.prompt_tokens, self._stats.output_tokens),
            }
        )

    def _whole(self, choice: Choice) -> dict[str, Any]:
        return {
            "index": choice.index,
            **self._form.choice("".join(choice.texts)),
            "logprobs": self._logprobs(choice, choice.logprobs),
            "finish_reason": choice.finish_reason,
        }

    async def _stream(self, outputs: OutputStream, send: Send) -> None:
        wanted, stats = self._body.wants_usage, self._stats
        writer = ChunkWriter(self._form, self._form.prefix + stats.id, int(time.time()), self._front.model, wanted)
        while new := await self._next(outputs):
            chunks = b"" if self._streaming else await self._open(writer, send)
            for choice, output in new:
                chunks += self._chunk(writer, choice, output)
            if chunks:
                await send({"type": "http.response.body", "body": chunks, "more_body": True})
        last = writer.usage(usage(stats.prompt_tokens, stats.output_tokens)) if wanted else b""
        await send({"type": "http.response.body", "body": last + DONE})

    def _chunk(self, writer: ChunkWriter, choice: Choice, output: RequestOutput) -> bytes:
        """Returns nothing where the output says nothing yet."""
        logprobs = self._logprobs(choice, output.logprobs)
        text = writer.text(choice.index, output.text, logprobs) if output.text or logprobs else b""
        return text + writer.finish(choice.index, output.finish_reason) if output.finish_reason else text

    async def _open(self, writer: ChunkWriter, send: Send) -> bytes:
        """Sends the headers: only with the first output in hand is it sure that there is something to stream."""
        self._streaming = True
        await send({"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS})
        return writer.opening(len(self._choices))

    def _logprobs(self, choice: Choice, tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not tokens:
            return None
        tokenizer, offsets = self._front.tokenizer, []
        for token in tokens:
            offsets.append(choice.offset)
            choice.advance(tokenizer, token.token)
        return self._form.logprobs(tokens, tokenizer.token_bytes, offsets)

    def _failure(self, error: Exception) -> ApiError:
        if isinstance(error, TimeoutError):
            seconds = self._front.config.request_timeout
            return ApiError(504, f"the request took longer than {seconds:g} s and was cancelled", code="timeout")
        return as_api_error(error)

    async def _fail(self, failure: ApiError, send: Send) -> None:
        """Sends the failure as an event where the stream has begun; else raises it."""
        if failure.status_code >= 500:
            self._cut_off("error")
        if not self._streaming:
            raise failure
        body = error_event(failure.body) + DONE
        with suppress(TimeoutError):  # a client that doesn't read isn't waited for: its answer is cut off
            async with asyncio.timeout(LAST_BYTES_SECONDS):
                await send({"type": "http.response.body", "body": body})


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, None]) -> bool:
    """Does the work, or cancels it when the client leaves. Returns whether it was done; raises what it raised."""
    serving, leaving = asyncio.create_task(work), asyncio.create_task(_gone(receive))
    try:
        await asyncio.wait((serving, leaving), return_when=asyncio.FIRST_COMPLETED)
        done = serving.done()
    finally:
        for task in (serving, leaving):
            task.cancel()
        await asyncio.gather(serving, leaving, return_exceptions=True)
    if done:
        serving.result()
    return done


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
