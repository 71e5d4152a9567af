"""Trees grown anew at every step, from what the heads themselves believe.

A static tree spends its nodes where guesses are right on average. The heads
know more: after "Once upon a" the first guess is nearly sure and deserves depth,
elsewhere several first guesses are about equal and deserve breadth. A path's
log-probability is the sum of its guesses', each given the guess before it: what
the heads, which do not know each other's guesses, say of it, and how well the two
go together where that was counted (`bigrams.py`) or learned (`selector.py`). The
best tree of N tokens is the root with the N - 1 likeliest paths. A path is never
likelier than its beginning, so these paths are prefix-closed.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from medusa_jax.drafting.tree_tables import MOST_TOKENS, PAD, TreeTables
from medusa_jax.errors import InputError
from medusa_jax.shapes import typed

# What a level of depth costs: less than any difference that matters, but it puts
# a certain guess (log-probability 0) behind the node it hangs from.
_STEP = 1e-4


@dataclasses.dataclass(frozen=True)
class DynamicTree:
    """Trees of `size` tokens, at most `depth` deep and `top_k` wide, grown anew at each step."""

    size: int
    depth: int
    top_k: int = 10
    scored: ClassVar[bool] = True  # whether `arrange` reads the scores of paths

    @property
    def path_cells(self) -> int:
        """E, tokens of the longest path, root included."""
        return self.depth + 1

    def check(self, num_heads: int, vocab_size: int) -> None:
        """Raises InputError if these heads cannot give such trees."""
        if self.size < 2:
            raise InputError(f"a dynamic tree has 2 tokens or more, got size {self.size}")
        if self.size > MOST_TOKENS:
            raise InputError(
                f"a dynamic tree of {self.size:,} tokens is too large: at most {MOST_TOKENS:,}"
            )
        if self.depth < 1:
            raise InputError(f"a dynamic tree is 1 deep or more, got depth {self.depth}")
        if self.depth > num_heads:
            raise InputError(
                f"a tree {self.depth} deep was asked for, but there are {num_heads} Medusa heads"
            )
        if self.top_k > vocab_size:
            raise InputError(f"top_k {self.top_k} exceeds the vocabulary of {vocab_size}")
        paths = sum(self.top_k**level for level in range(self.depth + 1))
        if self.size > paths:
            raise InputError(f"there are {paths} nodes at most, and {self.size} were asked for")

    def arrange(self, path_scores: Float[Array, "B M R R"]) -> tuple[Array, TreeTables]:
        """The cell of each slot's token among the candidates [B, N], and this step's tables."""
        return grow(path_scores, self.size)


@typed
def grow(scores: Float[Array, "B M R R"], size: int) -> tuple[Array, TreeTables]:
    """The root and the `size - 1` likeliest paths, in order of likelihood.

    Args:
      scores: [b, k, q, r] is the log-probability, 0 or less, of guess r of head k where guess q
        of the head before is right; with k = 0, where q means nothing, of guess r after the root.

    Example: two heads whose guesses have probabilities (0.6, 0.3) and, after either of
    these, (0.9, 0.1), size 4. Paths: (0) 0.6, (0, 0) 0.54, (1) 0.3, (1, 0) 0.27, ... The
    tree is the root with the first three: parents (-1, 0, 1, 0), depths (0, 1, 2, 1).

    Level by level: of each level at most size - 1 nodes can be in the tree, and
    they hang from the best of the level above.
    """
    batch, levels, _, ranks = scores.shape
    keep, rows = size - 1, jnp.arange(batch)[:, None]
    best = jnp.zeros((batch, 1))  # of the level above; the root is certain
    rank = jnp.zeros((batch, 1), jnp.int32)  # ... among the guesses of its head
    score, cell, parent, depth = [], [], [], []
    start = 0  # number of the first node of the level above, counting the root as 0
    for level in range(levels):
        after = jnp.take_along_axis(scores[:, level], rank[:, :, None], axis=1)
        paths = (best[:, :, None] + after - _STEP).reshape(batch, -1)
        best, chosen = jax.lax.top_k(paths, min(keep, paths.shape[1]))
        rank = chosen % ranks
        score.append(best)
        cell.append(1 + level * ranks + rank)
        parent.append(start + chosen // ranks)
        depth.append(jnp.full_like(chosen, level + 1))
        start = 1 + sum(one.shape[1] for one in score[:-1])
    numbers = jax.lax.top_k(jnp.concatenate(score, axis=1), keep)[1]
    cell, parent, depth = (
        jnp.take_along_axis(jnp.concatenate(table, axis=1), numbers, axis=1)
        for table in (cell, parent, depth)
    )
    # From numbers among all candidates to slots of the tree.
    slots = jnp.zeros((batch, start + keep + 1), jnp.int32)
    slots = slots.at[rows, numbers + 1].set(1 + jnp.arange(keep, dtype=jnp.int32))
    parent = jnp.take_along_axis(slots, parent, axis=1)

    def rooted(table: Int[Array, "B n"], root: int) -> Int[Array, "B N"]:
        return jnp.pad(table, ((0, 0), (1, 0)), constant_values=root)

    parents, depths = rooted(parent, PAD), rooted(depth, 0)
    up = jnp.broadcast_to(jnp.arange(size), (batch, size))
    mask = jnp.broadcast_to(jnp.eye(size, dtype=bool), (batch, size, size))
    ancestors = jnp.full((batch, size, levels + 1), PAD)
    slot, cells = jnp.arange(size)[None, :], jnp.arange(levels + 1)
    for height in range(levels + 1):
        here = (cells == (depths - height)[..., None]) & (up >= 0)[..., None]
        ancestors = jnp.where(here, up[..., None], ancestors)
        mask |= up[..., None] == slot[:, None]
        up = jnp.where(up > 0, jnp.take_along_axis(parents, jnp.maximum(up, 0), axis=1), PAD)
    inner = tuple(range(max(size - 1, 1)))
    return rooted(cell, 0), TreeTables(parents, depths, ancestors, mask, inner)
