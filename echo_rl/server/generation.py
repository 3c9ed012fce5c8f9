"""Several completions of one HTTP request, as one stream of outputs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from typing import Any, cast

from echo_rl.contracts import Request, RequestOutput

Submit = Callable[[Request], AsyncIterator[RequestOutput]]
Indexed = tuple[int, RequestOutput]


async def merged(submit: Submit, requests: Sequence[Request]) -> AsyncIterator[Indexed]:
    """(index of the request, output) as they come, until every request is finished.

    The first error of any of them is raised. Closing the iterator early, or an error, cancels all.
    """
    if len(requests) == 1:
        async with _closing(submit(requests[0])) as outputs:
            async for output in outputs:
                yield 0, output
        return
    queue: asyncio.Queue[Indexed | Exception | None] = asyncio.Queue()
    tasks = [asyncio.create_task(_pump(submit, i, request, queue)) for i, request in enumerate(requests)]
    try:
        running = len(tasks)
        while running:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(submit: Submit, index: int, request: Request, queue: asyncio.Queue[Indexed | Exception | None]) -> None:
    """Puts the request's outputs, then None; an error in its place."""
    try:
        async with _closing(submit(request)) as outputs:
            async for output in outputs:
                queue.put_nowait((index, output))
        queue.put_nowait(None)
    except Exception as error:
        queue.put_nowait(error)


def _closing(outputs: AsyncIterator[RequestOutput]) -> aclosing[Any]:
    return aclosing(cast(Any, outputs))
