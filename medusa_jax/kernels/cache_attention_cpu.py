"""Attention to the cache and to a block's own keys on a CPU, by `cache_attention.cpp`.

XLA makes a loop of a dozen small operations of it, in each layer: a third of the time of a step
of sixteen rows. Here a block of slots stays in the first cache of the processor for all of them.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from medusa_jax.shapes import typed

MOST_WIDTH = 512  # numbers of a head


def knows(width: int, dtype: jnp.dtype) -> bool:
    """Whether it computes heads of this width, with keys and values of this type in the cache."""
    return width <= MOST_WIDTH and dtype in (jnp.float32, jnp.bfloat16)


@typed
def attention(
    queries: Float[Array, "B K G T C"],
    own: tuple[Array, Array, Array],
    keys: Float[Array, "R *L K C S"],
    values: Float[Array, "R *L K S C"],
    lengths: Int[Array, " B"],
    first: Int[Array, "B T"] | None,
    row: Int[Array, ""] | None = None,
    live: Bool[Array, "B T"] | None = None,
    layer: Int[Array, ""] | None = None,
) -> Float[Array, "B K G T C"]:
    """As `cache_attention.Past.attend` has it, in float32. A query that sees nothing gets zeros.

    Queries that are not live may get zeros too, and take no time. The numbers of a query do not
    depend on the other queries, not even in their last bits.

    Args:
      layer: where the cache is that of L layers.
    """
    nothing = jnp.zeros(0, jnp.int32)
    place = (nothing if one is None else one[None] for one in (row, layer))
    numbers = (lengths, nothing if first is None else first, *place)
    live = jnp.zeros(0, bool) if live is None else live
    *block, mask = own
    block = [part.astype(keys.dtype) for part in block]
    inputs = queries.astype(jnp.float32), *block, mask, keys, values
    out = jax.ShapeDtypeStruct(queries.shape, jnp.float32)
    call = jax.ffi.ffi_call("medusa_cache_attention", out)
    return call(*inputs, *(number.astype(jnp.int32) for number in numbers), live)
