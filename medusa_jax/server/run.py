"""A server from its options to its end."""

import asyncio
import contextlib
import dataclasses
import os
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn

from medusa_jax import interrupts
from medusa_jax.checkpoints.hub import shipped
from medusa_jax.errors import InputError
from medusa_jax.progress import say
from medusa_jax.server.app import create_app
from medusa_jax.server.options import ServeOptions
from medusa_jax.server.service import Service
from medusa_jax.serving.async_generator import load_by_load
from medusa_jax.serving.options import DecodingOptions, ModelOptions

NEW_TOKENS = 1024  # of a chat that does not say how many
DRAIN_SECONDS = 120


def serve(options: ServeOptions) -> None:
    """Loads the model and serves it until a signal; what runs then is finished.

    Raises:
      InputError: an option is wrong, or the address cannot be listened at.
    """
    key = key_of(options.api_key_env)
    with _listening(options.host, options.port) as listener:
        service = make_service(options, key)
        with interrupts.Stop() as stop:
            asyncio.run(_serve(service, listener, stop))


def make_service(options: ServeOptions, key: str | None = None) -> Service:
    """The model behind a server; its engine runs."""
    shared = {field.name for field in dataclasses.fields(ModelOptions)}
    chosen = {name: value for name, value in vars(options).items() if name in shared}
    rows: dict[str, Any] = {"batch_size": options.slots, "most_logprobs": options.max_logprobs}
    generator = load_by_load(DecodingOptions(**chosen, **rows), NEW_TOKENS)
    name = options.served_model_name or options.model or shipped().name
    return Service(name, generator, max_waiting=options.max_waiting, key=key)


async def _serve(service: Service, listener: socket.socket, stop: interrupts.Stop) -> None:
    config = uvicorn.Config(
        create_app(service), log_level="warning", timeout_graceful_shutdown=DRAIN_SECONDS
    )
    server = _Server(config)
    host, port = listener.getsockname()[:2]
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started and not serving.done():
        await asyncio.sleep(0.01)
    print(f"listening on http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
    while not stop.number and not serving.done():
        await asyncio.sleep(0.05)
    service.drain()
    if service.taken:
        say(f"finishing {service.taken} texts")
    server.should_exit = True
    await serving
    service.stop()


class _Server(uvicorn.Server):
    """Signals are heard by `interrupts`."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket at an address, before the model is loaded, which takes long."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise InputError(
                f"--host {host} --port {port}: cannot listen there: {error.strerror or error}"
            ) from None
        yield listener


def key_of(variable: str | None) -> str | None:
    """The key in an environment variable; raises InputError where it is not set."""
    if variable is None:
        return None
    if not os.environ.get(variable):
        raise InputError(f"--api_key_env {variable}: that variable is not set, or empty")
    return os.environ[variable]
