"""Options: a default, help and bounds, declared once as dataclass fields.

A library caller fills in the dataclass; `cli/flags.py` makes the same fields flags.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from medusa_jax.errors import InputError

LARGEST = 2**31 - 1  # of an integer without bounds of its own


def option(
    default: Any = dataclasses.MISSING,
    *,
    help: str = "",
    least: float | None = None,
    most: float | None = None,
    choices: Sequence[Any] = (),
    **flag: Any,
) -> Any:
    """A dataclass field with its documentation and its bounds.

    Args:
      default: its value where nothing is given; without a default, the field is required.
      help: what it is for, a line.
      least, most: bounds of a number, or of each number of a sequence.
      choices: all values that are allowed.
      flag: what else the flag of this option needs, as `argparse` names it.
    """
    about = {"help": help, "least": least, "most": most, "choices": tuple(choices), "flag": flag}
    if isinstance(default, list | dict | set):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=about)
    return dataclasses.field(default=default, metadata=about)


def check(options: Any, prefix: str = "--") -> None:
    """Checks each field of a dataclass against its bounds and choices.

    Args:
      prefix: what a user writes before the name of an option.

    Raises:
      InputError: names the option, its value and what is expected.
    """
    for field in dataclasses.fields(options):
        value, about = getattr(options, field.name), field.metadata
        least, most, choices = (about.get(key) for key in ("least", "most", "choices"))
        if isinstance(field.default, tuple) and isinstance(value, str):
            raise InputError(
                f"{prefix}{field.name} is the text {value!r}; expected a tuple of such"
            )
        for item in value if isinstance(value, list | tuple) else [value]:
            if choices and item not in (None, field.default, *choices):
                raise InputError(
                    f"{prefix}{field.name} is {item!r}; expected {', '.join(map(str, choices))}"
                )
            if not isinstance(item, int | float):
                continue
            if isinstance(item, float) and not math.isfinite(item):
                raise InputError(f"{prefix}{field.name} must be a finite number, got {item}")
            if isinstance(item, int):  # arrays of indices and lengths hold no more
                least = -LARGEST if least is None else least
                most = LARGEST if most is None else most
            if least is not None and item < least:
                raise InputError(f"{prefix}{field.name} must be at least {least}, got {item}")
            if most is not None and item > most:
                raise InputError(f"{prefix}{field.name} must be at most {most}, got {item}")
