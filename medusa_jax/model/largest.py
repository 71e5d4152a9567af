"""The best few of a vocabulary's scores, as fast as the device that takes them can.

A GPU has a block of threads work on each row: a row of a whole vocabulary keeps a single
processor of many at work. So rows are cut into parts, and the best of the parts compete.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from medusa_jax.shapes import typed

PART = 1024  # scores: the shortest row for which XLA has a kernel on a GPU


@typed
def largest(
    scores: Float[Array, "*dims V"], k: int
) -> tuple[Float[Array, "*dims k"], Int[Array, "*dims k"]]:
    """`jax.lax.top_k`: the k largest scores, largest first, and their places.

    Among equals the first place comes first: k 2 of (1, 3, 3) -> (3, 3), places (1, 2).
    """

    def in_parts(scores: Array) -> tuple[Array, Array]:
        return by_parts(scores, k)

    def whole(scores: Array) -> tuple[Array, Array]:
        return tuple(jax.lax.top_k(scores, k))

    return jax.lax.platform_dependent(scores, cuda=in_parts, default=whole)


@typed
def largest_of_each(
    arrays: Sequence[Float[Array, "B V"]], k: int
) -> tuple[Float[Array, "B M k"], Int[Array, "B M k"]]:
    """`largest` of M arrays, in one call on a GPU.

    Elsewhere each array has its own: a CPU would copy them to stack them.
    """

    def together(*arrays: Array) -> tuple[Array, Array]:
        return by_parts(jnp.stack(arrays, axis=1), k)

    def apart(*arrays: Array) -> tuple[Array, Array]:
        values, places = zip(*(jax.lax.top_k(array, k) for array in arrays), strict=True)
        return jnp.stack(values, axis=1), jnp.stack(places, axis=1)

    return jax.lax.platform_dependent(*arrays, cuda=together, default=apart)


@typed
def by_parts(
    scores: Float[Array, "*dims V"], k: int, least: int = PART
) -> tuple[Float[Array, "*dims k"], Int[Array, "*dims k"]]:
    """`jax.lax.top_k` in two stages: the best of each part, then the best of those.

    k 2 of (1, 3 | 3, 0) in two parts: candidates (3, 1 | 3, 0), places (1, 0 | 2, 3) ->
    (3, 3), places (1, 2). Candidates lie in the order of their parts, and equals of a part in
    the order of their places. So equals resolve as in one stage.

    Args:
      least: scores of a part, or more; parts are equally long, and the last is filled up.
    """
    *dims, width = scores.shape
    parts = width // least
    if parts < 2:
        return tuple(jax.lax.top_k(scores, k))
    size = -(-width // parts)
    # Filled up at the end, where no place that is real comes later.
    filled = jnp.pad(
        scores.reshape(-1, width), ((0, 0), (0, parts * size - width)), constant_values=-jnp.inf
    )
    best, places = jax.lax.top_k(filled.reshape(-1, size), min(k, size))
    start = size * jnp.arange(parts, dtype=places.dtype)
    places = (places.reshape(-1, parts, best.shape[1]) + start[:, None]).reshape(len(filled), -1)
    best, which = jax.lax.top_k(best.reshape(places.shape), k)
    places = jnp.take_along_axis(places, which, axis=1)
    return best.reshape(*dims, k), places.reshape(*dims, k)
