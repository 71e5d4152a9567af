"""How each head ranks the tokens that came, in texts that the model itself wrote.

Guess r of head k is right where the rank of the token that came is r. Trees that are grown at each
step are asked in the same pass what a step would accept. Letters: see `shapes.py`; P are the
positions of a text, from the last prompt token on, and G such trees.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from medusa_jax.drafting.drafter import Drafter, Verified
from medusa_jax.drafting.hydra_heads import text_logits
from medusa_jax.drafting.medusa_heads import HeadsConfig, rows_of
from medusa_jax.model.backbone import Backbone, causal_mask
from medusa_jax.model.config import ModelConfig

UNKNOWN = -1  # the text ends before the token that this head guesses

Ranks = np.ndarray  # [P, M] int32


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def replayed(
    config: ModelConfig,
    heads: HeadsConfig,
    drafters: tuple[Drafter, ...],
    params: Any,
    tokens: Int[Array, "B T"],
) -> tuple[Int[Array, "B T M"], Int[Array, "B T G"]]:
    """Rank that each head gives, at each position, to the token that came, and lengths of steps.

    Head k (1-based) at position t is asked for token t + k + 1; entries for which `tokens` ends
    before that mean nothing. A step at t has token t + 1 as its root. Its length is what it would
    accept with each drafter.
    """

    def backbone(*inputs: Array, method: str | None = None) -> Any:
        return Backbone(config).apply({"params": params["backbone"]}, *inputs, method=method)

    def row(ids: Array) -> tuple[Array, Array]:  # one at a time, for logits of a large vocabulary
        positions = jnp.arange(len(ids))[None]
        hidden, _ = backbone(ids[None], positions, causal_mask(len(ids)))
        unembed = functools.partial(backbone, method="unembed")
        logits = text_logits(heads, params, hidden[0], ids, unembed)
        lengths = [step_lengths(config, drafter, params, hidden[0], ids) for drafter in drafters]
        none = jnp.zeros((len(ids), 0), jnp.int32)
        ranks = right_ranks(logits, ids, params["heads"].get("token_map"), config.vocab_size)
        return ranks, jnp.stack(lengths, axis=-1) if lengths else none

    return jax.lax.map(row, tokens)


def right_ranks(
    logits: list[Array], ids: Int[Array, " T"], token_map: Array | None, vocab_size: int
) -> Int[Array, "T M"]:
    """Rank of the token that came among each head's logits [T, W]; V where it cannot be said."""
    ranks = []
    for k, one in enumerate(logits, start=1):
        right = jnp.roll(ids, -(k + 1))
        if token_map is not None:
            right = rows_of(right, token_map, vocab_size)
        value = jnp.take_along_axis(one, right[:, None], axis=1)
        # Among equal logits top_k takes the lower row first.
        before = (one == value) & (jnp.arange(one.shape[1]) < right[:, None])
        rank = jnp.sum((one > value) | before, axis=1)
        ranks.append(jnp.where(right < 0, vocab_size, rank))
    return jnp.stack(ranks, axis=-1)


def step_lengths(
    config: ModelConfig, drafter: Drafter, params: Any, hidden: Array, ids: Int[Array, " T"]
) -> Int[Array, " T"]:
    """Tokens that a step at each position would accept with a drafter.

    Each position is a row of a batch, which was told the ids before it.

    Args:
      hidden: the backbone's, of these ids [T, D].
    """
    params, (rows,) = drafter.prepare(params), ids.shape
    backbone = Backbone(config).bind({"params": params["backbone"]})
    roots, lengths = jnp.roll(ids, -1), 1 + jnp.arange(rows)
    keys = jax.random.split(jax.random.key(0), rows)
    said = jnp.broadcast_to(ids, (rows, rows))
    seen = Verified(hidden, roots, said, lengths, keys, most=rows)
    draft = drafter.draft(params, backbone, drafter.begin(params, backbone, rows, rows), seen)
    tokens, tree, _ = drafter.propose(params, draft, roots)
    depths = jnp.broadcast_to(jnp.asarray(tree.depths), tokens.shape)
    places = lengths[:, None] + depths
    right = (tokens == ids[jnp.minimum(places, rows - 1)]) & (places < rows)
    whole = (~jnp.asarray(tree.mask) | right[:, None, :]).all(axis=-1)
    return 1 + jnp.where(whole, depths, 0).max(axis=1)


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
