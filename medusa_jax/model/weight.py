"""Weights as parameters that know their own layout.

Files, training and `Module.init` hold a weight as a plain array [out, in]. Decoding holds a
`Weight`, in the order that is fast for the 1 to 64 rows of a tree: [out, in] for the kernel of
`kernels.few_rows`, [in, out] for XLA's products, which take half the time in that order on a CPU,
and for the kernel of a GPU.
Modules read all of them by `linear.parameter`, so a path means the same weight in every layout.

A quantized weight holds narrow numbers and a scale: W = scale * data. Only weights are narrow;
sums are float32.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from medusa_jax.kernels import few_rows
from medusa_jax.shapes import typed

# Letters of a weight's dimensions in an einsum: f is out, d is in.
_LETTERS = {"out_in": "fd", "in_out": "df"}

# Rows of a tile in a TPU's memory on chip. A product of fewer is computed by the vector unit
# there, at half the speed of the memory; zeros up to a tile bring it to the matrix unit.
TILE_ROWS = 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapter:
    """A low-rank update (LoRA) of a weight: scale B A.

    Attributes:
      a, b: [..., R, in] and [..., out, R].
      scale: alpha / R of the LoRA paper.
      dropout: probability that a number of the adapter's input is dropped.
      key: PRNG key of the dropout; None for no dropout.
    """

    a: Array
    b: Array
    scale: float = dataclasses.field(metadata={"static": True})
    dropout: float = dataclasses.field(default=0.0, metadata={"static": True})
    key: Array | None = None

    def dot(self, x: Array) -> Array:
        """scale B A x, float32."""
        if self.key is not None and self.dropout:
            kept = jax.random.bernoulli(self.key, 1 - self.dropout, x.shape)
            # A TPU's compiler would draw numbers within products, once for each that reads them.
            kept = jax.lax.optimization_barrier(kept)
            x = jnp.where(kept, x / (1 - self.dropout), 0).astype(x.dtype)
        low = Weight(self.a).dot(x).astype(x.dtype)
        return self.scale * Weight(self.b).dot(low)


def _in_tiles(product: Callable[..., Array], leading: int, x: Array, data: Array) -> Array:
    """The product of x; on a TPU of at least TILE_ROWS rows, those that x lacks being zeros.

    Args:
      leading: how many of the dimensions of x count rows.
    """
    rows, rest = x.shape[:leading], x.shape[leading:]
    count = math.prod(rows)

    def padded(x: Array, data: Array) -> Array:
        width = ((0, TILE_ROWS - count), *((0, 0),) * len(rest))
        y = product(jnp.pad(x.reshape(count, *rest), width), data)[:count]
        return y.reshape(*rows, *y.shape[1:])

    if count >= TILE_ROWS:
        return product(x, data)
    return jax.lax.platform_dependent(x, data, tpu=padded, default=product)


def _of_narrow_stack(product: Callable[..., Array], letters: str, x: Array, data: Array) -> Array:
    """The product of a stack; XLA:CPU cannot multiply it once it has widened it to bfloat16."""

    def one_by_one(x: Array, data: Array) -> Array:
        single = functools.partial(
            jnp.einsum, f"...d,{letters}->...f", preferred_element_type=jnp.float32
        )
        return jnp.stack([single(x[..., m, :], one) for m, one in enumerate(data)], axis=-2)

    return jax.lax.platform_dependent(x, data, cpu=one_by_one, default=product)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weight:
    """One weight, or the weights of M heads stacked along a leading axis.

    A pytree node, so `jax.tree.map` reaches the arrays inside; `param_paths.flat` keeps it whole.

    Attributes:
      data: [out, in] or [in, out], as `order` says; of a stack [M, ., .]. Before it is loaded,
        a tensor in a file, a shape, or a sharding.
      order: "out_in" or "in_out".
      adapter: added to the product, or None.
      few_rows: whether products of few rows are those of `kernels.few_rows`, which has no
        gradient and wants the order "out_in".
      scale: of a quantized weight, float32: of each output [out], or of each output's G groups
        of inputs [out, G]; of a stack [M, out] or [M, out, G]. None where data are the numbers.
      layer: the weight that is meant, where data and scale are those of L layers, [L, ., .] and
        [L, out] (`layer_stack.py`); None where they are its own.
      lookup_dtype: type of the rows that `lookup` gives of a quantized table.
    """

    data: Any
    order: str = dataclasses.field(default="out_in", metadata={"static": True})
    adapter: Adapter | None = None
    few_rows: bool = dataclasses.field(default=False, metadata={"static": True})
    scale: Any = None
    lookup_dtype: str = dataclasses.field(default="float32", metadata={"static": True})
    layer: Array | None = None

    @property
    def dtype(self) -> jnp.dtype:
        """The type of the rows that `lookup` gives."""
        return self.data.dtype if self.scale is None else jnp.dtype(self.lookup_dtype)

    @property
    def bare(self) -> bool:
        """Whether it is a matrix [in, out], and at most a scale of each output."""
        alone = self.adapter is None and self.layer is None and not self.grouped
        return alone and self.order == "in_out" and self.data.ndim == 2

    @property
    def grouped(self) -> bool:
        """Whether an output has several scales."""
        return self.scale is not None and self.scale.ndim == self.data.ndim

    @typed
    def dot(self, x: Float[Array, "*dims"]) -> Float[Array, "*out"]:
        """The product W x of the last axis, accumulated and returned in float32.

        x [*dims, in] -> [*dims, out]. Of a stack, each of M vectors meets its own weight:
        x [*dims, M, in] -> [*dims, M, out].
        """
        if self.few_rows and x.size // x.shape[-1] <= few_rows.MOST_ROWS:
            y = few_rows.product(x, self.data, self.scale, self.layer)
        elif self.layer is not None:
            return self._cut_out().dot(x)
        else:
            data, letters = self.data, _LETTERS[self.order]
            if self.scale is not None:
                data = self._widened(x)
            if data.ndim == 3 and data.shape[0] == 1:
                data = data[0]  # XLA would transpose a batch of size 1 on a CPU
            stack = "m" if data.ndim == 3 else ""
            equation = f"...{stack}d,{stack}{letters}->...{stack}f"
            product = functools.partial(jnp.einsum, equation, preferred_element_type=jnp.float32)
            if stack and self.scale is not None:
                product = functools.partial(_of_narrow_stack, product, letters)
            y = _in_tiles(product, x.ndim - 1 - len(stack), x, data)
            if self.scale is not None and not self.grouped:
                y = y * self.scale
        return y if self.adapter is None else y + self.adapter.dot(x)

    def _cut_out(self) -> "Weight":
        """The weight of its layer alone: a copy, which is little beside a product of many rows."""
        parts = self.data, self.scale
        data, scale = jax.tree.map(lambda part: part[self.layer], parts)
        return dataclasses.replace(self, data=data, scale=scale, layer=None)

    def rows(self, ids: Array) -> "Weight":
        """The weight of some outputs only, such as the logits of W tokens."""
        axis = -2 if self.order == "out_in" else -1
        adapter = self.adapter
        if adapter is not None:
            adapter = dataclasses.replace(adapter, b=jnp.take(adapter.b, ids, axis=-2))
        data, scale = jnp.take(self.data, ids, axis=axis), self.scale
        if scale is not None:
            scale = jnp.take(scale, ids, axis=-2 if self.grouped else -1)
        return dataclasses.replace(self, data=data, scale=scale, adapter=adapter)

    def lookup(self, ids: Array) -> Array:
        """Rows of a table of embeddings [V, D]: ids [*dims] -> [*dims, D]."""
        rows = jnp.take(self.data, ids, axis=0)
        if self.scale is None:
            return rows
        scale = jnp.take(self.scale, ids, axis=0)
        groups = scale if self.grouped else scale[..., None]
        wide = rows.reshape(*groups.shape, -1).astype(jnp.float32) * groups[..., None]
        return wide.reshape(rows.shape).astype(self.dtype)

    def _widened(self, x: Array) -> Array:
        """Quantized data in the type of x; times their scales where an output has several."""
        data = jax.lax.platform_dependent(
            self.data, x, cpu=_converted_at_use, default=lambda data, x: data.astype(x.dtype)
        )
        if not self.grouped:
            return data
        inner = data if self.order == "out_in" else data.mT
        groups = inner.reshape(*self.scale.shape, -1) * self.scale[..., None]
        groups = groups.reshape(inner.shape).astype(x.dtype)
        return groups if self.order == "out_in" else groups.mT


def _converted_at_use(data: Array, x: Array) -> Array:
    """The data in the type of x, by a conversion that depends on x.

    XLA:CPU moves other conversions out of the decoding loop, and so keeps all weights wide in
    memory. TPUs and GPUs convert inside the product.
    """
    first = x.reshape(-1)[0]
    never = jnp.isinf(first) & jnp.isnan(first)
    if data.dtype.itemsize == 1 and jnp.issubdtype(data.dtype, jnp.floating):
        # XLA:CPU computes with these types in float16, in which it would keep them.
        bits = jax.lax.bitcast_convert_type(data, jnp.uint8)
        bits = jnp.where(never, jnp.zeros((), jnp.uint8), bits)
        return jax.lax.bitcast_convert_type(bits, data.dtype).astype(x.dtype)
    return jnp.where(never, jnp.zeros((), data.dtype), data).astype(x.dtype)


def weight_of(leaf: Any) -> Weight:
    """A parameter as a `Weight`: a plain array is in the order [out, in]."""
    return leaf if isinstance(leaf, Weight) else Weight(leaf)


def of_layer(params: Any, number: Array) -> Any:
    """The parameters of a layer, from those of L layers [L, ...]; weights stay where they lie."""

    def own(leaf: Any) -> Any:
        whole = isinstance(leaf, Weight)
        return dataclasses.replace(leaf, layer=number) if whole else leaf[number]

    return jax.tree.map(own, params, is_leaf=lambda leaf: isinstance(leaf, Weight))


def quantized(params: Any) -> bool:
    """Whether some of these parameters are narrow."""
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, Weight))
    return any(isinstance(leaf, Weight) and leaf.scale is not None for leaf in leaves)


def leaves_out_zeros(params: Any) -> bool:
    """Whether products by these parameters take no time for rows of zeros."""
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, Weight))
    return any(isinstance(leaf, Weight) and leaf.few_rows for leaf in leaves)
