"""Products of a weight with few rows on a GPU, by a Pallas kernel (Triton).

XLA's products leave float32 numbers for another kernel to convert, and need more kernels to add up
the parts of long sums or to gate an MLP. Here a program writes what comes next, and parts are left
to `add_norm_gpu`, which reads them anyway.

A program has a block of outputs and all rows: each weight is read once. Rows are counted up to a
power of 2. What is beyond their end is read as the last row, and writes what the last row writes.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Num

from medusa_jax.shapes import typed

MOST_ROWS = 64  # from where on XLA's products are as fast
LEAST_ROWS = 16  # of a product of tensor cores
OUTPUTS = (128, 64)  # of a program
INPUTS = 64  # that a program reads at a time
TYPES = (jnp.bfloat16,)  # of rows; a GPU would round float32
NARROW = (jnp.int8,)  # of weights with scales
PROGRAMS = 128  # that keep a large GPU at work
FEW_PROGRAMS = 64  # fewer take longer than twice as many of half the outputs


def knows(x: Array, weight: Array, *, gated: bool = False) -> bool:
    """Whether it multiplies rows [*dims, in] by a weight [in, out], narrow or of their type.

    Args:
      gated: half of the outputs gate the others.
    """
    inputs, outputs = weight.shape
    whole = inputs % INPUTS == 0 and outputs % (min(OUTPUTS) * (1 + gated)) == 0
    types = x.dtype in TYPES and weight.dtype in (x.dtype, *NARROW)
    return x.size // inputs <= MOST_ROWS and whole and types


@typed
def product(
    x: Float[Array, "*dims D"],
    weight: Num[Array, "D F"],
    scale: Float[Array, " F"] | None = None,
    *,
    gated: bool = False,
    interpret: bool = False,
) -> Float[Array, "*out"]:
    """W x of the last axis, accumulated in float32, in the type of x [*dims, F].

    Args:
      scale: of each output, which its sum is multiplied by.
      gated: the weight holds the outputs of G and, behind them, those of U, and the result is
        silu(G x) * U x [*dims, F / 2].
      interpret: runs the kernel with XLA, on any device.
    """
    width = _width(weight.shape[1] // (1 + gated), FEW_PROGRAMS)
    return _call(x, weight, scale, x.dtype, 1, width, gated=gated, interpret=interpret)[0]


@typed
def parts(
    x: Float[Array, "*dims D"], weight: Num[Array, "D F"], scale: Float[Array, " F"] | None = None,
    *, interpret: bool = False,
) -> Float[Array, "P *dims F"]:  # fmt: skip
    """Parts that W x is the sum of, in float32, so many that a large GPU is at work.

    Args:
      scale, interpret: as of `product`.
    """
    width = _width(weight.shape[1])
    count = max(1, min(PROGRAMS * width // weight.shape[1], len(weight) // INPUTS))
    return _call(x, weight, scale, jnp.float32, count, width, gated=False, interpret=interpret)


def _width(outputs: int, programs: int = 1) -> int:
    """How many of so many outputs a program computes, if that leaves so many programs."""
    most, least = OUTPUTS
    return most if outputs % most == 0 and outputs // most >= programs else least


def _call(
    x: Array, weight: Array, scale: Array | None, dtype: Any, parts: int, width: int, *,
    gated: bool, interpret: bool,
) -> Array:  # fmt: skip
    """The parts of a product [P, *dims, out]; a program computes so many outputs."""
    dims, inputs, outputs = x.shape[:-1], x.shape[-1], weight.shape[1] // (1 + gated)
    rows = math.prod(dims)
    arrays = [x.reshape(rows, inputs), weight, *([] if scale is None else [scale])]
    result = pl.pallas_call(
        functools.partial(_kernel, parts=parts, gated=gated),
        grid=(outputs // width, parts),
        in_specs=[pl.BlockSpec(one.shape, lambda *_, n=one.ndim: (0,) * n) for one in arrays],
        out_specs=pl.BlockSpec((None, rows, width), lambda block, part: (part, 0, block)),
        out_shape=jax.ShapeDtypeStruct((parts, rows, outputs), dtype),
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=4),
        interpret=interpret,
        name="few_rows",
    )(*arrays)
    return result.reshape(parts, *dims, outputs)


def _kernel(x: Any, weight: Any, *rest: Any, parts: int, gated: bool) -> None:
    """A part of the sums of a block of outputs; or those of G and of U, and then their gate."""
    *scales, y = rest
    (rows, inputs), width = x.shape, y.shape[1]
    count, turns = max(LEAST_ROWS, pl.next_power_of_2(rows)), inputs // INPUTS
    row = jnp.minimum(jnp.arange(count), rows - 1)
    start = pl.program_id(0) * width
    columns = [pl.ds(start, width)]
    if gated:
        columns.append(pl.ds(weight.shape[1] // 2 + start, width))

    def add(turn: Array, sums: list[Array]) -> list[Array]:
        numbers = pl.ds(turn * INPUTS, INPUTS)
        read = x[:, numbers] if count == rows else x[row, numbers]
        cut = (weight[numbers, column].astype(x.dtype) for column in columns)
        return [total + plgpu.dot(read, part) for total, part in zip(sums, cut, strict=True)]

    part = pl.program_id(1)
    first, last = part * turns // parts, (part + 1) * turns // parts
    none = [jnp.zeros((count, width), jnp.float32)] * len(columns)
    sums = jax.lax.fori_loop(first, last, add, none)
    for scale in scales:
        sums = [total * scale[column] for total, column in zip(sums, columns, strict=True)]
    sums = [total.astype(y.dtype) for total in sums]
    result = sums[0]
    if gated:
        result = jax.nn.silu(sums[0].astype(jnp.float32)).astype(y.dtype) * sums[1]
    if count == rows:
        y[...] = result
    else:
        y[row, :] = result
