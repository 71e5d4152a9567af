"""Attention over the filled slots of a cache, on a TPU: scores stay on the chip.

A Pallas kernel takes turns over blocks of slots, many heads at a time. Blocks that a row has not
filled are not fetched: their index is that of the row's last filled block, which is there already.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from medusa_jax.shapes import typed

SLOT_BLOCK = 256
QUERY_BLOCK = 256
MOST_BYTES = 2**20  # of a block of keys, of values, and of results; each is there twice
LOWEST = float(jnp.finfo(jnp.float32).min)
Result = tuple[Array, Array, Array]


@typed
def cache_attention(
    queries: Float[Array, "B K Q C"],
    keys: Float[Array, "B K C S"],
    values: Float[Array, "B K S C"],
    lengths: Int[Array, " B"],
    first: Int[Array, "B Q"] | None,
    *,
    interpret: bool = False,
) -> Result:
    """Softmax attention of scaled queries before it is divided by its sum.

    Args:
      lengths: filled slots of each row, which its queries see.
      first: the first slot that each query's window reaches; None without a window.
      interpret: runs the kernel with XLA, on any device.

    Returns:
      mixed [B, K, Q, C], top [B, K, Q, 1] and total [B, K, Q, 1] of `model.softmax.Softmax`.
    """
    batch, kv_heads, count, width = queries.shape
    capacity = keys.shape[3]
    # Rows of 16 bits fill a register 16 at a time.
    block = min(QUERY_BLOCK, 16 * math.ceil(count / 16))
    padding = -count % block
    queries = jnp.pad(queries, ((0, 0), (0, 0), (0, padding), (0, 0)))
    slots = min(SLOT_BLOCK, capacity)
    heads = _heads(kv_heads, max(slots * width * keys.dtype.itemsize, block * max(width, 128) * 4))
    ends = pl.cdiv(lengths, slots)
    begins = jnp.zeros_like(ends)
    windows = []
    if first is not None:
        begins = jnp.maximum(first.min(axis=1), 0) // slots
        windows = [jnp.pad(first, ((0, 0), (0, padding)))[..., None]]

    def of_queries(row: Any, head: Any, query: Any, *_: Any) -> tuple[Any, ...]:
        return row, head, query, 0

    def filled(row: Any, number: Any, begins: Any, ends: Any) -> Any:
        return jnp.clip(number, begins[row], jnp.maximum(ends[row] - 1, begins[row]))

    def of_keys(row: Any, head: Any, _: Any, number: Any, lengths: Any, *spans: Any) -> Any:
        return row, head, 0, filled(row, number, *spans)

    def of_values(row: Any, head: Any, _: Any, number: Any, lengths: Any, *spans: Any) -> Any:
        return row, head, filled(row, number, *spans), 0

    size = queries.shape[2]
    result = pl.BlockSpec((1, heads, block, width), of_queries)
    number = pl.BlockSpec((1, heads, block, 1), of_queries)
    whole = pl.pallas_call(
        functools.partial(_kernel, slots=slots, capacity=capacity),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            # A turn at least, for the first of which results are set to zero.
            grid=(batch, kv_heads // heads, size // block, jnp.maximum(ends.max(), 1)),
            in_specs=[
                pl.BlockSpec((1, heads, block, width), of_queries),
                pl.BlockSpec((1, heads, width, slots), of_keys),
                pl.BlockSpec((1, heads, slots, width), of_values),
                *[pl.BlockSpec((1, block, 1), lambda row, _, query, *rest: (row, query, 0))
                  for _ in windows],
            ],
            out_specs=[result, number, number],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((batch, kv_heads, size, width), jnp.float32),
            *[jax.ShapeDtypeStruct((batch, kv_heads, size, 1), jnp.float32)] * 2,
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
        name="cache_attention",
    )(lengths, begins, ends, queries, keys, values, *windows)  # fmt: skip
    mixed, top, total = (array[:, :, :count] for array in whole)
    return mixed, top, total


def _heads(kv_heads: int, each: int) -> int:
    """How many heads a turn takes: as many as divide them and fit."""
    fitting = [n for n in range(1, kv_heads + 1) if kv_heads % n == 0 and n * each <= MOST_BYTES]
    return max(fitting, default=1)


def _kernel(
    lengths: Any, begins: Any, ends: Any, queries: Any, keys: Any, values: Any, *rest: Any,
    slots: int, capacity: int,
) -> None:  # fmt: skip
    """A block of slots, for a block of queries of some heads."""
    *windows, mixed, top, total = rest
    row, number = pl.program_id(0), pl.program_id(3)

    @pl.when(number == 0)
    def begin() -> None:
        mixed[...] = jnp.zeros_like(mixed)
        top[...] = jnp.full_like(top, LOWEST)
        total[...] = jnp.zeros_like(total)

    @pl.when((number >= begins[row]) & (number < ends[row]))
    def add() -> None:
        shape = queries.shape[2], slots
        slot = number * slots + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
        seen = slot < lengths[row]
        if windows:
            seen &= slot >= windows[0][0]
        for head in range(queries.shape[1]):
            score = _product(queries[0, head], keys[0, head])
            score = jnp.where(seen, score, -jnp.inf)
            highest = jnp.maximum(top[0, head], score.max(axis=1, keepdims=True))
            weight = jnp.exp(score - highest)
            faded = jnp.exp(top[0, head] - highest)
            value = values[0, head]
            if capacity % slots:  # the last block ends after the cache, where anything may lie
                place = jax.lax.broadcasted_iota(jnp.int32, value.shape, 0) + number * slots
                value = jnp.where(place < capacity, value, jnp.zeros_like(value))
            mixed[0, head] = faded * mixed[0, head] + _product(weight.astype(value.dtype), value)
            total[0, head] = faded * total[0, head] + weight.sum(axis=1, keepdims=True)
            top[0, head] = highest


def _product(a: Array, b: Array) -> Array:
    return jax.lax.dot(a, b, preferred_element_type=jnp.float32)
