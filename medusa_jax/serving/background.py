"""Programs that are compiled beside users, who wait as little as can be for them."""

import dataclasses
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from medusa_jax.decoding.decoder import Decoder
from medusa_jax.drafting.drafter import Drafter
from medusa_jax.serving.programs import Programs

LOWEST_PRIORITY = 19


class Background:
    """Compiles in a thread, one program at a time, while those that are there decode."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._closed = threading.Event()

    def compile_run(
        self, decoder: Decoder, drafter: Drafter, params: Any, state: Callable[[], Any]
    ) -> None:
        """Begins with `Decoder.run` by a drafter, if it is idle.

        Args:
          decoder: whose drafts are in the state.
          state: gives the abstract state.
        """
        busy = self._thread is not None and self._thread.is_alive()
        if busy or self._closed.is_set():
            return

        def work() -> None:
            programs = Programs(params, decoder.drafter)  # whose time is not the engine's
            give_way()
            programs.run(dataclasses.replace(decoder, drafter=drafter), params, state())

        # Python cannot end beside a thread that compiles: it aborts. So it waits for this thread.
        self._thread = threading.Thread(target=work, name="compiler", daemon=False)
        self._thread.start()

    def close(self) -> None:
        """Begins no further program."""
        self._closed.set()


def give_way() -> None:
    """Lowers the priority of XLA's threads that compile below those that decode, on Linux.

    They take all cores of a CPU, for seconds a program. Idle cores serve them as before. Those
    that decode have a name of their own there; those that compile have the name of the program.
    """
    tasks = Path("/proc/self/task")
    pythons = {thread.native_id for thread in threading.enumerate()}
    for task in tasks.iterdir() if tasks.is_dir() else ():
        try:
            unnamed = (task / "comm").read_text() == Path("/proc/self/comm").read_text()
            if unnamed and int(task.name) not in pythons:
                os.setpriority(os.PRIO_PROCESS, int(task.name), LOWEST_PRIORITY)
        except OSError:  # it has ended
            continue
