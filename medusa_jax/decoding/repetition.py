"""Repetition penalty, as transformers' `RepetitionPenaltyLogitsProcessor` applies it.

The logit of a token that the prompt or the text holds is divided by the row's penalty if it
is positive, else multiplied by it (Keskar et al., 2019, section 4.1). In a tree, a node's text
ends with its own path. Where no row has a penalty, a state holds None, and nothing is computed.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from medusa_jax.drafting.tree_tables import PAD, TreeTables
from medusa_jax.errors import InputError
from medusa_jax.shapes import typed


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Repetition:
    """The penalties of a batch.

    Attributes:
      penalty: of each row; 1 changes nothing [B].
      seen: tokens of the prompt and the text up to the root, the root excluded [B, V].
    """

    penalty: Array
    seen: Array

    @classmethod
    def of_prompts(
        cls,
        penalty: Float[Array, " B"],
        tokens: Int[Array, "B T"],
        lengths: Int[Array, " B"],
        vocab_size: int,
    ) -> "Repetition":
        """The penalties after the prompts, of which the first `lengths` tokens count."""
        seen = jnp.zeros((tokens.shape[0], vocab_size), bool)
        return cls(penalty, marked(seen, tokens, lengths))

    def at_end(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        """Logits after the tokens seen so far."""
        return jnp.where(self.seen, penalized(logits, self.penalty), logits)

    def in_tree(
        self, tree: TreeTables, tokens: Int[Array, "B N"], logits: Float[Array, "B N V"]
    ) -> Float[Array, "B N V"]:
        """Logits after each node of a tree, whose path counts as seen."""
        rows, nodes = jnp.arange(tokens.shape[0])[:, None, None], jnp.arange(tokens.shape[1])
        path = jnp.broadcast_to(jnp.asarray(tree.ancestors), (*tokens.shape, tree.depth + 1))
        cells = rows, nodes[None, :, None], tokens[rows, path]
        # From the logits as they were: so a token that was seen before is penalized once.
        on_path = penalized(logits[cells], self.penalty)
        beyond = jnp.where(path == PAD, logits.shape[-1], cells[2])
        seen = jnp.where(self.seen[:, None], penalized(logits, self.penalty), logits)
        return seen.at[*cells[:2], beyond].set(on_path, mode="drop")

    def after(self, tokens: Int[Array, "B E"], count: Int[Array, " B"]) -> "Repetition":
        """The penalties once the first `count` of these tokens are text."""
        return dataclasses.replace(self, seen=marked(self.seen, tokens, count))


def penalties(penalty: float | Sequence[float], rows: int) -> np.ndarray | None:
    """The penalty of each row [B]; None where all are 1: (1.0, 2) -> None.

    Raises:
      InputError: a penalty is not a positive number.
    """
    each = [penalty] * rows if isinstance(penalty, int | float) else list(penalty)
    for one in each:
        if not 0 < np.float32(one) < math.inf:
            raise InputError(f"repetition_penalty must be > 0 and finite, got {one}; 1 is none")
    return np.array(each, np.float32) if any(one != 1 for one in each) else None


@typed
def marked(
    seen: Bool[Array, "B V"], tokens: Int[Array, "B T"], count: Int[Array, " B"]
) -> Bool[Array, "B V"]:
    """Also True for the first `count` tokens of each row.

    Of 4 tokens none seen, tokens (2, 0, 1), count 2 -> (True, False, True, False).
    """
    kept = jnp.arange(tokens.shape[1]) < count[:, None]
    place = jnp.where(kept, tokens, seen.shape[1])  # beyond the vocabulary: dropped
    return seen.at[jnp.arange(seen.shape[0])[:, None], place].set(True, mode="drop")


@typed
def penalized(
    logits: Float[Array, "B *dims"], penalty: Float[Array, " B"]
) -> Float[Array, "B *dims"]:
    """Logits further from being chosen: penalty 2 -> (3, -1) becomes (1.5, -2)."""
    penalty = penalty.reshape(-1, *[1] * (logits.ndim - 1))
    return jnp.where(logits < 0, logits * penalty, logits / penalty)
