"""Softmax attention of a block of tokens to itself and to the past that a cache holds."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from medusa_jax.model.cache_attention import Past
from medusa_jax.model.qkv import QKV
from medusa_jax.model.softmax import masked
from medusa_jax.shapes import typed

QUERY_BLOCK = 512  # queries whose scores exist at a time


@typed
def attend(
    block: QKV, mask: Bool[Array, "#B T T"], past: Past | None = None
) -> Float[Array, "B T H C"]:
    """Softmax attention to the block's own keys and to a cache, as over a single array.

    Keeping the block's own keys apart from the cache lets a decode step read
    the cache in place and write back only what was accepted.

    Args:
      mask: True where a query sees a key of the block; each must see at least one key
        there or in the cache.
      past: what the queries see of the cache.

    Returns:
      [B, T, H, C] in the queries' dtype; scores and softmax are float32.
      Scores of long blocks exist for QUERY_BLOCK queries at a time.
    """
    if past is not None and past.kernels.reads_projections(block.width):
        return past.attend_projected(block, mask)
    queries, keys, values = block.turned
    whole = queries.shape[1] <= QUERY_BLOCK
    mixed = (_attend if whole else _by_blocks)(queries, keys, values, mask, past)
    if past is None or past.live is None:
        return mixed
    return jnp.where(past.live[:, :, None, None], mixed, 0)


def _by_blocks(queries: Array, keys: Array, values: Array, mask: Array, past: Past | None) -> Array:
    """`_attend` for QUERY_BLOCK queries at a time."""
    length = queries.shape[1]
    count = -(-length // QUERY_BLOCK)

    def split(array: Array) -> Array:
        # Filled up with True: a query that sees nothing would divide by zero.
        width = ((0, 0), (0, count * QUERY_BLOCK - length), *((0, 0),) * (array.ndim - 2))
        array = jnp.pad(array, width, constant_values=1)
        return array.reshape(array.shape[0], count, QUERY_BLOCK, *array.shape[2:]).swapaxes(0, 1)

    def block(piece: tuple[Array, Array, Array | None]) -> Array:
        mine, seen, first = piece
        return _attend(mine, keys, values, seen, past and dataclasses.replace(past, first=first))

    first = None if past is None or past.first is None else split(past.first)
    pieces = split(queries), split(mask), first
    mixed = jax.lax.map(jax.checkpoint(block), pieces).swapaxes(0, 1)
    return mixed.reshape(mixed.shape[0], -1, *mixed.shape[3:])[:, :length]


def _attend(queries: Array, keys: Array, values: Array, mask: Array, past: Past | None) -> Array:
    batch, length, _, width = queries.shape
    # A [G*T, C] matrix per key/value head gives plain products of contiguous matrices.
    grouped = (queries * width**-0.5).reshape(batch, length, keys.shape[1], -1, width)
    grouped = grouped.transpose(0, 2, 3, 1, 4)
    own = keys, values, mask
    mixed = masked(grouped, *own).output() if past is None else past.attend(grouped, own)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(queries.shape).astype(queries.dtype)
