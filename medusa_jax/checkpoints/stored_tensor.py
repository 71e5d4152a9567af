"""A tensor that is not in memory yet: it is read, whole or in part, when that is asked for."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

_ALIGNMENT = 64  # bytes


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor that is not in memory yet: in a file, or still on devices.

    Attributes:
      shape: its dimensions.
      dtype: its NumPy name, "bfloat16" included; or a name that NumPy does not have
        ("F8_E4M3") of a type that cannot be read.
      read: loads it, or the part of it that an index selects, as a NumPy array.
      quantized: narrow numbers and their scale, where `read` multiplies the two.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[..., np.ndarray]
    quantized: "tuple[StoredTensor, StoredTensor] | None" = None

    @property
    def mT(self) -> "StoredTensor":
        """The transpose of a matrix, which is transposed when it is read."""

        def read(index: Any = ...) -> np.ndarray:
            return self.read(index if index is ... else index[::-1]).T

        pair = self.quantized and (self.quantized[0].mT, self.quantized[1])
        return StoredTensor(self.shape[::-1], self.dtype, read, pair)

    @classmethod
    def stack(cls, tensors: Sequence["StoredTensor"]) -> "StoredTensor":
        """Tensors of one shape as one, along a new first dimension; each is read where it lies."""

        def read(index: Any = ...) -> np.ndarray:
            rows, inner = (slice(None), ...) if index is ... else (index[0], index[1:])
            members = tensors[rows]
            first = members[0].read(inner)
            whole = _room((len(members), *first.shape), first.dtype)  # never all of it twice
            whole[0] = first
            for number, member in enumerate(members[1:], start=1):
                whole[number] = member.read(inner)
            return whole

        return cls((len(tensors), *tensors[0].shape), tensors[0].dtype, read)

    @classmethod
    def concatenate(cls, tensors: Sequence["StoredTensor"]) -> "StoredTensor":
        """The rows of several tensors, of those of the first on."""
        rows = sum(tensor.shape[0] for tensor in tensors)

        def read(index: Any = ...) -> np.ndarray:
            first = tensors[0].read()
            whole = _room((rows, *first.shape[1:]), first.dtype)  # never all of it twice
            end = len(first)
            whole[:end] = first
            for tensor in tensors[1:]:
                start, end = end, end + tensor.shape[0]
                whole[start:end] = tensor.read()
            return whole if index is ... else whole[index]

        pairs = [tensor.quantized for tensor in tensors if tensor.quantized]
        values, scales = zip(*pairs, strict=True) if len(pairs) == len(tensors) else ((), ())
        pair = (cls.concatenate(values), cls.concatenate(scales)) if values else None
        return cls((rows, *tensors[0].shape[1:]), tensors[0].dtype, read, pair)

    def rows(self, ids: np.ndarray) -> "StoredTensor":
        """These rows of it, in this order."""
        shape = (len(ids), *self.shape[1:])
        return StoredTensor(shape, self.dtype, lambda index=...: self.read()[ids][index])

    def cast(self, dtype: str) -> "StoredTensor":
        """It, each number rounded to the nearest of another type; read in C order."""

        def read(index: Any = ...) -> np.ndarray:
            return np.asarray(self.read(index), jnp.dtype(dtype), order="C")

        return StoredTensor(self.shape, dtype, read)


def by_rows(read: Callable[[slice], np.ndarray]) -> Callable[..., np.ndarray]:
    """`StoredTensor.read` of a function that reads whole rows, of which an index cuts the rest."""

    def part(index: Any = ...) -> np.ndarray:
        rows, *columns = (slice(None),) if index is ... else index
        return read(rows)[(slice(None), *columns)]

    return part


def _room(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array without numbers, at an address from which JAX makes no copy on a CPU."""
    size = math.prod(shape) * dtype.itemsize
    room = np.empty(size + _ALIGNMENT, np.uint8)
    start = -room.ctypes.data % _ALIGNMENT
    return room[start : start + size].view(dtype).reshape(shape)


Tensors = dict[str, StoredTensor]
