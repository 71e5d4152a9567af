"""Attention to a block's own keys and to the filled slots of a cache, on a GPU.

A Pallas kernel (Triton): scores stay on the chip. Programs share the blocks of a row's filled
slots in turn, so that short texts keep as many of them at work as there are blocks. The first of
them takes the block's own keys too. Their results are joined afterwards.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int

from medusa_jax.shapes import typed

SLOT_BLOCK = 64
QUERY_BLOCK = 64
LEAST = 16  # rows and columns of a product
PROGRAMS = 128  # that keep a large GPU at work
LOWEST = float(jnp.finfo(jnp.float32).min)
Sums = tuple[Array, Array, Array]


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
    """`cache_attention_tpu.attention` for a GPU; C is a power of 2, and S a multiple of 64."""
    batch, kv_heads, count, width = queries.shape
    own_keys, own_values, mask = own
    rows, columns = _block(count, QUERY_BLOCK), _block(own_keys.shape[3], SLOT_BLOCK)
    queries, mask = _padded(queries, 2, rows), _padded(_padded(mask, 1, rows), 2, columns)
    own_keys, own_values = _padded(own_keys, 3, columns), _padded(own_values, 2, columns)
    blocks = queries.shape[2] // rows
    splits = pl.cdiv(PROGRAMS, batch * kv_heads * blocks)
    splits = min(splits, pl.cdiv(keys.shape[3], SLOT_BLOCK))
    begins, windows = jnp.zeros_like(lengths), []
    if first is not None:
        begins = jnp.maximum(first.min(axis=1), 0) // SLOT_BLOCK
        windows = [_padded(first, 1, rows)]

    spec = functools.partial(_spec, kv_heads)
    shape = splits, *queries.shape
    sums = [jax.ShapeDtypeStruct(shape[:n], jnp.float32) for n in (5, 4, 4)]
    number = pl.BlockSpec((1,), lambda program, *_: (program // kv_heads,))
    mixed, top, total = pl.pallas_call(
        functools.partial(_kernel, splits=splits, columns=columns),
        grid=(batch * kv_heads, blocks, splits),
        in_specs=[
            number,
            number,
            spec(queries, rows, width),
            spec(own_keys),
            spec(own_values),
            spec(mask, rows, mask.shape[2], of_row=True),
            spec(keys),
            spec(values),
            *[spec(window, rows, of_row=True) for window in windows],
        ],
        out_specs=[_of_split(kv_heads, rows, *array.shape[4:]) for array in sums],
        out_shape=sums,
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="cache_attention",
    )(lengths, begins, queries, own_keys, own_values, mask, keys, values, *windows)
    faded = jnp.exp(top - top.max(axis=0))
    mixed = (mixed * faded[..., None]).sum(axis=0) / (total * faded).sum(axis=0)[..., None]
    return mixed[:, :, :count].astype(queries.dtype)


def _spec(kv_heads: int, array: Any, *block: int, of_row: bool = False) -> pl.BlockSpec:
    """Of a row [B, ...] or a head [B, K, ...]: all of it, or the block of some queries."""
    parts = 1 if of_row else 2

    def place(program: Any, query: Any, _: Any) -> tuple[Any, ...]:
        row, head = program // kv_heads % array.shape[0], program % kv_heads
        rest = [query if block else 0] + [0] * (array.ndim - parts - 1)
        return (row, *(() if of_row else (head,)), *rest)

    return pl.BlockSpec((None,) * parts + (block or array.shape[parts:]), place)


def _of_split(kv_heads: int, *block: int) -> pl.BlockSpec:
    """The place of a program's sums in arrays [split, B, K, Q, ...]."""

    def place(program: Any, query: Any, split: Any) -> tuple[Any, ...]:
        return split, program // kv_heads, program % kv_heads, query, *[0] * (len(block) - 1)

    return pl.BlockSpec((None, None, None, *block), place)


def _block(size: int, most: int) -> int:
    return min(most, max(LEAST, pl.next_power_of_2(size)))


def _padded(array: Array, axis: int, block: int) -> Array:
    width = [(0, 0)] * array.ndim
    width[axis] = (0, -array.shape[axis] % block)
    return jnp.pad(array, width)


def _kernel(
    lengths: Any, begins: Any, queries: Any, own_keys: Any, own_values: Any, mask: Any, keys: Any,
    values: Any, *rest: Any, splits: int, columns: int,
) -> None:  # fmt: skip
    """The blocks of slots of a split, for a block of queries of a head."""
    *windows, mixed, top, total = rest
    query = queries[...]
    count, width = query.shape
    length, split = lengths[0], pl.program_id(2)
    begin = begins[0] + split

    def add(sums: Sums, key: Array, value: Array, seen: Array) -> Sums:
        mixed, top, total = sums
        score = jnp.where(seen, plgpu.dot(query, key), -jnp.inf)
        highest = jnp.maximum(top, score.max(axis=1))
        weight, faded = jnp.exp(score - highest[:, None]), jnp.exp(top - highest)
        mixed = faded[:, None] * mixed + plgpu.dot(weight.astype(value.dtype), value)
        return mixed, highest, faded * total + weight.sum(axis=1)

    def add_own(turn: Array, sums: Sums) -> Sums:
        cut = pl.ds(turn * columns, columns)
        return add(sums, own_keys[:, cut], own_values[cut, :], mask[:, cut])

    def add_slots(turn: Array, sums: Sums) -> Sums:
        start = (begin + turn * splits) * SLOT_BLOCK
        cut, slot = pl.ds(start, SLOT_BLOCK), start + jnp.arange(SLOT_BLOCK)
        seen = jnp.broadcast_to(slot[None, :] < length, (count, SLOT_BLOCK))
        if windows:
            seen &= slot[None, :] >= windows[0][...][:, None]
        return add(sums, keys[:, cut], values[cut, :], seen)

    none = jnp.zeros((count, width)), jnp.full(count, LOWEST), jnp.zeros(count)
    own_turns = jnp.where(split == 0, jnp.int32(mask.shape[1] // columns), jnp.int32(0))
    turns = jnp.maximum(pl.cdiv(pl.cdiv(length, SLOT_BLOCK) - begin, splits), 0)
    sums = jax.lax.fori_loop(0, own_turns, add_own, none)
    mixed[...], top[...], total[...] = jax.lax.fori_loop(0, turns, add_slots, sums)
