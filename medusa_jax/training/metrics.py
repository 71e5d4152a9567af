"""What a run reports: a progress bar, `metrics.jsonl`, TensorBoard events."""

import importlib
import io
import json
from pathlib import Path
from typing import IO, Any

from medusa_jax.data.prompts import record_line
from medusa_jax.progress import progress, say
from medusa_jax.training.workdir import is_address

NAME = "metrics.jsonl"
_CLIENTS = {"gs": "google.cloud.storage", "s3": "boto3"}  # of tensorboardX


class Metrics:
    """Writes the lines of one run; with `active` off (all processes but the first), nothing."""

    def __init__(
        self, workdir: Path, first_step: int, total_steps: int, *, tensorboard: bool, active: bool
    ) -> None:
        """Continues at `first_step`; later lines of an earlier process are dropped."""
        self._active, self._file = active, workdir / NAME
        self._events: Any = None
        if active:
            self._lines = _lines(self._file, first_step)
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
        self._lines.write(record_line({"step": step, **values}) + "\n")
        self._lines.flush()
        if isinstance(self._lines, io.StringIO):  # an object of a bucket is only written whole
            self._file.write_text(self._lines.getvalue(), encoding="utf-8")
        if self._events is not None:
            for name, value in values.items():
                several = isinstance(value, list)
                for i, scalar in enumerate(value if several else [value], start=1):
                    self._events.add_scalar(f"{name}/{i}" if several else name, scalar, step)
            self._events.flush()

    def say(self, message: str) -> None:
        """A line on stderr, above the bar."""
        if self._active:
            say(message)

    def close(self) -> None:
        """Ends bar and files."""
        self._bar.close()
        if self._active:
            self._lines.close()
            if self._events is not None:
                self._events.close()


def _lines(file: Path, last_step: int) -> IO[str]:
    """The stream to append to, without lines of later steps and without a half-written line.

    Those steps run again and write their lines again. From step 0 on, nothing is kept.
    """
    kept = []
    if last_step and file.is_file():
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                step = json.loads(line)["step"]
            except (ValueError, KeyError):
                continue
            if step <= last_step:
                kept.append(line + "\n")
    if is_address(file):
        stream = io.StringIO("".join(kept))
        stream.seek(0, io.SEEK_END)
        return stream
    whole = file.with_suffix(".tmp")
    whole.write_text("".join(kept), encoding="utf-8")
    whole.replace(file)
    return open(file, "a", encoding="utf-8")


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
