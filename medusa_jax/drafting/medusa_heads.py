"""Medusa heads: from one hidden state, the tokens after the next (paper section 2.1.1).

Head k (1-based) reads the backbone's last hidden state h_t, whose own lm_head
predicts token t+1, and predicts token t+k+1:

    x <- x + SiLU(W x + b)    L times, from x = h_t
    logits = U_k x            U_k [D, V] of its own, or the backbone's lm_head

Large vocabularies make U_k most of a head. Truncated heads guess among W < V
tokens only, those of their `token_map`: the backbone still verifies every guess
over all V, so what a head cannot say costs a guess and never changes a text.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from medusa_jax.model.backbone import Linear
from medusa_jax.model.linear import multiply, multiply_each, project
from medusa_jax.shapes import typed


@dataclasses.dataclass(frozen=True)
class HeadsConfig:
    """Shape of a set of heads.

    Attributes:
      num_heads: M, counted from the weights, never from a checkpoint's config.
      num_layers: residual blocks of each head.
      hidden_size: D of the backbone they were trained on.
      vocab_size: V, or 0 where the heads' own tensors do not say (shared or truncated).
      shared: logits through one projection, the backbone's lm_head or its
        `token_map` rows, instead of an own one (the original's version "2").
      truncated: W, rows of the projection where it has fewer than V; else 0.
    """

    num_heads: int
    num_layers: int
    hidden_size: int
    vocab_size: int
    shared: bool = False
    truncated: int = 0


NO_HEADS = HeadsConfig(num_heads=0, num_layers=0, hidden_size=0, vocab_size=0)


class Head(nn.Module):
    """One head: residual SiLU blocks, then a vocabulary projection."""

    config: HeadsConfig

    def setup(self) -> None:
        config = self.config
        # Zero weights and biases make a new head start as the lm_head itself.
        zeros = nn.initializers.zeros
        self.blocks = [
            Linear(config.hidden_size, use_bias=True, kernel_init=zeros, name=f"block_{i}")
            for i in range(config.num_layers)
        ]
        if not config.shared and not self.has_variable("params", "vocab_kernel"):
            init = nn.initializers.lecun_normal(in_axis=1, out_axis=0)
            rows = config.truncated or config.vocab_size
            self.vocab = self.param("vocab", init, (rows, config.hidden_size))

    def __call__(self, x: Array, unembed: Callable[[Array], Array]) -> Array:
        """Logits, float32 [*dims, W], from hidden states [*dims, D]."""
        return self.project(self.features(x), unembed)

    def features(self, x: Array) -> Array:
        """What the vocabulary projection reads [*dims, D]."""
        for block in self.blocks:
            x = x + nn.silu(block(x))
        return x

    def project(self, x: Array, unembed: Callable[[Array], Array]) -> Array:
        """Logits of features."""
        if self.config.shared:
            return unembed(x)
        if self.has_variable("params", "vocab_kernel"):
            return multiply(x, self.get_variable("params", "vocab_kernel"))
        return project(x, self.vocab)


class MedusaHeads(nn.Module):
    """All heads.

    Parameters: a nested dict, one sub-dict a head, but for decoding the blocks of all together
    (`layout.py`); beside them, where heads are truncated, `token_map`, and, where a shared
    projection lies with them, `vocab` [W, D].
    """

    config: HeadsConfig

    @nn.compact
    def __call__(self, hidden: Array, unembed: Callable[[Array], Array]) -> list[Array]:
        """Logits of each head, float32 [*dims, W].

        Args:
          hidden: the backbone's hidden states after its final norm [*dims, D].
          unembed: the backbone's own projection, for shared heads that hold none.
        """
        if self.has_variable("params", "vocab_kernel"):
            unembed = functools.partial(
                multiply, kernel=self.get_variable("params", "vocab_kernel")
            )
        heads = [Head(self.config, name=f"head_{i}") for i in range(self.config.num_heads)]
        if self.is_initializing():
            return [head(hidden, unembed) for head in heads]
        if self.has_variable("params", "block_0"):
            features = self._features(hidden)
        else:
            features = jnp.stack([head.features(hidden) for head in heads], axis=-2)
        if self.config.shared:  # one product reads the projection once, not once a head
            return list(jnp.moveaxis(unembed(features), -2, 0))
        return [head.project(features[..., i, :], unembed) for i, head in enumerate(heads)]

    def _features(self, hidden: Float[Array, "*dims D"]) -> Float[Array, "*dims M D"]:
        """`Head.features` of all heads, whose blocks lie stacked."""
        heads, width = self.config.num_heads, hidden.shape[-1]
        x = jnp.broadcast_to(hidden[..., None, :], (*hidden.shape[:-1], heads, width))
        for i in range(self.config.num_layers):
            block = self.get_variable("params", f"block_{i}")
            y = multiply_each(x, block["kernel"]).astype(x.dtype)
            x = x + nn.silu(y + block["bias"])
        return x


def first_heads(params: dict[str, Any], count: int) -> dict[str, Any]:
    """Heads' parameters, of stacked blocks those of the first `count` heads alone.

    To cut a stack copies what is left of it: do it before a loop, not in it.
    """
    return {
        name: jax.tree.map(lambda stack: stack[:count], one) if name.startswith("block_") else one
        for name, one in params.items()
    }


@typed
def top_guesses(
    logits: list[Float[Array, "B W"]], top_k: int, token_map: Int[Array, " W"] | None = None
) -> tuple[Int[Array, "B M R"], Float[Array, "B M R"]]:
    """Best `top_k` token ids of each head, best first, and their logits.

    With token_map (7 2 9) and logits (.1 .3 .2), the best two are tokens 2 and 9.
    """
    values, ranked = zip(*(jax.lax.top_k(head, top_k) for head in logits), strict=True)
    # XLA knows top_k by its pattern; a later slice that folds into it would turn it
    # back into a sort of the whole vocabulary.
    rows, best = jax.lax.optimization_barrier(
        (jnp.stack(ranked, axis=1), jnp.stack(values, axis=1))
    )
    return rows if token_map is None else token_map[rows], best


@typed
def rows_of(
    tokens: Int[Array, "*dims"], token_map: Int[Array, " W"], vocab_size: int
) -> Int[Array, "*dims"]:
    """The row of a truncated projection for each token, -1 where it has none.

    With token_map (7 2 9): tokens (9 3 7) -> (2 -1 0).
    """
    rows = jnp.full(vocab_size, -1, jnp.int32)
    return rows.at[token_map].set(jnp.arange(len(token_map), dtype=jnp.int32))[tokens]
