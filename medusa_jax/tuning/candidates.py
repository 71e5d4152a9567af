"""The trees that tuning chooses from, by name.

"8" is the best static tree of 8 tokens, "8:2" the best that is at most 2 deep; "grow:8" and
"grow:8:2" are those that are grown at each step.
"""

import dataclasses
from collections.abc import Iterable

from medusa_jax.drafting.dynamic_tree import DynamicTree
from medusa_jax.drafting.tree import Tree
from medusa_jax.progress import progress
from medusa_jax.serving.generator import Generator
from medusa_jax.serving.options import dynamic_tree
from medusa_jax.tuning import tree_search
from medusa_jax.tuning.calibration import Calibration
from medusa_jax.tuning.timing import PLAIN, Trees

DYNAMIC_SIZES = (4, 5, 6, 7, 8, 12, 16, 32, 64)
STRIDE = 3  # of the sizes that are timed first


def grown_trees(generator: Generator) -> dict[str, DynamicTree]:
    """Trees that are grown at each step, of all sizes and depths."""
    trees: dict[str, DynamicTree] = {}
    for size in DYNAMIC_SIZES:
        whole = dynamic_tree(generator.model, size)
        trees[f"grow:{size}"] = whole
        trees |= _shallower(f"grow:{size}", whole)
    return trees


def static_trees(sizes: Iterable[int], calibration: Calibration, top_k: int) -> Trees:
    """The root alone, and the best static tree of each size."""
    trees: Trees = {PLAIN: Tree()}
    for size in progress(sorted({*sizes} - {1}), label="trees", unit="trees"):
        tree = tree_search.best_tree(calibration.ranks, size, top_k)
        trees[str(tree.size)] = tree
    return trees


def first_trees(trees: Trees) -> Trees:
    """The root alone and some sizes of each sort: 2, 3, 4, 5, 6 -> 2 and 5."""
    sorts = (isinstance(tree, DynamicTree) for tree in trees.values())
    names = list(zip(trees, sorts, strict=True))
    chosen = [PLAIN]
    for wanted in (False, True):
        own = [name for name, grown in names if grown is wanted and name != PLAIN]
        chosen += own[::STRIDE]
    return {name: trees[name] for name in chosen}


def less_deep(trees: Trees, calibration: Calibration, top_k: int) -> Trees:
    """The best trees of the same sizes at each smaller depth."""
    found: Trees = {}
    for name, tree in trees.items():
        if isinstance(tree, DynamicTree):
            found |= _shallower(name, tree)
            continue
        for depth in range(2, tree.depth):
            best = tree_search.best_tree(calibration.ranks, tree.size, top_k, depth)
            found[f"{name}:{depth}"] = best
    return found


def _shallower(name: str, tree: DynamicTree) -> dict[str, DynamicTree]:
    depths = range(2, tree.depth)
    return {f"{name}:{depth}": dataclasses.replace(tree, depth=depth) for depth in depths}
