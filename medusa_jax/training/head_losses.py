"""What a head may learn, position by position: pure functions of logits and targets.

p is the backbone's distribution after the tokens up to the one that a head guesses, q the head's.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from medusa_jax.shapes import typed


@typed
def overlap(
    teacher: Float[Array, "*dims W"], logits: Float[Array, "*dims W"]
) -> Float[Array, "*dims"]:
    """alpha = sum min(p, q) of two sets of logits: how often speculative sampling accepts."""
    return jnp.sum(jnp.minimum(jax.nn.softmax(teacher), jax.nn.softmax(logits)), axis=-1)


@typed
def soft_cross_entropy(
    teacher: Float[Array, "*dims W"], logits: Float[Array, "*dims W"]
) -> Float[Array, "*dims"]:
    """-sum p log q, cross-entropy with the backbone's distribution: Hydra's teacher loss.

    Example: p (0.5 0.5) and q (0.9 0.1) -> -(0.5 log 0.9 + 0.5 log 0.1) = 1.204.
    """
    return -jnp.sum(jax.nn.softmax(teacher) * jax.nn.log_softmax(logits), axis=-1)


@typed
def total_variation(
    teacher: Float[Array, "*dims W"], logits: Float[Array, "*dims W"]
) -> Float[Array, "*dims"]:
    """1 - alpha, the total variation of p and q.

    Example: p (0.5 0.5) and q (0.9 0.1) -> 1 - (0.5 + 0.1) = 0.4.
    """
    return 1.0 - overlap(teacher, logits)


@typed
def lk_hybrid(
    teacher: Float[Array, "*dims W"], logits: Float[Array, "*dims W"], eta: float
) -> Float[Array, "*dims"]:
    """lambda KL(p || q) + (1 - lambda) (1 - alpha) with lambda = exp(-eta alpha), not learnt from.

    KL leads where p and q hardly overlap, total variation where they do (arXiv 2602.23881). The
    weight is of each position.
    """
    alpha = overlap(teacher, logits)
    share = jax.lax.stop_gradient(jnp.exp(-eta * alpha))
    log_p, log_q = jax.nn.log_softmax(teacher), jax.nn.log_softmax(logits)
    kl = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
    return share * kl + (1.0 - share) * (1.0 - alpha)


@typed
def pace_weights(
    losses: Float[Array, "M *dims"], counted: Bool[Array, "M *dims"], smoothing: float
) -> Float[Array, "M *dims"]:
    """D-PACE: the weight of each head's cross-entropy at each position (arXiv 2605.18810).

    With q_k = exp(-loss_k) and q~ = (1 - s) q + s, head j weighs sum_{m >= j} prod_{i <= m} q~_i:
    how much the expected accepted length would gain in it. Heads without a target end the sum.

    Example: two heads, s = 0.5, losses (0, log 2): q~ (1, 0.75), weights (1 + 0.75, 0.75).
    """
    likely = jnp.where(counted, (1.0 - smoothing) * jnp.exp(-losses) + smoothing, 0.0)
    reached = jnp.cumprod(likely, axis=0)
    return jnp.flip(jnp.cumsum(jnp.flip(reached, 0), axis=0), 0)


@typed
def accepted_lengths(ranks: Int[Array, "M *dims"], k: int) -> Int[Array, "*dims"]:
    """How many heads in a row, from the first on, have their target among their best k.

    So many guesses a tree with all k guesses of each head would accept; k = 1 is the chain.

    Example: ranks (0, 2, 0): k = 1 -> 1, k = 3 -> 3.
    """
    return jnp.sum(jnp.cumprod(ranks < k, axis=0), axis=0)
