"""The key/value cache: preallocated, one length per row, only accepted tokens inside.

A decode step reads the cache in place and keeps its own tree's keys and values
beside it (`attention.attend`); `commit` then writes the accepted path. So rejected
nodes are never written, and slots at or beyond a row's length are never read.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

from medusa_jax.kernels.heads import Heads
from medusa_jax.model.config import ModelConfig
from medusa_jax.model.layers import rope_tables
from medusa_jax.model.qkv import turned_keys, turned_values
from medusa_jax.shapes import typed

# An array of each layer; or a single array of L layers, where they run in a loop.
Layers = tuple[Array, ...] | Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Block:
    """Keys and values of a block of T tokens, as projections leave them.

    Keys enter a cache rotated, and both in another order (`KVCache`). Of a tree only the accepted
    path does: so it is taken first, and then rotated and turned.

    Attributes:
      keys, values: heads [B, T, ...] of each layer; or of all L layers [B, L, T, ...].
      rope: cos and sin of the tokens' angles [B, T, C / 2].
    """

    keys: tuple[Heads, ...] | Heads
    values: tuple[Heads, ...] | Heads
    rope: tuple[Array, Array]

    def begin(self, count: int) -> "Block":
        """The first tokens."""
        return self._each(lambda one, axis: jax.lax.slice_in_dim(one, 0, count, axis=axis))

    def on_path(self, path: Int[Array, "B E"]) -> "Block":
        """The tokens of a path: of tokens (5, 6, 7), path (0, 2) -> (5, 7)."""

        def taken(one: Array, axis: int) -> Array:
            places = path.reshape(len(path), *[1] * (axis - 1), -1, *[1] * (one.ndim - axis - 1))
            return jnp.take_along_axis(one, places, axis)

        return self._each(taken)

    def turned(self) -> tuple[Layers, Layers]:
        """Keys and values as a cache holds them, of each layer or of all."""
        keys = jax.tree.map(lambda one: turned_keys(one, self.rope), self.keys, is_leaf=_is_heads)
        return keys, jax.tree.map(turned_values, self.values, is_leaf=_is_heads)

    def _each(self, change: Callable[[Array, int], Array]) -> "Block":
        """The block of arrays that were changed along the axis of their tokens."""
        return jax.tree.map(lambda one: change(one, one.ndim - 2), self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens each row has accepted.

    Layers are separate arrays: slicing a layer out of a stack copies it. Only where a kernel reads
    a layer inside it, is there a stack: a path is then appended to all layers at once.

    Each head's keys and values are one contiguous matrix, laid out as the product that reads
    it wants: q K with K [C, S], then p V with V [S, C]. Were keys [S, C], a CPU would gather
    them column by column from cold memory, which took up to four times as long.

    Attributes:
      keys: per layer [B, K, C, S], or [B, L, K, C, S]; rotated.
      values: per layer [B, K, S, C], or [B, L, K, S, C].
      length: valid slots of each row [B] int32.
      rope: `layers.rope_tables` of every slot, [S, C / 2] each: looked up by a step, whose
        every layer XLA would have compute them anew on a CPU, for queries and for keys.
      row: the row that a block of a single row belongs to []; None where rows meet their own.
    """

    keys: Layers
    values: Layers
    length: Array
    rope: tuple[Array, Array]
    row: Array | None = None

    @property
    def capacity(self) -> int:
        """S, the number of slots a row has."""
        return jax.tree.leaves(self.keys)[0].shape[-1]

    @property
    def stacked(self) -> bool:
        """Whether the layers are single arrays."""
        return not isinstance(self.keys, tuple)

    def of_layer(self, number: Any) -> tuple[Array, Array, Array | None]:
        """Keys and values that hold a layer, and its number if they hold others too."""
        if isinstance(self.keys, tuple) and isinstance(self.values, tuple):
            return self.keys[number], self.values[number], None
        keys, values = cast("tuple[Array, Array]", (self.keys, self.values))
        return keys, values, jnp.asarray(number, jnp.int32)

    def as_held(self, layers: Layers) -> Layers:
        """The layers of a block as the cache holds its own."""
        return jnp.stack(layers, 1) if self.stacked and isinstance(layers, tuple) else layers


