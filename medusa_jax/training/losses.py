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
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from medusa_jax.shapes import typed
from medusa_jax.training.mesh import sharing_rows

MISS = 2**30  # rank of a target that a head cannot say
TOP = (1, 3, 5, 10)  # a target among a head's best so many counts as a hit

_Sums = TypeVar("_Sums")
_Each = TypeVar("_Each")


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

    @classmethod
    def of(cls, loss: Array, rank: Array, counted: Array) -> "Sums":
        """The sums of targets' losses and ranks [*dims] over those that count."""
        hits = jnp.stack([jnp.sum(counted & (rank < k)) for k in TOP])
        return cls(
            jnp.sum(jnp.where(counted, loss, 0.0)),
            hits.astype(jnp.float32),
            jnp.sum(counted).astype(jnp.float32),
        )


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
    """Cross-entropy and hits, summed over the counted targets: see `each_target`."""
    return Sums.of(*each_target(logits, targets), counted)


@typed
def each_target(
    logits: Float[Array, "*dims V"], targets: Int[Array, "*dims"]
) -> tuple[Float[Array, "*dims"], Int[Array, "*dims"]]:
    """Cross-entropy of each target, and its rank: the number of logits above its own.

    Target -1 is a token that these logits have no place for: a `MISS` that costs nothing.
    With logits (1 3 2), target 2 has rank 1.
    """
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    # A masked sum, not a gather: it stays local where the vocabulary is split over devices.
    own = jnp.sum(jnp.where(ids == targets[..., None], logits, 0.0), axis=-1)
    loss = jax.nn.logsumexp(logits, axis=-1) - own
    rank = jnp.sum(logits > own[..., None], axis=-1)
    known = targets >= 0
    return jnp.where(known, loss, 0.0), jnp.where(known, rank, MISS)


@typed
def kl_divergence(
    teacher: Float[Array, "B T V"], student: Float[Array, "B T V"], counted: Bool[Array, "B T"]
) -> Float[Array, ""]:
    """KL(teacher || student) of two sets of logits, summed over the counted positions, in nats."""
    log_teacher, log_student = jax.nn.log_softmax(teacher), jax.nn.log_softmax(student)
    each = jnp.sum(jnp.exp(log_teacher) * (log_teacher - log_student), axis=-1)
    return jnp.sum(jnp.where(counted, each, 0.0))


def over_chunks(
    function: Callable[..., tuple[Array, _Sums, _Each]],
    chunk: int,
    params: Any,
    hidden: Array,
    counted: Array,
    arrays: Any,
    sharding: NamedSharding | None = None,
) -> tuple[Array, _Sums, _Each]:
    """A loss and what is reported beside it, over chunks of positions.

    Each row's counted positions come first. Chunks behind the last of them are not computed, so
    prompts and padding cost nothing.

    Args:
      function: (params, hidden, counted, arrays) of some positions [B, t, ...] -> (loss [],
        pytree of sums, pytree of arrays [B, t, ...]). Positions that are not counted must add
        nothing. The loss and the sums are added up, the arrays put together.
      chunk: positions t of a call, 0 for all at once.
      params: what `function` reads at all positions.
      hidden: [B, T, D]. The loss has gradients of `params` and of `hidden` alone.
      counted: [B, T]; arrays: pytree of [B, T, ...].
      sharding: of `hidden`, which its chunks keep; None leaves it to the compiler.

    Returns:
      loss, sums, and arrays [B, T, ...], which are zero where no chunk was computed.
    """
    length = hidden.shape[1]
    chunk = min(chunk or length, length)
    order = counted_first(counted)

    def pieces(array: Array) -> Array:
        width = ((0, 0), (0, -length % chunk), *((0, 0),) * (array.ndim - 2))
        return jnp.pad(_reordered(array, order), width)

    rest = jax.tree.map(pieces, (counted, arrays))
    loss, sums, each = _summed(function, (chunk, sharding), params, pieces(hidden), rest)
    back = jnp.argsort(order, axis=1)
    return loss, sums, jax.tree.map(lambda a: _reordered(a[:, :length], back), each)


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
    def piece(hidden: Array, counted: Array, arrays: Any) -> Any:
        loss, sums, each = function(params, hidden, counted, arrays)
        return (loss, sums), each

    (loss, sums), each = _loop(piece, chunks, hidden, arrays, _last(arrays))
    return loss, sums, each


