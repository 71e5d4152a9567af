"""Attention to a block's own keys and to the filled slots of a cache, on a TPU.

`projected_attention_tpu` does the same for heads as wide as a register's row, which are most. A
Pallas kernel: scores stay on the chip. It takes the block's own keys first, then turns over
blocks of slots, many heads at a time. What a row has not filled is not fetched: the index of such
a block of slots is that of the row's last filled block, which is there already.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from medusa_jax.shapes import typed

SLOT_BLOCK = 256
QUERY_BLOCK = 256
ROWS = 16  # of 16 bits, which fill a register
LANES = 128  # numbers of a register's row
MOST_BYTES = 2**20  # of a block of an array; the next one is fetched beside it
LOWEST = float(jnp.finfo(jnp.float32).min)


@typed
def attention(
    queries: Float[Array, "B K Q C"],
    own: tuple[Float[Array, "B K C N"], Float[Array, "B K N C"], Bool[Array, "#B Q N"]],
    keys: Float[Array, "B K C S"],
    values: Float[Array, "B K S C"],
    lengths: Int[Array, " B"],
    first: Int[Array, "B Q"] | None,
    *,
    interpret: bool = False,
) -> Float[Array, "B K Q C"]:
    """Softmax attention of scaled queries; scores and sums are float32.

    Args:
      own: keys, values and mask of the block itself.
      lengths: filled slots of each row, which its queries see.
      first: the first slot that each query's window reaches; None without a window.
      interpret: runs the kernel with XLA, on any device.
    """
    batch, kv_heads, count, width = queries.shape
    capacity = keys.shape[3]
    if width % LANES:  # such values lie in the order of keys, whose rows fill registers
        values = values.swapaxes(2, 3)
    if not interpret:  # else small caches are fetched whole, with slots that are not filled
        keys, values = (pltpu.with_memory_space_constraint(a, pltpu.HBM) for a in (keys, values))
    own_keys, own_values, mask = own
    own_size = own_keys.shape[3]
    block = min(QUERY_BLOCK, ROWS * math.ceil(count / ROWS))
    slots = min(SLOT_BLOCK, capacity)
    wide = max(width, LANES)
    each = max(max(slots, own_size) * wide * keys.dtype.itemsize, block * wide * 4)
    heads = heads_at_once(kv_heads, each)
    ends = pl.cdiv(lengths, slots)
    begins, windows = jnp.zeros_like(ends), []
    queries, mask = (_padded(array, block) for array in (queries, mask.astype(jnp.int32)))
    if first is not None:
        begins = jnp.maximum(first.min(axis=1), 0) // slots
        windows = [_padded(first[..., None], block)]
    arrays = queries, own_keys, own_values, mask, keys, values, *windows
    specs = _specs(arrays, heads, block, slots)
    # A turn at least, in which the own keys are taken.
    turns = jnp.maximum(ends.max(), 1)
    mixed = pl.pallas_call(
        functools.partial(_kernel, slots=slots, capacity=capacity),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(batch, kv_heads // heads, queries.shape[2] // block, turns),
            in_specs=specs,
            out_specs=specs[0],
            scratch_shapes=[
                pltpu.VMEM((heads, block, size), jnp.float32) for size in (width, 1, 1)
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(queries.shape, queries.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
        name="cache_attention",
    )(lengths, begins, ends, *arrays)
    return mixed[:, :, :count]


def _specs(arrays: Sequence[Array], heads: int, block: int, slots: int) -> list[pl.BlockSpec]:
    """Which block of each array a turn takes, by row, heads, queries and number of slots."""
    _, own_keys, _, mask, *_ = arrays
    width, own_size = own_keys.shape[2:]

    def of_keys(row: Any, head: Any, _: Any, number: Any, lengths: Any, *ends: Any) -> Any:
        return row, head, 0, last_filled(row, number, *ends)

    def of_values(row: Any, head: Any, _: Any, number: Any, lengths: Any, *ends: Any) -> Any:
        return row, head, last_filled(row, number, *ends), 0

    of_keys_block = (1, heads, width, slots), of_keys
    of_values_block = (1, heads, slots, width), of_values
    shapes: list[tuple[tuple[int, ...], Callable[..., Any]]] = [
        ((1, heads, block, width), lambda row, head, query, *_: (row, head, query, 0)),
        ((1, heads, width, own_size), lambda row, head, *_: (row, head, 0, 0)),
        ((1, heads, own_size, width), lambda row, head, *_: (row, head, 0, 0)),
        ((1, block, own_size), lambda row, _, query, *rest: (row % mask.shape[0], query, 0)),
        of_keys_block,
        of_keys_block if width % LANES else of_values_block,
        ((1, block, 1), lambda row, _, query, *rest: (row, query, 0)),
    ]
    return [pl.BlockSpec(*shape) for shape, _ in zip(shapes, arrays, strict=False)]


def last_filled(row: Any, number: Any, begins: Any, ends: Any) -> Any:
    """The block of slots that a turn fetches: once there are no others, a row's last filled one."""
    return jnp.clip(number, begins[row], jnp.maximum(ends[row] - 1, begins[row]))


