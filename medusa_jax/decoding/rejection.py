"""Rejection sampling: guesses that were drawn, accepted so that the target's distribution stays.

A guess x that was drawn from q is accepted with the probability min(1, p(x) / q(x)), p being the
target. After a rejection the rest of p is drawn from, max(p - q, 0) (Leviathan et al., 2023; Chen
et al., 2023). Siblings are drawn without replacement: each is judged by what is left of p and of q
(Chen et al., 2024, "Sequoia", algorithm 2).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from medusa_jax.decoding.sampling import draw
from medusa_jax.drafting.tree_tables import TreeTables
from medusa_jax.shapes import typed

CHANCES = np.uint32(2**32 - 2)  # its random stream, apart from those of draws


def walk(
    tree: TreeTables,
    tokens: Int[Array, "B N"],
    target: Callable[[Array], Array],
    drawn: Float[Array, "B I V"],
    keys: Key[Array, " B"],
    position: Int[Array, " B"],
) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
    """Slot of the last accepted node, and the token after it.

    Args:
      target: slots of nodes [B] -> logits of the target after them [B, V], with -inf for what it
        never draws.
      drawn: see `drafting.drafter.Proposal`.
      position: place of the root in each row's sequence.
    """
    rows, inner = jnp.arange(tokens.shape[0]), np.array(tree.inner)
    last, going = jnp.zeros_like(rows), jnp.ones_like(rows, bool)
    p = jax.nn.softmax(target(last))
    for depth in range(tree.depth):
        children = tree.parents == last[:, None]
        q = jnp.exp(drawn[rows, jnp.searchsorted(inner, last)])
        chances = _chances(keys, position + depth, widest(tree, depth))
        child, left = judge(children, tokens, p, q, chances)
        # The walk ends at a node that has no accepted child, with what is left there.
        p = jnp.where(going[:, None], left, p)
        going &= child > 0
        last = jnp.where(going, child, last)
        p = jnp.where(going[:, None], jax.nn.softmax(target(last)), p)
    return last, draw(keys, position + tree.depth_of(last) + 1, jnp.log(p))


@typed
def judge(
    children: Bool[Array, "B N"],
    tokens: Int[Array, "B N"],
    p: Float[Array, "B V"],
    q: Float[Array, "B V"],
    chances: Float[Array, "B w"],
) -> tuple[Int[Array, " B"], Float[Array, "B V"]]:
    """The child of a node that is accepted, 0 for none, and what is left of p then.

    p (.5, .5), q (.75, .25), a child of token 0: with a chance below 2/3 it is accepted. Else
    (0, 1) is left of p.

    Args:
      children: which slots are children of the node.
      p, q: the target's distribution after the node, and that of its children.
      chances: uniform in [0, 1), one for each child.
    """
    rows = jnp.arange(tokens.shape[0])
    number = jnp.cumsum(children, axis=1)
    accepted = jnp.zeros(tokens.shape[0], jnp.int32)
    for i in range(chances.shape[1]):
        this = children & (number == i + 1)
        slot = this.argmax(axis=1).astype(jnp.int32)
        token = tokens[rows, slot]
        chance, guessed = p[rows, token], q[rows, token]
        # A distribution of fewer tokens than children has drawn none for the last of them.
        asked = this.any(axis=1) & (accepted == 0) & (guessed > 0)
        takes = asked & (chances[:, i] * guessed < chance)
        accepted = jnp.where(takes, slot, accepted)
        fails = (asked & ~takes)[:, None]
        p = jnp.where(fails, normalized(jnp.maximum(p - q, 0), p), p)
        q = jnp.where(fails, normalized(q.at[rows, token].set(0), q), q)
    return accepted, p


def normalized(weights: Float[Array, "B V"], otherwise: Float[Array, "B V"]) -> Array:
    """Weights as probabilities, (1, 3) -> (.25, .75); `otherwise` where all are 0."""
    total = weights.sum(axis=-1, keepdims=True)
    return jnp.where(total > 0, weights / jnp.where(total > 0, total, 1), otherwise)


def widest(tree: TreeTables, depth: int) -> int:
    """Most children of a node at this depth; of a tree that is no constant, all that it has."""
    if not isinstance(tree.parents, np.ndarray) or not isinstance(tree.depths, np.ndarray):
        return tree.parents.shape[1] - 1
    parents = tree.parents[tree.depths == depth + 1]
    return int(np.bincount(parents).max())


def _chances(keys: Array, position: Array, count: int) -> Array:
    """Uniform numbers for the children of a node, whose token is at this place [B, count]."""

    def row(key: Array, place: Array) -> Array:
        own = jax.random.fold_in(jax.random.fold_in(key, CHANCES), place)
        return jax.random.uniform(own, (count,))

    return jax.vmap(row)(keys, position)
