"""What orbax and TensorStore print when reading or writing fails: an exception tells it already.

Orbax stops at the first of many parallel reads or writes that fails. The others end later, in an
event loop that is closed by then, and each prints a traceback.
"""

import functools
import gc
import inspect
import logging
import sys
import traceback
from collections.abc import Callable
from typing import Any


@functools.cache
def silence() -> None:
    """Leaves out those tracebacks, and orbax's log of all that it does."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    sys.unraisablehook = functools.partial(_unless_late, sys.unraisablehook)


def forget(error: BaseException | None) -> None:
    """Drops the coroutines that an error's frames hold, which would complain at the very end."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
    gc.collect()


def _unless_late(show: Callable[[Any], None], unraisable: Any) -> None:
    late = str(unraisable.exc_value) == "Event loop is closed"
    if not late and not inspect.iscoroutine(unraisable.object):
        show(unraisable)
