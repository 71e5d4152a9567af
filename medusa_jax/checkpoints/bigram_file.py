"""The bigram table of heads, `medusa/bigrams.safetensors` in their directory or their model's:

tokens  [L]     int32    ids of the most frequent tokens
scores  [L, L]  float16  what the second token gains after the first

It has a folder of its own, since other programs load each `.safetensors` beside a model.
"""

import math
from pathlib import Path

import numpy as np

from medusa_jax.checkpoints.dialects import folder
from medusa_jax.checkpoints.stored_tensor import StoredTensor
from medusa_jax.checkpoints.tensors import open_file, write_model
from medusa_jax.drafting.bigrams import NAME
from medusa_jax.errors import InputError
from medusa_jax.files import writing


def place(directory: Path) -> Path:
    """Where the table of a directory of heads, or of their model, is."""
    return folder(directory) / f"{NAME}.safetensors"


def beside(heads: Path) -> Path | None:
    """The table of a file or a directory of heads, or of their model, where there is one."""
    file = place(heads if heads.is_dir() else heads.parent)
    return file if file.is_file() else None


def save(directory: Path, tokens: np.ndarray, scores: np.ndarray) -> Path:
    """Writes the table of a directory, whole or not at all; returns its path.

    Raises:
      OutputError: it could not be written.
    """
    arrays = {"tokens": tokens.astype(np.int32), "scores": scores.astype(np.float16)}
    tensors = {
        name: StoredTensor(
            array.shape, str(array.dtype), lambda index=..., array=array: array[index]
        )
        for name, array in arrays.items()
    }
    path = place(directory)
    new = path.with_name(f"{NAME}.tmp.safetensors")
    with writing(path):
        path.parent.mkdir(exist_ok=True)
        try:
            write_model(path.parent, f"{NAME}.tmp", tensors)
            new.replace(path)
        finally:
            new.unlink(missing_ok=True)
    return path


def load(file: Path, vocab_size: int) -> dict[str, np.ndarray]:
    """A table as `links` wants it; a last row and column of zeros serve all tokens not in it.

    Raises:
      InputError: the file is no such table, or one for another vocabulary.
    """
    stored = open_file(file)
    shapes = {name: one.shape for name, one in stored.items()}
    length = math.prod(shapes.get("tokens", ()))
    if shapes != {"tokens": (length,), "scores": (length, length)} or not length:
        raise InputError(f"{file}: expected tokens [L] and scores [L, L], got {shapes}")
    if stored["tokens"].dtype != "int32" or not stored["scores"].dtype.startswith("float"):
        kinds = {name: one.dtype for name, one in stored.items()}
        raise InputError(f"{file}: expected tokens in int32 and scores in float16, got {kinds}")
    tokens, scores = stored["tokens"].read(), stored["scores"].read().astype(np.float32)
    if tokens.min() < 0 or tokens.max() >= vocab_size or len(np.unique(tokens)) != length:
        raise InputError(f"{file}: expected different tokens of a vocabulary of {vocab_size}")
    if not np.isfinite(scores).all():
        raise InputError(f"{file}: scores that are no numbers")
    rows = np.full(vocab_size, length, np.int32)
    rows[tokens] = np.arange(length)
    return {"rows": rows, "scores": np.pad(scores, (0, 1))}
