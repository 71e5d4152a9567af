"""Views of a static tree that only tests need."""

import numpy as np

from medusa_jax.drafting.tree import Tree
from medusa_jax.drafting.tree_tables import TreeTables


def tables(tree: Tree) -> TreeTables:
    """The tables that a step reads."""
    return tree.arrange(None)[1]


def leaf_paths(tree: Tree) -> np.ndarray:
    """`ancestors` of the leaves, last slot first: the original's `retrieve_indices` [P, E]."""
    leaves = sorted(set(range(tree.size)) - set(tree.parents.tolist()), reverse=True)
    return tree.ancestors[leaves]
