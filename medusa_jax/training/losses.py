"""Losses over a vocabulary, without ever holding the logits of all positions.

Logits of one chunk of positions exist at a time, and give the loss and its gradient. So memory
grows with chunk x V, not with heads x positions x V, and nothing is computed twice.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
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


def over_chunks(
    function: Callable[..., tuple[Array, _Sums]],
    chunk: int,
    params: Any,
    hidden: Array,
    counted: Array,
    *arrays: Array,
    sharding: NamedSharding | None = None,
) -> tuple[Array, _Sums]:
    """A loss and what is reported beside it, added up over chunks of positions.

    Each row's counted positions come first. Chunks behind the last of them are not computed, so
    prompts and padding cost nothing.

    Args:
      function: (params, hidden, counted, *arrays) of some positions [B, t, ...] -> (loss [],
        pytree of sums). Positions that are not counted must add nothing.
      chunk: positions t of a call, 0 for all at once.
      params: what `function` reads at all positions.
      hidden: [B, T, D]. The loss has gradients of `params` and of `hidden` alone.
      counted, arrays: [B, T, ...].
      sharding: of `hidden`, which its chunks keep; None leaves it to the compiler.
    """
    length = hidden.shape[1]
    chunk = min(chunk or length, length)
    order = counted_first(counted)

    def pieces(array: Array) -> Array:
        width = ((0, 0), (0, -length % chunk), *((0, 0),) * (array.ndim - 2))
        return jnp.pad(_reordered(array, order), width)

    arrays = tuple(map(pieces, (counted, *arrays)))
    return _summed(function, (chunk, sharding), params, pieces(hidden), arrays)


@typed
def counted_first(counted: Bool[Array, "B T"]) -> Int[Array, "B T"]:
    """Each row's positions: those that count, then the others.

    counted (0 1 0 1) -> (1 3 0 2).
    """
    return jnp.argsort(~counted, axis=1, stable=True)


@jax.custom_vjp
def _reordered(array: Array, order: Array) -> Array:
    """Positions [B, T, ...] in the order [B, T]; the gradient is a gather too, no scatter."""
    index = order.reshape(*order.shape, *(1,) * (array.ndim - 2))
    return jnp.take_along_axis(array, index, axis=1)


_reordered.defvjp(
    lambda array, order: (_reordered(array, order), order),
    lambda order, change: (_reordered(change, jnp.argsort(order, axis=1)), None),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _summed(function: Any, chunks: Any, params: Any, hidden: Array, arrays: Any) -> Any:
    def piece(hidden: Array, *arrays: Array) -> Any:
        return function(params, hidden, *arrays), None

    return _loop(piece, *chunks, hidden, *arrays)[0]


def _summed_with_gradient(function: Any, chunks: Any, params: Any, hidden: Any, arrays: Any) -> Any:
    """The sums, and the gradient of their loss from the same logits."""
    leaves, structure = jax.tree.flatten(params)
    learnt = [leaf.value for leaf in leaves if leaf.perturbed]

    def loss(learnt: list[Array], hidden: Array, *arrays: Array) -> Any:
        given = iter(learnt)
        values = [next(given) if leaf.perturbed else leaf.value for leaf in leaves]
        return function(structure.unflatten(values), hidden, *arrays)

    def piece(*arrays: Array) -> Any:
        argnums = (0, 1) if hidden.perturbed else (0,)
        (value, sums), (grads, *rest) = jax.value_and_grad(loss, argnums, has_aux=True)(
            learnt, *arrays
        )
        return ((value, sums), grads), (rest[0] if rest else None)

    values = [array.value for array in arrays]
    (out, grads), of_hidden = _loop(piece, *chunks, hidden.value, *values)
    given = iter(grads)
    of_params = [
        next(given).astype(leaf.value.dtype) if leaf.perturbed else None for leaf in leaves
    ]
    return out, (structure.unflatten(of_params), of_hidden)


def _gradient(function: Any, chunks: Any, grads: Any, change: Any) -> Any:
    """The gradient that was found on the way, times that of what the loss is part of."""
    scaled = jax.tree.map(lambda grad: (change[0] * grad).astype(grad.dtype), grads)
    return (*scaled, None)


_summed.defvjp(_summed_with_gradient, _gradient, symbolic_zeros=True)


def _loop(
    piece: Callable[..., Any],
    chunk: int,
    sharding: NamedSharding | None,
    hidden: Array,
    counted: Array,
    *rest: Array,
) -> Any:
    """Calls `piece` for chunks up to the last counted position of any row.

    Args:
      piece: arrays of some positions -> (pytree to add up, array [B, t, ...] to put together).
    """

    def part(number: Any) -> list[Array]:
        slice_at = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=chunk, axis=1)
        mine, *others = (slice_at(a, number * chunk) for a in (hidden, counted, *rest))
        if sharding is not None:  # else the compiler may split D, and add up logits over devices
            mine = jax.lax.with_sharding_constraint(mine, sharding)
        return [mine, *others]

    def body(number: Array, done: Any) -> Any:
        (added, placed), (more, here) = done, piece(*part(number))
        if here is not None:
            placed = jax.lax.dynamic_update_slice_in_dim(placed, here, number * chunk, axis=1)
        return jax.tree.map(jnp.add, added, more), placed

    added, here = jax.eval_shape(lambda: piece(*part(0)))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), added)
    last = jnp.max(jnp.sum(counted, axis=1))
    placed = None if here is None else jnp.zeros(hidden.shape, here.dtype)
    return jax.lax.fori_loop(0, -(-last // chunk), body, (zeros, placed))
