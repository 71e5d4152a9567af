"""Medusa heads and n-grams in a single tree, grown anew at each step.

Heads guess from the hidden state, which forgets words. Prompt lookup guesses what followed the
same words before, and knows nothing else. A language model repeats itself and its prompt, small
models most: so what followed the longest match takes part in the tree as a chain of guesses. How
likely it is, its length says. Both together get the nodes of a single tree: a chain far longer
than there are heads where a text repeats itself, and the heads' guesses elsewhere.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from medusa_jax.drafting.drafter import OfTree, Params, Proposal, Verified
from medusa_jax.drafting.dynamic_tree import DynamicTree
from medusa_jax.drafting.medusa_drafter import MedusaDraft, MedusaDrafter, path_scores
from medusa_jax.drafting.medusa_heads import HeadsConfig
from medusa_jax.drafting.ngram_drafter import followed
from medusa_jax.model.backbone import Backbone
from medusa_jax.model.config import ModelConfig
from medusa_jax.shapes import typed

# Probability that the token after a match of 0, 1, 2, ... tokens is right, beside what the heads
# say: of the first guess, and of a later guess of a chain whose guesses before it were right. They
# were fitted to 450 answers of SmolLM2 and of the story model. A guess that was right makes the
# match longer. The last is that of 16 tokens and more.
FIRST = (0.0, 0.12, 0.27, 0.33, 0.44, 0.52, 0.6, 0.63, 0.65, 0.68, 0.72, 0.75, 0.77, 0.78, 0.8,
         0.82, 0.9)  # fmt: skip
LATER = (0.0, 0.45, 0.45, 0.48, 0.6, 0.66, 0.72, 0.75, 0.76, 0.78, 0.82, 0.83, 0.84, 0.84, 0.85,
         0.88, 0.95)  # fmt: skip
LONGEST = len(FIRST) - 1
REACH = 16  # guesses of a chain, where the tree has room for them
NEVER = -1e9  # log-probability of a path that is none; finite


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MedusaNgramDraft:
    """The guesses after the next root.

    Attributes:
      heads: those of the heads.
      followed: tokens after the longest match [B, D].
      matched: length of the match, 0 for none [B].
    """

    heads: MedusaDraft
    followed: Array
    matched: Array


@dataclasses.dataclass(frozen=True)
class MedusaNgramDrafter(OfTree):
    """Grown trees of the guesses of Medusa heads and of n-grams.

    Attributes:
      heads: shape of the heads.
      tree: grown anew at each step.
      reach: D, most guesses of a path; None: REACH, or what the tree has room for.
    """

    heads: HeadsConfig
    tree: DynamicTree
    reach: int | None = None

    @property
    def depth(self) -> int:
        """D, most guesses that a step can accept."""
        return self.reach or max(self.tree.depth, min(self.tree.size - 1, REACH))

    @property
    def of_heads(self) -> MedusaDrafter:
        """The drafter of the heads alone."""
        return MedusaDrafter(self.heads, self.tree)

    def smaller(self, tree: DynamicTree) -> "MedusaNgramDrafter":
        """The drafter of a tree of fewer tokens, which reads the same drafts."""
        return dataclasses.replace(self, tree=tree, reach=self.depth)

    def check(self, model: ModelConfig) -> None:
        self.of_heads.check(model)

    def prepare(self, params: Params) -> Params:
        return self.of_heads.prepare(params)

    def begin(
        self, params: Params, backbone: Backbone, rows: int, cache_slots: int
    ) -> MedusaNgramDraft:
        heads = self.of_heads.begin(params, backbone, rows, cache_slots)
        followed = jnp.zeros((rows, self.depth), jnp.int32)
        return MedusaNgramDraft(heads, followed, followed[:, 0])

    def draft(
        self, params: Params, backbone: Backbone, draft: MedusaNgramDraft, seen: Verified
    ) -> MedusaNgramDraft:
        heads = self.of_heads.draft(params, backbone, draft.heads, seen)
        return MedusaNgramDraft(heads, *followed(seen, LONGEST, self.depth))

    def propose(self, params: Params, draft: MedusaNgramDraft, root: Int[Array, " B"]) -> Proposal:
        guesses, ranks = among(draft.heads.guesses, draft.followed, draft.matched > 0)
        number = draft.heads.guesses.shape[1]
        own = jnp.pad(draft.heads.scores, ((0, 0), (0, 0), (0, 1)), constant_values=NEVER)
        heads = dataclasses.replace(draft.heads, guesses=guesses[:, :number], scores=own)
        scores = path_scores(params, heads, root)
        scores = with_chain(scores, ranks, chance(draft.matched, self.depth))
        cells, tables = self.tree.arrange(scores)
        candidates = jnp.concatenate((root[:, None], guesses.reshape(len(root), -1)), axis=1)
        return Proposal(jnp.take_along_axis(candidates, cells, axis=1), tables)

    def read_bytes(self, params: Params) -> float:
        return self.of_heads.read_bytes(params)


@typed
def among(
    guesses: Int[Array, "B M R"], chain: Int[Array, "B D"], exists: Bool[Array, " B"]
) -> tuple[Int[Array, "B D r"], Int[Array, "B D"]]:
    """The guesses of D levels with those of a chain among them, r = R + 1, and the chain's ranks.

    A token of the chain that no head has guessed has the last rank, which is its own. Levels below
    those of the heads have the chain alone.

    Example: a head guesses (4 5 6), the chain is (5 7): levels (4 5 6 0) and (0 0 0 7), ranks 1, 3.
    """
    _, number, ranks = guesses.shape
    depth = chain.shape[1]
    same = (guesses == chain[:, :number, None]) & exists[:, None, None]
    place = jnp.where(same.any(axis=2), same.argmax(axis=2), ranks)
    place = jnp.pad(place, ((0, 0), (0, depth - number)), constant_values=ranks)
    guesses = jnp.pad(guesses, ((0, 0), (0, depth - number), (0, 1)))
    put = (jnp.arange(ranks + 1) == place[:, :, None]) & exists[:, None, None]
    return jnp.where(put, chain[:, :, None], guesses), place


@typed
def chance(matched: Int[Array, " B"], depth: int) -> Float[Array, "B D"]:
    """Probability of each guess of a chain, given those before it; 0 without a match.

    Example: after a match of 2 tokens, depth 3: 0.27, then 0.48 and 0.60 of matches of 3 and 4.
    """
    length = jnp.minimum(matched[:, None] + jnp.arange(depth), LONGEST)
    first = jnp.arange(depth) == 0
    right = jnp.where(first, jnp.array(FIRST)[length], jnp.array(LATER)[length])
    return jnp.where(matched[:, None] > 0, right, 0)


@typed
def with_chain(
    scores: Float[Array, "B M r r"], ranks: Int[Array, "B D"], right: Float[Array, "B D"]
) -> Float[Array, "B D r r"]:
    """Log-probabilities of guesses after guesses, where a chain is among them.

    After the chain so far, its next token is right with the probability `right`, or because its
    head says so; the head's other guesses share the rest.

    Example: a head gives 0.5 and 0.2. The chain's token is the second, 0.5: it gets 1 - 0.5 * 0.8
    = 0.6, and the first 0.25.

    Args:
      scores: of the heads, which may be those of fewer levels.
      ranks: of the chain's tokens.
      right: probability of each, given those before it; zeros for no chain.
    """
    batch, number, width, _ = scores.shape
    below = jnp.full((batch, ranks.shape[1] - number, width, width), NEVER)
    scores = jnp.concatenate((scores, below), axis=1)
    before = jnp.pad(ranks[:, :-1], ((0, 0), (1, 0)))  # of the chain's token that a level follows
    own = jnp.take_along_axis(scores, before[:, :, None, None], axis=2)
    own = jnp.take_along_axis(own, ranks[:, :, None, None], axis=3)
    wrong = jnp.log1p(-right)[:, :, None, None]
    likely = jnp.log1p(-jnp.exp(wrong) * (1 - jnp.exp(jnp.minimum(own, 0))))
    after = jnp.where(_at(ranks, width)[:, :, None], likely, scores + wrong)
    exists = (right > 0)[:, :, None, None]
    from_chain = _at(before, width).at[:, 0].set(True)  # the first level is after the root
    return jnp.where(from_chain[..., None] & exists, after, scores)


def _at(ranks: Int[Array, "B D"], width: int) -> Bool[Array, "B D r"]:
    return jnp.arange(width) == ranks[:, :, None]
