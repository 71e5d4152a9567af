"""What the processor of this machine has."""

from pathlib import Path

import pytest

_FLAGS = {"avx2": "avx2", "avx512": "avx512bw", "vnni": "avx512_vnni"}


def skip_without(level: str) -> None:
    """Skips a test of an instruction set, a key of `native.LEVELS`, that is not here."""
    if level in _FLAGS and _FLAGS[level] not in Path("/proc/cpuinfo").read_text():
        pytest.skip(f"this processor has no {level}")
