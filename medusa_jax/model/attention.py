"""Softmax attention over keys and values that are held in several arrays."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from medusa_jax.shapes import typed

QUERY_BLOCK = 512  # queries whose scores exist at a time


@typed
def attend(
    queries: Float[Array, "B T H C"],
    parts: list[tuple[Float[Array, "B K C _"], Float[Array, "B K _ C"], Bool[Array, "B T _"]]],
) -> Float[Array, "B T H C"]:
    """Softmax attention over keys that are stored in several arrays, as over a single array.

    Keeping the block's own keys apart from the cache lets a decode step read
    the cache in place and write back only what was accepted.

    Args:
      queries: rotated queries [B, T, H, C].
      parts: (keys [B, K, C, U], values [B, K, U, C], mask [B, T, U]) of each
        array; mask is True where a query sees a key. Every query must see at
        least one key in some part.

    Returns:
      [B, T, H, C] in the queries' dtype; scores and softmax are float32.
      Scores of long blocks exist for QUERY_BLOCK queries at a time.
    """
    length = queries.shape[1]
    if length <= QUERY_BLOCK:
        return _attend(queries, parts)
    count = -(-length // QUERY_BLOCK)

    def split(array: Array) -> Array:
        # Filled up with True: a query that sees nothing would divide by zero.
        width = ((0, 0), (0, count * QUERY_BLOCK - length), *((0, 0),) * (array.ndim - 2))
        array = jnp.pad(array, width, constant_values=1)
        return array.reshape(array.shape[0], count, QUERY_BLOCK, *array.shape[2:]).swapaxes(0, 1)

    def block(piece: tuple[Array, list[Array]]) -> Array:
        mine, masks = piece
        return _attend(mine, [(k, v, m) for (k, v, _), m in zip(parts, masks, strict=True)])

    pieces = split(queries), [split(mask) for *_, mask in parts]
    mixed = jax.lax.map(jax.checkpoint(block), pieces).swapaxes(0, 1)
    return mixed.reshape(mixed.shape[0], -1, *mixed.shape[3:])[:, :length]


def _attend(queries: Array, parts: list[tuple[Array, Array, Array]]) -> Array:
    batch, length, heads, width = queries.shape
    kv_heads = parts[0][0].shape[1]
    group = heads // kv_heads
    # A [G*T, C] matrix per key/value head gives plain products of contiguous matrices.
    scaled = (queries * width**-0.5).reshape(batch, length, kv_heads, group, width)
    scaled = scaled.transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, group * length, width)
    scores = []
    for keys, _, mask in parts:
        score = jnp.einsum("bkqc,bkcu->bkqu", scaled, keys, preferred_element_type=jnp.float32)
        score = score.reshape(batch, kv_heads, group, length, -1)
        scores.append(jnp.where(mask[:, None, None], score, -jnp.inf))
    top = functools.reduce(jnp.maximum, [score.max(axis=-1, keepdims=True) for score in scores])
    total, mixed = jnp.zeros(()), jnp.zeros(())
    for score, (_, values, _) in zip(scores, parts, strict=True):
        weight = jnp.exp(score - top)
        total = total + weight.sum(axis=-1, keepdims=True)
        weight = weight.reshape(batch, kv_heads, group * length, -1).astype(values.dtype)
        mix = jnp.einsum("bkqu,bkuc->bkqc", weight, values, preferred_element_type=jnp.float32)
        mixed = mixed + mix.reshape(batch, kv_heads, group, length, width)
    mixed = (mixed / total).transpose(0, 3, 1, 2, 4)
    return mixed.reshape(queries.shape).astype(queries.dtype)
