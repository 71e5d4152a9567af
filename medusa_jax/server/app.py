"""The HTTP application: OpenAI's routes on top of a worker."""

import asyncio
import copy
import dataclasses
import hmac
import itertools
import secrets
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import fastapi
import pydantic
from fastapi import FastAPI
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from medusa_jax import json_files
from medusa_jax.data.messages import read_messages
from medusa_jax.decoding.decoder import check_prompt
from medusa_jax.errors import InputError
from medusa_jax.server.answers import Form, event
from medusa_jax.server.body import MostBody
from medusa_jax.server.metrics import Metrics
from medusa_jax.server.problems import Problem
from medusa_jax.server.protocol import ChatRequest, CompletionRequest, Request
from medusa_jax.server.worker import Piece, Text, Worker
from medusa_jax.serving.generator import Generator
from medusa_jax.serving.jobs import Job

PAGE = Path(__file__).with_name("page.html")
LOOK_EVERY = 0.2  # seconds between two looks whether a client is still there


@dataclasses.dataclass(frozen=True)
class Service:
    """What a server serves.

    Attributes:
      name: of the model.
      generator: the model, its tokenizer and its engine.
      key: that clients must send, or None.
    """

    name: str
    generator: Generator
    worker: Worker
    metrics: Metrics
    key: str | None = None

    def job(self, prompt_ids: list[int], request: Request, choice: int) -> Job:
        """What the engine decodes for a choice of a request."""
        ends = () if request.ignore_eos else self.generator.stop_ids
        seed = secrets.randbits(63) if request.seed is None else request.seed
        new_tokens = self.generator.new_tokens(len(prompt_ids), request.new_tokens)
        return Job(
            prompt_ids,
            new_tokens,
            stream=(0, choice),
            seed=seed,
            sampling=request.sampling,
            stop_ids=tuple({*ends, *(request.stop_token_ids or ())}),
        )

    def chat_ids(self, request: ChatRequest) -> list[int]:
        """Token ids of a conversation."""
        messages = read_messages({"messages": request.messages}, "messages", "request")
        return self.generator.text.encode(messages)

    def completion_ids(self, prompt: str | list[int]) -> list[int]:
        """Token ids of a prompt: BOS and the text as it is, or the ids as they are."""
        if not isinstance(prompt, str):
            self.generator.text.check_ids(prompt)
            return prompt
        raw = copy.copy(self.generator.text)
        raw.raw = True
        return raw.encode([{"role": "user", "content": prompt}])


