"""The arithmetic of a Llama block as pure functions: norm, rotary positions, windows."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from medusa_jax.model.config import ModelConfig
from medusa_jax.model.rope import DynamicNTK, plain_frequencies
from medusa_jax.shapes import typed


@typed
def rms_norm(x: Float[Array, "*dims D"], scale: Float[Array, " D"], eps: float) -> Array:
    """x / rms(x) * scale, in float32, back in x's dtype [*dims, D]."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return wide.astype(x.dtype) * scale.astype(x.dtype)


@typed
def rope_tables(
    config: ModelConfig, positions: Int[Array, "*dims"], lengths: Array | None = None
) -> tuple[Float[Array, "*dims c"], Float[Array, "*dims c"]]:
    """cos and sin of every position's angles, float32 [*dims, C / 2] each.

    Args:
      lengths: whole lengths of the texts [*dims], which dynamic NTK asks for; by default
        each text ends at its position.
    """
    scaling, theta, width = config.rope_scaling, config.rope_theta, config.head_dim
    if isinstance(scaling, DynamicNTK):
        whole = positions + 1 if lengths is None else jnp.maximum(lengths, positions + 1)
        frequencies = scaling.frequencies_at(theta, width, whole)
    elif scaling is None:
        frequencies = plain_frequencies(theta, width)
    else:
        frequencies = scaling.frequencies(theta, width)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if scaling is None or scaling.amplitude == 1.0:
        return cos, sin
    return cos * scaling.amplitude, sin * scaling.amplitude


@typed
def rotate(
    x: Float[Array, "*dims H C"], cos: Float[Array, "*#dims c"], sin: Float[Array, "*#dims c"]
) -> Float[Array, "*dims H C"]:
    """Turns pair (x[i], x[i + C/2]) by its angle: Hugging Face's half-split layout."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
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
    first = first_within_window(query_positions, window)
    if first is None:
        return jnp.ones((*query_positions.shape, key_positions.shape[1]), bool)
    return key_positions[:, None, :] >= first[:, :, None]


@typed
def first_within_window(
    query_positions: Int[Array, "B T"], window: int | None
) -> Int[Array, "B T"] | None:
    """The first position that each query sees, below 0 too; None where it sees all.

    With window 2, query positions (0, 5) -> (-1, 4).
    """
    return None if window is None else query_positions - window + 1
