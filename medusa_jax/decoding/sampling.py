"""The target distribution, and draws from it that depend on a row's key and a position alone."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from medusa_jax.decoding.cutoff import least_kept
from medusa_jax.model.largest import largest
from medusa_jax.shapes import typed

# Below the first temperature, logits count from the greatest, or rounding would be worth more than
# their differences. The second gives all chance to the greatest; colder logits would overflow.
COLD, COLDEST = 1e-3, 1e-30
PART = 256  # tokens: about the root of a vocabulary, which needs the fewest random numbers


class RowSampling(NamedTuple):
    """How a row is sampled.

    Attributes:
      temperature: 0 decodes greedily.
      top_k: tokens kept; 0 keeps all.
      top_p: probability mass kept; 1 keeps all.
      typical: paths by typical acceptance at this temperature, instead of exact samples.
      logprobs: whether log-probabilities of its text are wanted.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    typical: bool = False
    logprobs: bool = False


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How each row of a batch is sampled: the fields of `RowSampling`, each [B]."""

    temperature: Array
    top_k: Array
    top_p: Array
    typical: Array
    logprobs: Array

    @classmethod
    def of(cls, rows: Sequence[tuple]) -> "Sampling":
        """Of each row's `RowSampling`, or the first fields of it."""
        columns = zip(*(RowSampling(*row) for row in rows), strict=True)
        types = jnp.float32, jnp.int32, jnp.float32, bool, bool
        return cls(*(jnp.array(column, t) for column, t in zip(columns, types, strict=True)))

    @property
    def drawn(self) -> Array:
        """Rows whose tokens are random [B]."""
        return (self.temperature > 0) & ~self.typical


@typed
def warp(
    logits: Float[Array, "*dims V"], temperature: float, top_k: int = 0, top_p: float = 1.0
) -> Float[Array, "*dims V"]:
    """Temperature, then top-k, then top-p, in the order of Hugging Face `generate`.

    top-p keeps the likeliest tokens up to and including the one whose
    cumulative probability reaches `top_p`. Tokens equally likely as the last
    one kept are kept too.

    probabilities (.5, .3, .2), top_p .6 -> the first two stay.

    Args:
      temperature: > 0; the coldest give the likeliest token.
      top_k: tokens kept; 0 keeps all.
      top_p: probability mass kept; 1 keeps all.

    Returns:
      float32 logits with -inf for the tokens removed.
    """
    logits = scaled(logits, temperature)
    if 0 < top_k < logits.shape[-1]:
        logits = jnp.where(logits < largest(logits, top_k)[0][..., -1:], -jnp.inf, logits)
    return _top_p(logits, top_p) if top_p < 1.0 else logits


@typed
def warp_rows(logits: Float[Array, "B V"], how: Sampling) -> Float[Array, "B V"]:
    """`warp` of rows with settings of their own: the same numbers, bit for bit.

    A greedy row comes out as with temperature COLDEST. The vocabulary is cut only where a row
    asks for top-k or top-p.
    """
    logits = scaled_rows(logits, how.temperature)
    top_k, top_p = how.top_k[:, None], how.top_p[:, None]

    def cut(logits: Array) -> Array:
        smallest = least_kept(logits, jnp.ones_like(logits), top_k)
        logits = jnp.where((top_k > 0) & (logits < smallest), -jnp.inf, logits)
        return jnp.where(top_p < 1, _top_p(logits, top_p), logits)

    asked = how.drawn & ((how.top_k > 0) | (how.top_p < 1))
    return jax.lax.cond(asked.any(), cut, lambda logits: logits, logits)


def scaled_rows(logits: Float[Array, "B *dims V"], temperature: Array) -> Array:
    """`scaled` of rows with a temperature each [B], the same numbers."""
    logits = logits.astype(jnp.float32)
    temperature = temperature.reshape(-1, *[1] * (logits.ndim - 1))
    cold = temperature < COLD
    logits = logits - jnp.where(cold, logits.max(axis=-1, keepdims=True), 0)
    return logits * (1 / jnp.maximum(temperature, COLDEST))


def _top_p(logits: Array, top_p: Array | float) -> Array:
    """Logits with -inf for the tokens that top-p removes."""
    probabilities = jax.nn.softmax(logits)
    return jnp.where(logits < least_kept(logits, probabilities, top_p), -jnp.inf, logits)


def scaled(logits: Float[Array, "*dims V"], temperature: float) -> Float[Array, "*dims V"]:
    """Logits / temperature in float32; with temperature 1e-40, (2, 1) -> (0, -1e30)."""
    logits = logits.astype(jnp.float32)
    if temperature < COLD:
        logits -= logits.max(axis=-1, keepdims=True)
    # The division that XLA would make of it, rounded as `warp_rows` rounds it.
    return logits * (np.float32(1) / np.float32(max(temperature, COLDEST)))


@typed
def argmax(logits: Float[Array, "*dims V"]) -> Int[Array, "*dims"]:
    """Most likely token, the first among equals: (1, 3, 3) -> 1."""
    return best(logits)[1]


