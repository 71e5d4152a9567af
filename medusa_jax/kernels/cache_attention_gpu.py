"""Attention over the filled slots of a cache, on a GPU: scores stay on the chip.

A Pallas kernel (Triton). Programs share the blocks of a row's filled slots in turn, so that short
texts keep as many of them at work as there are blocks; their results are joined afterwards.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from medusa_jax.shapes import typed

SLOT_BLOCK = 64
QUERY_BLOCK = 64
PROGRAMS = 256  # that keep a large GPU at work
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
    """`cache_attention_tpu.cache_attention` for a GPU.

    Args:
      queries: whose width C is a power of 2, 16 or more.
    """
    batch, kv_heads, count, width = queries.shape
    capacity = keys.shape[3]
    block = min(QUERY_BLOCK, max(16, pl.next_power_of_2(count)))
    padding = -count % block
    queries = jnp.pad(queries, ((0, 0), (0, 0), (0, padding), (0, 0)))
    size = queries.shape[2]
    blocks = size // block
    splits = pl.cdiv(PROGRAMS, batch * kv_heads * blocks)
    splits = min(splits, pl.cdiv(capacity, SLOT_BLOCK))
    begins = jnp.zeros_like(lengths)
    windows = []
    if first is not None:
        begins = jnp.maximum(first.min(axis=1), 0) // SLOT_BLOCK
        windows = [jnp.pad(first, ((0, 0), (0, padding)))]

    def of_row(program: Any, *_: Any) -> tuple[Any, ...]:
        return (program // kv_heads,)

    def of_head(program: Any, *_: Any) -> tuple[Any, ...]:
        return program // kv_heads, program % kv_heads, 0, 0

    def of_queries(program: Any, query: Any, _: Any) -> tuple[Any, ...]:
        return program // kv_heads, program % kv_heads, query, 0

    def of_split(program: Any, query: Any, split: Any) -> tuple[Any, ...]:
        return split, program // kv_heads, program % kv_heads, query

    number = pl.BlockSpec((None, None, None, block), of_split)
    shape = splits, batch, kv_heads, size
    mixed, top, total = pl.pallas_call(
        functools.partial(_kernel, splits=splits, capacity=capacity),
        grid=(batch * kv_heads, blocks, splits),
        in_specs=[
            pl.BlockSpec((1,), of_row),
            pl.BlockSpec((1,), of_row),
            pl.BlockSpec((None, None, block, width), of_queries),
            pl.BlockSpec((None, None, width, capacity), of_head),
            pl.BlockSpec((None, None, capacity, width), of_head),
            *[pl.BlockSpec((None, block), lambda program, query, _: (program // kv_heads, query))
              for _ in windows],
        ],
        out_specs=[
            pl.BlockSpec((None, None, None, block, width), lambda *i: (*of_split(*i), 0)),
            number,
            number,
        ],
        out_shape=[
            jax.ShapeDtypeStruct((*shape, width), jnp.float32),
            *[jax.ShapeDtypeStruct(shape, jnp.float32)] * 2,
        ],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="cache_attention",
    )(lengths, begins, queries, keys, values, *windows)  # fmt: skip
    highest = top.max(axis=0)
    faded = jnp.exp(top - highest)[..., None]
    mixed, total = (mixed * faded).sum(axis=0), (total[..., None] * faded).sum(axis=0)
    return mixed[:, :, :count], highest[:, :, :count, None], total[:, :, :count]


def _kernel(
    lengths: Any, begins: Any, queries: Any, keys: Any, values: Any, *rest: Any,
    splits: int, capacity: int,
) -> None:  # fmt: skip
    """The blocks of slots of a split, for a block of queries of a head."""
    *windows, mixed, top, total = rest
    query = queries[...]
    count, width = query.shape
    length = lengths[0]
    begin = begins[0] + pl.program_id(2)

    def add(turn: Array, so_far: Result) -> Result:
        mixed, top, total = so_far
        start = (begin + turn * splits) * SLOT_BLOCK
        cut = pl.ds(start, SLOT_BLOCK)
        slot = start + jnp.arange(SLOT_BLOCK)
        there = slot < length
        key = plgpu.load(keys.at[:, cut], mask=there[None, :], other=0.0)
        value = plgpu.load(values.at[cut, :], mask=there[:, None], other=0.0)
        seen = jnp.broadcast_to(there[None, :], (count, SLOT_BLOCK))
        if windows:
            seen &= slot[None, :] >= windows[0][...][:, None]
        score = jnp.where(seen, _product(query, key), -jnp.inf)
        highest = jnp.maximum(top, score.max(axis=1))
        weight = jnp.exp(score - highest[:, None])
        faded = jnp.exp(top - highest)
        mixed = faded[:, None] * mixed + _product(weight.astype(value.dtype), value)
        return mixed, highest, faded * total + weight.sum(axis=1)

    none = jnp.zeros((count, width)), jnp.full(count, LOWEST), jnp.zeros(count)
    left = pl.cdiv(length, SLOT_BLOCK) - begin
    turns = jnp.maximum(pl.cdiv(left, splits), 0)
    mixed[...], top[...], total[...] = jax.lax.fori_loop(0, turns, add, none)


def _product(a: Array, b: Array) -> Array:
    return pl.dot(a, b)