def create_app(service: Service) -> FastAPI:
    """The application; its worker must have been started."""
    app = FastAPI(title="medusa_jax", docs_url=None, redoc_url=None)
    app.add_middleware(MostBody)
    _handle_errors(app)
    guard = [fastapi.Depends(_key_check(service.key))]

    @app.post("/v1/chat/completions", dependencies=guard, openapi_extra=_schema(ChatRequest))
    async def chat(http: fastapi.Request) -> Response:
        request = await _read(http, ChatRequest, service)
        ids = await _ids(service.chat_ids, request, "messages")
        return await _answer(service, http, request, [ids])

    @app.post("/v1/completions", dependencies=guard, openapi_extra=_schema(CompletionRequest))
    async def completions(http: fastapi.Request) -> Response:
        request = await _read(http, CompletionRequest, service)
        prompts = [await _ids(service.completion_ids, one, "prompt") for one in request.prompts]
        return await _answer(service, http, request, prompts)

    @app.get("/v1/models", dependencies=guard)
    async def models() -> dict[str, Any]:
        context = service.generator.engine.decoder.capacity
        card = {"id": service.name, "object": "model", "created": 0, "owned_by": "medusa_jax"}
        return {"object": "list", "data": [card | {"max_model_len": context}]}

    @app.get("/health")
    async def health() -> Response:
        return Response(status_code=200 if service.worker.alive else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/")
    async def page() -> Response:
        return FileResponse(PAGE)

    return app


async def _read(http: fastapi.Request, kind: type[Any], service: Service) -> Any:
    """The request in a body. Raises Problem."""
    try:
        text = (await http.body()).decode("utf-8")
        request = kind.model_validate(json_files.parse(text, "the body"))
    except UnicodeDecodeError:
        raise Problem(400, "the body is not UTF-8") from None
    except InputError as error:
        raise Problem(400, str(error)) from None
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(map(str, first["loc"])) or None
        raise Problem(400, f"{field or 'the body'}: {first['msg']}", field) from None
    if request.model not in (None, "", service.name):
        raise Problem(
            404, f"the model {json_files.short(request.model)} does not exist; this server has "
            f"{service.name}", "model", "model_not_found",
        )  # fmt: skip
    request.refuse_unsupported()
    return request


async def _ids(encode: Any, content: Any, field: str) -> list[int]:
    """Token ids of a field, made beside the event loop. Raises Problem."""
    try:
        return await asyncio.to_thread(encode, content)
    except InputError as error:
        raise Problem(400, str(error), field) from None


async def _answer(
    service: Service, http: fastapi.Request, request: Request, prompts: Sequence[list[int]]
) -> Response:
    """Decodes all choices of all prompts, and writes them as they come or once they are whole."""
    choices = range(request.n or 1)
    jobs = [service.job(ids, request, choice) for ids in prompts for choice in choices]
    if not jobs:
        raise Problem(400, "prompt is empty", "prompt")
    for job in jobs:
        try:
            check_prompt(service.generator.engine.decoder, job.prompt_ids, job.max_new_tokens)
        except InputError as error:
            raise Problem(400, str(error), code="context_length_exceeded") from None
    size = service.generator.engine.decoder.drafter.size
    form = Form(isinstance(request, ChatRequest), service.name, size)
    texts = service.worker.open(jobs, request.stops)
    if request.stream:
        return Stream(form, request, texts)
    try:
        return JSONResponse(await _until_gone(http, _whole(form, texts)))
    finally:
        for text in texts:
            text.close()


async def _whole(form: Form, texts: Sequence[Text]) -> dict[str, Any]:
    async def read(text: Text) -> tuple[str, Any]:
        pieces = [piece async for piece in text.pieces()]
        return "".join(itertools.chain(*(piece.texts for piece in pieces))), pieces[-1].output

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
        finally:  # the client may have gone
            for text in self._texts:
                text.close()


async def _events(form: Form, request: Request, texts: Sequence[Text]) -> AsyncIterator[str]:
    steps = bool((request.model_extra or {}).get("stream_steps"))
    outputs: dict[int, Any] = {}
    for index in range(len(texts)) if form.chat else ():
        yield form.first(index)
    try:
        async for index, piece in _merged(texts):
            if piece.output is not None:
                outputs[index] = piece.output
            yield form.chunk(index, piece, steps=steps)
    except Problem as problem:
        yield event(problem.body())
        return
    if request.stream_options and request.stream_options.include_usage:
        yield form.last([outputs[index] for index in sorted(outputs)])
    yield event("[DONE]")


async def _merged(texts: Sequence[Text]) -> AsyncIterator[tuple[int, Piece]]:
    """Pieces of all texts with the numbers of these. Raises Problem."""
    coming: asyncio.Queue[tuple[int, Piece | Problem]] = asyncio.Queue()

    async def read(index: int, text: Text) -> None:
        try:
            async for piece in text.pieces():
                coming.put_nowait((index, piece))
        except Problem as problem:
            coming.put_nowait((index, problem))

    tasks = [asyncio.create_task(read(i, text)) for i, text in enumerate(texts)]
    running = len(tasks)
    try:
        while running:
            index, piece = await coming.get()
            if isinstance(piece, Problem):
                raise piece
            running -= piece.output is not None
            yield index, piece
    finally:
        for task in tasks:
            task.cancel()


async def _until_gone(http: fastapi.Request, work: Any) -> Any:
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


def _key_check(key: str | None) -> Any:
    async def check(http: fastapi.Request) -> None:
        if key is None:
            return
        sent = http.headers.get("authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(sent.encode(), key.encode()):
            raise Problem(401, "the API key is missing or wrong", code="invalid_api_key")

    return check


def _handle_errors(app: FastAPI) -> None:
    """All errors in OpenAI's form."""

    @app.exception_handler(Problem)
    async def problem(_: fastapi.Request, error: Problem) -> Response:
        return JSONResponse(error.body(), error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def http(_: fastapi.Request, error: HTTPException) -> Response:
        said = Problem(error.status_code, str(error.detail))
        return JSONResponse(said.body(), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def unforeseen(_: fastapi.Request, error: Exception) -> Response:
        said = Problem(500, f"the server failed: {type(error).__name__}")
        return JSONResponse(said.body(), 500)


def _schema(kind: type[pydantic.BaseModel]) -> dict[str, Any]:
    """What the interface's description says of a body, which is read by hand."""
    content = {"application/json": {"schema": kind.model_json_schema()}}
    return {"requestBody": {"content": content, "required": True}}
