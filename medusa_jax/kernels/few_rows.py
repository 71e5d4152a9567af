"""Products of a weight with few rows on a CPU, as fast as the weight can be read.

A tree of 8 tokens multiplies 8 rows by each weight. XLA's product takes two to four times as
long as for a single row; `few_rows.cpp` reads each weight once for all of them.

Rows of zeros cost nothing: padding of a prompt, and rows of a batch whose texts have ended.

Beside weights in int8 and int4, rows are rounded to integers of 16 bits, and products are added up
exactly. Each row has a factor of its own, a power of two. Where an output has a scale of each group
of inputs, a group's products are added up exactly, and groups in float32.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from medusa_jax.shapes import typed

MOST_ROWS = 128  # from where on XLA's product is as fast
MOST_OF_GROUP = 1536  # products of int8 that an int32 of the kernel adds up at most


def knows(dtype: str, inputs: int, groups: int = 1) -> bool:
    """Whether it multiplies weights of this type, with so many scales of each output."""
    size = inputs // groups
    if dtype == "int4":  # two in a byte, and a vector of them in a group
        return size % 64 == 0
    if groups > 1:
        return dtype == "int8" and size % 32 == 0 and size <= MOST_OF_GROUP
    return dtype in ("float32", "bfloat16", "int8")


@typed
def product(
    x: Float[Array, "*dims"],
    weight: Array,
    scale: Float[Array, "*of"] | None = None,
    layer: Int[Array, ""] | None = None,
) -> Float[Array, "*out"]:
    """W x of the last axis, accumulated and returned in float32.

    The numbers of a row do not depend on the other rows, not even in their last bits.
    Beside an int8 weight, the numbers of a row are rounded first: none moves by more than 2^-15
    of the row's largest. From there on, the sums are exact.

    Args:
      x: [*dims, in], or for a stack of M weights [*dims, M, in]; float32 or bfloat16.
      weight: [out, in] or [M, out, in]; float32, bfloat16, int8 or int4.
      scale: of each output [out] or [M, out], which its sum is multiplied by; or of each group of
        its inputs, [out, G] or [M, out, G].
      layer: the weight that is meant, where weight and scale are those of L layers, [L, out, in]
        and [L, out] or [L, out, G]. They are read where they lie.

    Returns:
      [*dims, out] or [*dims, M, out].
    """
    stack, out = weight.shape[:-2] if layer is None else (), weight.shape[-2]
    dims = x.shape[: -1 - len(stack)]
    factors = jnp.zeros(0) if scale is None else scale
    number = jnp.zeros(0, jnp.int32) if layer is None else layer[None].astype(jnp.int32)
    rows = jax.ShapeDtypeStruct((*dims, *stack, out), jnp.float32)
    return jax.ffi.ffi_call("medusa_few_rows", rows)(x, weight, factors, number)
