"""GGUF, the file of llama.cpp: settings, tokenizer and quantized tensors in a single file.

The `gguf` library of llama.cpp reads it, and knows the types of tensors. Files are untrusted: what
the library stumbles over is an error that names the file.
"""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from medusa_jax.errors import InputError, listed

SUFFIX = ".gguf"
MAGIC = b"GGUF"


@dataclasses.dataclass(frozen=True)
class GgufTensor:
    """A tensor that is not in memory yet.

    Attributes:
      shape: its dimensions, as NumPy counts them: a weight is [out, in].
      kind: the name of its type, such as "Q4_K".
      path, offset: where its numbers lie.
      row: type and shape of a row in the file, which is an output.
    """

    shape: tuple[int, ...]
    kind: str
    path: Path
    offset: int
    row: np.dtype

    def read(self, rows: Any = ...) -> np.ndarray:
        """Its numbers as float32, or those of some rows.

        Raises:
          InputError: the file has become shorter since it was opened.
        """
        from gguf import GGMLQuantizationType, quants

        # Not by the library's map of the file, whose pages would stay in this process's memory.
        span = isinstance(rows, slice) and rows.step in (None, 1)
        start, stop, _ = (rows if span else slice(None)).indices(self.shape[0])
        place = {"count": max(stop - start, 0), "offset": self.offset + start * self.row.itemsize}
        data = np.fromfile(self.path, self.row, **place)
        if len(data) < place["count"]:
            raise InputError(f"{self.path} has changed while it was read: it has become shorter")
        with np.errstate(all="ignore"):  # damaged blocks hold NaN, which loading looks for
            numbers = quants.dequantize(data, GGMLQuantizationType[self.kind])
        return numbers if span else numbers[rows]


@dataclasses.dataclass(frozen=True)
class GgufFile:
    """A file that is open.

    Attributes:
      path: where it lies.
      fields: its settings by name, "general.architecture" and the like.
      tensors: by name.
    """

    path: Path
    fields: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    @property
    def architecture(self) -> str:
        """The family, such as "llama"."""
        return str(self.fields.get("general.architecture"))

    def setting(self, name: str) -> Any:
        """A setting of the architecture: "block_count" -> the value of "llama.block_count"."""
        return self.fields.get(f"{self.architecture}.{name}")


def is_gguf(path: Path) -> bool:
    """Whether a path names a GGUF file, by its suffix."""
    return path.suffix.lower() == SUFFIX and path.is_file()


def only_gguf(directory: Path) -> Path | None:
    """The GGUF file of a directory that holds no other model; None where there is none.

    Raises:
      InputError: there are several.
    """
    if not directory.is_dir() or (directory / "config.json").exists():
        return None
    files = sorted(path for path in directory.iterdir() if is_gguf(path))
    if len(files) > 1:
        names = listed([file.name for file in files], 5)
        raise InputError(f"{directory} holds {len(files)} GGUF files: name a file: {names}")
    return files[0] if files else None


def open_gguf(path: Path) -> GgufFile:
    """Opens a file; its tensors are read when they are asked for.

    Raises:
      InputError: it is no GGUF file, is damaged, or holds types that the library does not know.
    """
    state = path.stat()
    return _open(path, state.st_mtime_ns, state.st_size)


@functools.lru_cache(maxsize=2)  # the tokenizer and the backbone open the same file
def _open(path: Path, *state: int) -> GgufFile:
    with path.open("rb") as stream:
        if stream.read(4) != MAGIC:
            raise InputError(f"{path} is no GGUF file: it does not begin with {MAGIC.decode()}")
    try:
        reader = _reader()(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {
            tensor.name: GgufTensor(
                shape=tuple(map(int, tensor.shape[::-1])),
                kind=tensor.tensor_type.name,
                path=path,
                offset=int(tensor.data_offset),
                row=np.dtype((tensor.data.dtype, tensor.data.shape[1:])),
            )
            for tensor in reader.tensors
        }
    except Exception as error:  # the library knows no error of its own
        raise InputError(f"{path}: damaged, or no GGUF file: {_reason(error)}") from None
    return GgufFile(path, fields, tensors)


@functools.cache
def _reader() -> Any:
    """The library's reader, which otherwise reads on behind the end of a file that is cut off."""
    import gguf

    class Bounded(gguf.GGUFReader):
        @property
        def data(self) -> Any:
            return self._data

        @data.setter
        def data(self, file: Any) -> None:
            # A vocabulary is cut into a view for each token: views of a memmap are large and slow.
            self._data = np.asarray(file)

        def _get(self, offset: int, dtype: Any, count: int = 1, *order: Any, **named: Any) -> Any:
            if int(offset) + np.dtype(dtype).itemsize * int(count) > self.data.size:
                raise ValueError("the file ends before its content does")
            return super()._get(offset, dtype, count, *order, **named)

    return Bounded


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
