"""A sum of rows and its RMS norm on a GPU, by a Pallas kernel (Triton); XLA takes three."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from medusa_jax.shapes import typed


@typed
def add_norm(
    x: Float[Array, "*dims D"],
    update: Float[Array, "*parts D"],
    scale: Float[Array, " D"],
    eps: float,
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "*dims D"], Float[Array, "*dims D"]]:
    """x + update, and this sum as `layers.rms_norm` scales it.

    Args:
      update: [*dims, D], or parts that it is the sum of, [P, *dims, D].
      interpret: runs the kernel with XLA, on any device.
    """
    width = x.shape[-1]
    rows = x.reshape(-1, width)
    parts = update.reshape(-1, *rows.shape)
    row = pl.BlockSpec((None, width), lambda number: (number, 0))
    in_parts = pl.BlockSpec((len(parts), None, width), lambda number: (0, number, 0))
    out = jax.ShapeDtypeStruct(rows.shape, x.dtype)
    total, normed = pl.pallas_call(
        functools.partial(_kernel, eps=eps),
        grid=(len(rows),),
        in_specs=[row, in_parts, pl.BlockSpec((width,), lambda _: (0,))],
        out_specs=[row, row],
        out_shape=[out, out],
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=1),
        interpret=interpret,
        name="add_norm",
    )(rows, parts, scale)
    return total.reshape(x.shape), normed.reshape(x.shape)


def _kernel(x: Any, update: Any, scale: Any, total: Any, normed: Any, *, eps: float) -> None:
    """A row. Numbers are counted up to a power of 2; those beyond the width are zeros."""
    width = x.shape[0]
    numbers = jnp.arange(pl.next_power_of_2(width))
    inside = numbers < width

    def load(ref: Any, *row: Array) -> Array:
        return plgpu.load(ref.at[*row, numbers], mask=inside, other=0)

    parts = [load(update, jnp.int32(part)) for part in range(len(update))]
    added = load(x) + sum(parts[1:], parts[0]).astype(total.dtype)
    wide = added.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt((wide * wide).sum() / width + eps)
    plgpu.store(total.at[numbers], added, mask=inside)
    scaled = wide.astype(normed.dtype) * load(scale).astype(normed.dtype)
    plgpu.store(normed.at[numbers], scaled, mask=inside)