def _summed_with_gradient(function: Any, chunks: Any, params: Any, hidden: Any, arrays: Any) -> Any:
    """The sums, and the gradient of their loss from the same logits."""
    leaves, structure = jax.tree.flatten(params)
    learnt = [leaf.value for leaf in leaves if leaf.perturbed]

    def loss(learnt: list[Array], hidden: Array, counted: Array, arrays: Any) -> Any:
        given = iter(learnt)
        values = [next(given) if leaf.perturbed else leaf.value for leaf in leaves]
        value, sums, each = function(structure.unflatten(values), hidden, counted, arrays)
        return value, (sums, each)

    def piece(*arrays: Any) -> Any:
        argnums = (0, 1) if hidden.perturbed else (0,)
        (value, (sums, each)), (grads, *rest) = jax.value_and_grad(loss, argnums, has_aux=True)(
            learnt, *arrays
        )
        return ((value, sums), grads), (each, rest[0] if rest else None)

    values = jax.tree.map(lambda array: array.value, arrays)
    ((value, sums), grads), (each, of_hidden) = _apart(piece, chunks, hidden.value, values)
    given = iter(grads)
    of_params = [
        next(given).astype(leaf.value.dtype) if leaf.perturbed else None for leaf in leaves
    ]
    return (value, sums, each), (structure.unflatten(of_params), of_hidden)


def _gradient(function: Any, chunks: Any, grads: Any, change: Any) -> Any:
    """The gradient that was found on the way, times that of what the loss is part of."""
    scaled = jax.tree.map(lambda grad: (change[0] * grad).astype(grad.dtype), grads)
    return (*scaled, None)


_summed.defvjp(_summed_with_gradient, _gradient, symbolic_zeros=True)


def _apart(
    piece: Callable[..., Any],
    chunks: tuple[int, NamedSharding | None],
    hidden: Array,
    arrays: tuple[Array, Any],
) -> Any:
    """`_loop`, in which each device adds up what its own rows give.

    So gradients of parameters cross the devices once, and not after each chunk.
    """
    chunk, sharding = chunks
    ways = 1 if sharding is None else sharing_rows(sharding.mesh)
    last = _last(arrays)
    if sharding is None or ways == 1:
        return _loop(piece, chunks, hidden, arrays, last)
    own = chunk, NamedSharding(sharding.mesh, P(None, *sharding.spec[1:]))

    def rows(hidden: Array, arrays: tuple[Array, Any]) -> Any:
        return _loop(piece, own, hidden, arrays, last)

    def split(array: Array) -> Array:
        return array.reshape(ways, -1, *array.shape[1:])

    parts = jax.tree.map(split, (hidden, arrays))
    added, placed = jax.vmap(rows, spmd_axis_name=sharding.spec[0])(*parts)
    # The loss is there when the gradients are: what waits for it waits for them.
    added = jax.lax.optimization_barrier(jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), added))
    return added, jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), placed)


def _last(arrays: tuple[Array, Any]) -> Array:
    """The most positions that count in a row."""
    return jnp.max(jnp.sum(arrays[0], axis=1))


def _loop(
    piece: Callable[..., Any],
    chunks: tuple[int, NamedSharding | None],
    hidden: Array,
    arrays: tuple[Array, Any],
    last: Array,
) -> Any:
    """Calls `piece` for chunks up to the last counted position of any row.

    Args:
      piece: hidden, counted and the rest of some positions -> (pytree to add up, pytree of
        arrays [B, t, ...] to put together). Narrow numbers are added up in float32.
      chunks: positions of a call, and the sharding of `hidden`.
      arrays: counted, and the rest.
      last: of `_last`.
    """
    chunk, sharding = chunks

    def part(number: Any) -> Any:
        mine, *others = jax.tree.map(
            lambda a: jax.lax.dynamic_slice_in_dim(a, number * chunk, chunk, axis=1),
            (hidden, *arrays),
        )
        if sharding is not None:  # else the compiler may split D, and add up logits over devices
            mine = jax.lax.with_sharding_constraint(mine, sharding)
        return mine, *others

    def put(whole: Array, here: Array, number: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(whole, here, number * chunk, axis=1)

    def body(number: Array, done: Any) -> Any:
        (added, placed), (more, here) = done, piece(*part(number))
        placed = jax.tree.map(functools.partial(put, number=number), placed, here)
        return jax.tree.map(jnp.add, added, more), placed

    added, here = jax.eval_shape(lambda: piece(*part(0)))
    zeros = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32)), added
    )
    shape = hidden.shape[:2]
    placed = jax.tree.map(lambda leaf: jnp.zeros((*shape, *leaf.shape[2:]), leaf.dtype), here)
    total, placed = jax.lax.fori_loop(0, -(-last // chunk), body, (zeros, placed))
    return jax.tree.map(lambda one, leaf: one.astype(leaf.dtype), total, added), placed
