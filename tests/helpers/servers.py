"""Servers on free ports, in this process: the application and its worker as users run them."""

import asyncio
import contextlib
import re
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import uvicorn

from medusa_jax.server.app import create_app
from medusa_jax.server.service import Service


@contextlib.contextmanager
def running(service: Service) -> Iterator[str]:
    """The address of a server."""
    server: Any = uvicorn.Server(
        uvicorn.Config(create_app(service), port=0, log_level="error", lifespan="off")
    )
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
    # As little room as there is: a client that stops to read is noticed soon.
    server.servers[0].sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(timeout=10)
        service.stop()


def metric(address: str, name: str) -> float:
    """A figure of a server."""
    text = httpx.get(f"{address}/metrics").text
    return float(re.findall(rf"^vllm:{name}(?:{{[^}}]*}})? (\S+)$", text, re.M)[0])


def settled(address: str, service: Service) -> bool:
    """Whether no text runs or waits, soon."""
    names = "num_requests_running", "num_requests_waiting"
    for _ in range(200):
        if not service.taken and not any(metric(address, name) for name in names):
            return True
        time.sleep(0.05)
    return False


def connect(
    address: str, path: str, body: bytes, *, length: int | None = None, **options: int
) -> socket.socket:
    """A connection on which a request was sent, whose answer is not read yet.

    Args:
      length: of the body, as its header says; by default the truth.
      options: of the socket, such as SO_RCVBUF.
    """
    host, port = address.removeprefix("http://").split(":")
    made = socket.socket()
    for name, value in options.items():
        made.setsockopt(socket.SOL_SOCKET, getattr(socket, name), value)
    made.settimeout(60)
    made.connect((host, int(port)))
    size = len(body) if length is None else length
    lines = f"POST {path} HTTP/1.1", "Host: x", "Connection: close", f"Content-Length: {size}"
    made.sendall("\r\n".join([*lines, "", ""]).encode() + body)
    return made
