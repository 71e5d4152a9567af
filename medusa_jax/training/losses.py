"""Losses over a vocabulary, without ever holding the logits of all positions.

Logits of one chunk of positions exist at a time; the backward pass computes
them again. So memory grows with chunk x V, not with heads x positions x V.
"""

import dataclasses
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from medusa_jax.shapes import typed

TOP = (1, 3, 5, 10)  # a target among a head's best so many counts as a hit

_Sums = TypeVar("_Sums")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sums:
    """Sums over counted targets; divide by `count` for means.

    Attributes:
      loss: cross-entropy in nats, float32 [].
      hits: targets among the best TOP logits, float32 [len(TOP)].
      count: targets, float32 [].
    """

    loss: Array
    hits: Array
    count: Array


@typed
def targets_at(
    tokens: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    learnt: Bool[Array, "B T"],
    offset: int,
) -> tuple[Int[Array, "B T"], Bool[Array, "B T"]]:
    """The token `offset` places on from each position, and whether it counts.

    It counts if it is learnt and of the same document. Head k (1-based) has
    offset k + 1, the lm_head 1. With tokens (5 6 7 8 9), segments (1 1 1 2 2),
    all learnt, and offset 2: targets (7 8 9 0 0), counted (1 0 0 0 0).
    """
    width = ((0, 0), (0, offset))

    def ahead(array: Array) -> Array:
        return jnp.pad(array, width)[:, offset:]

    counted = ahead(learnt) & (ahead(segments) == segments)
    return ahead(tokens), counted


@typed
def cross_entropy(
    logits: Float[Array, "B T V"], targets: Int[Array, "B T"], counted: Bool[Array, "B T"]
) -> Sums:
    """Cross-entropy and hits, summed over the counted targets.

    A target's rank is the number of logits above its own, so no sorting. Target -1
    is a token that these logits have no place for: a miss that costs nothing.
    """
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2)
    # A masked sum, not a gather: it stays local where the vocabulary is split over devices.
    own = jnp.sum(jnp.where(ids == targets[..., None], logits, 0.0), axis=-1)
    loss = jax.nn.logsumexp(logits, axis=-1) - own
    rank = jnp.sum(logits > own[..., None], axis=-1)
    known = counted & (targets >= 0)
    hits = jnp.stack([jnp.sum(known & (rank < k)) for k in TOP])
    return Sums(
        jnp.sum(jnp.where(known, loss, 0.0)),
        hits.astype(jnp.float32),
        jnp.sum(counted).astype(jnp.float32),
    )


@typed
def kl_divergence(
    teacher: Float[Array, "B T V"], student: Float[Array, "B T V"], counted: Bool[Array, "B T"]
) -> Float[Array, ""]:
    """KL(teacher || student) of two sets of logits, summed over the counted positions, in nats."""
    log_teacher, log_student = jax.nn.log_softmax(teacher), jax.nn.log_softmax(student)
    each = jnp.sum(jnp.exp(log_teacher) * (log_teacher - log_student), axis=-1)
    return jnp.sum(jnp.where(counted, each, 0.0))


def over_chunks(function: Callable[..., _Sums], chunk: int, *arrays: Array) -> _Sums:
    """The sum of `function` over chunks of positions, one at a time.

    Args:
      function: arrays [B, t, ...] -> a pytree of sums. It must give zero for
        positions filled up with zeros (nothing counted).
      chunk: positions t of one call, 0 for all at once.
      arrays: [B, T, ...].
    """
    length = arrays[0].shape[1]
    if chunk == 0:
        return function(*arrays)
    if chunk >= length:  # one chunk, which need not be kept for the backward pass either
        return jax.checkpoint(function)(*arrays)
    count = -(-length // chunk)

    def split(array: Array) -> Array:
        rest = [(0, 0)] * (array.ndim - 2)
        array = jnp.pad(array, [(0, 0), (0, count * chunk - length), *rest])
        return array.reshape(array.shape[0], count, chunk, *array.shape[2:]).swapaxes(0, 1)

    pieces = tuple(map(split, arrays))
    body = jax.checkpoint(function)
    first = jax.eval_shape(function, *(piece[0] for piece in pieces))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), first)

    def add(total: _Sums, piece: tuple[Array, ...]) -> tuple[_Sums, None]:
        return jax.tree.map(jnp.add, total, body(*piece)), None

    return jax.lax.scan(add, zeros, pieces)[0]
