"""The arithmetic of a Llama block as pure functions: norm, rotary positions, attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from medusa_jax.model.config import ModelConfig
from medusa_jax.shapes import typed

QUERY_BLOCK = 512


@typed
def rms_norm(x: Float[Array, "*dims D"], scale: Float[Array, " D"], eps: float) -> Array:
    """x / rms(x) * scale, in float32, back in x's dtype [*dims, D]."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return wide.astype(x.dtype) * scale.astype(x.dtype)


def rope_frequencies(config: ModelConfig) -> np.ndarray:
    """Radians per position of each rotated pair, float32 [C / 2]."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies = (1.0 / np.float32(config.rope_theta) ** exponents).astype(np.float32)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    turns = scaling.original_context * frequencies / (2 * np.pi)
    ramp = scaling.high_freq_factor - scaling.low_freq_factor
    keep = np.clip((turns - scaling.low_freq_factor) / ramp, 0.0, 1.0)
    return (frequencies * (keep + (1 - keep) / scaling.factor)).astype(np.float32)


@typed
def rope_tables(
    config: ModelConfig, positions: Int[Array, "*dims"]
) -> tuple[Float[Array, "*dims c"], Float[Array, "*dims c"]]:
    """cos and sin of every position's angles, float32 [*dims, C / 2] each."""
    angles = positions[..., None].astype(jnp.float32) * rope_frequencies(config)
    return jnp.cos(angles), jnp.sin(angles)


@typed
def rotate(
    x: Float[Array, "B T H C"], cos: Float[Array, "B T c"], sin: Float[Array, "B T c"]
) -> Float[Array, "B T H C"]:
    """Turns pair (x[i], x[i + C/2]) by its angle: Hugging Face's half-split layout."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    turned = jnp.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)
    return turned.astype(x.dtype)


@typed
def within_window(
    query_positions: Int[Array, "B T"], key_positions: Int[Array, "#B U"], window: int | None
) -> Bool[Array, "B T U"]:
    """True where a key is near enough: position(key) > position(query) - window.

    With window 2, query position 5 sees keys 4 and 5:
    keys (3, 4, 5) -> (False, True, True).
    """
    if window is None:
        return jnp.ones((*query_positions.shape, key_positions.shape[1]), bool)
    return key_positions[:, None, :] > query_positions[:, :, None] - window


@typed
def attend(
    queries: Float[Array, "B T H C"],
    parts: list[tuple[Float[Array, "B K C _"], Float[Array, "B K _ C"], Bool[Array, "B T _"]]],
) -> Float[Array, "B T H C"]:
    """Softmax attention over keys that lie in several arrays, as if they were one.

    Keeping the block's own keys apart from the cache lets a decode step read
    the cache in place and write back only what was accepted.

    Args:
      queries: rotated queries [B, T, H, C].
      parts: (keys [B, K, C, U], values [B, K, U, C], mask [B, T, U]) of each
        array; mask is True where a query sees a key. Every query must see at
        least one key in some part.

    Returns:
      [B, T, H, C] in the queries' dtype; scores and softmax are float32.
      Scores of long blocks exist for QUERY_BLOCK queries at a time.
    """
    length = queries.shape[1]
    if length <= QUERY_BLOCK:
        return _attend(queries, parts)
    count = -(-length // QUERY_BLOCK)

    def split(array: Array) -> Array:
        # Filled up with True: a query that sees nothing would divide by zero.
        width = ((0, 0), (0, count * QUERY_BLOCK - length), *((0, 0),) * (array.ndim - 2))
        array = jnp.pad(array, width, constant_values=1)
        return array.reshape(array.shape[0], count, QUERY_BLOCK, *array.shape[2:]).swapaxes(0, 1)

    def block(piece: tuple[Array, list[Array]]) -> Array:
        mine, masks = piece
        return _attend(mine, [(k, v, m) for (k, v, _), m in zip(parts, masks, strict=True)])

    pieces = split(queries), [split(mask) for *_, mask in parts]
    mixed = jax.lax.map(jax.checkpoint(block), pieces).swapaxes(0, 1)
    return mixed.reshape(mixed.shape[0], -1, *mixed.shape[3:])[:, :length]


def _attend(queries: Array, parts: list[tuple[Array, Array, Array]]) -> Array:
    batch, length, heads, width = queries.shape
    kv_heads = parts[0][0].shape[1]
    group = heads // kv_heads
    # One [G*T, C] matrix a key/value head: plain matrix products, whose operands lie in order.
    scaled = (queries * width**-0.5).reshape(batch, length, kv_heads, group, width)
    scaled = scaled.transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, group * length, width)
    scores = []
    for keys, _, mask in parts:
        score = jnp.einsum("bkqc,bkcu->bkqu", scaled, keys, preferred_element_type=jnp.float32)
        score = score.reshape(batch, kv_heads, group, length, -1)
        scores.append(jnp.where(mask[:, None, None], score, -jnp.inf))
    top = functools.reduce(jnp.maximum, [score.max(axis=-1, keepdims=True) for score in scores])
    total, mixed = jnp.zeros(()), jnp.zeros(())
    for score, (_, values, _) in zip(scores, parts, strict=True):
        weight = jnp.exp(score - top)
        total = total + weight.sum(axis=-1, keepdims=True)
        weight = weight.reshape(batch, kv_heads, group * length, -1).astype(values.dtype)
        mix = jnp.einsum("bkqu,bkuc->bkqc", weight, values, preferred_element_type=jnp.float32)
        mixed = mixed + mix.reshape(batch, kv_heads, group, length, width)
    mixed = (mixed / total).transpose(0, 3, 1, 2, 4)
    return mixed.reshape(queries.shape).astype(queries.dtype)
