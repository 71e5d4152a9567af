"""A time for measurements, in minutes."""

import time
from typing import Protocol


class Over(Protocol):
    """Whether a part of the time is over, by default all of it."""

    def __call__(self, part: float = 1.0) -> bool: ...


def clock(minutes: float | None) -> Over:
    """So many minutes from now on; None never ends."""
    begun = time.monotonic()

    def over(part: float = 1.0) -> bool:
        return minutes is not None and time.monotonic() > begun + 60 * minutes * part

    return over
