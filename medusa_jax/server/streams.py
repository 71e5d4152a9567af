"""Texts of a request, gathered as they come: into one answer, or into a stream of events."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import fastapi
from fastapi.responses import StreamingResponse

from medusa_jax.server.answers import Form, event
from medusa_jax.server.problems import OF_A_TEXT, Problem, problem_of
from medusa_jax.server.protocol import Request
from medusa_jax.serving.worker import Piece, Text

LOOK_EVERY = 0.2  # seconds between two looks whether a client is still there


async def whole(form: Form, texts: Sequence[Text]) -> dict[str, Any]:
    """The answer, once all its texts have ended. Raises ExceptionGroup, as `Text.pieces`."""

    async def read(text: Text) -> tuple[str, Any]:
        pieces = [piece async for piece in text.pieces()]
        return "".join(piece.text for piece in pieces), pieces[-1].output

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(read(text)) for text in texts]
    answers, outputs = zip(*(task.result() for task in tasks), strict=True)
    return form.whole(answers, outputs)


class Stream(StreamingResponse):
    """Server-sent events of all texts of a request, as they come."""

    def __init__(self, form: Form, request: Request, texts: Sequence[Text]) -> None:
        super().__init__(_events(form, request, texts), media_type="text/event-stream")
        self._texts = texts

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:  # the client may have gone, or have stopped to read
            for text in self._texts:
                text.close()


async def _events(form: Form, request: Request, texts: Sequence[Text]) -> AsyncIterator[str]:
    outputs: dict[int, Any] = {}
    offsets = [0] * len(texts)
    for index in range(len(texts)) if form.chat else ():
        yield form.first(index)
    try:
        async for index, piece in _merged(texts):
            if piece.output is not None:
                outputs[index] = piece.output
            steps = bool(request.stream_steps)
            yield form.chunk(index, piece, steps=steps, offset=offsets[index])
            if form.logprobs is not None:
                offsets[index] += form.logprobs.length(piece.token_ids)
    except OF_A_TEXT as error:
        yield event(problem_of(error).body())
        return
    if request.stream_options and request.stream_options.include_usage:
        yield form.last([outputs[index] for index in sorted(outputs)])
    yield event("[DONE]")


async def _merged(texts: Sequence[Text]) -> AsyncIterator[tuple[int, Piece]]:
    """Pieces of all texts with the numbers of these. Raises as `Text.pieces`."""
    coming: asyncio.Queue[tuple[int, Piece | Exception]] = asyncio.Queue()

    async def read(index: int, text: Text) -> None:
        try:
            async for piece in text.pieces():
                coming.put_nowait((index, piece))
        except Exception as error:
            coming.put_nowait((index, error))

    tasks = [asyncio.create_task(read(i, text)) for i, text in enumerate(texts)]
    running = len(tasks)
    try:
        while running:
            index, piece = await coming.get()
            if isinstance(piece, Exception):
                raise piece
            running -= piece.output is not None
            yield index, piece
    finally:
        for task in tasks:
            task.cancel()


async def until_gone(http: fastapi.Request, work: Any) -> Any:
    """The result of work, which is given up where the client has gone."""
    task = asyncio.ensure_future(work)
    try:
        while not (await asyncio.wait({task}, timeout=LOOK_EVERY))[0]:
            if await http.is_disconnected():
                raise Problem(499, "the client has gone")
        return task.result()
    except ExceptionGroup as group:  # of the first choice that failed
        raise group.exceptions[0] from None
    finally:
        task.cancel()
