"""Attention over the cache, whose cost follows what is filled and not what there is room for.

A row sees the slots below its length, from the window of each query on. So blocks of slots that
no query sees are neither read nor computed.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from medusa_jax.model.softmax import LOWEST, Softmax, joined, masked
from medusa_jax.shapes import typed

SLOT_BLOCK = 128  # slots that are read at a time


@dataclasses.dataclass(frozen=True)
class Past:
    """What the queries of a layer see of the cache.

    Attributes:
      keys, values: of the layer [B, K, C, S] and [B, K, S, C].
      lengths: filled slots of each row [B].
      first: the first slot that each query's window reaches [B, T]; None without a window.
    """

    keys: Array
    values: Array
    lengths: Array
    first: Array | None = None

    def softmax(self, queries: Float[Array, "B K G T C"]) -> Softmax:
        """Over the slots that each query sees; queries are scaled."""
        return by_blocks(queries, self.keys, self.values, self.lengths, self.first)


@typed
def by_blocks(
    queries: Float[Array, "B K G T C"],
    keys: Float[Array, "B K C S"],
    values: Float[Array, "B K S C"],
    lengths: Int[Array, " B"],
    first: Int[Array, "B T"] | None,
) -> Softmax:
    """A loop over the blocks of slots that some row of the batch sees."""
    capacity = keys.shape[3]
    size = min(SLOT_BLOCK, capacity)

    def block(number: Array) -> Softmax:
        begin = number * size
        # The last block is moved back to end with the cache.
        start = jnp.minimum(begin, capacity - size)
        slots = start + jnp.arange(size)
        seen = ((slots >= begin) & (slots < lengths[:, None]))[:, None]
        if first is not None:
            seen &= slots >= first[:, :, None]
        cut = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=size)
        return masked(queries, cut(keys, axis=3), cut(values, axis=2), seen)

    if size == capacity:
        return block(jnp.zeros((), jnp.int32))
    number = jnp.zeros((), jnp.int32) if first is None else jnp.maximum(first.min(), 0) // size
    nothing = jnp.zeros((*queries.shape[:4], 1))
    none = Softmax(jnp.zeros(queries.shape), nothing + LOWEST, nothing)
    blocks = (lengths.max() + size - 1) // size
    return jax.lax.fori_loop(number, blocks, lambda i, so_far: joined(so_far, block(i)), none)
