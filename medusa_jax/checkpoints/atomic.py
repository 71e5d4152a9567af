"""Directories of weights: written beside their place, put there when they are complete."""

import contextlib
import shutil
from pathlib import Path
from typing import Any

from medusa_jax.files import locked, writing

# What a Hugging Face directory holds beside weights and config.json.
_BESIDE = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "generation_config.json",
           "chat_template*", "vocab.json", "merges.txt")  # fmt: skip


class Replacing:
    """A directory that takes `target`'s place once it is complete; nothing stays of a failure.

    What a killed process has left beside `target` is removed. An earlier `target` stays whole
    until the new directory is.

    Args:
      write: whether this process writes; the others only learn the directory's name.

    Raises:
      InputError: another process is writing it.
      OutputError: the directory cannot be made, or not be put into its place.
    """

    def __init__(self, target: Path, write: bool = True) -> None:
        self._target, self._write = target.resolve(), write  # a link stays a link
        self._new = self._target.with_name(f"{self._target.name}.tmp")
        self._old = self._target.with_name(f"{self._target.name}.old")
        self._lock = contextlib.ExitStack()

    def __enter__(self) -> Path:
        if self._write:
            name = f".{self._target.name}.lock"
            with writing(self._target):
                self._target.parent.mkdir(parents=True, exist_ok=True)
            self._lock.enter_context(locked(self._target.with_name(name), str(self._target)))
            with writing(self._target):
                _remove(self._new)
                self._new.mkdir()
        return self._new

    def __exit__(self, kind: Any, *_: Any) -> None:
        if not self._write:
            return
        try:
            if kind is None:
                with writing(self._target):
                    self._put()
        finally:
            shutil.rmtree(self._new, ignore_errors=True)
            self._lock.close()

    def _put(self) -> None:
        _remove(self._old)
        replaces = self._target.exists()
        if replaces:
            self._target.rename(self._old)
        try:
            self._new.rename(self._target)
        except OSError:
            if replaces:
                self._old.rename(self._target)
            raise
        _remove(self._old)


def copy_beside(source: Path, target: Path) -> None:
    """Copies a model's tokenizer, templates and generation settings. Raises OutputError."""
    for pattern in _BESIDE:
        for file in filter(Path.is_file, source.glob(pattern)):
            copy_file(file, target / file.name)


def copy_file(source: Path, target: Path) -> None:
    """Copies a file into a directory, which is made where it is missing. Raises OutputError."""
    with writing(target):
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(source, target)


def _remove(directory: Path) -> None:
    if directory.exists():
        shutil.rmtree(directory)
