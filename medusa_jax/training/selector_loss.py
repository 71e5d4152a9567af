"""What the selector learns: to choose among the candidates of a head after the right token.

Heads and backbone get no gradient from it.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from medusa_jax.drafting import selector
from medusa_jax.model.weight import Weight
from medusa_jax.shapes import typed
from medusa_jax.training.losses import MISS, each_target

CANDIDATES = 16  # of each head

Params = dict[str, Any]


def with_table(learned: Params, embedding: Weight, token_map: Array | None) -> Params:
    """The selector's parameters, with Q of all tokens that heads guess among, "table" [W, r].

    Candidates then cost a lookup each instead of a product.
    """
    rows = embedding.data if token_map is None else embedding.lookup(token_map)
    return learned | {"table": selector.mapped(learned, "after", rows)}


def of_head(learned: Params, k: int, num_heads: int) -> Params:
    """The parameters of `with_table` with the context of head k (0-based) alone."""
    context = {
        name: leaf.reshape(num_heads, -1, *leaf.shape[1:])[k]
        for name, leaf in learned["context"].items()
    }
    return learned | {"context": context}


def chosen(
    learned: Params, logits: Array, hidden: Array, before: Array, targets: Array
) -> tuple[Array, Array]:
    """Cross-entropy of the right candidates of a head, and their ranks [B, t].

    A target that was not among the candidates is put in to be learnt, and is a miss.

    Args:
      learned: of `of_head`.
      logits, hidden: of the head [B, t, W] and of the backbone [B, t, D].
      before: embeddings of the tokens before the targets [B, t, D].
      targets: rows of the logits [B, t], -1 for tokens that the head cannot say.
    """
    logits, hidden, before = jax.lax.stop_gradient((logits, hidden, before))
    most = min(CANDIDATES, logits.shape[-1])
    rows, values, missing = candidates(logits, jnp.maximum(targets, 0), most)
    context = selector.contexts(learned, hidden, 1)[..., 0, :]
    first = selector.mapped(learned, "before", before)[..., None, :]
    scores = values + selector.pairs(first, context, learned["table"][rows])[..., 0, :]
    place = jnp.argmax(rows == targets[..., None], axis=-1)
    loss, rank = each_target(scores, jnp.where(targets < 0, -1, place))
    return loss, jnp.where(missing, MISS, rank)


@typed
def candidates(
    logits: Float[Array, "*dims W"], targets: Int[Array, "*dims"], most: int
) -> tuple[Int[Array, "*dims R"], Float[Array, "*dims R"], Bool[Array, "*dims"]]:
    """The best rows of a head, with the target in the last place where it is not among them.

    Example: logits (5 1 4 3), target 1, most 2 -> rows (0 1), their logits (5 1), missing True.

    Args:
      targets: rows, which are not negative.
      most: how many.

    Returns:
      rows, their logits, and whether the target was missing.
    """
    flat = logits.reshape(-1, logits.shape[-1])
    # XLA knows top_k by its pattern, of matrices alone; what comes before must not fold into it.
    values, rows = jax.lax.top_k(jax.lax.optimization_barrier(flat), most)
    values, rows = (array.reshape(*targets.shape, most) for array in (values, rows))
    missing = ~(rows == targets[..., None]).any(axis=-1)
    own = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    last = missing[..., None] & (jnp.arange(most) == most - 1)
    rows = jnp.where(last, targets[..., None], rows)
    return rows, jnp.where(last, own[..., None], values), missing
