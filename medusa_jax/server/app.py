"""The HTTP application: OpenAI's routes on top of an engine."""

import asyncio
import hmac
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fastapi
import pydantic
from fastapi import FastAPI
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.exceptions import HTTPException

from medusa_jax import json_files
from medusa_jax.errors import InputError
from medusa_jax.server.answers import Form
from medusa_jax.server.connections import Bounds
from medusa_jax.server.problems import OF_A_TEXT, Problem, problem_of
from medusa_jax.server.protocol import ChatRequest, CompletionRequest, Request
from medusa_jax.server.service import Service
from medusa_jax.server.streams import Stream, until_gone, whole

PAGE = Path(__file__).with_name("page.html")


def create_app(service: Service) -> FastAPI:
    """The application."""
    app = FastAPI(title="medusa_jax", docs_url=None, redoc_url=None)
    app.add_middleware(Bounds)
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
        return Response(status_code=200 if service.alive else 503)

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
    request.refuse_unsupported(service.most_logprobs)
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
    if not prompts:
        raise Problem(400, "prompt is empty", "prompt")
    chat = isinstance(request, ChatRequest)
    form = Form(chat, service.name, service.logprobs(request))
    texts = service.open(prompts, request)
    if request.stream:
        return Stream(form, request, texts)
    try:
        return JSONResponse(await until_gone(http, whole(form, texts)))
    finally:
        for text in texts:
            text.close()


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

    async def of_a_text(http: fastapi.Request, error: Exception) -> Response:
        return await problem(http, problem_of(error))

    for each in OF_A_TEXT:
        app.add_exception_handler(each, of_a_text)

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
    schema = kind.model_json_schema()
    # A reference would count from the root of the whole description.
    whole = _resolved(schema, schema.pop("$defs", {}))
    return {"requestBody": {"content": {"application/json": {"schema": whole}}, "required": True}}


def _resolved(node: Any, definitions: dict[str, Any]) -> Any:
    """A schema with its definitions in place of the references to them."""
    if isinstance(node, list):
        return [_resolved(one, definitions) for one in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        return _resolved(definitions[node["$ref"].rpartition("/")[2]], definitions)
    return {name: _resolved(value, definitions) for name, value in node.items()}
