"""A server on a free port, in this process: the application and its worker as users run them."""

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import uvicorn

from medusa_jax.server.app import create_app
from medusa_jax.server.service import Service


@contextlib.contextmanager
def running(service: Service) -> Iterator[str]:
    """Its address."""
    server: Any = uvicorn.Server(
        uvicorn.Config(create_app(service), port=0, log_level="error", lifespan="off")
    )
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(timeout=10)
        service.stop()
