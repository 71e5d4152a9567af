"""Hydra heads: Medusa heads that also see the tokens drafted before (arXiv 2402.05109).

Head k (1-based) predicts token t+k+1 from the backbone's last hidden state h_t and from the
embeddings E of the k tokens between: the root t+1, and the guesses after it up to token t+k.

    z = [h_t, E(t+1), ..., E(t+k)]            (k+1) D numbers
    x = (R z + c) + SiLU(W z + b)             the first block: R [D, (k+1) D] takes the place of x
    x <- x + SiLU(W x + b)                    L - 1 more blocks, as of Medusa heads
    logits = U_k x + u_k                      U_k [V, D] of its own, or the backbone's lm_head

So a head is asked once for each node of a depth, and a tree takes as many calls as it is deep.
E is the backbone's table, which heads never change. Projections are own, shared or truncated as
those of Medusa heads. Only a projection of its own has a bias u_k.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from medusa_jax.drafting.medusa_heads import HYDRA, HeadsConfig, MedusaHeads
from medusa_jax.model.linear import Linear, parameter, projections
from medusa_jax.model.weight import weight_of
from medusa_jax.shapes import typed

RESIDUAL = "residual"  # R, beside the layers "linear_0", "linear_1", ...


class HydraHead(nn.Module):
    """A single head; the width of its input says which.

    Parameters: "residual" and "linear_0", both "weight" [D, (k+1) D] and "bias" [D]; of further
    blocks "linear_1" and so on; a projection of its own is "vocab" [W, D] and "vocab_bias" [W].

    Attributes:
      config: shape of the heads.
    """

    config: HeadsConfig

    @nn.compact
    def __call__(self, z: Array, unembed: Callable[[Array], Array]) -> Array:
        """Logits, float32 [*dims, W].

        Args:
          z: of `head_input` [*dims, (k+1) D].
          unembed: the projection of shared heads.
        """
        config, width = self.config, self.config.hidden_size
        residual, first = projections(self, z, {RESIDUAL: width, "linear_0": width}, use_bias=True)
        x = residual + nn.silu(first)
        for i in range(1, config.num_layers):
            x = x + nn.silu(Linear(width, True, name=f"linear_{i}")(x))
        if config.shared:
            return unembed(x)
        rows = config.truncated or config.vocab_size
        bias = self.param("vocab_bias", nn.initializers.zeros, (rows,))
        return parameter(self, "vocab", (rows, width)).dot(x) + bias


@typed
def head_input(
    hidden: Float[Array, "*dims D"], drafted: Float[Array, "*dims k D"]
) -> Float[Array, "*dims z"]:
    """The input z of head k: the hidden state, then the embeddings of the k tokens before.

    Example: D = 2, hidden (1 2), drafted ((3 4) (5 6)) -> (1 2 3 4 5 6).
    """
    flat = drafted.reshape(*drafted.shape[:-2], -1)
    return jnp.concatenate((hidden, flat.astype(hidden.dtype)), axis=-1)


def hydra_logits(
    config: HeadsConfig,
    params: dict[str, Any],
    k: int,
    z: Float[Array, "*dims z"],
    unembed: Callable[[Array], Array],
) -> Array:
    """Logits of head k (0-based) [*dims, W].

    Args:
      params: of all heads, as decoding holds them.
      unembed: the backbone's own projection, for shared heads without rows of it.
    """
    if "vocab" in params:
        unembed = weight_of(params["vocab"]).dot
    logits: Any = HydraHead(config).apply({"params": params[f"head_{k}"]}, z, unembed)
    return logits


def text_logits(
    config: HeadsConfig,
    params: dict[str, Any],
    hidden: Float[Array, "T D"],
    ids: Int[Array, " T"],
    unembed: Callable[[Array], Array],
) -> list[Array]:
    """Logits of each head at each position of a text [T, W], of either architecture.

    Hydra heads are asked after the tokens that came. Those beyond the end of the text mean nothing.

    Args:
      params: {"backbone", "heads"}.
    """
    if config.architecture != HYDRA:
        logits: Any = MedusaHeads(config).apply({"params": params["heads"]}, hidden, unembed)
        return logits
    table = weight_of(params["backbone"]["embed"]["embedding"])
    came = [table.lookup(jnp.roll(ids, -k)) for k in range(1, config.num_heads + 1)]
    return [
        hydra_logits(
            config, params["heads"], k, head_input(hidden, jnp.stack(came[: k + 1], 1)), unembed
        )
        for k in range(config.num_heads)
    ]
