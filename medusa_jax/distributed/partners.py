"""Processes that compute together: what is left of them says so when another dies.

In Python the others learn of it by an error of a sum over processes. In C++ JAX learns of it
too, and aborts. Both end here: one message, exit code 1.
"""

import contextlib
import ctypes
import dataclasses
import functools
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax._src import distributed

_LOST = re.compile(
    r"Gloo|NCCL|UNAVAILABLE|Socket closed|Connection (reset|closed|refused)|unhealthy|"
    r"coordination service|Barrier timed out|heartbeat"
)
HEARTBEAT = 30  # seconds without a sign of life, after which a process counts as gone
_PATIENCE = 5.0  # seconds in which the others may leave, too


@dataclasses.dataclass
class _Run:
    """What this process knows of the others.

    Attributes:
      handler: for C, which holds its address only; None where this process is alone.
      advice: what the message says of saved work.
      code: with which this process leaves.
      lock: of the last words.
    """

    handler: Any = None
    advice: Callable[[], str] = str
    code: int | None = None
    lock: Any = dataclasses.field(default_factory=threading.Lock)


_run = _Run()


def join(*address: Any) -> None:
    """Joins the others; the arguments are those of `jax.distributed.initialize`.

    Raises:
      ValueError: there is no cluster, so this process is alone.
    """
    api: Any = distributed._jax
    client = api.get_distributed_runtime_client
    # JAX 0.10 cannot call a Python function here: it aborts without a stack trace instead.
    api.get_distributed_runtime_client = functools.partial(client, missed_heartbeat_callback=_gone)
    try:
        jax.distributed.initialize(*address, heartbeat_timeout_seconds=HEARTBEAT)
    finally:
        api.get_distributed_runtime_client = client
    _run.handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(_gone)
    ctypes.CDLL(None).signal(signal.SIGABRT, _run.handler)


def advise(advice: Callable[[], str]) -> None:
    """Sets what the message says of saved work."""
    _run.advice = advice


def end_if_lost(error: Exception) -> None:
    """Ends this process with a message where an error means that another process has died."""
    if _run.handler is not None and _LOST.search(str(error)):
        _end()


@contextlib.contextmanager
def ending_if_lost() -> Iterator[None]:
    """Around work whose end would wait for the others, for example for their checkpoint."""
    try:
        yield
    except Exception as error:
        end_if_lost(error)
        raise


def leave(code: int) -> None:
    """Ends a process that has failed: with the others where all fail alike, else without them."""
    if _run.handler is None:
        return
    if _run.code is None:
        _run.code = code
        goodbye = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        goodbye.start()
        goodbye.join(_PATIENCE)
    os._exit(code)


def _gone(*_: object) -> None:
    """Called by the thread of C++ that heard of it."""
    if _run.code is not None:  # this process is on its way out
        os._exit(_run.code)
    _end()


def _end() -> None:
    """Says what has happened, and ends at once, before C++ can say it in words of its own."""
    with _run.lock:  # whoever comes second has nothing to add
        parts = "another process is gone", _run.advice(), "start all again"
        said = f"\nerror: {'; '.join(filter(None, parts))}\n".encode()
        stderr = os.dup(2)
        with open(os.devnull, "wb") as nowhere:  # for what C++ is about to say meanwhile
            os.dup2(nowhere.fileno(), 2)
        os.write(stderr, said)
        os._exit(1)
