"""The drafter of the paper: Medusa heads guess, a tree of their guesses is verified."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from medusa_jax.drafting import bigrams, selector
from medusa_jax.drafting.drafter import OfTree, Params, Proposal, Verified
from medusa_jax.drafting.dynamic_tree import DynamicTree
from medusa_jax.drafting.medusa_heads import (
    HeadsConfig,
    MedusaHeads,
    first_heads,
    top_guesses,
)
from medusa_jax.drafting.tree import Tree
from medusa_jax.model.backbone import Backbone
from medusa_jax.model.config import ModelConfig
from medusa_jax.model.weight import weight_of
from medusa_jax.param_paths import device_bytes, flat


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MedusaDraft:
    """The guesses after the next root.

    Attributes:
      guesses: the best tokens of each head [B, M, R].
      scores: their log-probabilities [B, M, R], where the tree reads them; else [B, 0, 0].
      contexts: what the selector makes of the hidden state [B, M, r]; without one [B, 0, 0].
    """

    guesses: Array
    scores: Array
    contexts: Array


@dataclasses.dataclass(frozen=True)
class MedusaDrafter(OfTree):
    """Medusa heads and the tree of their guesses (paper, section 2.1).

    Attributes:
      heads: shape of the heads.
      tree: static, or grown anew at each step. The root alone is plain decoding: `NoDraft`.
    """

    heads: HeadsConfig
    tree: Tree | DynamicTree

    def smaller(self, tree: DynamicTree) -> "MedusaDrafter":
        """The drafter of a grown tree of fewer tokens, which reads the same drafts."""
        return dataclasses.replace(self, tree=tree)

    def check(self, model: ModelConfig) -> None:
        self.heads.check_tree(self.tree, model.vocab_size)

    def prepare(self, params: Params) -> Params:
        return params | {"heads": first_heads(params["heads"], self.depth)}

    def begin(self, params: Params, backbone: Backbone, rows: int, cache_slots: int) -> MedusaDraft:
        guesses, none = (rows, self.depth, self.tree.top_k), jnp.zeros((rows, 0, 0))
        scores, contexts = jnp.zeros(guesses) if self.tree.scored else none, none
        if self.tree.scored and selector.NAME in params["heads"]:
            bias = params["heads"][selector.NAME]["context"]["bias"]
            contexts = jnp.zeros((rows, self.depth, bias.size // self.heads.num_heads))
        return MedusaDraft(jnp.zeros(guesses, jnp.int32), scores, contexts)

    def draft(
        self, params: Params, backbone: Backbone, draft: MedusaDraft, seen: Verified
    ) -> MedusaDraft:
        hidden = seen.hidden
        asked = MedusaHeads(dataclasses.replace(self.heads, num_heads=self.depth))
        logits: Any = asked.apply({"params": params["heads"]}, hidden, backbone.unembed)
        token_map = params["heads"].get("token_map")
        guesses, values = top_guesses(logits, self.tree.top_k, token_map)
        none = jnp.zeros((hidden.shape[0], 0, 0))
        if not self.tree.scored:
            return MedusaDraft(guesses, none, none)
        every = jnp.stack(logits, axis=1)
        likely = jnp.exp(every - values[..., :1])
        # A product: a CPU would split a sum among its threads, which costs more than the sum.
        total = likely @ jnp.ones(every.shape[-1])
        scores = values - values[..., :1] - jnp.log(total)[..., None]
        if selector.NAME not in params["heads"]:
            return MedusaDraft(guesses, scores, none)
        learned = params["heads"][selector.NAME]
        contexts = selector.contexts(learned, hidden, self.heads.num_heads)
        return MedusaDraft(guesses, scores, contexts[:, : self.depth])

    def propose(self, params: Params, draft: MedusaDraft, root: Int[Array, " B"]) -> Proposal:
        scores = path_scores(params, draft, root) if self.tree.scored else draft.scores
        cells, tables = self.tree.arrange(scores)
        batch = root.shape[0]
        candidates = jnp.concatenate((root[:, None], draft.guesses.reshape(batch, -1)), axis=1)
        cells = jnp.broadcast_to(cells, (batch, self.size))
        return Proposal(jnp.take_along_axis(candidates, cells, axis=1), tables)

    def read_bytes(self, params: Params) -> float:
        share, total = self.depth / self.heads.num_heads, 0.0
        whole = (*(f"head_{i}/" for i in range(self.depth)), f"{selector.NAME}/")
        for path, leaf in flat(params["heads"]).items():
            if path.startswith("block_"):  # of all heads
                total += device_bytes(leaf) * share
            elif path.startswith(whole):
                total += device_bytes(leaf)
        if self.heads.shared:
            # Heads wait for the accepted token, so the shared projection is read once more.
            backbone = params["backbone"]
            unembedding = backbone["lm_head"] if "lm_head" in backbone else backbone["embed"]
            total += device_bytes(params["heads"].get("vocab", unembedding))
        return total


def path_scores(
    params: Params, draft: MedusaDraft, root: Int[Array, " B"]
) -> Float[Array, "B M R R"]:
    """Log-probability of each guess after each guess of the head before, or after the root."""
    if selector.NAME in params["heads"]:
        return _selected(params, draft, root)
    scores, guesses = draft.scores[:, :, None, :], draft.guesses
    if bigrams.NAME not in params:
        return jnp.broadcast_to(scores, (*guesses.shape, guesses.shape[-1]))
    roots = jnp.broadcast_to(root[:, None, None], guesses[:, :1].shape)
    before = jnp.concatenate((roots, guesses[:, :-1]), axis=1)
    return jnp.minimum(scores + bigrams.links(params[bigrams.NAME], before, guesses), 0)


def _selected(params: Params, draft: MedusaDraft, root: Int[Array, " B"]) -> Array:
    """`path_scores` where the heads have a selector, which then takes the place of bigrams."""
    learned = params["heads"][selector.NAME]
    table = weight_of(params["backbone"]["embed"]["embedding"])
    guesses = table.lookup(draft.guesses)
    first = selector.mapped(learned, "before", table.lookup(root))[:, None, None]
    first = jnp.broadcast_to(first, (*guesses[:, :1].shape[:-1], first.shape[-1]))
    rest = selector.mapped(learned, "before", guesses[:, :-1])
    before = jnp.concatenate((first, rest), axis=1)
    after = selector.mapped(learned, "after", guesses)
    return selector.links(draft.scores, selector.pairs(before, draft.contexts, after))
