"""Directories of weights: written beside their place, put there when they are complete."""

import shutil
from pathlib import Path
from typing import Any

# What a Hugging Face directory holds beside weights and config.json.
_BESIDE = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "generation_config.json",
           "chat_template*", "vocab.json", "merges.txt")  # fmt: skip


class Replacing:
    """A directory that takes `target`'s place once it is complete; nothing stays of a failure.

    Args:
      write: whether this process writes; the others only learn the directory's name.
    """

    def __init__(self, target: Path, write: bool = True) -> None:
        self._target, self._new, self._write = target, target.with_name(f"{target.name}.tmp"), write

    def __enter__(self) -> Path:
        if self._write:
            shutil.rmtree(self._new, ignore_errors=True)
            self._new.mkdir(parents=True)
        return self._new

    def __exit__(self, kind: Any, *_: Any) -> None:
        if self._write and kind is None:
            shutil.rmtree(self._target, ignore_errors=True)
            self._new.rename(self._target)
        elif self._write:
            shutil.rmtree(self._new, ignore_errors=True)


def copy_beside(source: Path, target: Path) -> None:
    """Copies a model's tokenizer, templates and generation settings."""
    for pattern in _BESIDE:
        for file in filter(Path.is_file, source.glob(pattern)):
            shutil.copyfile(file, target / file.name)
