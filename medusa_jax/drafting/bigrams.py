"""Which tokens follow which: corrects guesses that the heads make without knowing each other.

Head k guesses the token at t+k+1 from the hidden state alone. With "New York" and
"Los Angeles" equally likely, both heads are right half of the time, and half of
the paths made of their guesses are nonsense. How often one token follows another
in the model's own texts tells these apart: guess b gets, after a,

    0.4 (log p(b | a) - log p(b))

on top of its head's log-probability (n-gram rescoring: Kim et al., arXiv
2404.09221). The token before head 1's guesses is the root, which is known by then.

Only trees grown at every step ask for it (`grow.py`). Verification is what it was,
so no text changes. The table lies beside the heads in `bigrams.safetensors`:

    tokens  [L]     int32    ids of the tokens that are said most
    scores  [L, L]  float16  what the second gains after the first

`python -m medusa_jax.count_bigrams` makes it.
"""

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from jaxtyping import Array, Float, Int

from medusa_jax.checkpoints.tensors import StoredTensor, open_file, write_model
from medusa_jax.errors import InputError
from medusa_jax.shapes import typed

NAME = "bigrams"  # of the file, and of its part of the parameters
# The heads know some of it already. On the shipped model 0.3 to 0.5 accept within 1% of each other.
_WEIGHT = 0.4
_PRIOR = 5.0  # how many observations the second token's own frequency weighs

Bigrams = dict[str, Array]  # {"rows": [V] int32, "scores": [L + 1, L + 1]}


def count(
    texts: Iterable[tuple[np.ndarray, np.ndarray]], most: int
) -> tuple[np.ndarray, np.ndarray]:
    """The `most` frequent tokens [L] and the scores of their pairs [L, L].

    Args:
      texts: of each, token ids [T] and whether they count as second of a pair [T] bool.

    Example: in the texts (1 2 1 2) and (2 3), tokens 2, 1, 3 come second 2, 1 and 1 times.
    After 2, which is followed twice, by 1 and by 3, these gain
    0.4 log((1 + 5/4) / (2 + 5) / (1/4)) = 0.1, and 2 loses 0.4 log((0 + 5/2) / (2 + 5) / (1/2)).

    Raises:
      InputError: there is not one pair.
    """
    pairs = [
        np.stack((ids[:-1], ids[1:]))[:, counted[1:]] for ids, counted in texts if len(ids) > 1
    ]
    before, after = np.concatenate([np.zeros((2, 0), np.int64), *pairs], axis=1)
    if not len(after):
        raise InputError("these texts hold no two tokens in a row to count")
    ids = max(before.max(), after.max()) + 1
    times = np.bincount(after, minlength=ids)
    tokens = np.argsort(-times, kind="stable")[:most]
    tokens = tokens[times[tokens] > 0]
    rows = np.full(ids, -1)
    rows[tokens] = np.arange(len(tokens))
    listed = (rows[before] >= 0) & (rows[after] >= 0)
    seen = np.zeros((len(tokens), len(tokens)))
    np.add.at(seen, (rows[before[listed]], rows[after[listed]]), 1)
    followed = np.bincount(before, minlength=ids)[tokens]
    alone = times[tokens] / len(after)
    after_it = (seen + _PRIOR * alone) / (followed[:, None] + _PRIOR)
    return tokens, _WEIGHT * np.log(after_it / alone)


def beside(heads: Path) -> Path | None:
    """The file that lies with heads, in their directory, where there is one."""
    file = (heads if heads.is_dir() else heads.parent) / f"{NAME}.safetensors"
    return file if file.is_file() else None


def save(directory: Path, tokens: np.ndarray, scores: np.ndarray) -> Path:
    """Writes the file into a directory of heads, whole or not at all; returns its path."""
    arrays = {"tokens": tokens.astype(np.int32), "scores": scores.astype(np.float16)}
    tensors = {
        name: StoredTensor(
            array.shape, str(array.dtype), lambda index=..., array=array: array[index]
        )
        for name, array in arrays.items()
    }
    write_model(directory, f"{NAME}.tmp", tensors)
    path = directory / f"{NAME}.safetensors"
    (directory / f"{NAME}.tmp.safetensors").replace(path)
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


@typed
def links(
    bigrams: Bigrams, before: Int[Array, "*dims R"], after: Int[Array, "*dims R"]
) -> Float[Array, "*dims R R"]:
    """What each guess gains after each of the tokens before it.

    Example: with scores (0.1 for 1 after 2) and nothing else, before (2 3) and
    after (3 1) -> ((0 0.1) (0 0)).
    """
    rows, scores = bigrams["rows"], bigrams["scores"]
    return scores[rows[before][..., :, None], rows[after][..., None, :]]
