"""Softmax over a part of the keys, and how two parts are joined."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from medusa_jax.shapes import typed

LOWEST = float(jnp.finfo(jnp.float32).min)  # finite: the difference of two is no NaN


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Softmax:
    """Attention to some keys before it is divided by its sum, float32.

    Attributes:
      mixed: sum of exp(score - top) value over the keys [B, K, G, T, C].
      top: the largest score, LOWEST where a query sees no key [B, K, G, T, 1].
      total: sum of exp(score - top), 0 where a query sees no key [B, K, G, T, 1].
    """

    mixed: Array
    top: Array
    total: Array

    @classmethod
    def of_nothing(cls, queries: Array) -> "Softmax":
        """Over no keys, which changes nothing that it is joined with."""
        number = jnp.zeros((*queries.shape[:-1], 1))
        return cls(jnp.zeros(queries.shape), number + LOWEST, number)

    def output(self) -> Array:
        """The mean of the values [B, K, G, T, C]."""
        return self.mixed / self.total


@typed
def masked(
    queries: Float[Array, "B K G T C"],
    keys: Float[Array, "B K C U"],
    values: Float[Array, "B K U C"],
    mask: Bool[Array, "#B #T U"],
) -> Softmax:
    """Over the keys that the mask shows each query; queries are scaled."""
    score = jnp.einsum("bkgtc,bkcu->bkgtu", queries, keys, preferred_element_type=jnp.float32)
    score = jnp.where(mask[:, None, None], score, -jnp.inf)
    top = jnp.maximum(score.max(axis=-1, keepdims=True), LOWEST)
    weight = jnp.exp(score - top)
    total = weight.sum(axis=-1, keepdims=True)
    weight = weight.astype(values.dtype)
    mixed = jnp.einsum("bkgtu,bkuc->bkgtc", weight, values, preferred_element_type=jnp.float32)
    return Softmax(mixed, top, total)


def joined(one: Softmax, other: Softmax) -> Softmax:
    """Over the keys of both.

    Keys that a query does not see change nothing, not even its last bits: their weights are 0,
    and the weights of what it sees are multiplied by exp(0).
    """
    top = jnp.maximum(one.top, other.top)
    a, b = jnp.exp(one.top - top), jnp.exp(other.top - top)
    return Softmax(a * one.mixed + b * other.mixed, top, a * one.total + b * other.total)
