"""A bound on bodies, before any of them is read."""

import json
from typing import Any

from medusa_jax.server.problems import Problem

MOST_BYTES = 4 << 20


class MostBody:
    """ASGI middleware: a body of more than MOST_BYTES is refused, whatever its header says."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > MOST_BYTES:
            await _refuse(send)
            return
        read = 0

        async def bounded() -> Any:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > MOST_BYTES:
                raise _problem()
            return message

        await self._app(scope, bounded, send)


def _problem() -> Problem:
    return Problem(413, f"a body may have at most {MOST_BYTES:,} bytes")


async def _refuse(send: Any) -> None:
    body = json.dumps(_problem().body()).encode()
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": 413, "headers": headers})
    await send({"type": "http.response.body", "body": body})
