"""The frozen backbone's hidden states of all rows, computed once and read in each epoch.

`data.hidden_states` names a directory. Its `train/` and `eval/` hold

    index.json             what they were computed from
    00000.npy, 00001.npy   hidden states of so many rows [., T, D], the bits of bfloat16

A file is there whole or not at all. So a run that was killed goes on with the next file.
"""

import dataclasses
import functools
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding

from medusa_jax import json_files
from medusa_jax.data.loader import global_arrays
from medusa_jax.data.packing import Rows
from medusa_jax.errors import InputError
from medusa_jax.files import locked, writing
from medusa_jax.progress import progress, say
from medusa_jax.training import scanned_backbone, settings
from medusa_jax.training.checksums import checksums
from medusa_jax.training.mesh import BATCH, HIDDEN
from medusa_jax.training.settings import Config
from medusa_jax.training.weights import Weights, load
from medusa_jax.training.workdir import is_address

INDEX = "index.json"
FILE_BYTES = 2**26  # most of a file
_WHAT = {
    "backbone": "another backbone, or of its computation in another dtype",
    "rows": "other training data",
    "shape": "rows of another length or width",
}


@dataclasses.dataclass(frozen=True)
class Files:
    """Hidden states of rows in a directory.

    Attributes:
      directory: theirs.
      rows: in each file but the last.
      shape: (T, D).
    """

    directory: Path
    rows: int
    shape: tuple[int, int]

    def path(self, number: int) -> Path:
        """File `number`, which begins with row `number * rows`."""
        return self.directory / f"{number:05d}.npy"

    def read(self, rows: Sequence[int]) -> np.ndarray:
        """Hidden states of some rows [B, T, D] bfloat16; of row -1, which is empty, zeros."""
        out = np.zeros((len(rows), *self.shape), np.uint16)
        for place, row in enumerate(rows):
            if row >= 0:
                number, within = divmod(row, self.rows)
                out[place] = np.load(self.path(number), mmap_mode="r")[within]
        return out.view(ml_dtypes.bfloat16)

    def write(self, number: int, hidden: np.ndarray) -> None:
        """Writes a file, uint16 [rows, T, D], whole or not at all."""
        path = self.path(number)
        beside = path.with_suffix(".tmp")
        with writing(path):
            with open(beside, "wb") as stream:
                np.save(stream, hidden)
            beside.replace(path)


@dataclasses.dataclass(frozen=True)
class RowsWithHidden(Rows):
    """Rows whose arrays hold the backbone's `hidden` states [B, T, D] too."""

    hidden: Files

    def arrays(self, rows: Sequence[int]) -> dict[str, np.ndarray]:
        """See `Rows.arrays`."""
        return super().arrays(rows) | {"hidden": self.hidden.read(rows)}


