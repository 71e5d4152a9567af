"""Fields of settings that declare their bounds and choices once."""

import dataclasses
from typing import Any

from medusa_jax.errors import InputError


def option(
    default: Any = dataclasses.MISSING,
    *,
    help: str = "",
    least: float | None = None,
    most: float | None = None,
    choices: tuple[str, ...] = (),
    **flag: Any,
) -> Any:
    """A dataclass field with what `check` enforces and a command line shows.

    Args:
      least, most: bounds of the value, both allowed.
      choices: the only values.
      flag: further arguments of `argparse.ArgumentParser.add_argument`.
    """
    about = {"help": help, "least": least, "most": most, "choices": choices, "flag": flag}
    return dataclasses.field(default=default, metadata=about)


def check(instance: Any, prefix: str = "") -> None:
    """Refuses values beyond their bounds, also of dataclasses inside.

    Raises:
      InputError: names the field, its value and what was expected.
    """
    for field in dataclasses.fields(instance):
        name, value, about = f"{prefix}{field.name}", getattr(instance, field.name), field.metadata
        if dataclasses.is_dataclass(value):
            check(value, f"{name}.")
        elif not about or value is None:
            continue
        elif about["choices"] and value not in about["choices"]:
            expected = ", ".join(choice or "'' (empty)" for choice in about["choices"])
            raise InputError(f"{name} is {value!r}; expected {expected}")
        elif about["least"] is not None and value < about["least"]:
            raise InputError(f"{name} is {value}; expected {about['least']} or more")
        elif about["most"] is not None and value > about["most"]:
            raise InputError(f"{name} is {value}; expected {about['most']} or less")
