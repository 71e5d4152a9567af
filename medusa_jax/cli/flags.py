"""Command-line flags of an options dataclass, by `argparse`: its names, types and bounds."""

import argparse
import dataclasses
import types
import typing
from typing import Any, TypeVar

from medusa_jax.options import check

_Options = TypeVar("_Options")


def parser(description: str, example: str) -> argparse.ArgumentParser:
    """A parser with an example under its help, and the flags that all commands share."""
    made = argparse.ArgumentParser(
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("--debug", action="store_true", help="show the traceback of an error")
    made.add_argument("--no_cache", action="store_true", help="compile all programs anew, and keep "
        "none in ~/.cache/medusa_jax")  # fmt: skip
    return made


def add_flags(parser: argparse.ArgumentParser, options: type) -> None:
    """Adds a flag for each field of a dataclass that `options.option` declares.

    Fields with the same keyword `group` exclude each other, and one of them is required.
    """
    hints = typing.get_type_hints(options)
    groups: dict[str, Any] = {}
    for field in _declared(options):
        extra = dict(field.metadata["flag"])
        target: Any = parser
        if group := extra.pop("group", None):
            if group not in groups:
                groups[group] = parser.add_mutually_exclusive_group(required=True)
            target = groups[group]
        name = extra.pop("name", field.name)  # where the flag is a word of Python
        about = _arguments(field, hints[field.name])
        target.add_argument(f"--{name}", dest=field.name, **about, **extra)


def read(namespace: argparse.Namespace, options: type[_Options]) -> _Options:
    """The dataclass that the flags fill in.

    Raises:
      InputError: a value is out of its bounds.
    """
    names = [field.name for field in _declared(options)]
    filled = options(**{name: getattr(namespace, name) for name in names})
    check(filled)
    return filled


def _declared(options: Any) -> list[dataclasses.Field]:
    return [field for field in dataclasses.fields(options) if "flag" in field.metadata]


def _arguments(field: dataclasses.Field, hint: Any) -> dict[str, Any]:
    """What `add_argument` needs to know of a field."""
    about: dict[str, Any] = {"help": field.metadata["help"]}
    if field.default_factory is not dataclasses.MISSING:
        about["default"] = field.default_factory()
    elif field.default is not dataclasses.MISSING:
        about["default"] = field.default
    else:
        about["required"] = True
    if hint is bool:
        return about | {"action": "store_true"}
    if field.metadata["choices"]:
        about["choices"] = field.metadata["choices"]
    return about | {"type": _scalar(hint)}


def _scalar(hint: Any) -> type:
    """The type of a single value: `int | None` and `list[int]` -> int, anything else -> str."""
    arguments = [one for one in typing.get_args(hint) if one is not types.NoneType]
    if arguments:
        return _scalar(arguments[0])
    return hint if hint in (int, float) else str
