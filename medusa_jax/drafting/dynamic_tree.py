"""Trees grown anew at every step, from what the heads themselves believe.

A static tree spends its nodes where guesses are right on average. The heads
know more: after "Once upon a" the first guess is nearly sure and deserves depth,
elsewhere several first guesses are about equal and deserve breadth. A path's
log-probability is the sum of its guesses', each given the guess before it: what
Medusa heads, which do not know each other's guesses, say of it, and how well the two
go together where that was counted (`bigrams.py`) or learned (`selector.py`). Hydra
heads know the guesses before (`hydra_drafter.py`). The best tree of N tokens is the
root with the N - 1 likeliest paths. A path is never likelier than its beginning, so
these paths are prefix-closed.
"""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

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
    """
    batch, depth, _, ranks = scores.shape
    best = jnp.zeros((batch, 1))  # of the level above; the root is certain
    rank = jnp.zeros((batch, 1), jnp.int32)  # ... among the guesses of its head
    levels, cells = [], [rank]
    for number in range(depth):
        after = jnp.take_along_axis(scores[:, number], rank[:, :, None], axis=1)
        level, rank = next_level(best, after, size - 1)
        levels.append(level)
        cells.append(1 + number * ranks + rank)
        best = level.scores
    chosen, tables = likeliest(levels, size)
    return jnp.take_along_axis(jnp.concatenate(cells, axis=1), chosen, axis=1), tables


class Level(NamedTuple):
    """The best nodes of one depth.

    Attributes:
      scores: log-probability of the path to each [B, n].
      parents: number of the node that it hangs from, in the level above [B, n].
    """

    scores: Array
    parents: Array


@typed
def next_level(
    best: Float[Array, "B n"], after: Float[Array, "B n R"], keep: int
) -> tuple[Level, Int[Array, "B m"]]:
    """The `keep` best children of the nodes of a level, best first, and their ranks.

    Of each level at most size - 1 nodes can be in a tree, and they hang from the best of the
    level above.

    Example: paths of log-probability (0 -2), whose children have (-1 -3) and (-0.5 -4), keep 2:
    children 0 and 0 of the nodes 0 and 1, -1 and -2.5.

    Args:
      best: log-probability of the path to each node.
      after: of each child, given its parent.
    """
    batch, _, ranks = after.shape
    paths = (best[:, :, None] + after - _STEP).reshape(batch, -1)
    scores, chosen = jax.lax.top_k(paths, min(keep, paths.shape[1]))
    return Level(scores, chosen // ranks), chosen % ranks


def likeliest(levels: Sequence[Level], size: int) -> tuple[Array, TreeTables]:
    """The tree of the root and the `size - 1` likeliest nodes of all levels.

    Returns:
      which node is in each slot, counting the root as 0 and then level by level [B, N]; the tables.
    """
    batch, depth, keep = levels[0].scores.shape[0], len(levels), size - 1
    rows = jnp.arange(batch)[:, None]
    parent, depths = [], []
    above, start = 0, 1  # numbers of the first nodes of the level above, and of this one
    for number, level in enumerate(levels, start=1):
        parent.append(above + level.parents)
        depths.append(jnp.full_like(level.parents, number))
        above, start = start, start + level.parents.shape[1]
    scores = jnp.concatenate([level.scores for level in levels], axis=1)
    chosen = 1 + jax.lax.top_k(scores, keep)[1]
    parent, depth_of = (
        jnp.take_along_axis(jnp.concatenate(table, axis=1), chosen - 1, axis=1)
        for table in (parent, depths)
    )
    # From numbers among all nodes to slots of the tree.
    slots = jnp.zeros((batch, start + 1), jnp.int32)
    slots = slots.at[rows, chosen].set(1 + jnp.arange(keep, dtype=jnp.int32))
    parent = jnp.take_along_axis(slots, parent, axis=1)

    def rooted(table: Int[Array, "B n"], root: int) -> Int[Array, "B N"]:
        return jnp.pad(table, ((0, 0), (1, 0)), constant_values=root)

    parents, depths = rooted(parent, PAD), rooted(depth_of, 0)
    up = jnp.broadcast_to(jnp.arange(size), (batch, size))
    mask = jnp.broadcast_to(jnp.eye(size, dtype=bool), (batch, size, size))
    ancestors = jnp.full((batch, size, depth + 1), PAD)
    slot, cells = jnp.arange(size)[None, :], jnp.arange(depth + 1)
    for height in range(depth + 1):
        here = (cells == (depths - height)[..., None]) & (up >= 0)[..., None]
        ancestors = jnp.where(here, up[..., None], ancestors)
        mask |= up[..., None] == slot[:, None]
        up = jnp.where(up > 0, jnp.take_along_axis(parents, jnp.maximum(up, 0), axis=1), PAD)
    inner = tuple(range(max(size - 1, 1)))
    return rooted(chosen, 0), TreeTables(parents, depths, ancestors, mask, inner)
