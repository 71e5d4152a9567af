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
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from medusa_jax.drafting.dynamic_tree import DynamicTree
from medusa_jax.drafting.tree import Tree
from medusa_jax.errors import InputError
from medusa_jax.model.largest import largest_of_each
from medusa_jax.model.linear import Linear, parameter
from medusa_jax.model.weight import weight_of
from medusa_jax.shapes import typed

MEDUSA, HYDRA = ARCHITECTURES = ("medusa", "hydra")


@dataclasses.dataclass(frozen=True)
class HeadsConfig:
    """Shape of a set of heads.

    Attributes:
      num_heads: M, counted from the weights, never from a checkpoint's config.
      num_layers: residual blocks of each head.
      hidden_size: D of the backbone they were trained on.
      vocab_size: V, or 0 where the heads' own tensors do not say (shared or truncated).
      shared: logits through one projection, the backbone's lm_head or its
        `token_map` rows, instead of its own (the original's version "2").
      truncated: W, rows of the projection where it has fewer than V; else 0.
      selector: ranks r of the learned selector (`selector.py`), 0 where they have none.
      architecture: `MEDUSA`, or `HYDRA` (`hydra_heads.py`).
    """

    num_heads: int
    num_layers: int
    hidden_size: int
    vocab_size: int
    shared: bool = False
    truncated: int = 0
    selector: int = 0
    architecture: str = MEDUSA

    def check_tree(self, tree: Tree | DynamicTree, vocab_size: int) -> None:
        """Raises InputError where such heads cannot fill a tree, or need not."""
        tree.check(self.num_heads, self.truncated or vocab_size)
        if not tree.depth:
            raise InputError("a tree of the root alone asks no head: use NoDraft()")


NO_HEADS = HeadsConfig(num_heads=0, num_layers=0, hidden_size=0, vocab_size=0)


class Head(nn.Module):
    """One head: residual SiLU blocks, then a vocabulary projection."""

    config: HeadsConfig

    @nn.compact
    def __call__(self, x: Array, unembed: Callable[[Array], Array]) -> Array:
        """Logits, float32 [*dims, W], from hidden states [*dims, D]."""
        config, features = self.config, _features(_blocks(self.config), x)
        if config.shared:
            return unembed(features)
        rows = config.truncated or config.vocab_size
        return parameter(self, "vocab", (rows, config.hidden_size)).dot(features)


class MedusaHeads(nn.Module):
    """All heads, whose blocks run as one product for M heads.

    Parameters: the stacked blocks, "block_0/weight" [M, D, D] and "block_0/bias" [M, D]; heads'
    own projections, "head_0/vocab". Truncated heads have a "token_map" [W]. A projection that is
    stored with the heads and shared by them is "vocab".
    """

    config: HeadsConfig

    @nn.compact
    def __call__(self, hidden: Array, unembed: Callable[[Array], Array]) -> list[Array]:
        """Logits of each head, float32 [*dims, W].

        Args:
          hidden: the backbone's hidden states after its final norm [*dims, D].
          unembed: the backbone's own projection, for shared heads without one.
        """
        config, (*dims, width) = self.config, hidden.shape
        x = jnp.broadcast_to(hidden[..., None, :], (*dims, config.num_heads, width))
        features = _features(_blocks(config, stack=(config.num_heads,)), x)
        if not config.shared:
            projection = dataclasses.replace(config, num_layers=0)  # a head without its blocks
            return [
                Head(projection, name=f"head_{i}")(features[..., i, :], unembed)
                for i in range(config.num_heads)
            ]
        stored = self.get_variable("params", "vocab")
        if stored is not None:
            unembed = weight_of(stored).dot
        # One product reads the shared projection once, not once a head.
        return list(jnp.moveaxis(unembed(features), -2, 0))


def _blocks(config: HeadsConfig, stack: tuple[int, ...] = ()) -> list[Linear]:
    """The residual blocks of one head, or, with stack (M,), of M heads."""
    # Zero weights and biases make a new head start as its vocabulary projection alone.
    return [
        Linear(config.hidden_size, True, stack, nn.initializers.zeros, name=f"block_{i}")
        for i in range(config.num_layers)
    ]


def _features(blocks: list[Linear], x: Array) -> Array:
    """The input of the vocabulary projection: [*dims, D] of one head, [*dims, M, D] of M heads."""
    for block in blocks:
        x = x + nn.silu(block(x))
    return x


def first_heads(params: dict[str, Any], count: int) -> dict[str, Any]:
    """Heads' parameters whose stacked blocks are those of the first `count` heads.

    Cutting a stack copies the rest of it: do it before a loop, not in it.
    """
    return {
        name: jax.tree.map(lambda stack: stack[:count], leaf) if name.startswith("block_") else leaf
        for name, leaf in params.items()
    }


@typed
def top_guesses(
    logits: list[Float[Array, "B W"]], top_k: int, token_map: Int[Array, " W"] | None = None
) -> tuple[Int[Array, "B M R"], Float[Array, "B M R"]]:
    """Best `top_k` token ids of each head, best first, and their logits.

    With token_map (7 2 9) and logits (.1 .3 .2), the best two are tokens 2 and 9.
    """
    # XLA knows top_k by its pattern; a later slice that folds into it would turn it
    # back into a sort of the whole vocabulary.
    best, rows = jax.lax.optimization_barrier(largest_of_each(logits, top_k))
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
