"""A draft model: a smaller backbone of the same vocabulary guesses, token after token.

It reads the text into a cache of its own, then grows a tree from the root depth by depth. Children
are its likeliest tokens, or draws from its distribution, which lossless acceptance accepts more
often (Leviathan et al., 2023; Chen et al., 2023).
"""

import dataclasses
import functools
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from medusa_jax.drafting.drafter import OfTree, Params, Proposal, Verified
from medusa_jax.drafting.tree import Tree
from medusa_jax.errors import InputError
from medusa_jax.model.backbone import Backbone, causal_mask
from medusa_jax.model.config import ModelConfig
from medusa_jax.model.kv_cache import KVCache, commit, init_cache
from medusa_jax.model.largest import largest
from medusa_jax.model.weight import weight_of
from medusa_jax.param_paths import device_bytes
from medusa_jax.shapes import typed

NAME = "draft"  # its part of the parameters
READ_BLOCK = 129  # most tokens that it reads in a pass: a block of a prompt on a CPU, and the root
MORE_SLOTS = 256  # than a text needs: a pass writes whole blocks, with their padding
DRAWS = np.uint32(2**32 - 1)  # its random stream, apart from those of places in the text


class Target(Protocol):
    """What `decoding.acceptance.Lossless` draws from; the draft model draws from the same."""

    def target(self, logits: Float[Array, "*dims V"]) -> Float[Array, "*dims V"]: ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ModelDraft:
    """What a draft model knows.

    Attributes:
      cache: of the tokens that it has read; slots after its length may hold more.
      guesses: the tokens of the slots after the root [B, N - 1].
      drawn: see `drafting.drafter.Proposal`.
    """

    cache: KVCache
    guesses: Array
    drawn: Array | None


@dataclasses.dataclass(frozen=True)
class DraftModel(OfTree):
    """A smaller model and the tree of its guesses.

    Attributes:
      config: shape of the smaller backbone.
      tree: node (0, 2) is the third best child of the best child, or the third that was drawn.
      target: children are drawn from what it makes of the logits; None takes the likeliest.
    """

    config: ModelConfig
    tree: Tree
    target: Target | None = None

    def check(self, model: ModelConfig) -> None:
        own, other = self.config.vocab_size, model.vocab_size
        if own != other:
            raise InputError(
                f"the draft model has a vocabulary of {own} tokens, and the model that it drafts "
                f"for one of {other}: they must be the same"
            )
        super().check(model)

    def begin(self, params: Params, backbone: Backbone, rows: int, cache_slots: int) -> ModelDraft:
        dtype = weight_of(params[NAME]["embed"]["embedding"]).dtype
        slots = cache_slots + MORE_SLOTS
        stacked = backbone.kernels.stacks_cache(params[NAME], self.config.head_dim)
        cache = init_cache(self.config, rows, slots, dtype, stacked)
        guesses, drawn = jnp.zeros((rows, self.size - 1), jnp.int32), None
        if self.target is not None:
            inner = len(np.unique(self.tree.parents[1:]))
            drawn = jnp.zeros((rows, inner, self.config.vocab_size))
        return ModelDraft(cache, guesses, drawn)

    def draft(
        self, params: Params, backbone: Backbone, draft: ModelDraft, seen: Verified
    ) -> ModelDraft:
        model = Backbone(self.config, backbone.kernels).bind({"params": params[NAME]})
        cache, hidden = read(model, draft.cache, seen)
        # The root is in the cache, behind its length.
        past = dataclasses.replace(cache, length=seen.length + 1)
        hidden, guesses, drawn = hidden[:, None], jnp.zeros((len(seen.root), 0), jnp.int32), []
        for level in levels(self.tree):
            if level.depth:
                hidden = grown(model, level, guesses, past)
            scores = model.unembed(hidden)
            if self.target is not None:
                scores = jax.nn.log_softmax(self.target.target(scores))
                drawn.append(scores)
                scores += noise(seen, level.depth, scores.shape)
            children = best(scores, level, in_order=self.target is not None)
            guesses = jnp.concatenate((guesses, children), axis=1)
        return ModelDraft(cache, guesses, jnp.concatenate(drawn, axis=1) if drawn else None)

    def propose(self, params: Params, draft: ModelDraft, root: Int[Array, " B"]) -> Proposal:
        tokens = jnp.concatenate((root[:, None], draft.guesses), axis=1)
        return Proposal(tokens, self.tree.arrange(None)[1], draft.drawn)

    def read_bytes(self, params: Params) -> float:
        weights = dict(params[NAME])
        if not self.config.tied or "lm_head" in weights:
            weights.pop("embed")  # a pass reads a few rows of it, not the table
        return float(device_bytes(weights) * self.depth)


