"""The best few of a vocabulary's scores, as fast as the device that takes them can.

A GPU has a block of threads sort each row: a row of a whole vocabulary keeps a single processor of
many at work. So rows are cut into groups. All processors find their maxima, and what is sorted are
these maxima and the few groups that have the largest.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from medusa_jax.shapes import typed


@typed
def largest(
    scores: Float[Array, "*dims V"], k: int
) -> tuple[Float[Array, "*dims k"], Int[Array, "*dims k"]]:
    """`jax.lax.top_k`: the k largest scores, largest first, and their places.

    Among equals the first place comes first: k 2 of (1, 3, 3) -> (3, 3), places (1, 2).
    """

    def grouped(scores: Array) -> tuple[Array, Array]:
        return by_groups(scores, k)

    def whole(scores: Array) -> tuple[Array, Array]:
        return tuple(jax.lax.top_k(scores, k))

    return jax.lax.platform_dependent(scores, cuda=grouped, default=whole)


@typed
def largest_of_each(
    arrays: Sequence[Float[Array, "B V"]], k: int
) -> tuple[Float[Array, "B M k"], Int[Array, "B M k"]]:
    """`largest` of M arrays, in one call on a GPU.

    Elsewhere each array has its own: a CPU would copy them to stack them.
    """

    def together(*arrays: Array) -> tuple[Array, Array]:
        return by_groups(jnp.stack(arrays, axis=1), k)

    def apart(*arrays: Array) -> tuple[Array, Array]:
        values, places = zip(*(jax.lax.top_k(array, k) for array in arrays), strict=True)
        return jnp.stack(values, axis=1), jnp.stack(places, axis=1)

    return jax.lax.platform_dependent(*arrays, cuda=together, default=apart)


@typed
def by_groups(
    scores: Float[Array, "*dims V"], k: int, size: int | None = None
) -> tuple[Float[Array, "*dims k"], Int[Array, "*dims k"]]:
    """`jax.lax.top_k` in two stages: the k groups with the largest scores, then the best in those.

    k 2 of (1, 3 | 3, 0 | 2, 2) in three groups: maxima (3, 3, 2), so the first two groups ->
    (3, 3), places (1, 2). Of groups with equal maxima the first is taken, and groups stay in
    order. So equals resolve as in one stage.

    Args:
      size: of a group; the last is filled up. By default both stages look at as many scores.
    """
    *dims, width = scores.shape
    size = size or max(1, round((width / k) ** 0.5))
    groups = -(-width // size)
    if groups <= k:
        return tuple(jax.lax.top_k(scores, k))
    filled = jnp.pad(
        scores.reshape(-1, width), ((0, 0), (0, groups * size - width)), constant_values=-jnp.inf
    )
    filled = filled.reshape(-1, groups, size)
    group = jnp.sort(jax.lax.top_k(filled.max(axis=2), k)[1], axis=1)
    inside = jnp.take_along_axis(filled, group[:, :, None], axis=1)
    best, which = jax.lax.top_k(inside.reshape(-1, k * size), k)
    places = size * jnp.take_along_axis(group, which // size, axis=1) + which % size
    return best.reshape(*dims, k), places.reshape(*dims, k)
