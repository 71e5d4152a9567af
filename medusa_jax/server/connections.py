"""Bounds of a connection: the size of a body, and how long a client may say or read nothing."""

import asyncio
import json
import time
from typing import Any

from starlette.requests import ClientDisconnect

from medusa_jax.server.problems import Problem

MOST_BYTES = 4 << 20
PATIENCE = 60.0  # seconds without a byte from a client, or without room for another one to it
LINGER = 5.0  # seconds in which the rest of a refused body is thrown away


class Bounds:
    """ASGI middleware.

    A body of more than MOST_BYTES is refused, whatever its header says. Who stops to send a body
    gets status 408. Who stops to read an answer loses it: the write fails, as if the client had
    gone.
    """

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > MOST_BYTES:
            await _refuse(receive, send)
            return
        read, whole, stalled = 0, False, False

        async def bounded() -> Any:
            nonlocal read, whole
            try:
                async with asyncio.timeout(None if whole else PATIENCE):
                    message = await receive()
            except TimeoutError:
                raise Problem(408, "the body did not come to its end") from None
            whole = not message.get("more_body", False)
            read += len(message.get("body", b""))
            if read > MOST_BYTES:
                await _rest(receive)
                raise _problem()
            return message

        async def patient(message: Any) -> None:
            nonlocal stalled
            try:
                async with asyncio.timeout(PATIENCE):
                    await send(message)
            except TimeoutError:  # an OSError, as writing to a client that has gone
                stalled = True
                raise

        try:
            await self._app(scope, bounded, patient)
        except (OSError, ClientDisconnect):
            if not stalled:
                raise


def _problem() -> Problem:
    return Problem(413, f"a body may have at most {MOST_BYTES:,} bytes")


async def _refuse(receive: Any, send: Any) -> None:
    body = json.dumps(_problem().body()).encode()
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": 413, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": True})
    await _rest(receive)
    await send({"type": "http.response.body", "body": b""})


async def _rest(receive: Any) -> None:
    """Reads on for a while: a client that is cut off while it sends would not read the answer."""
    until = time.monotonic() + LINGER
    try:
        async with asyncio.timeout(LINGER):
            while time.monotonic() < until and (await receive()).get("more_body", False):
                pass
    except TimeoutError:
        return
