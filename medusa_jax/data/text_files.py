"""Text files to read, also compressed, with bounds: a small file can unpack to all of memory."""

import contextlib
import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from medusa_jax.errors import InputError

MOST_LINE = 2**26  # characters of a line
MOST_WHOLE = 2**30  # characters of a text that is held whole


def check_readable(path: str | Path, flag: str) -> None:
    """Checks, before anything takes long, that there is a file to read; pipes are not opened.

    Raises:
      InputError: no file of that name, or it may not be read.
    """
    place = Path(path)
    try:
        if not str(path) or place.is_dir():
            raise InputError(f"{flag} {path}: expected a file, not a directory")
        if not place.exists():
            raise InputError(f"{flag} {path} does not exist")
        if place.is_file():
            place.open("rb").close()
    except OSError as error:
        raise InputError(f"{flag} {path} cannot be read: {error.strerror}") from None


@contextlib.contextmanager
def open_text(path: Path) -> Iterator[IO[str]]:
    """A text file, also compressed (`.gz`), to read.

    Raises:
      InputError: it is none, or breaks off; names `path`.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig") as stream:
            yield stream
    except (OSError, UnicodeDecodeError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: {error}") from None


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines of a text file that are not blank, with their numbers from 1.

    Raises:
      InputError: as `open_text`, or a line is longer than MOST_LINE.
    """
    with open_text(path) as stream:
        number = 0
        while line := stream.readline(MOST_LINE + 1):
            number += 1
            if len(line) > MOST_LINE:
                raise InputError(
                    f"{path}, line {number} has more than {MOST_LINE:,} characters, "
                    "too many for a record"
                )
            if line.strip():
                yield number, line


def read_whole(path: Path) -> str:
    """The text of a file.

    Raises:
      InputError: as `open_text`, or it is longer than MOST_WHOLE.
    """
    with open_text(path) as stream:
        text = stream.read(MOST_WHOLE + 1)
    if len(text) > MOST_WHOLE:
        raise InputError(
            f"{path} has more than {MOST_WHOLE:,} characters, too many to read at once: "
            "write JSON Lines"
        )
    return text
