"""Programs that are compiled beside users, who wait as little as can be for them."""

import dataclasses
import functools
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from medusa_jax.decoding.decoder import Decoder
from medusa_jax.decoding.prompt_blocks import RowSettings
from medusa_jax.drafting.drafter import Drafter
from medusa_jax.serving.programs import Programs

LOWEST_PRIORITY = 19


class Background:
    """Compiles in a thread, one program at a time, while those that are there decode."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._closed = threading.Event()
        self._wanted: list[Callable[[], Any]] = []

    def compile_runs(
        self,
        programs: Programs,
        decoder: Decoder,
        choices: Sequence[tuple[int, Drafter]],
        settings: RowSettings,
    ) -> None:
        """Compiles `Decoder.run` for batches of some rows, by some drafters, one after another.

        What was wanted before and has not begun is forgotten.

        Args:
          programs: of the engine.
          decoder: whose drafts are in the states.
          choices: the most useful first.
          settings: that rows have.
        """
        own = Programs(programs.parameters, decoder.drafter)  # whose time is not the engine's

        def compiled(rows: int, drafter: Drafter) -> Any:
            state = own.abstract_state(decoder, rows, settings)
            return own.run(dataclasses.replace(decoder, drafter=drafter), state)

        self._wanted = [functools.partial(compiled, *choice) for choice in choices]
        busy = self._thread is not None and self._thread.is_alive()
        if busy or self._closed.is_set():
            return

        def work() -> None:
            while self._wanted and not self._closed.is_set() and threading.main_thread().is_alive():
                give_way()
                self._wanted.pop(0)()

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
