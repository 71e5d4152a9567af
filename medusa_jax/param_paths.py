"""Nested parameter dicts addressed by path: "heads/head_0/block_0/weight"."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves by path."""
    leaves = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            leaves |= flat(value, f"{prefix}{key}/")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flat`."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *keys, last = path.split("/")
        inner = tree
        for key in keys:
            inner = inner.setdefault(key, {})
        inner[last] = leaf
    return tree


def joined(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Two nested dicts with different leaves as one."""
    return nested(flat(one) | flat(other))


def map_with_path(function: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """`jax.tree.map` over pytrees of one structure, whose function gets the path first."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: function(
            jax.tree_util.keystr(path, simple=True, separator="/"), *leaves
        ),
        tree,
        *others,
    )


def device_bytes(leaf: jax.Array) -> int:
    """Bytes of the part of an array that a single device holds."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
