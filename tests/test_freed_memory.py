"""Freed memory goes back to the system."""

import platform
from pathlib import Path

import numpy as np
import pytest

from medusa_jax import freed_memory

SIZE = 64 * 1024  # bytes: small enough for the heap, which shrinks from its end only
COUNT = 3000


def resident() -> int:
    """Bytes of memory that this process occupies."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return 4096 * pages


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries cannot be asked")
def test_what_is_freed_in_the_middle_of_the_heap_goes_back():
    blocks = [np.ones(SIZE, np.uint8) for _ in range(COUNT)]
    del blocks[:-1]
    before = resident()
    freed_memory.give_back()
    assert before - resident() > COUNT * SIZE / 2
    assert blocks[0].all()


def test_other_c_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(freed_memory, "_trim", lambda: None)
    freed_memory.give_back()