def _is_heads(node: Any) -> bool:
    return isinstance(node, Heads)


def cache_axes(ndim: int) -> P:
    """Axes of keys [B, K, C, S] and values [B, K, S, C] of a layer, or of L layers [B, L, K, ...].

    4 -> P(None, "tensor", None, None), 5 -> P(None, None, "tensor", None, None).
    """
    return P(*[None] * (ndim - 3), "tensor", None, None)


def init_cache(
    config: ModelConfig, batch: int, capacity: int, dtype: jnp.dtype, stacked: bool = False
) -> KVCache:
    """An empty cache of `capacity` slots a row. Zeros, so that unread slots stay finite.

    Args:
      stacked: a single array holds all layers.
    """
    heads, width, count = config.num_kv_heads, config.head_dim, config.num_layers

    def zeros(*matrix: int) -> Layers:
        if stacked:
            return jnp.zeros((batch, count, heads, *matrix), dtype)
        return tuple(jnp.zeros((batch, heads, *matrix), dtype) for _ in range(count))

    return KVCache(
        keys=zeros(width, capacity),
        values=zeros(capacity, width),
        length=jnp.zeros(batch, jnp.int32),
        rope=rope_tables(config, jnp.arange(capacity)),
    )


def write_block(cache: KVCache, block: Block, start: int | Array, row: int | Array = 0) -> KVCache:
    """Writes a block of T tokens at the slots `start .. start + T` of its rows.

    Lengths are left as they are: rows shorter than the block hold padding
    there, which the caller's lengths keep out of sight.

    Args:
      row: the first of the cache's rows that the block is of.
    """

    def write(layers: Layers, block: Layers, axis: int) -> Layers:
        def update(slots: Array, new: Array) -> Array:
            place = [row, *[0] * (slots.ndim - 1)]
            place[axis] = start
            return jax.lax.dynamic_update_slice(slots, new.astype(slots.dtype), place)

        return jax.tree.map(update, layers, cache.as_held(block))

    keys, values = block.turned()
    return dataclasses.replace(
        cache, keys=write(cache.keys, keys, -1), values=write(cache.values, values, -2)
    )


@typed
def commit(
    cache: KVCache, block: Block, path: Int[Array, "B E"], count: Int[Array, " B"]
) -> KVCache:
    """Appends the first `count` nodes of each row's path to its cache.

    All E cells are written, so that shapes stay static; those beyond `count`
    land past the new length, where nothing is read and the next step writes.

    Example: a row of length 7 whose path is nodes (0, 2, 5) with count 2 gets
    node 0 in slot 7 and node 2 in slot 8 (node 5 in slot 9, unread); its length
    becomes 9.

    Args:
      cache: every row needs E free slots past its length.
      block: keys and values of the N nodes.
      path: node in each cell of the accepted path [B, E].
      count: nodes kept of it, 0 to E [B].
    """

    def append(layers: Layers, kept: Layers, axis: int) -> Layers:
        def row(slots: Array, kept: Array, start: Array) -> Array:
            kept = kept.astype(slots.dtype)
            return jax.lax.dynamic_update_slice_in_dim(slots, kept, start, slots.ndim + axis)

        # A GPU would take two kernels for the scatter that vmap makes of a single row.
        each = jax.vmap if len(count) > 1 else _alone
        kept = cache.as_held(kept)
        return jax.tree.map(lambda old, new: each(row)(old, new, cache.length), layers, kept)

    keys, values = block.on_path(path).turned()
    return dataclasses.replace(
        cache,
        keys=append(cache.keys, keys, -1),
        values=append(cache.values, values, -2),
        length=cache.length + count,
    )


def _alone(row: Callable[..., Array]) -> Callable[..., Array]:
    """What `jax.vmap(row)` does, for batches of one row."""
    return lambda *arrays: row(*(array[0] for array in arrays))[None]
