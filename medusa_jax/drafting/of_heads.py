"""The drafter that heads and a tree get where nobody names another."""

from medusa_jax.drafting.drafter import Drafter, NoDraft
from medusa_jax.drafting.dynamic_tree import DynamicTree
from medusa_jax.drafting.hydra_drafter import HydraDrafter
from medusa_jax.drafting.medusa_drafter import MedusaDrafter
from medusa_jax.drafting.medusa_heads import HYDRA, HeadsConfig
from medusa_jax.drafting.medusa_ngram_drafter import MedusaNgramDrafter
from medusa_jax.drafting.tree import Tree


def drafter_of_heads(heads: HeadsConfig, tree: Tree | DynamicTree) -> Drafter:
    """Plain decoding for the root alone; Hydra heads get theirs, Medusa heads by their tree.

    A static tree has a place for each guess of each head, and none for n-grams. A grown tree takes
    what is likeliest.
    """
    if not tree.depth:
        return NoDraft()
    if heads.architecture == HYDRA:
        return HydraDrafter(heads, tree)
    grown = isinstance(tree, DynamicTree)
    return MedusaNgramDrafter(heads, tree) if grown else MedusaDrafter(heads, tree)
