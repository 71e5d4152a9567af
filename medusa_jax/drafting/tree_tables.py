"""The tables of a tree of tokens, as a decode step and an acceptance scheme read them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

PAD = -1
MOST_TOKENS = 4096  # of a tree; its mask has the square of that, and each step verifies all

Table = Array | np.ndarray  # constant in a static tree, computed in a dynamic tree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TreeTables:
    """The shape of the trees of one step. Letters: see `shapes.py`.

    Slots number the tokens as the backbone sees them; slot 0 is the root. The leading
    dimension is B, or 1 where all rows share one tree. `Tree` draws an example.

    Attributes:
      parents: slot of each token's parent, PAD for the root [#B, N].
      depths: distance of each token from the root [#B, N].
      ancestors: slots from the root to each token, itself included, then PAD [#B, N, E].
      mask: True where a token (row) sees another: itself and its ancestors [#B, N, N].
      inner: slots that may have children, ascending.
    """

    parents: Table
    depths: Table
    ancestors: Table
    mask: Table
    inner: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @property
    def depth(self) -> int:
        """Depth of the deepest token that the tables have room for: E - 1."""
        return self.ancestors.shape[-1] - 1

    def depth_of(self, slots: Int[Array, " B"]) -> Int[Array, " B"]:
        """Depth of one slot a row."""
        return jnp.asarray(self.depths)[self._rows(slots), slots]

    def path_to(self, slots: Int[Array, " B"]) -> Int[Array, "B E"]:
        """Slots from the root to one slot a row, then PAD.

        For the example of `Tree`: slot 3 -> (0, 1, 3), slot 2 -> (0, 2, PAD).
        """
        return jnp.asarray(self.ancestors)[self._rows(slots), slots]

    def first(self, size: int) -> "TreeTables":
        """The tree of the first `size` slots, whose ancestors are among them.

        For the example of `Tree`: of 3 slots, the root and its two children.
        """
        return TreeTables(
            self.parents[:, :size],
            self.depths[:, :size],
            self.ancestors[:, :size],
            self.mask[:, :size, :size],
            tuple(slot for slot in self.inner if slot < max(size - 1, 1)),
        )

    def _rows(self, slots: Array) -> Array:
        """The row of the tables for each row of the batch."""
        rows = jnp.arange(slots.shape[0])
        return rows if self.parents.shape[0] > 1 else jnp.zeros_like(rows)
