"""Nested parameter dicts addressed by path: "heads/head_0/block_0/weight".

A leaf is whatever is no mapping: `flat` keeps a `model.weight.Weight` whole, and so does
`map_with_path` where `is_leaf` says so. A path ends in the parameter's name, never inside it.
"""

import math
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


def map_with_path(
    function: Callable[..., Any],
    tree: Any,
    *others: Any,
    is_leaf: Callable[[Any], bool] | None = None,
) -> Any:
    """`jax.tree.map` over pytrees of one structure, whose function gets the path first."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: function(
            jax.tree_util.keystr(path, simple=True, separator="/"), *leaves
        ),
        tree,
        *others,
        is_leaf=is_leaf,
    )


def device_bytes(tree: Any) -> int:
    """Bytes of the parts of a pytree's arrays, or abstract arrays, that a single device holds."""

    def size(leaf: Any) -> int:
        shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape
        return math.prod(shape) * jax.dtypes.itemsize_bits(leaf.dtype) // 8

    return sum(map(size, jax.tree.leaves(tree)))
