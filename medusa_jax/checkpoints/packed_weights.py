"""Weights of GPTQ (arXiv 2210.17323) and AWQ (2306.00978) directories: numbers packed in int32.

"q_proj.qweight" holds 8 numbers of 4 bits in each int32: along inputs in GPTQ, [in / 8, out], and
along outputs in AWQ, [in, out / 8], where outputs 0 2 4 6 1 3 5 7 follow each other.
"q_proj.qzeros" [groups, out / 8] is packed along outputs in both. With "q_proj.scales"
[groups, out],

    W[o, i] = scales[g, o] * (q[i, o] - zeros[g, o])

where g is the group of input i: i // group size, or what "q_proj.g_idx" of GPTQ says. Here a weight
is one tensor, whose narrow numbers are q - zeros in int8, as long as groups are in order.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from medusa_jax import json_files
from medusa_jax.checkpoints.compressed_tensors import KEY, numbers_in, scaled
from medusa_jax.checkpoints.stored_tensor import StoredTensor, Tensors, by_rows
from medusa_jax.errors import InputError, listed

_WEIGHT, _ZEROS, _SCALES, _GROUPS = ".qweight", ".qzeros", ".scales", ".g_idx"
# Of each output of eight, its place in an int32 of AWQ; the library packs the inverse of this.
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


@dataclasses.dataclass(frozen=True)
class _Packing:
    """How a directory packs its numbers.

    Attributes:
      awq: numbers of an int32 are outputs, in AWQ's order; otherwise inputs.
      bits: of a number.
      offset: that stored zero points lack.
    """

    awq: bool
    bits: int
    offset: int

    @property
    def per_word(self) -> int:
        """Numbers of an int32."""
        return 32 // self.bits


def joined(tensors: Tensors, settings: Mapping[str, Any], origin: str) -> Tensors:
    """Tensors by name, each quantized weight, its zero points and its scales as one.

    Args:
      settings: the content of `config.json`, which says how they are quantized.
      origin: what to call it in messages.

    Raises:
      InputError: they are packed in another way than is read here.
    """
    packing = _packing(json_files.Fields(settings, origin).inner(KEY), origin)
    rest, weights = dict(tensors), {}
    for name in [name for name in rest if name.endswith(_WEIGHT)]:
        module = name.removesuffix(_WEIGHT)
        parts = {end: rest.pop(module + end, None) for end in (_WEIGHT, _ZEROS, _SCALES, _GROUPS)}
        if lacking := [module + end for end in (_ZEROS, _SCALES) if parts[end] is None]:
            raise InputError(f"{origin}: {name} has no {listed(lacking)} beside it")
        weights[f"{module}.weight"] = _weight(packing, parts, f"{origin}: {name}")
    return rest | weights


def _packing(fields: json_files.Fields, origin: str) -> _Packing:
    awq = fields.text("quant_method") == "awq"
    bits = fields.integer("bits", 4)
    form = fields.text("version" if awq else "checkpoint_format", "gemm" if awq else "gptq")
    known = ("gemm",) if awq else ("gptq", "gptq_v2")
    if form.lower() not in known or bits not in ((4,) if awq else (4, 8)):
        raise InputError(
            f"{origin}: {'AWQ' if awq else 'GPTQ'} of the format {json_files.short(form)} with "
            f"{bits} bits is not supported; expected {listed(known)} with 4 bits"
            + ("" if awq else " or 8 bits")
        )
    return _Packing(awq, bits, offset=int(form.lower() == "gptq"))


def _weight(packing: _Packing, parts: dict[str, Any], origin: str) -> StoredTensor:
    """The weight [out, in] of a module, float32, which keeps its narrow numbers where it can."""
    packed, zeros, scales, order = (parts[end] for end in (_WEIGHT, _ZEROS, _SCALES, _GROUPS))
    shape = _shape(packing, packed, zeros, scales, order, origin)
    inner, groups = shape[1], scales.shape[0]
    in_turn = np.arange(inner) // (inner // groups)
    # Read at once, for it says which numbers can be kept: some kilobytes.
    group_of = in_turn if order is None else order.read().astype(np.int64)
    if group_of.min() < 0 or group_of.max() >= groups:
        raise InputError(f"{origin}: g_idx names groups beyond 0..{groups - 1}")

    def centered(rows: slice) -> np.ndarray:
        numbers = _outputs(packing, packed, rows, shape[0], packed_along=packing.awq)
        zero = _outputs(packing, zeros, rows, shape[0], packed_along=True) + packing.offset
        return numbers - zero[:, group_of]

    def factors(rows: slice) -> np.ndarray:
        return scales.read((slice(None), rows)).astype(np.float32).T

    if packing.bits == 8 or not np.array_equal(group_of, in_turn):
        wide = by_rows(lambda rows: centered(rows) * factors(rows)[:, group_of])
        return StoredTensor(shape, "float32", wide)
    narrow = StoredTensor(shape, "int8", by_rows(lambda rows: centered(rows).astype(np.int8)))
    return scaled(narrow, StoredTensor((shape[0], groups), "float32", by_rows(factors)), origin)


def _shape(
    packing: _Packing,
    packed: StoredTensor,
    zeros: StoredTensor,
    scales: StoredTensor,
    order: StoredTensor | None,
    origin: str,
) -> tuple[int, int]:
    """Outputs and inputs. Raises InputError where parts do not fit each other."""
    parts = [one for one in (packed, zeros, scales, order) if one is not None]
    integers = all(one.dtype in ("int32", "int64") for one in parts if one is not scales)
    if integers and [len(one.shape) for one in parts] == [2, 2, 2, 1][: len(parts)]:
        groups, out = scales.shape
        inner = packed.shape[0] * (1 if packing.awq else packing.per_word)
        words = -(-out // packing.per_word)
        fits = packed.shape[1] == (words if packing.awq else out)
        fits &= zeros.shape == (groups, words) and 0 < groups <= inner and inner % groups == 0
        if fits and (order is None or order.shape == (inner,)):
            return out, inner
    shapes = ", ".join(f"{one.dtype} {list(one.shape)}" for one in parts)
    raise InputError(f"{origin} and what is beside it have shapes that do not fit: {shapes}")


def _outputs(
    packing: _Packing, packed: StoredTensor, rows: slice, out: int, *, packed_along: bool
) -> np.ndarray:
    """Numbers of some outputs, int16: [outputs, numbers].

    Args:
      packed_along: an int32 holds several outputs; otherwise several numbers of an output.
    """
    start, stop, step = rows.indices(out)
    per = packing.per_word
    words = slice(start // per, -(-stop // per)) if packed_along else slice(start, stop)
    numbers = numbers_in(packed.read((slice(None), words)), packing.bits)
    if not packed_along:  # [in / 8, outputs, 8]
        outputs = numbers.transpose(1, 0, 2)
        return outputs.reshape(len(outputs), -1).astype(np.int16)[::step]
    if packing.awq:
        numbers = numbers[..., _AWQ_PLACES]
    first = start - words.start * per
    whole = numbers.reshape(len(numbers), -1).T.astype(np.int16)
    return whole[first : first + stop - start : step]
