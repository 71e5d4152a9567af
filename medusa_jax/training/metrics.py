"""What a run says while it goes: a progress bar, `metrics.jsonl`, TensorBoard events."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from medusa_jax.data.prompts import write_record

NAME = "metrics.jsonl"


class Metrics:
    """Writes the lines of one run; with `active` off (all processes but the first), nothing."""

    def __init__(
        self, workdir: Path, first_step: int, total_steps: int, *, tensorboard: bool, active: bool
    ) -> None:
        """Continues at `first_step`: what an earlier process logged beyond it is dropped."""
        self._active = active
        self._events: Any = None
        if active:
            _cut(workdir / NAME, first_step)
            self._file = open(workdir / NAME, "a", encoding="utf-8")  # noqa: SIM115
            if tensorboard:
                from tensorboardX import SummaryWriter

                self._events = SummaryWriter(str(workdir), purge_step=first_step + 1)
        self._bar = tqdm(
            total=total_steps, initial=first_step, disable=not active, unit=" steps",
            dynamic_ncols=True,
        )  # fmt: skip

    def advance(self, tokens_per_second: float, loss: float) -> None:
        """One step is done."""
        self._bar.set_postfix_str(f"{tokens_per_second:,.0f} tokens/s, loss {loss:.4f}", False)
        self._bar.update()

    def write(self, step: int, values: dict[str, Any]) -> None:
        """A line of `metrics.jsonl`, and the same to TensorBoard, lists as name/1, name/2, ..."""
        if not self._active:
            return
        write_record(self._file, {"step": step, **values})
        if self._events is not None:
            for name, value in values.items():
                several = isinstance(value, list)
                for i, one in enumerate(value if several else [value], start=1):
                    self._events.add_scalar(f"{name}/{i}" if several else name, one, step)
            self._events.flush()

    def say(self, message: str) -> None:
        """A line on stderr, above the bar."""
        if self._active:
            tqdm.write(message, file=sys.stderr)

    def close(self) -> None:
        """Ends bar and files."""
        self._bar.close()
        if self._active:
            self._file.close()
            if self._events is not None:
                self._events.close()


def _cut(file: Path, last_step: int) -> None:
    """Drops lines of later steps, and a half-written one: they will be written again.

    From step 0 on everything will be.
    """
    if not file.is_file():
        return
    if last_step == 0:
        file.unlink()
        return
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            step = json.loads(line)["step"]
        except (ValueError, KeyError):
            continue
        if step <= last_step:
            kept.append(line + "\n")
    whole = file.with_suffix(".tmp")
    whole.write_text("".join(kept), encoding="utf-8")
    os.replace(whole, file)
