"""What a run reports: a progress bar, `metrics.jsonl`, TensorBoard events."""

import contextlib
import importlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medusa_jax import json_files
from medusa_jax.data.prompts import record_line
from medusa_jax.errors import InputError
from medusa_jax.files import Lines, OutputError, write_whole, writing
from medusa_jax.progress import progress, say
from medusa_jax.training.workdir import is_address

NAME = "metrics.jsonl"
_CLIENTS = {"gs": "google.cloud.storage", "s3": "boto3"}  # of tensorboardX


def read_lines(workdir: Path, last_step: int) -> list[dict[str, Any]]:
    """The records of a run up to a step; those of later steps are written anew.

    From step 0 on, nothing is kept. A last line that a killed process has left half is none.

    Raises:
      InputError: a line is no record with a step; names the file and the line.
    """
    file = workdir / NAME
    if not last_step or not file.is_file():
        return []
    try:
        *lines, _ = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: {error}; move it away, or give another --workdir") from None
    kept = []
    for number, line in enumerate(lines, start=1):
        record = json_files.parse(line, f"{file}, line {number}")
        if not isinstance(record, dict) or type(record.get("step")) is not int:
            raise InputError(f"{file}, line {number}: expected an object with a 'step'")
        if record["step"] <= last_step:
            kept.append(record)
    return kept


class Metrics:
    """Writes the lines of one run; with `active` off (all processes but the first), nothing.

    Args:
      records: lines of an earlier process to begin with.
      first_step: where this process goes on.
    """

    def __init__(
        self,
        workdir: Path,
        records: Sequence[dict[str, Any]],
        first_step: int,
        total_steps: int,
        tensorboard: bool,
        *,
        active: bool,
    ) -> None:
        self._active, self._file = active, workdir / NAME
        self._events: Any = None
        if active:
            self._lines = _lines(self._file, records)
            if tensorboard:
                self._events = _events(workdir, first_step)
        self._bar = progress(total=total_steps, done=first_step, unit="steps", shown=active)

    def advance(self, tokens_per_second: float, loss: float) -> None:
        """One step is done."""
        self._bar.set_postfix_str(f"{tokens_per_second:,.0f} tokens/s, loss {loss:.4f}", False)
        self._bar.update()

    def write(self, step: int, values: dict[str, Any]) -> None:
        """A line of `metrics.jsonl`, and the same to TensorBoard, lists as name/1, name/2, ..."""
        if not self._active:
            return
        self._lines.write(_line({"step": step, **values}))
        if self._events is not None:
            with writing(self._file.parent):
                for name, value in values.items():
                    self._plot(name, value, step)
                self._events.flush()

    def _plot(self, name: str, value: Any, step: int) -> None:
        if isinstance(value, list):
            for i, item in enumerate(value, start=1):
                self._plot(f"{name}/{i}", item, step)
        elif value is not None:
            self._events.add_scalar(name, value, step)

    def say(self, message: str) -> None:
        """A line on stderr, above the bar."""
        if self._active:
            say(message)

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Ends bar and files; after a failure, what they have to say is no news."""
        self._bar.close()
        if self._active:
            with contextlib.suppress(OutputError) if kind else contextlib.nullcontext():
                self._lines.close()
                if self._events is not None:
                    with writing(self._file.parent):
                        self._events.close()


class _Object:
    """An object of a bucket, which can only be written whole."""

    def __init__(self, file: Path, text: str) -> None:
        self._file, self._text = file, text

    def write(self, line: str) -> None:
        """Adds a line."""
        self._text += line + "\n"
        self._file.write_text(self._text, encoding="utf-8")

    def close(self) -> None:
        """Nothing is open."""


def _lines(file: Path, records: Sequence[dict[str, Any]]) -> "Lines | _Object":
    """What lines are appended to, after those of the records."""
    text = "".join(_line(record) + "\n" for record in records)
    if is_address(file):
        return _Object(file, text)
    write_whole(file, text)
    return Lines(file, append=True)


def _line(record: dict[str, Any]) -> str:
    return record_line({name: _finite(value) for name, value in record.items()})


def _finite(value: Any) -> Any:
    """A number or a list of them as JSON knows them: what is not finite is null."""
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value if not isinstance(value, float) or math.isfinite(value) else None


def _events(workdir: Path, first_step: int) -> Any:
    """The TensorBoard writer, or None, with a message, where it cannot reach the bucket."""
    if is_address(workdir):
        client = _CLIENTS.get(str(workdir).partition("://")[0])
        try:
            importlib.import_module(client or "")
        except (ImportError, ValueError):
            say(f"{workdir} gets no TensorBoard events: they need {client or 'a local directory'}")
            return None
    from tensorboardX import SummaryWriter

    return SummaryWriter(str(workdir), purge_step=first_step + 1)