def with_hidden_states(
    config: Config, mesh: Mesh, train_rows: Rows, eval_rows: Rows
) -> tuple[Rows, Rows]:
    """The rows with their hidden states, of which those that are missing are computed first.

    Raises:
      InputError: the directory holds those of another backbone or of other rows, another process
        is writing there, or several processes share the run.
      OutputError: a file could not be written.
    """
    place = config.data.hidden_states
    if is_address(place) or jax.process_count() > 1:
        raise InputError(
            f"data.hidden_states {place}: expected a local directory and a single process; "
            "empty computes hidden states in each step"
        )
    weights = load(_backbone_alone(config), mesh, with_learnt=False)
    backbone = _fingerprint(config, weights)
    size = config.optim.batch_size // config.optim.accumulation
    parts = {"train": (train_rows, 0), "eval": (eval_rows, config.data.eval_rows)}
    made, missing = [], []
    directory = Path(place)
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
    with locked(directory / ".lock", f"data.hidden_states {place}"):
        for name, (rows, limit) in parts.items():
            files = _open(directory / name, rows, backbone, weights.model.hidden_size, size)
            numbers = range(0, min(len(rows), limit or len(rows)), files.rows)
            spans = [(first, min(first + files.rows, len(rows))) for first in numbers]
            missing += [
                (rows, files, span)
                for span in spans
                if not files.path(span[0] // files.rows).exists()
            ]
            made.append(RowsWithHidden(rows.pieces, rows.plan, rows.length, files))
        if missing:
            _compute(config, mesh, weights, size, missing)
    return made[0], made[1]


def _backbone_alone(config: Config) -> Config:
    """The settings of a run that has the same backbone, all of it, and heads of no size."""
    data = dataclasses.replace(config.data, hidden_states="")
    heads = settings.Heads(number=1, layers=1, shared=True)
    return dataclasses.replace(config, data=data, heads=heads)


def _fingerprint(config: Config, weights: Weights) -> int:
    """A number that other weights, or their computation in another dtype, would change."""
    sums = checksums(weights.frozen["backbone"])
    told = json.dumps([repr(weights.model), config.model.dtype, sorted(sums.items())])
    return zlib.crc32(told.encode())


def _open(directory: Path, rows: Rows, backbone: int, width: int, size: int) -> Files:
    """The files of a directory, which gets an index where it has none.

    Args:
      backbone: its fingerprint.
      size: rows that are computed at a time.

    Raises:
      InputError: its index is of something else.
    """
    ours = {"backbone": backbone, "rows": rows.fingerprint(), "shape": [rows.length, width]}
    index = directory / INDEX
    if not index.is_file():
        row_bytes = 2 * rows.length * width
        count = size * max(1, FILE_BYTES // (row_bytes * size))
        with writing(directory):
            directory.mkdir(exist_ok=True)
        json_files.write(index, ours | {"rows_of_a_file": count})
    fields = json_files.Fields(json_files.read_object(index), str(index))
    for name, value in ours.items():
        if fields.content.get(name) != value:
            raise InputError(
                f"{directory} holds hidden states of {_WHAT[name]}: delete it, or name another "
                "directory in data.hidden_states"
            )
    return Files(
        directory, fields.integer("rows_of_a_file", least=1, most=2**31), (rows.length, width)
    )


def _compute(
    config: Config,
    mesh: Mesh,
    weights: Weights,
    size: int,
    missing: Sequence[tuple[Rows, Files, tuple[int, int]]],
) -> None:
    """Computes and writes the files of missing spans (first row, last row + 1)."""
    total = sum(last - first for _, _, (first, last) in missing)
    length, width = missing[0][1].shape
    say(
        f"hidden states of {total:,} rows of {length:,} tokens, "
        f"{total * length * width * 2 / 1e9:.2f} GB, go to {config.data.hidden_states}"
    )
    hidden_states = jax.jit(
        functools.partial(_bits, weights.model, NamedSharding(mesh, HIDDEN)),
    )
    place, backbone = NamedSharding(mesh, BATCH), weights.frozen["backbone"]
    with progress(total=total, unit="rows", label="hidden states") as bar:
        for rows, files, (first, last) in missing:
            parts = []
            for numbers in _batches(first, last, size):
                batch = global_arrays(rows, numbers[None], place)
                parts.append(np.asarray(hidden_states(backbone, batch))[numbers >= 0])
                bar.update(int(np.sum(numbers >= 0)))
            files.write(first // files.rows, np.concatenate(parts))


def _batches(first: int, last: int, size: int) -> Iterator[np.ndarray]:
    """Row numbers [size] from `first` to before `last`; -1, an empty row, fills the last array."""
    for start in range(first, last, size):
        numbers = np.arange(start, start + size)
        yield np.where(numbers < last, numbers, -1)


def _bits(model: Any, sharding: NamedSharding, backbone: Any, batch: Any) -> jax.Array:
    """Hidden states of the arrays [1, B, T] as the bits of bfloat16 [B, T, D] uint16."""
    batch = jax.tree.map(lambda array: array[0], batch)
    hidden = scanned_backbone.hidden_states(model, backbone, batch, sharding=sharding)
    return jax.lax.bitcast_convert_type(hidden.astype(jnp.bfloat16), jnp.uint16)
