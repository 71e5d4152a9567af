"""The drafter of Hydra heads: a tree that grows depth by depth, one call of a head for each.

A head reads the tokens drafted before, so the tree is drafted as soon as its root is known. Its
nodes of one depth are rows of one product. A static tree says which ranks follow each node. A
grown tree keeps the likeliest paths of each depth (`dynamic_tree.py`): a beam.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from medusa_jax.drafting.drafter import OfTree, Params, Proposal, Verified
from medusa_jax.drafting.dynamic_tree import DynamicTree, likeliest, next_level
from medusa_jax.drafting.hydra_heads import head_input, hydra_logits
from medusa_jax.drafting.medusa_heads import HeadsConfig
from medusa_jax.drafting.tree import Tree
from medusa_jax.drafting.tree_tables import TreeTables
from medusa_jax.model.backbone import Backbone
from medusa_jax.model.config import ModelConfig
from medusa_jax.model.largest import largest
from medusa_jax.model.weight import weight_of
from medusa_jax.param_paths import device_bytes, flat
from medusa_jax.shapes import typed


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HydraDraft:
    """The guesses after the root.

    Attributes:
      guesses: of each slot behind the root [B, N - 1].
      tables: of a tree that was grown; None where the tree is static.
    """

    guesses: Array
    tables: TreeTables | None


@dataclasses.dataclass(frozen=True)
class HydraDrafter(OfTree):
    """Hydra heads and the tree of their guesses.

    Attributes:
      heads: shape of the heads.
      tree: static, or grown anew at each step; deeper than the root.
      drafted: the larger tree of a draft whose first slots are `tree`; None where it is `tree`.
    """

    heads: HeadsConfig
    tree: Tree | DynamicTree
    drafted: Tree | DynamicTree | None = None

    def smaller(self, tree: DynamicTree) -> "HydraDrafter":
        """The drafter of a grown tree of fewer tokens, which reads the same drafts.

        Likely paths come first in the larger tree.
        """
        return dataclasses.replace(self, tree=tree, drafted=self.drafted or self.tree)

    def check(self, model: ModelConfig) -> None:
        self.heads.check_tree(self.tree, model.vocab_size)

    def begin(self, params: Params, backbone: Backbone, rows: int, cache_slots: int) -> HydraDraft:
        tree, tables = self.drafted or self.tree, None
        if tree.scored:
            scores = jnp.zeros((rows, tree.depth, tree.top_k, tree.top_k))
            tables = tree.arrange(scores)[1]
        return HydraDraft(jnp.zeros((rows, tree.size - 1), jnp.int32), tables)

    def draft(
        self, params: Params, backbone: Backbone, draft: HydraDraft, seen: Verified
    ) -> HydraDraft:
        asked = _Asked(self.heads, params, backbone)
        z = asked.first(seen.hidden, seen.root)
        tree = self.drafted or self.tree
        if isinstance(tree, DynamicTree):
            return _grown(tree, asked, z)
        return HydraDraft(_static(tree, asked, z), None)

    def propose(self, params: Params, draft: HydraDraft, root: Int[Array, " B"]) -> Proposal:
        tables = draft.tables
        if tables is None:
            tables = self.tree.arrange(draft.guesses)[1]  # a static tree reads no scores
        tokens = jnp.concatenate((root[:, None], draft.guesses), axis=1)
        if self.drafted is None:
            return Proposal(tokens, tables)
        return Proposal(tokens[:, : self.size], tables.first(self.size))

    def read_bytes(self, params: Params) -> float:
        leaves = flat(params["heads"]).items()
        heads = tuple(f"head_{k}/" for k in range(self.depth))
        total = sum(device_bytes(leaf) for path, leaf in leaves if path.startswith(heads))
        if self.heads.shared:
            backbone = params["backbone"]
            unembedding = backbone["lm_head"] if "lm_head" in backbone else backbone["embed"]
            # Each depth waits for the depth before.
            total += self.depth * device_bytes(params["heads"].get("vocab", unembedding))
        return total


@dataclasses.dataclass(frozen=True)
class _Asked:
    """Heads with their parameters and what they read.

    Attributes:
      heads: their shape.
      params: of the model.
      backbone: bound, for its projection.
    """

    heads: HeadsConfig
    params: Params
    backbone: Backbone

    def embedded(self, tokens: Int[Array, "*dims"]) -> Float[Array, "*dims D"]:
        return weight_of(self.params["backbone"]["embed"]["embedding"]).lookup(tokens)

    def first(self, hidden: Float[Array, "B D"], root: Int[Array, " B"]) -> Float[Array, "B 1 z"]:
        """The input of the first head at the root."""
        return head_input(hidden, self.embedded(root)[:, None])[:, None]

    def best(self, k: int, z: Float[Array, "B n z"], top_k: int) -> tuple[Array, Array]:
        """The best tokens of head k (0-based) after each node, and their log-probabilities [B n R].

        Args:
          z: its input at each node.
        """
        logits = hydra_logits(self.heads, self.params["heads"], k, z, self.backbone.unembed)
        tokens, scores = best_of(logits, top_k)
        token_map = self.params["heads"].get("token_map")
        return tokens if token_map is None else token_map[tokens], scores

    def after(self, z: Array, parents: Array | np.ndarray, tokens: Int[Array, "B m"]) -> Array:
        """The next head's input at tokens [B, m, z + D], which hang from nodes `parents` of z."""
        path = jnp.take_along_axis(z, jnp.broadcast_to(parents, tokens.shape)[..., None], axis=1)
        return jnp.concatenate((path, self.embedded(tokens).astype(z.dtype)), axis=-1)


