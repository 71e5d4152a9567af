"""Nested parameter dicts addressed by path: "heads/head_0/block_0/weight"."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import traverse_util


def flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves by path. Whatever is not a dict is a leaf, other pytrees included."""
    return traverse_util.flatten_dict(tree, sep="/")


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flat`."""
    return traverse_util.unflatten_dict(leaves, sep="/")


def joined(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Two nested dicts with different leaves, merged."""
    return nested(flat(first) | flat(second))


def map_with_path(function: Callable[[str, Any], Any], tree: Any) -> Any:
    """`jax.tree.map` of any pytree, whose function also receives the path."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: function(jax.tree_util.keystr(path, simple=True, separator="/"), leaf),
        tree,
    )
