"""Attention to a block's own keys and to the filled slots of a cache, on a GPU.

A Pallas kernel (Triton): scores stay on the chip. Programs share the block's own keys and the
blocks of a row's filled slots in turn, so that short texts keep as many of them at work as there
are blocks. Their results are joined afterwards.

The kernel reads the block as the projections leave it: token by token, not rotated, and heads of
all kinds in an array. It writes in the order of the next projection. Programs count rows and
columns of a block up to powers of 2. What is beyond its end is read as its last token: keys are
left out, queries write what the last token writes.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int

from medusa_jax.kernels.heads import Heads
from medusa_jax.shapes import typed

SLOT_BLOCK = 64
QUERY_BLOCK = 64
LEAST = 16  # rows and columns of a product
PROGRAMS = 128  # that keep a large GPU at work
LOWEST = float(jnp.finfo(jnp.float32).min)
Sums = tuple[Array, Array, Array]


@typed
def attention(
    own: tuple[Heads, Heads, Heads],
    rope: tuple[Float[Array, "B T c"], Float[Array, "B T c"]],
    mask: Bool[Array, "#B T T"],
    keys: Float[Array, "B *L K C S"],
    values: Float[Array, "B *L K S C"],
    lengths: Int[Array, " B"],
    first: Int[Array, "B T"] | None = None,
    layer: Int[Array, ""] | None = None,
    *,
    interpret: bool = False,
) -> Float[Array, "B T H C"]:
    """Softmax attention of a block to itself and to a cache; scores and sums are float32.

    Args:
      own: queries, keys and values of the block, not rotated yet; query heads lie first.
      rope: cos and sin of the tokens' angles.
      keys, values: of the cache; C is a power of 2, and S a multiple of 64.
      lengths: filled slots of each row, which its queries see.
      first: the first slot that each query's window reaches; None without a window.
      layer: which one is meant, where the cache is that of L layers.
      interpret: runs the kernel with XLA, on any device.
    """
    if layer is None:
        keys, values, layer = keys[:, None], values[:, None], jnp.int32(0)
    batch, _, kv_heads, width, slots = keys.shape
    queries, own_keys, own_values = own
    count, group = mask.shape[1], queries.number // kv_heads
    rows, columns = _block(count * group, QUERY_BLOCK), _block(count, SLOT_BLOCK)
    blocks = pl.cdiv(count * group, rows)
    splits = min(pl.cdiv(PROGRAMS, batch * kv_heads * blocks), pl.cdiv(slots, SLOT_BLOCK))
    begins, windows = jnp.zeros_like(lengths), []
    if first is not None:
        begins = jnp.maximum(first.min(axis=1), 0) // SLOT_BLOCK
        windows = [first]
    # What is read, and of which heads, as `_spec` has them.
    inputs: list[tuple[Any, ...]] = [(lengths,), (begins,), (layer[None],)]
    inputs += [(queries.in_place(), (2, group, queries.first))]
    inputs += [(part.in_place(), (2, None, part.first)) for part in (own_keys, own_values)]
    inputs += [(array,) for array in (*rope, mask)]
    inputs += [(slots, (2, None, 0)) for slots in (keys, values)]
    inputs += [(window,) for window in windows]

    shape = splits, batch, count, kv_heads, group, width
    sums = [jax.ShapeDtypeStruct(shape[:n], jnp.float32) for n in (6, 5, 5)]
    mixed, top, total = pl.pallas_call(
        functools.partial(_kernel, splits=splits, rows=rows, columns=columns),
        grid=(batch * kv_heads, blocks, splits),
        in_specs=[_spec(kv_heads, *one) for one in inputs],
        out_specs=[_of_split(kv_heads, array.shape) for array in sums],
        out_shape=sums,
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="cache_attention",
    )(*(array for array, *_ in inputs))
    faded = jnp.exp(top - top.max(axis=0))
    mixed = (mixed * faded[..., None]).sum(axis=0) / (total * faded).sum(axis=0)[..., None]
    return mixed.astype(queries.array.dtype).reshape(batch, count, -1, width)


def _spec(
    kv_heads: int, array: Any, head: tuple[int, int | None, int] | None = None
) -> pl.BlockSpec:
    """All that an array [B, ...] holds of a program's row, and of its heads if it has heads.

    Args:
      head: axis of the heads; how many are taken, None for one without its axis; the first one of
        key/value head 0.
    """

    def place(program: Any, *_: Any) -> tuple[Any, ...]:
        indices = [program // kv_heads % array.shape[0]] + [0] * (array.ndim - 1)
        if head is not None:
            axis, taken, first = head
            indices[axis] = first // (taken or 1) + program % kv_heads
        return tuple(indices)

    block: list[int | None] = [None, *array.shape[1:]]
    if head is not None:
        block[head[0]] = head[1]
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
    lengths: Any, begins: Any, layer: Any, queries: Any, own_keys: Any, own_values: Any, cos: Any,
    sin: Any, mask: Any, keys: Any, values: Any, *rest: Any, splits: int, rows: int, columns: int,
) -> None:  # fmt: skip
    """The blocks of slots of a split, for a block of queries of a head.

    Row r of all is query r // G of the group's member r % G. Rotation turns pairs of numbers of
    which one is in either half of a head, so halves are read and multiplied apart.
    """
    *windows, mixed, top, total = rest
    count, group, width = queries.shape
    halves = [pl.ds(part * (width // 2), width // 2) for part in range(2)]
    row = pl.program_id(1) * rows + jnp.arange(rows)
    token = jnp.minimum(jax.lax.div(row, jnp.int32(group)), count - 1)
    member = jax.lax.rem(row, jnp.int32(group))
    length, number, split = lengths[...], layer[...], pl.program_id(2)
    # The first split has the block's own keys, so the second has the first block of slots.
    begin = begins[...] + jax.lax.rem(split + splits - 1, jnp.int32(splits))

    halves_of = [queries[token, member, half] for half in halves]
    query = [part * width**-0.5 for part in _turned(halves_of, cos[token, :], sin[token, :])]

    def scores(keys: list[Array], trans_b: bool = False) -> Array:
        first, second = (
            plgpu.dot(part, key, trans_b=trans_b) for part, key in zip(query, keys, strict=True)
        )
        return first + second

    def add_own(turn: Array, sums: Sums) -> Sums:
        column = turn * columns + jnp.arange(columns)
        cut = jnp.minimum(column, count - 1)
        seen = mask[token[:, None], cut[None, :]] & (column < count)[None, :]
        key = _turned([own_keys[cut, half] for half in halves], cos[cut, :], sin[cut, :])
        return _added(sums, scores(key, trans_b=True), own_values[cut, :], seen)

    def add_slots(turn: Array, sums: Sums) -> Sums:
        start = (begin + turn * splits) * SLOT_BLOCK
        cut, slot = pl.ds(start, SLOT_BLOCK), start + jnp.arange(SLOT_BLOCK)
        seen = jnp.broadcast_to(slot[None, :] < length, (rows, SLOT_BLOCK))
        if windows:
            seen &= slot[None, :] >= windows[0][token][:, None]
        key = [keys[number, half, cut] for half in halves]
        return _added(sums, scores(key), values[number, cut, :], seen)

    none = jnp.zeros((rows, width)), jnp.full(rows, LOWEST), jnp.zeros(rows)
    own_turns = jnp.where(split == 0, jnp.int32(pl.cdiv(count, columns)), jnp.int32(0))
    turns = jnp.maximum(pl.cdiv(pl.cdiv(length, SLOT_BLOCK) - begin, splits), 0)
    sums = jax.lax.fori_loop(0, own_turns, add_own, none)
    sums = jax.lax.fori_loop(0, turns, add_slots, sums)
    # Beyond the end, rows are those of the last token again, and write what these write.
    for sum_of, value in zip((mixed, top, total), sums, strict=True):
        sum_of[token, member] = value


def _turned(halves: list[Array], cos: Array, sin: Array) -> list[Array]:
    """The halves of rotated heads, as `layers.rotate` computes them."""
    first, second = (half.astype(jnp.float32) for half in halves)
    both = first * cos - second * sin, second * cos + first * sin
    return [part.astype(halves[0].dtype) for part in both]


def _added(sums: Sums, score: Array, value: Array, seen: Array) -> Sums:
    """The sums with the keys of these scores."""
    mixed, top, total = sums
    score = jnp.where(seen, score, -jnp.inf)
    highest = jnp.maximum(top, score.max(axis=1))
    weight, faded = jnp.exp(score - highest[:, None]), jnp.exp(top - highest)
    mixed = faded[:, None] * mixed + plgpu.dot(weight.astype(value.dtype), value)
    return mixed, highest, faded * total + weight.sum(axis=1)
