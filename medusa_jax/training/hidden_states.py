"""The frozen backbone's hidden states of all rows, computed once and read in each epoch.

`data.hidden_states` names a directory. Its `train/` and `eval/` hold

    index.json             what they were computed from
    00000.npy, 00001.npy   hidden states of so many rows [., T, D], the bits of bfloat16

A file is there whole or not at all. So a run that was killed goes on with the next file.
Complete states are read without a lock, so runs share them.
"""

import dataclasses
import functools
import io
import json
import math
import os
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
from medusa_jax.training.mesh import BATCH, HIDDEN, compiler_options
from medusa_jax.training.settings import Config
from medusa_jax.training.weights import Weights, load
from medusa_jax.training.workdir import is_address

INDEX = "index.json"
LOCK = ".hidden_states.lock"  # that of a run has another name: the directory may be its --workdir
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

    def is_whole(self, number: int, rows: int) -> bool:
        """Whether a file of so many rows is there, to its last byte."""
        path, shape = self.path(number), (rows, *self.shape)
        size = len(_header(shape)) + 2 * math.prod(shape)
        return path.is_file() and path.stat().st_size == size

    def read(self, rows: Sequence[int]) -> np.ndarray:
        """Hidden states of some rows [B, T, D] bfloat16; of row -1, which is empty, zeros."""
        out = np.zeros((len(rows), *self.shape), np.uint16)
        for place, row in enumerate(rows):
            if row >= 0:
                number, within = divmod(row, self.rows)
                out[place] = np.load(self.path(number), mmap_mode="r")[within]
        return out.view(ml_dtypes.bfloat16)

    def write(self, number: int, hidden: np.ndarray) -> None:
        """Writes a file, uint16 [rows, T, D], whole or not at all. Raises OutputError."""
        path = self.path(number)
        beside = path.with_suffix(".tmp")
        with writing(path):
            try:
                with open(beside, "wb") as stream:  # np.save loses the error of the last bytes
                    stream.write(_header(hidden.shape))
                    stream.write(np.ascontiguousarray(hidden).data.cast("B"))
                    stream.flush()
                    os.fsync(stream.fileno())
                beside.replace(path)
            except BaseException:
                beside.unlink(missing_ok=True)
                raise


def _header(shape: tuple[int, ...]) -> bytes:
    """What a .npy file of such an array of uint16 begins with."""
    stream = io.BytesIO()
    fields = {"descr": "<u2", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, fields)
    return stream.getvalue()


# Rows of which the first to before the last are in one of the files.
Span = tuple[Rows, Files, tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class Part:
    """Rows, and where their hidden states are kept.

    Attributes:
      directory: of their files.
      rows: all of them.
      needed: how many of them, from the first, are read.
      origin: what their states are computed from, as the index says it.
    """

    directory: Path
    rows: Rows
    needed: int
    origin: dict[str, Any]

    def open(self) -> Files | None:
        """The files; None where no index says what they are.

        Raises:
          InputError: the index is of something else.
        """
        index = self.directory / INDEX
        if not index.is_file():
            return None
        fields = json_files.Fields(json_files.read_object(index), str(index))
        for name, value in self.origin.items():
            if fields.content.get(name) != value:
                raise InputError(
                    f"{self.directory} holds hidden states of {_WHAT[name]}: delete it, or name "
                    "another directory in data.hidden_states"
                )
        rows = fields.integer("rows_of_a_file", least=1, most=2**31)
        return Files(self.directory, rows, tuple(self.origin["shape"]))

    def begun(self, size: int) -> Files:
        """The files, with an index where there was none.

        Args:
          size: rows that are computed at a time.
        """
        if files := self.open():
            return files
        batch_bytes = 2 * size * math.prod(self.origin["shape"])
        count = size * max(1, FILE_BYTES // batch_bytes)
        with writing(self.directory):
            self.directory.mkdir(exist_ok=True)
            for unknown in self.directory.glob(f"{'[0-9]' * 5}.npy"):  # could be of any backbone
                unknown.unlink()
        json_files.write(self.directory / INDEX, self.origin | {"rows_of_a_file": count})
        return Files(self.directory, count, tuple(self.origin["shape"]))

    def missing(self, files: Files) -> list[Span]:
        """What is still to be computed, a span for each file."""
        firsts = range(0, min(self.needed, len(self.rows)), files.rows)
        spans = [(first, min(first + files.rows, len(self.rows))) for first in firsts]
        return [
            (self.rows, files, (first, last))
            for first, last in spans
            if not files.is_whole(first // files.rows, last - first)
        ]


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
    backbone, width = _fingerprint(config, weights), weights.model.hidden_size
    size = config.optim.piece_rows
    directory = Path(place)

    def part(name: str, rows: Rows, needed: int) -> Part:
        shape = [rows.length, width]
        origin = {"backbone": backbone, "rows": rows.fingerprint(), "shape": shape}
        return Part(directory / name, rows, needed, origin)

    limit = config.data.eval_rows or len(eval_rows)
    parts = part("train", train_rows, len(train_rows)), part("eval", eval_rows, limit)
    if not all((files := part.open()) and not part.missing(files) for part in parts):
        with writing(directory):
            directory.mkdir(parents=True, exist_ok=True)
        with locked(directory / LOCK, f"data.hidden_states {place}"):
            missing = [span for part in parts for span in part.missing(part.begun(size))]
            _compute(config, mesh, weights, size, missing)
    made = [
        RowsWithHidden(part.rows.pieces, part.rows.plan, part.rows.length, part.begun(size))
        for part in parts
    ]
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


def _compute(
    config: Config,
    mesh: Mesh,
    weights: Weights,
    size: int,
    missing: Sequence[Span],
) -> None:
    """Computes and writes the files of missing spans."""
    if not missing:  # another process has written them before this one held the lock
        return
    total = sum(last - first for _, _, (first, last) in missing)
    length, width = missing[0][1].shape
    say(
        f"hidden states of {total:,} rows of {length:,} tokens, "
        f"{total * length * width * 2 / 1e9:.2f} GB, go to {config.data.hidden_states}"
    )
    hidden_states = jax.jit(
        functools.partial(_bits, weights.model, NamedSharding(mesh, HIDDEN)),
        compiler_options=compiler_options(mesh),
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
