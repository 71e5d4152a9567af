"""The attention of `cache_attention_tpu` to a block as its projections leave it, and to a cache.

XLA would rotate queries and keys and write them head by head, as the other kernel wants them: in
each layer as many bytes as a product moves. Here a head is a register's row of the projection. The
kernel cuts it out, rotates it, and writes in the order of the next projection.

Heads of other widths share rows of registers, so they are left to the other kernel.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from medusa_jax.kernels.cache_attention_tpu import (
    LOWEST,
    ROWS,
    SLOT_BLOCK,
    add_to,
    heads_at_once,
    last_filled,
    product,
)
from medusa_jax.kernels.heads import Heads
from medusa_jax.shapes import typed

TOKEN_BLOCK = 128


@typed
def attention(
    own: tuple[Heads, Heads, Heads],
    rope: tuple[Float[Array, "B T c"], Float[Array, "B T c"]],
    mask: Bool[Array, "#B T T"],
    keys: Float[Array, "B K C S"],
    values: Float[Array, "B K S C"],
    lengths: Int[Array, " B"],
    first: Int[Array, "B T"] | None = None,
    layer: None = None,
    *,
    interpret: bool = False,
) -> Float[Array, "B T H C"]:
    """Softmax attention of a block to itself and to a cache; scores and sums are float32.

    Args:
      own: queries, keys and values of the block, not rotated yet; query heads lie first.
      rope: cos and sin of the tokens' angles.
      keys, values: of the cache; C is that of a register's row, 128.
      lengths: filled slots of each row, which its queries see.
      first: the first slot that each query's window reaches; None without a window.
      layer: the cache is that of a single layer.
      interpret: runs the kernel with XLA, on any device.
    """
    (batch, kv_heads, width, capacity), count = keys.shape, mask.shape[1]
    group, slots = own[0].number // kv_heads, min(SLOT_BLOCK, capacity)
    if not interpret:  # else small caches are fetched whole, with slots that are not filled
        keys, values = (pltpu.with_memory_space_constraint(a, pltpu.HBM) for a in (keys, values))
    block = min(TOKEN_BLOCK, ROWS * math.ceil(count / ROWS))
    size = block * math.ceil(count / block)
    each = max(max(slots, size) * width * keys.dtype.itemsize, group * block * width * 4)
    heads = heads_at_once(kv_heads, each)
    ends = pl.cdiv(lengths, slots)
    begins = jnp.zeros_like(ends)
    if first is not None:
        begins = jnp.maximum(first.min(axis=1), 0) // slots
    arrays = _inputs(own, rope, mask, first, size)
    specs = _specs(own, heads, group, (block, size, slots), len(mask))
    rows = heads, group * block
    mixed = pl.pallas_call(
        functools.partial(_kernel, capacity=capacity),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            # A turn at least, in which the own keys are taken.
            grid=(batch, kv_heads // heads, size // block, jnp.maximum(ends.max(), 1)),
            in_specs=specs if first is not None else specs[:-1],
            out_specs=_of_lanes(heads * group * width, block),
            scratch_shapes=[
                pltpu.VMEM((*rows, width), own[0].array.dtype),
                *[pltpu.VMEM((*rows, size), jnp.float32) for size in (width, 1, 1)],
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((batch, size, own[0].number * width), own[0].array.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
        name="cache_attention",
    )(lengths, begins, ends, keys, values, *arrays)
    return mixed[:, :count].reshape(batch, count, -1, width)


def _inputs(
    own: tuple[Heads, ...], rope: tuple[Array, Array], mask: Array, first: Array | None, size: int
) -> list[Array]:
    """What the kernel reads of a block, filled up to so many tokens.

    A head x is rotated as x cos + r(x) sin, where r swaps its halves: so the tables are as wide as
    a head, and the sine of the first half is negative.
    """
    cos, sin = rope
    tables = jnp.concatenate((cos, cos), axis=2), jnp.concatenate((-sin, sin), axis=2)
    missing = size - mask.shape[1]
    arrays = [jnp.pad(one, ((0, 0), (0, missing), (0, 0))) for one in tables]
    arrays = [jnp.pad(part.array, ((0, 0), (0, missing), (0, 0))) for part in own] + 2 * arrays
    arrays += [jnp.pad(mask.astype(jnp.int32), ((0, 0), (0, missing), (0, missing)))]
    if first is not None:
        arrays += [jnp.pad(first[..., None], ((0, 0), (0, missing), (0, 0)))]
    return arrays


def _of_lanes(lanes: int, tokens: int, first: int = 0, turns: bool = True) -> pl.BlockSpec:
    """So many numbers of each token, of the heads of a turn.

    Args:
      first: number of the turn whose heads would be the array's first.
      turns: queries take turns; otherwise all tokens are taken at once.
    """
    return pl.BlockSpec(
        (1, tokens, lanes),
        lambda row, head, query, *_: (row, query if turns else 0, first + head),
    )


def _specs(
    own: tuple[Heads, Heads, Heads], heads: int, group: int, sizes: tuple[int, int, int], masks: int
) -> list[pl.BlockSpec]:
    """Which block of each array a turn takes, by row, heads, queries and number of slots.

    Args:
      sizes: tokens of a block of queries, tokens of all, and slots.
      masks: rows of the mask.
    """
    queries, own_keys, own_values = own
    (block, size, slots), width = sizes, queries.width

    def of_cache(place: Callable[..., Any]) -> Callable[..., Any]:
        def index(row: Any, head: Any, _: Any, number: Any, lengths: Any, *filled: Any) -> Any:
            return row, head, *place(last_filled(row, number, *filled))

        return index

    def of_tokens(tokens: int, lanes: int, turns: bool) -> pl.BlockSpec:
        return pl.BlockSpec(
            (1, tokens, lanes), lambda row, _, query, *rest: (row, query if turns else 0, 0)
        )

    table, own_table = of_tokens(block, width, True), of_tokens(size, width, False)
    return [
        pl.BlockSpec((1, heads, width, slots), of_cache(lambda number: (0, number))),
        pl.BlockSpec((1, heads, slots, width), of_cache(lambda number: (number, 0))),
        _of_lanes(heads * group * width, block, queries.first // (heads * group)),
        _of_lanes(heads * width, size, own_keys.first // heads, turns=False),
        _of_lanes(heads * width, size, own_values.first // heads, turns=False),
        *(table, table, own_table, own_table),
        pl.BlockSpec((1, block, size), lambda row, _, query, *rest: (row % masks, query, 0)),
        of_tokens(block, 1, True),
    ]


def _rotated(head: Array, cos: Any, sin: Any) -> Array:
    """A head [T, C] by tables of `_inputs`."""
    wide = head.astype(jnp.float32)
    wide = wide * cos[0] + pltpu.roll(wide, wide.shape[1] // 2, 1) * sin[0]
    return wide.astype(head.dtype)


def _kernel(
    lengths: Any, begins: Any, ends: Any, keys: Any, values: Any, queries: Any, own_keys: Any,
    own_values: Any, cos: Any, sin: Any, own_cos: Any, own_sin: Any, mask: Any, *rest: Any,
    capacity: int,
) -> None:  # fmt: skip
    """A block of slots, for a block of tokens and some key/value heads.

    The queries of a key/value head are rows of a matrix, one member of the group after the other.
    """
    *windows, out, turned, mixed, top, total = rest
    row, number = pl.program_id(0), pl.program_id(3)
    (_, heads, width, slots), count = keys.shape, cos.shape[1]
    group = turned.shape[1] // count

    def lanes(array: Any, head: int) -> Array:
        return array[0, :, head * width : (head + 1) * width]

    def of_group(array: Array) -> Array:
        return jnp.concatenate([array] * group, axis=0) if group > 1 else array

    def add(head: int, key: Array, value: Array, seen: Array, axis: int) -> None:
        score = jnp.where(seen, product(turned[head], key, axis), -jnp.inf)
        add_to((mixed, top, total), head, score, value)

    @pl.when(number == 0)
    def take_own() -> None:
        mixed[...] = jnp.zeros_like(mixed)
        top[...] = jnp.full_like(top, LOWEST)
        total[...] = jnp.zeros_like(total)
        for place in range(heads * group):
            query = _rotated(lanes(queries, place), cos, sin)
            rows = slice(place % group * count, (place % group + 1) * count)
            turned[place // group, rows] = query * jnp.asarray(width**-0.5, query.dtype)
        seen = of_group(mask[0]) != 0
        for head in range(heads):
            key = _rotated(lanes(own_keys, head), own_cos, own_sin)
            add(head, key, lanes(own_values, head), seen, 1)

    @pl.when((number >= begins[row]) & (number < ends[row]))
    def take_slots() -> None:
        rows = jax.lax.broadcasted_iota(jnp.int32, (group * count, slots), 1)
        slot = number * slots + rows
        seen = slot < lengths[row]
        if windows:
            seen &= slot >= of_group(windows[0][0])
        for head in range(heads):
            value = values[0, head]
            if capacity % slots:  # the last block ends after the cache, where anything may lie
                place = number * slots + jax.lax.broadcasted_iota(jnp.int32, value.shape, 0)
                value = jnp.where(place < capacity, value, jnp.zeros_like(value))
            add(head, keys[0, head], value, seen, 0)

    @pl.when(number == pl.num_programs(3) - 1)
    def end() -> None:
        for place in range(heads * group):
            head, rows = place // group, slice(place % group * count, (place % group + 1) * count)
            mean = mixed[head, rows] / total[head, rows]
            out[0, :, place * width : (place + 1) * width] = mean.astype(out.dtype)