def _padded(array: Array, block: int) -> Array:
    """With so many queries, the last axis but one, that blocks divide them."""
    width = [(0, 0)] * array.ndim
    width[-2] = (0, -array.shape[-2] % block)
    return jnp.pad(array, width)


def heads_at_once(kv_heads: int, each: int) -> int:
    """How many heads a turn takes: as many as divide them and fit."""
    fitting = [n for n in range(1, kv_heads + 1) if kv_heads % n == 0 and n * each <= MOST_BYTES]
    return max(fitting, default=1)


def _kernel(
    lengths: Any, begins: Any, ends: Any, queries: Any, own_keys: Any, own_values: Any, mask: Any,
    keys: Any, values: Any, *rest: Any, slots: int, capacity: int,
) -> None:  # fmt: skip
    """A block of slots, for a block of queries of some heads."""
    *windows, out, mixed, top, total = rest
    row, number = pl.program_id(0), pl.program_id(3)
    heads, count, width = queries.shape[1:]
    slot_axis = 1 if width % LANES else 0  # of values

    def add(head: int, key: Array, value: Array, seen: Array, axis: int = 0) -> None:
        score = jnp.where(seen, product(queries[0, head], key, 0), -jnp.inf)
        add_to((mixed, top, total), head, score, value, axis)

    @pl.when(number == 0)
    def take_own() -> None:
        mixed[...] = jnp.zeros_like(mixed)
        top[...] = jnp.full_like(top, LOWEST)
        total[...] = jnp.zeros_like(total)
        for head in range(heads):
            add(head, own_keys[0, head], own_values[0, head], mask[0] != 0)

    @pl.when((number >= begins[row]) & (number < ends[row]))
    def take_slots() -> None:
        slot = number * slots + jax.lax.broadcasted_iota(jnp.int32, (count, slots), 1)
        seen = slot < lengths[row]
        if windows:
            seen &= slot >= windows[0][0]
        for head in range(heads):
            value = values[0, head]
            if capacity % slots:  # the last block ends after the cache, where anything may lie
                place = jax.lax.broadcasted_iota(jnp.int32, value.shape, slot_axis)
                place = number * slots + place
                value = jnp.where(place < capacity, value, jnp.zeros_like(value))
            add(head, keys[0, head], value, seen, slot_axis)

    @pl.when(number == pl.num_programs(3) - 1)
    def end() -> None:
        out[0] = (mixed[...] / total[...]).astype(out.dtype)


def add_to(
    sums: tuple[Any, Any, Any], head: int, score: Array, value: Array, axis: int = 0
) -> None:
    """Adds slots with these scores to a head's mixed values, largest score and sum of weights.

    Args:
      score: -inf for what a query does not see.
      axis: of the slots in the values.
    """
    mixed, top, total = sums
    highest = jnp.maximum(top[head], score.max(axis=1, keepdims=True))
    weight, faded = jnp.exp(score - highest), jnp.exp(top[head] - highest)
    mixed[head] = faded * mixed[head] + product(weight.astype(value.dtype), value, axis)
    total[head] = faded * total[head] + weight.sum(axis=1, keepdims=True)
    top[head] = highest


def product(a: Array, b: Array, axis: int) -> Array:
    """Over the columns of a and an axis of b."""
    which = (((1,), (axis,)), ((), ()))
    return jax.lax.dot_general(a, b, which, preferred_element_type=jnp.float32)
