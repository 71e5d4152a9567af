"""Measurements that outlive an interruption: a line of JSON each, in the order in which they came.

The first line says what they were measured for. Measurements for anything else are no use here,
and new measurements replace them. Each line ends with a checksum of itself: what follows a damaged
line is measured anew.
"""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medusa_jax import json_files
from medusa_jax.errors import InputError
from medusa_jax.files import claim, writing
from medusa_jax.progress import say

PURPOSE, CHECKSUM = "for", "crc32"

Record = dict[str, Any]


class Journal:
    """A file of measurements that a later run goes on with.

    Attributes:
      records: all measurements so far, those of earlier runs first.
    """

    def __init__(self, path: Path, purpose: Mapping[str, Any]) -> None:
        """Opens or begins the file.

        Args:
          purpose: what the measurements depend on.

        Raises:
          InputError: another process is writing it.
          OutputError: it cannot be written.
        """
        self.path = path
        first = {PURPOSE: purpose}
        with writing(path):
            self._file = path.open("ab+", buffering=0)
        claim(self._file, path)
        self._file.seek(0)
        content = self._file.read()
        self.records, whole = _read(content, json.loads(json.dumps(purpose)))
        with writing(path):
            self._file.truncate(whole)
        if content and not whole:
            say(f"{path} was measured for something else: measured anew")
        if not whole:
            self._write(first)

    def add(self, record: Record) -> None:
        """Keeps a measurement."""
        self._write(record)
        self.records.append(record)

    def remove(self) -> None:
        """Nobody needs the measurements any more."""
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _write(self, record: Record) -> None:
        line = json.dumps(record | {CHECKSUM: _checksum(record)})
        with writing(self.path):
            self._file.write(f"{line}\n".encode())


def _checksum(record: Record) -> int:
    """Of a record as it is written, or as it was read again."""
    return zlib.crc32(json.dumps(record).encode())


def _read(content: bytes, purpose: Any) -> tuple[list[Record], int]:
    """The records for a purpose, and the bytes up to the last of them; none for another purpose.

    With purpose 1, '{"for": 1}', '{"a": 2}' and half a line: [{"a": 2}] and the first two lines;
    without their checksums here.
    """
    records: list[Record] = []
    whole = 0
    for number, line in enumerate(content.splitlines(keepends=True)):
        try:
            record = json_files.parse(line.decode("utf-8"), "a measurement")
        except (InputError, UnicodeDecodeError):
            break
        if not line.endswith(b"\n") or not isinstance(record, dict):
            break
        if record.pop(CHECKSUM, None) != _checksum(record):
            break
        if not number and record.get(PURPOSE) != purpose:
            break
        whole += len(line)
        records += [record] if number else []
    return records, whole
