"""Freed memory, which the C library would keep for later, goes back to the system.

Loading a model and compiling a program free hundreds of megabytes that nothing asks for again.
"""

import ctypes
import functools
from typing import Any


def give_back() -> None:
    """Gives back what can be given; milliseconds. Does nothing without glibc."""
    if trim := _trim():
        trim(0)


@functools.cache
def _trim() -> Any:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return None
