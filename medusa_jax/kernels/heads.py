"""Where the heads of a block lie in the output of a projection."""

import dataclasses

import jax
from jaxtyping import Array

STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Heads:
    """Heads of a projection's output, which may hold others too: a kernel reads them in place.

    Attributes:
      array: [B, T, N C], or of L layers [B, L, T, N C].
      width: C.
      first: the first of these heads in it.
      count: how many they are; None for all that follow.
    """

    array: Array
    width: int = dataclasses.field(metadata=STATIC)
    first: int = dataclasses.field(default=0, metadata=STATIC)
    count: int | None = dataclasses.field(default=None, metadata=STATIC)

    @property
    def number(self) -> int:
        """How many heads these are."""
        most = self.array.shape[-1] // self.width
        return most - self.first if self.count is None else self.count

    def in_place(self) -> Array:
        """All that the array holds, by head [B, T, N, C]."""
        return self.array.reshape(*self.array.shape[:2], -1, self.width)

    def alone(self) -> Array:
        """These heads as an array of their own [B, T, n, C].

        They are cut out of the flat array: heads that are cut apart are moved twice on a TPU.
        """
        cut = self.cut().array
        return cut.reshape(*cut.shape[:-1], self.number, self.width)

    def cut(self) -> "Heads":
        """These heads in a flat array of their own."""
        start = self.first * self.width
        return Heads(self.array[..., start : start + self.number * self.width], self.width)