@typed
def best_of(
    logits: Float[Array, "B n W"], top_k: int
) -> tuple[Int[Array, "B n R"], Float[Array, "B n R"]]:
    """The best `top_k` rows of each node, best first, and their log-probabilities.

    Logits (0 log 3) -> rows (1 0), log-probabilities of (0.75 0.25).
    """
    # XLA knows top_k by its pattern, of matrices alone; what lies around it must not fold into it.
    every = jax.lax.optimization_barrier(logits.reshape(-1, logits.shape[-1]))
    shape = (*logits.shape[:2], top_k)
    best, rows = jax.lax.optimization_barrier(
        [found.reshape(shape) for found in largest(every, top_k)]
    )
    # A product: a CPU would split a sum among its threads, which costs more than the sum.
    total = jnp.exp(logits - best[..., :1]) @ jnp.ones(logits.shape[-1])
    return rows, best - best[..., :1] - jnp.log(total)[..., None]


def _grown(tree: DynamicTree, asked: _Asked, z: Float[Array, "B 1 z"]) -> HydraDraft:
    """A tree of the likeliest paths; of each depth, the nodes that may be in it are expanded."""
    batch, levels, every = z.shape[0], [], []
    best = jnp.zeros((batch, 1))  # log-probability of the root
    for k in range(tree.depth):
        tokens, scores = asked.best(k, z, tree.top_k)
        level, ranks = next_level(best, scores, tree.size - 1)
        cells = level.parents * tree.top_k + ranks
        tokens = jnp.take_along_axis(tokens.reshape(batch, -1), cells, axis=1)
        levels.append(level)
        every.append(tokens)
        best = level.scores
        if k + 1 < tree.depth:
            z = asked.after(z, level.parents, tokens)
    chosen, tables = likeliest(levels, tree.size)
    nodes = jnp.concatenate(every, axis=1)
    return HydraDraft(jnp.take_along_axis(nodes, chosen[:, 1:] - 1, axis=1), tables)


def _static(tree: Tree, asked: _Asked, z: Float[Array, "B 1 z"]) -> Int[Array, "B n"]:
    """The tokens of a static tree's slots behind the root, which are in the order of depth."""
    inner, above = np.unique(tree.parents[1:]), np.array([0])
    every = []
    for k in range(tree.depth):
        slots = np.flatnonzero(tree.depths == k + 1)
        parents = np.searchsorted(above, tree.parents[slots])  # among the nodes of z
        ranks = tree.ranks[slots]
        tokens = asked.best(k, z, int(ranks.max()) + 1)[0][:, parents, ranks]
        every.append(tokens)
        if k + 1 < tree.depth:
            expanded = np.isin(slots, inner)
            z = asked.after(z, parents[expanded], tokens[:, expanded])
            above = slots[expanded]
    return jnp.concatenate(every, axis=1)
