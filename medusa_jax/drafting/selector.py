"""The learned selector: how well a guess goes together with the guess before it.

Heads guess without knowing each other's guesses (`bigrams.py`). After token a, guess b of head k
gets, on top of its logit, a sum over the ranks r of a product of three

    S_k(a, b) = U_k(b) + sum_r P[a]_r (W_k h + c_k)_r Q[b]_r / sqrt(ranks)

P[a] and Q[b] are linear maps of the tokens' embeddings, and h is the hidden state that all heads
read. All three have a root mean square of 1 before they are mapped, so one learning rate suits
all models. Bigrams are the case W = 0. The formula is that of DFlash 2's selector.

Only trees that are grown at each step (`dynamic_tree.py`) read it. Verification does not change,
so no text changes. Parameters: "before/weight" and "after/weight" [r, D], of P and Q;
"context/weight" [M r, D] and "context/bias" [M r], of all heads.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from medusa_jax.model.weight import weight_of
from medusa_jax.shapes import typed

NAME = "selector"  # its part of the heads' parameters

Selector = dict[str, Any]


def mapped(selector: Selector, side: str, embeddings: Float[Array, "*dims D"]) -> Array:
    """P ("before") or Q ("after") of tokens, float32 [*dims, r], from their embeddings."""
    return weight_of(selector[side]["weight"]).dot(_normed(embeddings))


def contexts(selector: Selector, hidden: Float[Array, "*dims D"], num_heads: int) -> Array:
    """W_k h + c_k of each head, over sqrt(ranks), float32 [*dims, M, r]."""
    context = selector["context"]
    flat = weight_of(context["weight"]).dot(_normed(hidden)) + context["bias"]
    each = flat.reshape(*hidden.shape[:-1], num_heads, -1)
    return each / each.shape[-1] ** 0.5


@typed
def pairs(
    before: Float[Array, "*dims a r"],
    context: Float[Array, "*dims r"],
    after: Float[Array, "*dims b r"],
) -> Float[Array, "*dims a b"]:
    """What each guess gains after each token: a single batched product.

    Example: ranks 2, before ((1 0) (0 1)), context (2 3), after ((1 1)) -> ((2) (3)).
    """
    return (before * context[..., None, :]) @ after.mT


@typed
def links(
    scores: Float[Array, "*dims R"], pairs: Float[Array, "*dims a R"]
) -> Float[Array, "*dims a R"]:
    """Log-probability of each guess after each token, 0 or less.

    The selector shares out what the head gives to its guesses together. Where it says nothing
    (pairs 0), the links are the head's own log-probabilities.

    Example: a head gives two guesses 0.4 and 0.2. After a token with pairs (0, log 2) they are
    equally good and get 0.3 each.
    """
    together = jax.nn.logsumexp(scores, axis=-1, keepdims=True)[..., None]
    return together + jax.nn.log_softmax(scores[..., None, :] + pairs, axis=-1)


def _normed(x: Array) -> Array:
    """x / rms(x) over the last axis, in float32."""
    wide = x.astype(jnp.float32)
    return wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-6)
