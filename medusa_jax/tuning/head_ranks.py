"""How each head ranks the tokens that came, in texts that the model itself wrote.

Guess r of head k is right where the rank of the token that came is r. Letters: see `shapes.py`;
P are the positions of a text, from the last prompt token on.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from medusa_jax.drafting.hydra_heads import text_logits
from medusa_jax.drafting.medusa_heads import HeadsConfig, rows_of
from medusa_jax.model.backbone import Backbone, causal_mask
from medusa_jax.model.config import ModelConfig

UNKNOWN = -1  # the text ends before the token that this head guesses

Ranks = np.ndarray  # [P, M] int32


@functools.partial(jax.jit, static_argnums=(0, 1))
def right_ranks(
    config: ModelConfig, heads: HeadsConfig, params: Any, tokens: Int[Array, "B T"]
) -> Int[Array, "B T M"]:
    """Rank that each head gives, at each position, to the token that came.

    Head k (1-based) at position t is asked for token t + k + 1; entries for
    which `tokens` ends before that mean nothing.
    """
    length = tokens.shape[1]

    def backbone(*inputs: Array, method: str | None = None) -> Any:
        return Backbone(config).apply({"params": params["backbone"]}, *inputs, method=method)

    def unembed(hidden: Array) -> Array:
        return backbone(hidden, method="unembed")

    def row(ids: Array) -> Array:  # one at a time, for the logits of a large vocabulary
        positions = jnp.arange(length)[None]
        hidden, _ = backbone(ids[None], positions, causal_mask(length))
        logits = text_logits(heads, params, hidden[0], ids, unembed)
        ranks = []
        for k, one in enumerate(logits, start=1):
            right = jnp.roll(ids, -(k + 1))
            if heads.truncated:
                right = rows_of(right, params["heads"]["token_map"], config.vocab_size)
            value = jnp.take_along_axis(one, right[:, None], axis=1)
            # Among equal logits top_k takes the lower row first.
            before = (one == value) & (jnp.arange(one.shape[1]) < right[:, None])
            rank = jnp.sum((one > value) | before, axis=1)
            ranks.append(jnp.where(right < 0, config.vocab_size, rank))
        return jnp.stack(ranks, axis=-1)

    return jax.lax.map(row, tokens)


def text_ranks(ranks: np.ndarray, prompt_tokens: int, length: int) -> Ranks:
    """One text's part of `right_ranks` [T, M]: from its last prompt token to its last but one.

    A text of 5 tokens, 2 of them the prompt's, has positions 1, 2 and 3; at 3
    the root is the last token and no head has anything to be right about.
    """
    found = ranks[prompt_tokens - 1 : length - 1].astype(np.int32)
    positions = np.arange(prompt_tokens - 1, length - 1)[:, None]
    asked = positions + 2 + np.arange(ranks.shape[1])
    return np.where(asked < length, found, UNKNOWN)


def accuracy(texts: Sequence[Ranks], top_k: int) -> np.ndarray:
    """Share of the positions at which guess r of head k is right [M, R]; each head has its own."""
    table = np.concatenate(texts)
    known = np.maximum((table != UNKNOWN).sum(axis=0), 1)
    return np.stack([(table == rank).sum(axis=0) / known for rank in range(top_k)], axis=1)
