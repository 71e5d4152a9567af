"""Weights that are quantized in their files, as compressed-tensors and LLM Compressor write them.

"q_proj.weight" holds int8 or float8 numbers, and "q_proj.weight_scale" a scale for the tensor, for
each output [out, 1], or for each group of an output's inputs [out, G]. "q_proj.weight_packed" holds
8 numbers of 4 bits, or 4 of 8 bits, in each int32 [out, in / 8], with "weight_shape" [2] beside it.
Here a weight is one tensor: reading it multiplies, and `StoredTensor.quantized` has both parts.
"""

import logging
import re
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from medusa_jax import json_files
from medusa_jax.checkpoints import float8
from medusa_jax.checkpoints.stored_tensor import StoredTensor, Tensors, by_rows
from medusa_jax.errors import InputError, listed

log = logging.getLogger(__name__)

KEY, METHOD = "quantization_config", "compressed-tensors"  # of config.json
_FORMATS = ("int-quantized", "float-quantized", "naive-quantized", "pack-quantized", "dense",
            "mixed-precision")  # fmt: skip
# Scales of activations and of the cache, which stay floats here.
_ACTIVATIONS = re.compile(r"\.(input|output|k|v|q)_(global_)?(scale|zero_point)$")
_SCALE, _PACKED, _SHAPE = ".weight_scale", ".weight_packed", ".weight_shape"


def joined(tensors: Tensors, settings: Mapping[str, Any], origin: str) -> Tensors:
    """Tensors by name, each quantized weight and its scale as one.

    Args:
      settings: the content of `config.json`, which says how they are quantized.
      origin: what to call it in messages.

    Raises:
      InputError: they are quantized in another way than is read here.
    """
    fields = json_files.Fields(settings, origin).inner(KEY)
    stored = fields.text("format", "dense")
    if stored not in _FORMATS:
        raise InputError(
            f"{origin}: weights of the format {json_files.short(stored)} are not supported; "
            f"expected {', '.join(_FORMATS)}"
        )
    rest = {name: one for name, one in tensors.items() if not _ACTIVATIONS.search(name)}
    groups = fields.inner("config_groups").content.values()
    if any(isinstance(one, dict) and one.get("input_activations") for one in groups):
        log.warning("%s: only weights are quantized; settings of activations are ignored", origin)
    weights = {}
    for name in [name for name in rest if name.endswith(_SCALE)]:
        module, scale = name.removesuffix(_SCALE), rest.pop(name)
        packed, shape = rest.pop(module + _PACKED, None), rest.pop(module + _SHAPE, None)
        whole = f"{module}.weight"
        values = rest.pop(whole, None)
        if packed and shape:
            values = _unpacked(packed, tuple(map(int, shape.read())), f"{origin}: {whole}")
        if values is None:
            raise InputError(f"{origin}: {name} has no {whole} beside it")
        weights[whole] = scaled(values, scale, f"{origin}: {whole}")
    if strange := [name for name in rest if re.search(r"\.weight_(?!scale)\w+$", name)]:
        raise InputError(
            f"{origin}: zero points and orders of inputs are not supported: {listed(strange)}"
        )
    if alone := [name for name, one in rest.items() if one.dtype == float8.NAME]:
        raise InputError(f"{origin}: 8-bit floats without a scale: {listed(sorted(alone))}")
    return rest | weights


def scaled(values: StoredTensor, scale: StoredTensor, origin: str) -> StoredTensor:
    """The product of numbers and scale, float32, which keeps both."""
    if values.dtype == float8.NAME:
        values = StoredTensor(values.shape, "float8_e4m3fn", values.read)
    if values.dtype not in ("int8", "int4", "float8_e4m3fn") or len(values.shape) != 2:
        raise InputError(f"{origin} of type {values.dtype} {list(values.shape)} is not supported")
    out, inner = values.shape
    groups = scale.shape[-1] if len(scale.shape) == 2 else 1
    if scale.shape not in ((out, groups), (1,), ()) or inner % groups:
        raise InputError(
            f"{origin} {[out, inner]} has a scale {list(scale.shape)}; expected [], [1], "
            "[outputs, 1] or [outputs, groups]"
        )

    def factors(index: Any = ...) -> np.ndarray:
        whole = np.broadcast_to(scale.read().astype(np.float32).reshape(-1, groups), (out, groups))
        return np.array((whole if groups > 1 else whole[:, 0])[index])

    def read(rows: slice) -> np.ndarray:
        wide = values.read((rows, slice(None))).astype(np.float32)
        parts = wide.reshape(len(wide), groups, -1) * factors((rows,)).reshape(-1, groups, 1)
        return parts.reshape(wide.shape)

    shape = (out, groups) if groups > 1 else (out,)
    pair = values, StoredTensor(shape, "float32", factors)
    return StoredTensor(values.shape, "float32", by_rows(read), pair)


def _unpacked(packed: StoredTensor, shape: tuple[int, ...], origin: str) -> StoredTensor:
    """Numbers of 4 or 8 bits out of int32, the lowest bits first, stored plus half their range."""
    bits = 32 * packed.shape[-1] // max(shape[-1], 1) if len(shape) == 2 else 0
    exact = packed.dtype == "int32" and len(shape) == len(packed.shape) == 2
    if bits not in (4, 8) or not exact or packed.shape != (shape[0], -(-shape[1] * bits // 32)):
        raise InputError(
            f"{origin} {list(shape)}, packed in {packed.dtype} {list(packed.shape)}, "
            "is not supported; expected 4 or 8 bits in int32"
        )

    def read(rows: slice) -> np.ndarray:
        words = packed.read((rows, slice(None)))
        numbers = numbers_in(words, bits).reshape(len(words), -1)
        narrow = np.int8 if bits == 8 else ml_dtypes.int4
        return (numbers[:, : shape[1]].astype(np.int16) - 2 ** (bits - 1)).astype(narrow)

    return StoredTensor(shape, f"int{bits}", by_rows(read))


def numbers_in(words: np.ndarray, bits: int) -> np.ndarray:
    """The numbers of 4 or 8 bits in each int32, uint8 [..., 32 / bits], the lowest bits first.

    0x76543210 holds 0, 1, 2, ..., 7 of 4 bits.
    """
    numbers = np.ascontiguousarray(words.astype("<i4")).view(np.uint8).reshape(*words.shape, 4)
    if bits == 4:
        numbers = np.stack((numbers & 15, numbers >> 4), -1).reshape(*words.shape, 8)
    return numbers
