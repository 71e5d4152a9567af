"""Attention to a block's own keys and to the filled slots of a cache, on a GPU.

A Pallas kernel (Triton): scores stay on the chip. Programs share the blocks of a row's filled
slots in turn, so that short texts keep as many of them at work as there are blocks. The first of
them takes the block's own keys too. Their results are joined afterwards.

The kernel reads the block as the projections leave it, token by token, and writes in that order:
transpositions here cancel those of the caller. Programs count rows and columns of a block up to
powers of 2. What is beyond its end is read as its last token: keys are left out, queries write
what the last token writes.
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
    queries: Float[Array, "B K G T C"],
    own: tuple[Float[Array, "B K C N"], Float[Array, "B K N C"], Bool[Array, "#B T N"]],
    keys: Float[Array, "B K C S"],
    values: Float[Array, "B K S C"],
    lengths: Int[Array, " B"],
    first: Int[Array, "B T"] | None,
    *,
    interpret: bool = False,
) -> Float[Array, "B K G T C"]:
    """Softmax attention of scaled queries; scores and sums are float32.

    Args:
      own: keys, values and mask of the block itself.
      keys, values: of the cache; C is a power of 2, and S a multiple of 64.
      lengths: filled slots of each row, which its queries see.
      first: the first slot that each query's window reaches; None without a window.
      interpret: runs the kernel with XLA, on any device.
    """
    batch, kv_heads, group, count, width = queries.shape
    own_keys, own_values, mask = own
    own_keys, own_values = own_keys.transpose(0, 3, 1, 2), own_values.swapaxes(1, 2)
    queries = queries.transpose(0, 3, 1, 2, 4)
    rows, columns = _block(count * group, QUERY_BLOCK), _block(mask.shape[2], SLOT_BLOCK)
    blocks = pl.cdiv(count * group, rows)
    splits = pl.cdiv(PROGRAMS, batch * kv_heads * blocks)
    splits = min(splits, pl.cdiv(keys.shape[3], SLOT_BLOCK))
    begins, windows = jnp.zeros_like(lengths), []
    if first is not None:
        begins = jnp.maximum(first.min(axis=1), 0) // SLOT_BLOCK
        windows = [first]

    spec = functools.partial(_spec, kv_heads)
    shape = splits, batch, count, kv_heads, group, width
    sums = [jax.ShapeDtypeStruct(shape[:n], jnp.float32) for n in (6, 5, 5)]
    mixed, top, total = pl.pallas_call(
        functools.partial(_kernel, splits=splits, rows=rows, columns=columns),
        grid=(batch * kv_heads, blocks, splits),
        in_specs=[
            spec(lengths),
            spec(begins),
            spec(queries, 2),
            spec(own_keys, 2),
            spec(own_values, 2),
            spec(mask),
            spec(keys, 1),
            spec(values, 1),
            *[spec(window) for window in windows],
        ],
        out_specs=[_of_split(kv_heads, array.shape) for array in sums],
        out_shape=sums,
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="cache_attention",
    )(lengths, begins, queries, own_keys, own_values, mask, keys, values, *windows)
    faded = jnp.exp(top - top.max(axis=0))
    mixed = (mixed * faded[..., None]).sum(axis=0) / (total * faded).sum(axis=0)[..., None]
    return mixed.astype(queries.dtype).transpose(0, 2, 3, 1, 4)


def _spec(kv_heads: int, array: Any, head_axis: int | None = None) -> pl.BlockSpec:
    """All that an array [B, ...] holds of a program's row, and of its head if it has heads."""

    def place(program: Any, *_: Any) -> tuple[Any, ...]:
        indices = [program // kv_heads % array.shape[0]] + [0] * (array.ndim - 1)
        if head_axis is not None:
            indices[head_axis] = program % kv_heads
        return tuple(indices)

    block: list[int | None] = [None, *array.shape[1:]]
    if head_axis is not None:
        block[head_axis] = None
    return pl.BlockSpec(tuple(block), place)


def _of_split(kv_heads: int, shape: tuple[int, ...]) -> pl.BlockSpec:
    """A split's sums of a row and a key/value head, in arrays [split, B, T, K, G, ...]."""

    def place(program: Any, query: Any, split: Any) -> tuple[Any, ...]:
        rest = [0] * (len(shape) - 4)
        return split, program // kv_heads, 0, program % kv_heads, *rest

    return pl.BlockSpec((None, None, shape[2], None, *shape[4:]), place)


def _block(size: int, most: int) -> int:
    return min(most, max(LEAST, pl.next_power_of_2(size)))


def _kernel(
    lengths: Any, begins: Any, queries: Any, own_keys: Any, own_values: Any, mask: Any, keys: Any,
    values: Any, *rest: Any, splits: int, rows: int, columns: int,
) -> None:  # fmt: skip
    """The blocks of slots of a split, for a block of queries of a head.

    Row r of all is query r // G of the group's member r % G.
    """
    *windows, mixed, top, total = rest
    count, group, width = queries.shape
    row = pl.program_id(1) * rows + jnp.arange(rows)
    token = jnp.minimum(jax.lax.div(row, jnp.int32(group)), count - 1)
    member = jax.lax.rem(row, jnp.int32(group))
    query = queries[token, member]
    length, split = lengths[...], pl.program_id(2)
    begin = begins[...] + split

    def add(sums: Sums, score: Array, value: Array, seen: Array) -> Sums:
        mixed, top, total = sums
        score = jnp.where(seen, score, -jnp.inf)
        highest = jnp.maximum(top, score.max(axis=1))
        weight, faded = jnp.exp(score - highest[:, None]), jnp.exp(top - highest)
        mixed = faded[:, None] * mixed + plgpu.dot(weight.astype(value.dtype), value)
        return mixed, highest, faded * total + weight.sum(axis=1)

    def add_own(turn: Array, sums: Sums) -> Sums:
        column = turn * columns + jnp.arange(columns)
        cut = jnp.minimum(column, mask.shape[1] - 1)
        seen = mask[token[:, None], cut[None, :]] & (column < mask.shape[1])[None, :]
        score = plgpu.dot(query, own_keys[cut], trans_b=True)
        return add(sums, score, own_values[cut], seen)

    def add_slots(turn: Array, sums: Sums) -> Sums:
        start = (begin + turn * splits) * SLOT_BLOCK
        cut, slot = pl.ds(start, SLOT_BLOCK), start + jnp.arange(SLOT_BLOCK)
        seen = jnp.broadcast_to(slot[None, :] < length, (rows, SLOT_BLOCK))
        if windows:
            seen &= slot[None, :] >= windows[0][token][:, None]
        return add(sums, plgpu.dot(query, keys[:, cut]), values[cut, :], seen)

    none = jnp.zeros((rows, width)), jnp.full(rows, LOWEST), jnp.zeros(rows)
    own_turns = jnp.where(split == 0, jnp.int32(pl.cdiv(mask.shape[1], columns)), jnp.int32(0))
    turns = jnp.maximum(pl.cdiv(pl.cdiv(length, SLOT_BLOCK) - begin, splits), 0)
    sums = jax.lax.fori_loop(0, own_turns, add_own, none)
    sums = jax.lax.fori_loop(0, turns, add_slots, sums)
    # Beyond the end, rows are those of the last token again, and write what these write.
    for sum_of, value in zip((mixed, top, total), sums, strict=True):
        sum_of[token, member] = value
