"""Checksums of arrays by their values, the same for each way in which they lie on devices.

They are computed where the arrays are. So no process reads another's part, and a checkpoint is
verified wherever it lies and on whatever mesh it is restored.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from medusa_jax.param_paths import map_with_path

_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}  # by bytes of an element


def checksums(tree: Any) -> dict[str, int]:
    """The checksum of each array of a pytree by path.

    Each bit that is flipped in an element changes the array's checksum, and so does, but for a
    chance of 2^-32, any other change.
    """
    sums: dict[str, Array] = {}
    map_with_path(lambda path, leaf: sums.update({path: checksum(leaf)}), tree)
    return {path: int(value) for path, value in jax.device_get(sums).items()}


@jax.jit
def checksum(array: Array) -> Array:
    """Sum over the elements of their bits, mixed with their place [] uint32.

    Example: swapped elements differ, checksum([1, 2]) != checksum([2, 1]).
    """
    if array.dtype == bool:
        array = array.astype(jnp.uint8)
    bits = lax.bitcast_convert_type(array, _WORDS[array.dtype.itemsize]).astype(jnp.uint32)
    strides = np.cumprod((1, *bits.shape[:0:-1]), dtype=np.uint32)[::-1] if bits.ndim else ()
    place = jnp.uint32(0)
    for axis, stride in enumerate(strides):
        place += lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(stride)
    return jnp.sum(_mixed(bits ^ _mixed(place + 1)), dtype=jnp.uint32)


def _mixed(word: Array) -> Array:
    """A bijection of 32 bits in which each depends on all (MurmurHash3's finalizer)."""
    word = (word ^ (word >> 16)) * jnp.uint32(0x85EBCA6B)
    word = (word ^ (word >> 13)) * jnp.uint32(0xC2B2AE35)
    return word ^ (word >> 16)
