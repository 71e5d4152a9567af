"""Queries, keys and values of a block, before and after their rotation."""

import dataclasses
import functools

import jax.numpy as jnp
from jaxtyping import Array

from medusa_jax.kernels.heads import Heads
from medusa_jax.model.layers import rotate


@dataclasses.dataclass(frozen=True)
class QKV:
    """A block's queries, keys and values before their rotation.

    Attributes:
      queries, keys, values: H, K and K heads.
      rope: cos and sin of the tokens' angles [B, T, C / 2].
    """

    queries: Heads
    keys: Heads
    values: Heads
    rope: tuple[Array, Array]

    @property
    def width(self) -> int:
        """C, the numbers of a head."""
        return self.values.width

    @functools.cached_property
    def turned(self) -> tuple[Array, Array, Array]:
        """Rotated queries [B, T, H, C] and keys [B, K, C, T], and values [B, K, T, C]."""
        queries = rotate(self.queries.alone(), *self.rope)
        return queries, turned_keys(self.keys, self.rope), turned_values(self.values)


def turned_keys(keys: Heads, rope: tuple[Array, Array]) -> Array:
    """Keys, rotated, as the cache holds them [B, K, C, T], or of L layers [B, L, K, C, T]."""
    cos, sin = (one if keys.array.ndim == 3 else one[:, None] for one in rope)
    return jnp.moveaxis(rotate(keys.alone(), cos, sin), -3, -1)


def turned_values(values: Heads) -> Array:
    """Values as the cache holds them [B, K, T, C], or of L layers [B, L, K, T, C]."""
    return values.alone().swapaxes(-3, -2)
