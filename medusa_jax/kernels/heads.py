"""Where the heads of a block lie in the output of a projection."""

import dataclasses

from jaxtyping import Array


@dataclasses.dataclass(frozen=True)
class Heads:
    """Heads of a projection's output, which may hold others too: a kernel reads them in place.

    Attributes:
      array: [B, T, N, C].
      first: the first of these heads in it.
      count: how many they are; None for all that follow.
    """

    array: Array
    first: int = 0
    count: int | None = None

    def alone(self) -> Array:
        """These heads as an array of their own."""
        return self.array[:, :, self.first : self.first + self.number]

    @property
    def number(self) -> int:
        """How many heads these are."""
        return self.array.shape[2] - self.first if self.count is None else self.count
