"""The speed of a run, measured from the end of a step to the end of another."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any


class Clock:
    """Tokens per second, padding included, since the last logged line; pauses do not count."""

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens  # of a step
        self._seen: float | None = None
        self._last = time.perf_counter()
        self.restart()

    def look(self, result: Any) -> None:
        """Notes the time if a step's array is there, before the host does something else.

        A CPU computes a step while it is dispatched: when it is reported, the next is done too.
        """
        if self._seen is None and result.is_ready():
            self._seen = time.perf_counter()

    def tick(self) -> float:
        """A step is done; the average so far."""
        self._last, self._seen = self._seen or time.perf_counter(), None
        self._steps += 1
        return self._tokens * self._steps / (self._last - self._start - self._paused)

    def restart(self) -> None:
        """Begins a new average at the last step's end."""
        self._start, self._steps, self._paused = self._last, 0, 0.0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time within does not count."""
        begun = time.perf_counter()
        yield
        self._paused += time.perf_counter() - begun
