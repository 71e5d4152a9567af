"""The progress bar of every command."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

SIDE_BY_SIDE = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{left}, {rate_fmt}{postfix}]"


def progress(
    items: Iterable[Any] | None = None,
    *,
    unit: str,
    total: int | None = None,
    done: int = 0,
    label: str | None = None,
    average: bool = False,
    side_by_side: int = 1,
    shown: bool = True,
) -> Any:
    """A bar on stderr, around `items` or moved by its `update`.

    Args:
      unit: what is counted, in the plural.
      done: how many were finished before this process started.
      average: the time left is told by the mean rate so far, not by the latest: for parts of
        unequal length.
      side_by_side: parts that run at once; on average half of each is done, which the time left
        counts too.
      shown: False returns a bar that draws nothing.
    """
    bar = _Bar(
        items,
        desc=label,
        total=total,
        initial=done,
        unit=f" {unit}",
        smoothing=0 if average else 0.3,
        disable=not shown,
        dynamic_ncols=True,
        bar_format=SIDE_BY_SIDE if side_by_side > 1 else None,
    )
    bar.side_by_side = side_by_side
    return bar


class _Bar(tqdm):
    """A bar that also knows the time left of parts that run side by side."""

    side_by_side = 1

    @property
    def format_dict(self) -> dict[str, Any]:
        known = super().format_dict
        done, total = known["n"] - known["initial"], (known["total"] or 0) - known["initial"]
        left = seconds_left(done, total, self.side_by_side, known["elapsed"])
        return {**known, "left": "?" if left is None else self.format_interval(left)}


def seconds_left(done: int, total: int, side_by_side: int, seconds: float) -> float | None:
    """Seconds until all parts are done; those that run are half done on average.

    After 40 of 100 parts in 10 s, of which 20 run at once, half of the work is done: 10 s. None
    where nothing is done and nothing runs.
    """
    work = done + min(side_by_side, total - done) / 2
    return seconds * (total - work) / work if work else None


def say(message: str) -> None:
    """A line on stderr, above a bar."""
    tqdm.write(message, file=sys.stderr)
