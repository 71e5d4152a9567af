"""Attention to the cache, whose cost follows what is filled and not what there is room for.

A row sees the slots below its length, from the window of each query on. So blocks of slots that
no query sees are neither read nor computed.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from medusa_jax.kernels import cache_attention_cpu, native
from medusa_jax.kernels.heads import Heads
from medusa_jax.model.kernel_choice import KernelChoice
from medusa_jax.model.kv_cache import cache_axes
from medusa_jax.model.qkv import QKV
from medusa_jax.model.softmax import Softmax, joined, masked
from medusa_jax.shapes import typed

SLOT_BLOCK = 128  # slots that `by_blocks` reads at a time

Own = tuple[Array, Array, Array]  # a block's keys, values and mask, as `attention.attend` has them


@dataclasses.dataclass(frozen=True)
class Past:
    """What the queries of a layer see of the cache.

    Attributes:
      keys, values: of the layer [R, K, C, S] and [R, K, S, C], or of L layers, [R, L, K, C, S]
        and [R, L, K, S, C]; R is B without `row`.
      lengths: filled slots of each row [B].
      first: the first slot that each query's window reaches [B, T]; None without a window.
      kernels: which of them may compute it.
      row: of the cache, where the queries are of this row alone []; else None.
      live: which queries anything comes of [B, T]; the others get zeros. None: all of them.
      layer: the layer that is meant, of keys and values of L layers []; else None.
    """

    keys: Array
    values: Array
    lengths: Array
    first: Array | None
    kernels: KernelChoice
    row: Array | None = None
    live: Array | None = None
    layer: Array | None = None

    def attend(self, queries: Float[Array, "B K G T C"], own: Own) -> Array:
        """Softmax attention to the block's own keys and to the cache [B, K, G, T, C].

        Each device computes its own heads. Queries are scaled.
        """
        compute, mesh = implementation(self.kernels), self.kernels.mesh
        inputs = queries, own, self.keys, self.values, self.lengths, self.first, self.row
        if mesh is None:
            return compute(*inputs, self.live, self.layer)
        heads, cache = P(None, "tensor", "group"), P(None, "tensor")
        places = heads, (cache, cache, P()), cache, cache, P(), P(), P()
        split = jax.shard_map(compute, mesh=mesh, in_specs=places, out_specs=heads, check_vma=False)
        return split(*inputs)

    def attend_projected(self, block: QKV, mask: Array) -> Float[Array, "B T H C"]:
        """The same of queries and keys before their rotation, by a kernel."""
        kernel = self.kernels.of_projections()
        keys, values, layer = self.keys, self.values, self.layer
        if self.row is not None:  # the kernel reads the cache of each row
            keys, values = (_of_row(slots, self.row, layer) for slots in (keys, values))
            layer = None
        inputs = block.rope, mask, keys, values, self.lengths, self.first, layer
        parts = block.queries, block.keys, block.values
        if self.kernels.on_one_device:
            return kernel(parts, *inputs)

        def compute(arrays: tuple[Array, ...], *inputs: Any) -> Array:
            queries, keys, values = (Heads(array, block.width) for array in arrays)
            return kernel((queries, keys, values), *inputs)

        heads, kv_heads = P(None, None, ("tensor", "group")), P(None, None, "tensor")
        cache = cache_axes(keys.ndim)
        places = (heads, kv_heads, kv_heads), P(), P(), cache, cache, P(), P(), P()
        mesh = self.kernels.mesh
        split = jax.shard_map(compute, mesh=mesh, in_specs=places, out_specs=heads, check_vma=False)
        return split(tuple(part.array for part in parts), *inputs)


def implementation(kernels: KernelChoice) -> Callable[..., Array]:
    """What computes `Past.attend`."""
    if not kernels.attends:
        return _by_xla
    if kernels.platform == "tpu":
        from medusa_jax.kernels import cache_attention_tpu

        return functools.partial(_by_kernel, cache_attention_tpu.attention)
    if kernels.platform == "cpu" and kernels.mesh is None and native.available():
        return _by_cpu
    return _by_xla


def _of_row(slots: Array, row: Array, layer: Array | None) -> Array:
    """Keys or values of a row, and of a layer where there are several."""
    sizes, begin = list(slots.shape), [row, *[jnp.zeros_like(row)] * (slots.ndim - 1)]
    sizes[0] = 1
    if layer is None:
        return jax.lax.dynamic_slice(slots, begin, sizes)
    begin[1], sizes[1] = layer, 1
    return jax.lax.dynamic_slice(slots, begin, sizes)[:, 0]


def _by_xla(
    queries: Array, own: Own, keys: Array, values: Array, lengths: Array, first: Array | None,
    row: Array | None = None, live: Array | None = None, layer: Array | None = None,
) -> Array:  # fmt: skip
    past = by_blocks(queries, keys, values, lengths, first, row, layer)
    return joined(masked(queries, *own), past).output()


def _by_cpu(
    queries: Array, own: Own, keys: Array, values: Array, lengths: Array, first: Array | None,
    row: Array | None = None, live: Array | None = None, layer: Array | None = None,
) -> Array:  # fmt: skip
    knows = cache_attention_cpu.knows(queries.shape[-1], keys.dtype)
    compute = cache_attention_cpu.attention if knows else _by_xla
    return compute(queries, own, keys, values, lengths, first, row, live, layer)


def _by_kernel(
    kernel: Callable[..., Array], queries: Array, own: Own, keys: Array, values: Array,
    lengths: Array, first: Array | None, row: Array | None = None, live: Array | None = None,
    layer: None = None,
) -> Array:  # fmt: skip
    """By a kernel that takes the queries of a key/value head as the rows of a matrix."""
    if row is not None:  # it reads the cache of each row
        keys, values = (_of_row(slots, row, layer) for slots in (keys, values))
    group = queries.shape[2]
    rows = queries.reshape(*queries.shape[:2], -1, queries.shape[4])
    own_keys, own_values, mask = own
    own = own_keys, own_values, jnp.tile(mask, (1, group, 1))
    first = None if first is None else jnp.tile(first, (1, group))
    return kernel(rows, own, keys, values, lengths, first).reshape(queries.shape)


@typed
def by_blocks(
    queries: Float[Array, "B K G T C"],
    keys: Float[Array, "R *L K C S"],
    values: Float[Array, "R *L K S C"],
    lengths: Int[Array, " B"],
    first: Int[Array, "B T"] | None,
    row: Int[Array, ""] | None = None,
    layer: Int[Array, ""] | None = None,
) -> Softmax:
    """Over the slots that each query sees, in a loop over the blocks that some row sees.

    A block is cut out of its row and layer here: whoever cuts these out first copies all of
    their slots.
    """
    capacity = keys.shape[-1]
    size = min(SLOT_BLOCK, capacity)

    def block(number: Array) -> Softmax:
        begin = number * size
        # The last block is moved back to end with the cache.
        start = jnp.minimum(begin, capacity - size)
        slots = start + jnp.arange(size)
        seen = ((slots >= begin) & (slots < lengths[:, None]))[:, None]
        if first is not None:
            seen &= slots >= first[:, :, None]
        return masked(queries, cut(keys, -1, start), cut(values, -2, start), seen)

    def cut(slots: Array, axis: int, start: Array) -> Array:
        begin, shape = [0 if row is None else row, *[0] * (slots.ndim - 1)], list(slots.shape)
        begin[axis], shape[axis] = start, size
        shape[0] = len(queries)
        if layer is not None:
            begin[1], shape[1] = layer, 1
        block = jax.lax.dynamic_slice(slots, begin, shape)
        return block if layer is None else block[:, 0]

    number = jnp.zeros((), jnp.int32)
    if size == capacity:
        return block(number)
    if first is not None:
        number = jnp.maximum(first.min(), 0) // size
    blocks = (lengths.max() + size - 1) // size
    nothing = Softmax.of_nothing(queries)
    return jax.lax.fori_loop(number, blocks, lambda i, so_far: joined(so_far, block(i)), nothing)
