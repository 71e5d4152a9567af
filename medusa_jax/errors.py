"""Errors meant for people: one sentence on what was given, what was expected, what to do.

Library code raises `InputError` for anything the caller can mend (a file, a
flag, a prompt). The scripts print its text and exit with code 2; every other
exception is a failed run and exits with 1.
"""

import contextlib
from collections.abc import Collection, Iterator


class InputError(ValueError):
    """The input or the settings are wrong; the message says which and how to mend it."""


@contextlib.contextmanager
def needs(extra: str) -> Iterator[None]:
    """Around imports: a package that is not installed becomes an `InputError` that says how.

    Args:
      extra: the extra of this project that installs it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package == "medusa_jax":
            raise
        raise InputError(f"{package} is not installed: pip install 'medusa_jax[{extra}]'") from None


def listed(names: Collection[object], most: int = 8) -> str:
    """Names for a message, not all of thousands: "a, b and 998 more"."""
    shown = [str(name)[:200] for name, _ in zip(names, range(most), strict=False)]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more:,} more" if more else "")
