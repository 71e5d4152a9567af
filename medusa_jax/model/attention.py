"""Softmax attention over keys and values that are held in several arrays.

Each array gives the `Softmax` of its own keys; `joined` makes the softmax of both of two.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from medusa_jax.model.cache_attention import Past
from medusa_jax.model.softmax import Softmax, joined, masked
from medusa_jax.shapes import typed

QUERY_BLOCK = 512  # queries whose scores exist at a time


@typed
def attend(
    queries: Float[Array, "B T H C"],
    parts: list[tuple[Float[Array, "B K C _"], Float[Array, "B K _ C"], Bool[Array, "B T _"]]],
    past: Past | None = None,
) -> Float[Array, "B T H C"]:
    """Softmax attention over keys that are stored in several arrays, as over a single array.

    Keeping the block's own keys apart from the cache lets a decode step read
    the cache in place and write back only what was accepted.

    Args:
      queries: rotated queries [B, T, H, C].
      parts: (keys [B, K, C, U], values [B, K, U, C], mask [B, T, U]) of each
        array; mask is True where a query sees a key. Every query must see at
        least one key in some part.
      past: what the queries see of the cache.

    Returns:
      [B, T, H, C] in the queries' dtype; scores and softmax are float32.
      Scores of long blocks exist for QUERY_BLOCK queries at a time.
    """
    length = queries.shape[1]
    if length <= QUERY_BLOCK:
        return _attend(queries, parts, past)
    count = -(-length // QUERY_BLOCK)

    def split(array: Array) -> Array:
        # Filled up with True: a query that sees nothing would divide by zero.
        width = ((0, 0), (0, count * QUERY_BLOCK - length), *((0, 0),) * (array.ndim - 2))
        array = jnp.pad(array, width, constant_values=1)
        return array.reshape(array.shape[0], count, QUERY_BLOCK, *array.shape[2:]).swapaxes(0, 1)

    def block(piece: tuple[Array, list[Array], Array | None]) -> Array:
        mine, masks, first = piece
        seen = past and dataclasses.replace(past, first=first)
        return _attend(mine, [(k, v, m) for (k, v, _), m in zip(parts, masks, strict=True)], seen)

    first = None if past is None or past.first is None else split(past.first)
    pieces = split(queries), [split(mask) for *_, mask in parts], first
    mixed = jax.lax.map(jax.checkpoint(block), pieces).swapaxes(0, 1)
    return mixed.reshape(mixed.shape[0], -1, *mixed.shape[3:])[:, :length]


def _attend(
    queries: Array, parts: list[tuple[Array, Array, Array]], past: Past | None
) -> Array:
    batch, length, heads, width = queries.shape
    kv_heads = past.keys.shape[1] if past else parts[0][0].shape[1]
    # A [G*T, C] matrix per key/value head gives plain products of contiguous matrices.
    grouped = (queries * width**-0.5).reshape(batch, length, kv_heads, -1, width)
    grouped = grouped.transpose(0, 2, 3, 1, 4)
    found = [masked(grouped, keys, values, mask) for keys, values, mask in parts]
    if past is not None:
        found.append(past.softmax(grouped))
    whole = functools.reduce(joined, found)
    mixed = (whole.mixed / whole.total).transpose(0, 3, 1, 2, 4)
    return mixed.reshape(queries.shape).astype(queries.dtype)
