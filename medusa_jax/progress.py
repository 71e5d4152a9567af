"""The progress bar of every command."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


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
    bar = tqdm(
        items,
        desc=label,
        total=total,
        initial=done,
        unit=f" {unit}",
        smoothing=0 if average else 0.3,
        disable=not shown,
        dynamic_ncols=True,
    )
    if shown:
        bar.initial -= (side_by_side - 1) / 2  # the rate is of what was done since
    return bar


def say(message: str) -> None:
    """A line on stderr, above a bar."""
    tqdm.write(message, file=sys.stderr)