def read(model: Backbone, cache: KVCache, seen: Verified) -> tuple[KVCache, Array]:
    """The cache of the text with the root behind it, and the root's hidden state [B, D].

    Each pass reads a block of what a row has not read yet: a step's path fits into one.
    """
    size = min(seen.most + 1, READ_BLOCK)
    rows, cells = jnp.arange(len(seen.root)), jnp.arange(size)
    text, end = seen.sequence.at[rows, seen.length].set(seen.root), seen.length + 1

    def behind(carry: tuple[KVCache, Array]) -> Array:
        return (carry[0].length < end).any()

    def block(carry: tuple[KVCache, Array]) -> tuple[KVCache, Array]:
        cache, root_hidden = carry
        places = cache.length[:, None] + cells
        tokens = jnp.take_along_axis(text, jnp.minimum(places, text.shape[1] - 1), axis=1)
        hidden, new = model(tokens, places, causal_mask(size), cache)
        count = jnp.clip(end - cache.length, 0, size)
        last = hidden[rows, jnp.maximum(count - 1, 0)]
        root_hidden = jnp.where((count > 0)[:, None], last, root_hidden)
        # Zero, but XLA does not know: so all layers read the cache before it is written.
        zero = jnp.minimum(jnp.argmax(hidden[0, 0]), 0)
        path = jnp.broadcast_to(cells + zero, places.shape)
        return commit(cache, new, path, count), root_hidden

    dtype = jax.tree.leaves(cache.keys)[0].dtype
    nothing = jnp.zeros((len(rows), model.config.hidden_size), dtype)
    cache, hidden = jax.lax.while_loop(behind, block, (cache, nothing))
    return dataclasses.replace(cache, length=seen.length), hidden


@dataclasses.dataclass(frozen=True)
class Level:
    """The nodes of a tree that have children at one depth, and these children.

    Attributes:
      depth: of the parents.
      nodes: slots of all nodes down to this depth that have children, the root excluded.
      depths: of these.
      own: how many of the last of them are the parents.
      parent: number of each child's parent among the parents.
      rank: rank of each child.
      order: number of each child among its siblings.
      mask: which of `nodes` see each other.
    """

    depth: int
    nodes: np.ndarray
    depths: np.ndarray
    own: int
    parent: np.ndarray
    rank: np.ndarray
    order: np.ndarray
    mask: np.ndarray


@functools.cache
def levels(tree: Tree) -> tuple[Level, ...]:
    """The levels of a tree, from the root down.

    For the example of `Tree`: level 0 has no nodes, as the root is its parent, and children of the
    ranks 0 and 1. Level 1 has the node in slot 1, which is its own, and a child of rank 0.
    """
    inner, found = np.unique(tree.parents[1:]), []
    for depth in range(tree.depth):
        nodes = inner[(tree.depths[inner] <= depth) & (inner > 0)]
        parents = inner[tree.depths[inner] == depth]
        children = np.flatnonzero(tree.depths == depth + 1)
        parent = np.searchsorted(parents, tree.parents[children])
        order = np.array([np.sum(parent[:i] == one) for i, one in enumerate(parent)])
        mask = tree.mask[np.ix_(nodes, nodes)]
        places = parent, tree.ranks[children], order
        found.append(Level(depth, nodes, tree.depths[nodes], len(parents), *places, mask))
    return tuple(found)


def grown(
    model: Backbone, level: Level, guesses: Int[Array, "B n"], past: KVCache
) -> Float[Array, "B P D"]:
    """Hidden states of a level's parents.

    Nodes above them run again: only what is certain lies in the cache.

    Args:
      guesses: tokens of the slots after the root, down to this level.
      past: the cache with the root.
    """
    tokens = guesses[:, level.nodes - 1]
    positions = past.length[:, None] + level.depths - 1
    hidden, _ = model(tokens, positions, jnp.asarray(level.mask)[None], past)
    return hidden[:, -level.own :]


@typed
def best(scores: Float[Array, "B P V"], level: Level, in_order: bool) -> Int[Array, "B n"]:
    """The tokens of a level's children: of those with the best scores, that of each child's rank.

    A parent's scores (1, 3, 2): children of the ranks 0 and 2 are the tokens 1 and 0; in order,
    they are 1 and 2.

    Args:
      in_order: the first sibling gets the best token, whatever its rank: draws skip none.
    """
    which = level.order if in_order else level.rank
    # A slice that folds into top_k would turn it back into a sort of the whole vocabulary.
    ranked = jax.lax.optimization_barrier(largest(scores, int(which.max()) + 1)[1])
    return ranked[:, level.parent, which]


def noise(seen: Verified, depth: int, shape: tuple[int, ...]) -> Array:
    """Gumbel noise: the best of log-probabilities with it are draws without replacement."""

    def row(key: Array, length: Array) -> Array:
        for place in (DRAWS, length, depth):
            key = jax.random.fold_in(key, place)
        return jax.random.gumbel(key, shape[1:], mode="high")

    return jax.vmap(row)(seen.keys, seen.length)
