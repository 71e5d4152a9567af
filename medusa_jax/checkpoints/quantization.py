"""Quantized weights: narrow numbers and scales, made by qwix as each tensor is read.

int8 and fp8 (float8_e4m3fn) have a scale for each output of a weight. int4 has a scale for each
group of an output's inputs; tables of tokens, which are the most sensitive, are int8 then. Norms
and biases keep their type. Activations are never quantized.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from medusa_jax.checkpoints.stored_tensor import StoredTensor
from medusa_jax.errors import InputError

NONE = "none"
# Names of the quantizations and the types of their numbers.
TYPES = {"int8": "int8", "fp8": "float8_e4m3fn", "int4": "int4"}
CHOICES = (*TYPES, NONE)
GROUPS = (128, 64, 32)  # sizes of an int4 weight's groups: the first that divides its inputs
TABLES = ("embedding", "lm_head", "vocab")  # names of parameters with a row for each token
_BLOCK = 2**22  # numbers of a tensor that are in memory before they are narrow


def check(quantize: str) -> None:
    """Raises InputError for an unknown quantization, and where qwix is missing."""
    if quantize not in CHOICES:
        raise InputError(f"quantize is {quantize!r}; expected {', '.join(CHOICES)}")
    if quantize != NONE:
        try:
            import qwix  # noqa: F401
        except ImportError:
            raise InputError(
                f"quantize {quantize} needs qwix: pip install 'medusa_jax[quantize]'"
            ) from None


def type_for(path: str, quantize: str) -> str:
    """The type of a weight's numbers: "lm_head" and "int4" -> "int8"; "" for NONE."""
    table = path.split("/")[-1] in TABLES
    return TYPES.get("int8" if quantize == "int4" and table else quantize, "")


def name_of(dtype: str) -> str:
    """The quantization with numbers of a type: "float8_e4m3fn" -> "fp8"."""
    return next(name for name, narrow in TYPES.items() if narrow == dtype)


@functools.partial(jax.jit, static_argnames=("dtype", "axis"))
def quantized(array: jax.Array, dtype: str, axis: int) -> tuple[jax.Array, jax.Array]:
    """The nearest numbers of a narrow type, and their scale (`model.weight.Weight`).

    Args:
      array: a weight or a stack of them, float32.
      dtype: of `TYPES`.
      axis: -1 or -2, that of the inputs.
    """
    import qwix

    others = [i for i in range(array.ndim) if i != array.ndim + axis]
    size = array.shape[axis] // groups_of(array.shape[axis])
    groups = {array.ndim + axis: size} if dtype == "int4" else {}
    narrow = qwix.quantize(array, dtype, channelwise_axes=others, tiled_axes=groups)
    scale = jnp.moveaxis(narrow.scale, axis, -1)
    return narrow.qvalue, scale if groups else scale[..., 0]


def stored(tensor: StoredTensor, dtype: str, axis: int) -> tuple[StoredTensor, StoredTensor]:
    """`quantized` for a tensor in a file, which is read and made narrow block by block."""
    axis, shape = len(tensor.shape) + axis, tensor.shape
    # Scales of what was read: they are asked for after the values, and small.
    known: dict[Any, np.ndarray] = {}

    def values(index: Any = ...) -> np.ndarray:
        places = _places(shape, index)
        inputs, places[axis] = places[axis], slice(0, shape[axis])
        bounds = _bounds(places)
        narrow, known[bounds] = _blocks(tensor, bounds, dtype, axis)
        return narrow[tuple(inputs if i == axis else slice(None) for i in range(len(shape)))]

    def scale(index: Any = ...) -> np.ndarray:
        places = _places(scales, index)
        outputs = places[: len(shape) - 1]
        outputs.insert(axis, slice(0, shape[axis]))
        bounds = _bounds(outputs)
        return known[bounds] if bounds in known else _blocks(tensor, bounds, dtype, axis)[1]

    scales = tuple(size for i, size in enumerate(shape) if i != axis)
    if dtype == "int4":
        scales = (*scales, groups_of(shape[axis]))
    return StoredTensor(shape, dtype, values), StoredTensor(scales, "float32", scale)


def _blocks(
    tensor: StoredTensor, bounds: tuple[tuple[int, int], ...], dtype: str, axis: int
) -> tuple[np.ndarray, np.ndarray]:
    """A part of a tensor with all inputs of its outputs, quantized."""
    rank = len(bounds)
    out = 2 * rank - 3 - axis  # the other of the last two
    (start, stop), sizes = bounds[out], [end - begin for begin, end in bounds]
    step = max(_BLOCK * sizes[out] // math.prod(sizes), 1)
    values, scales = [], []
    for first in range(start, stop, step):
        index = [slice(*pair) for pair in bounds]
        index[out] = slice(first, min(first + step, stop))
        block = tensor.read(tuple(index)).astype(np.float32)
        narrow, scale = quantized(block, dtype, axis - rank)
        values.append(np.asarray(narrow))
        scales.append(np.asarray(scale))
    return np.concatenate(values, out), np.concatenate(scales, rank - 2)


def groups_of(inputs: int) -> int:
    """Groups of an output's inputs in int4: 4096 -> 32 of 128, 576 -> 9 of 64, 80 -> 1."""
    return inputs // next((size for size in GROUPS if inputs % size == 0), inputs)


def _places(shape: tuple[int, ...], index: Any) -> list[slice]:
    """An index as slices with a begin and an end."""
    whole = [slice(None)] * len(shape) if index is ... else index
    return [slice(*one.indices(size)[:2]) for one, size in zip(whole, shape, strict=True)]


def _bounds(places: list[slice]) -> tuple[tuple[int, int], ...]:
    return tuple((place.start, place.stop) for place in places)
