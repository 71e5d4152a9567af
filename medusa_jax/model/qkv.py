"""Queries, keys and values of a block, before and after their rotation."""

import dataclasses
import functools

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
        queries, keys = (rotate(part.alone(), *self.rope) for part in (self.queries, self.keys))
        return queries, keys.transpose(0, 2, 3, 1), self.values.alone().swapaxes(1, 2)
