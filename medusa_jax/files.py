"""Files that are written: kept whole, by a single process, with errors that name them."""

import contextlib
import errno
import fcntl
import os
import re
import socket
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from medusa_jax.errors import InputError


class OutputError(RuntimeError):
    """A file could not be written; the message names it and says why."""


def cache_directory() -> Path:
    """Where this project keeps what it has measured and compiled: $MEDUSA_JAX_CACHE."""
    return Path(os.environ.get("MEDUSA_JAX_CACHE") or Path.home() / ".cache" / "medusa_jax")


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Around writes to `path`: an error of the system becomes an `OutputError` that names it."""
    try:
        yield
    except BrokenPipeError:  # the reader of a pipe has gone, which commands end at without a word
        raise
    except Exception as error:
        if (reason := _system_error(error)) is None:
            raise
        raise OutputError(f"{path} could not be written: {reason}") from error


def _system_error(error: Exception) -> str | None:
    """What the system said, in lower case; None for any other error.

    Libraries in Rust, as safetensors, have errors of their own: "I/O error: ... (os error 28)".
    """
    if isinstance(error, OSError):
        return (error.strerror or str(error)).lower()
    number = re.search(r"\(os error (\d+)\)", str(error))
    return os.strerror(int(number[1])).lower() if number else None


def write_whole(path: Path, text: str) -> None:
    """Writes a text file whole or not at all.

    Raises:
      OutputError: it could not be written; names `path`.
    """
    beside = path.with_name(f"{path.name}.tmp")
    with writing(path):
        try:
            beside.write_text(text, encoding="utf-8")
            beside.replace(path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise


def check_output(
    path: str | Path | None, inputs: Iterable[str | Path | None] = (), *, flag: str = "--output"
) -> None:
    """Checks, before anything takes long, that a file can be made or continued at `path`.

    Args:
      inputs: files that the command reads, none of which may be `path`, by whatever name.

    Raises:
      InputError: its directory is missing, it is a directory, is not writable, or is an input.
    """
    if path is None:
        return
    place = Path(path)
    if not str(path) or place.is_dir():
        raise InputError(f"{flag} {path}: expected a file, not a directory")
    if not place.absolute().parent.is_dir():
        raise InputError(f"{flag} {path}: its directory does not exist")
    for given in filter(None, inputs):
        if place.exists() and Path(given).exists() and place.samefile(given):
            raise InputError(f"{flag} {path} is {given}, which is read: give another file")
    before = place.exists()
    if before and not place.is_file():
        return  # a pipe or a device
    try:
        with open(place, "ab"):
            pass
        if not before:
            place.unlink()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise InputError(f"{flag} {path} cannot be written: {reason}") from None


def check_directory(path: str | Path, *, flag: str = "--output") -> None:
    """Checks, before anything takes long, that files can be written into a directory at `path`.

    Raises:
      InputError: it is a file, its own directory is missing, or nothing can be written there.
    """
    place = Path(path)
    if place.exists() and not place.is_dir():
        raise InputError(f"{flag} {path}: expected a directory, not a file")
    if not place.absolute().parent.is_dir():
        raise InputError(f"{flag} {path}: its directory does not exist")
    where = place if place.is_dir() else place.absolute().parent
    if not os.access(where, os.W_OK | os.X_OK):
        raise InputError(f"{flag} {path} cannot be written: permission denied")


def check_new_directory(path: str | Path, *, flag: str = "--output") -> None:
    """Checks, before anything takes long, that a directory can be made at `path`.

    Directories above it that are missing will be made too.

    Raises:
      InputError: something is there already, or nothing can be made there.
    """
    place = Path(path).absolute()
    if place.exists() or place.is_symlink():
        raise InputError(f"{path} exists already; give another {flag}")
    above = next(parent for parent in place.parents if parent.exists())
    if not above.is_dir():
        raise InputError(f"{flag} {path}: {above} is a file, not a directory")
    if not os.access(above, os.W_OK | os.X_OK):
        raise InputError(f"{flag} {path} cannot be written: permission denied")


class Lines:
    """A file that is written line by line, and only ever holds whole lines.

    An earlier file of that name stays as it is until the new lines are complete: until then
    they are in `NAME.partial`, where they also stay if the writer fails.

    Args:
      path: the file; a pipe or a device is written directly.
      append: go on at the end of the earlier file.

    Raises:
      InputError: another process is writing it.

    Attributes:
      file: where the lines are until they are complete.
    """

    def __init__(self, path: str | Path, *, append: bool = False) -> None:
        self.path = Path(path)
        place = self.path.resolve()  # a link stays a link
        replaces = not append and place.is_file() and place.stat().st_size > 0
        self._target = place if replaces else None
        self.file = place.with_name(f"{place.name}.partial") if replaces else place
        self._earlier = contextlib.ExitStack()
        if replaces:  # another process may be writing it
            claim(self._earlier.enter_context(place.open("rb")), self.path)
        with writing(self.path):
            self._stream: IO[bytes] = self.file.open("ab", buffering=0)
        claim(self._stream, self.path)
        if self.file.is_file() and not append:
            self._stream.truncate(0)

    def write(self, line: str) -> None:
        """Adds a line and hands it to the operating system.

        Raises:
          OutputError: it could not be written; the file then ends with the line before.
        """
        whole = self._stream.tell() if self.file.is_file() else None  # a device is not cut
        rest = memoryview(line.encode("utf-8", "replace") + b"\n")
        with writing(self.path):
            try:
                while rest:  # an unbuffered file may take a part
                    rest = rest[self._stream.write(rest) :]
            except BaseException:
                if whole is not None:
                    self._stream.truncate(whole)
                    self._stream.seek(whole)
                raise

    def close(self, *, complete: bool = True) -> None:
        """Ends the file; if it is not complete, an earlier file keeps its place."""
        with writing(self.path):
            self._stream.close()
            if self._target is not None and complete:
                self.file.replace(self._target)
        self._earlier.close()

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.close(complete=kind is None)


def claim(stream: IO[bytes], path: str | Path) -> None:
    """Locks an open file until it is closed. Raises InputError where another process did."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stream.close()
        raise InputError(f"{path} is being written by another process; give another file") from None
    except OSError:  # a pipe, or a file system without locks
        pass


@contextlib.contextmanager
def locked(path: Path, what: str, *, wait: float = 0.0) -> Iterator[None]:
    """Holds a lock file while a single process may write `what`; a dead process holds none.

    Args:
      path: the lock file, which is removed at the end.
      wait: seconds in which another process may give it back.

    Raises:
      InputError: another process holds it; names its id and its host.
    """
    handle = _held(path, what, time.monotonic() + wait)
    try:
        with writing(path):
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def _held(path: Path, what: str, deadline: float) -> int:
    """The lock file's handle, locked."""
    while True:
        with writing(path):
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.exists(path) and os.path.samestat(os.fstat(handle), os.stat(path)):
                return handle
            os.close(handle)  # the process before has removed this file: ask for the next
        except BlockingIOError:
            owner = os.read(handle, 200).decode("utf-8", "replace").strip() or "another process"
            os.close(handle)
            if time.monotonic() < deadline:
                time.sleep(0.05)
                continue
            raise InputError(f"{what} is written by {owner}: wait for it, or stop it") from None
        except OSError as error:  # a file system without locks is used as it is
            if error.errno in (errno.ENOLCK, errno.ENOTSUP):
                return handle
            os.close(handle)
            raise InputError(f"{path} cannot be locked: {error.strerror}") from None
