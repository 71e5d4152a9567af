"""Which parameters of a test are in the fast tier."""

from collections.abc import Iterable
from typing import Any

import pytest


def slow_except(values: Iterable[Any], *fast: Any) -> list[Any]:
    """Parameters, all marked `slow` but those in `fast`: some of every test stay fast."""
    values = list(values)
    assert all(value in values for value in fast), f"{fast} are none of {values}"
    return [
        pytest.param(*_tuple(value), marks=() if value in fast else pytest.mark.slow)
        for value in values
    ]


def _tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)