@typed
def best(
    logits: Float[Array, "*dims V"],
) -> tuple[Float[Array, "*dims"], Int[Array, "*dims"]]:
    """The largest logit, and the first token that has it: (1, 3, 3) -> (3, 1).

    A NaN is larger than all numbers. On a CPU these are plain reductions, which XLA vectorizes: its
    own argmax takes 5 (V = 4096) to 40 times (V = 49152) as long there. A TPU reduces both at once,
    while it multiplies: logits of a tree that nothing else reads are never written.
    """
    small = logits.shape[-1] < 16 * PART  # parts would gain nothing there
    on_cpu = best_in_two_passes if small else best_by_parts
    return jax.lax.platform_dependent(
        logits, cpu=on_cpu, tpu=best_at_once, default=best_in_two_passes
    )


def best_at_once(logits: Array) -> tuple[Array, Array]:
    """`best` as a single reduction of pairs."""

    def better(one: tuple[Array, Array], other: tuple[Array, Array]) -> tuple[Array, Array]:
        (value, place), (than, there) = one, other
        wins = (value > than) | jnp.isnan(value) | ((value == than) & (place < there))
        return jnp.where(wins, value, than), jnp.where(wins, place, there)

    places = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    least = jnp.array(-jnp.inf, logits.dtype), jnp.array(logits.shape[-1] - 1, jnp.int32)
    value, place = jax.lax.reduce((logits, places), least, better, (logits.ndim - 1,))
    return value, place


def best_in_two_passes(logits: Array) -> tuple[Array, Array]:
    """`best` in two passes, neither of which writes anything out on a GPU."""
    return logits.max(axis=-1), _first_of_the_largest(logits)


def _first_of_the_largest(logits: Float[Array, "*dims V"]) -> Int[Array, "*dims"]:
    size = logits.shape[-1]
    most = logits.max(axis=-1, keepdims=True)
    where = jnp.where(logits == most, jnp.arange(size, dtype=jnp.int32), size - 1)
    return where.min(axis=-1)


def best_by_parts(logits: Float[Array, "*dims V"]) -> tuple[Array, Array]:
    """`best` in a single pass, then among the maxima of parts and in the first best part."""
    parts = in_parts(logits)
    most = parts.max(axis=-1)
    part = _first_of_the_largest(most)
    inside = jnp.take_along_axis(parts, part[..., None, None], axis=-2)[..., 0, :]
    place = jnp.minimum(part * PART + _first_of_the_largest(inside), logits.shape[-1] - 1)
    return most.max(axis=-1), place


def row_keys(seed: int | Sequence[int], rows: list[tuple[int, int]]) -> Array:
    """One key a row [B], from (prompt number, sample number).

    A row keeps its key whatever batch it is decoded in.

    Args:
      seed: of all rows or of each, from -2**63 to 2**64 - 1; each has streams of its own.
    """
    seeds = [seed] * len(rows) if isinstance(seed, int) else seed
    keys = {each: _key(each) for each in dict.fromkeys(seeds)}
    return _row_keys(jnp.stack([keys[each] for each in seeds]), np.asarray(rows, np.uint32))


def _key(seed: int) -> Array:
    """`jax.random.key(seed)`, which reads 32 bits of a seed only."""
    words = jnp.asarray(np.array([seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF], np.uint32))
    key = jax.random.wrap_key_data(words, impl="threefry2x32")
    # A negative seed has the bits of a large seed.
    return jax.random.fold_in(key, 1) if seed < 0 else key


@jax.jit
def _row_keys(bases: Array, rows: Array) -> Array:
    fold = jax.random.fold_in
    return jax.vmap(lambda base, row: fold(fold(base, row[0]), row[1]))(bases, rows)


@typed
def draw(
    keys: Key[Array, " B"], positions: Int[Array, " B"], logits: Float[Array, "B V"]
) -> Int[Array, " B"]:
    """Draws one token a row from softmax(logits).

    The noise depends on the row's key and the token's absolute position, not on
    the step or the tree in which the draw happens. So plain decoding and Medusa
    with any tree draw the same text from the same key.

    A part of the vocabulary is drawn by its mass, then a token of that part. So a
    draw needs V / PART + PART random numbers, not V.
    """
    parts = in_parts(logits)
    mass = jax.nn.logsumexp(parts, axis=-1)

    def one(key: Array, position: Array, parts: Array, mass: Array) -> Array:
        # JAX's default noise stops at 15.9, which no token 1e-7 as likely as the best can reach.
        key = jax.random.fold_in(key, position)
        noise = jax.random.gumbel(key, (mass.size + PART,), mode="high")
        part = _first_of_the_largest(mass + noise[: mass.size])
        return part * PART + _first_of_the_largest(parts[part] + noise[mass.size :])

    return jax.vmap(one)(keys, positions, parts, mass)


def in_parts(logits: Float[Array, "*dims V"], size: int = PART) -> Float[Array, "*dims P size"]:
    """A vocabulary in parts of equal size: (1, 2, 3), size 2 -> ((1, 2), (3, -inf))."""
    *dims, width = logits.shape
    missing = *((0, 0),) * len(dims), (0, -width % size)
    return jnp.pad(logits, missing, constant_values=-jnp.inf).reshape(*dims, -1, size)
