"""Attention to the cache, whose cost follows what is filled and not what there is room for.

A row sees the slots below its length, from the window of each query on. So blocks of slots that
no query sees are neither read nor computed.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from medusa_jax.kernels import cache_attention_cpu, native
from medusa_jax.model.softmax import Softmax, joined, masked
from medusa_jax.shapes import typed

SLOT_BLOCK = 128  # slots that `by_blocks` reads at a time

Own = tuple[Array, Array, Array]  # a block's keys, values and mask, as `attention.attend` has them


@dataclasses.dataclass(frozen=True)
class CacheAttention:
    """What computes attention to a cache, on which devices.

    Attributes:
      kernels: a kernel does it where one knows the device and the shape; else `by_blocks`.
      mesh: devices (tensor, group, copy) that hold the heads; None for one device.
    """

    kernels: bool = False
    mesh: Mesh | None = None

    def implementation(self, width: int) -> Callable[..., Array]:
        """For heads of this width, on the devices that a program is compiled for."""
        platform = self.mesh.devices.flat[0].platform if self.mesh else jax.default_backend()
        if self.kernels and platform == "tpu":
            from medusa_jax.kernels import cache_attention_tpu

            by_matrices = functools.partial(_by_matrices, cache_attention_tpu.attention)
            return functools.partial(_by_kernel, by_matrices)
        if self.kernels and platform == "gpu" and width >= 16 and width.bit_count() == 1:
            from medusa_jax.kernels import cache_attention_gpu

            return functools.partial(_by_kernel, cache_attention_gpu.attention)
        if self.kernels and platform == "cpu" and self.mesh is None and native.available():
            return _by_cpu
        return _by_xla


@dataclasses.dataclass(frozen=True)
class Past:
    """What the queries of a layer see of the cache.

    Attributes:
      keys, values: of the layer [R, K, C, S] and [R, K, S, C], or of L layers, [R, L, K, C, S]
        and [R, L, K, S, C]; R is B without `row`.
      lengths: filled slots of each row [B].
      first: the first slot that each query's window reaches [B, T]; None without a window.
      attention: what computes it.
      row: of the cache, where the queries are of this row alone []; else None.
      live: which queries anything comes of [B, T]; the others get zeros. None: all of them.
      layer: the layer that is meant, of keys and values of L layers []; else None.
    """

    keys: Array
    values: Array
    lengths: Array
    first: Array | None
    attention: CacheAttention
    row: Array | None = None
    live: Array | None = None
    layer: Array | None = None

    def attend(self, queries: Float[Array, "B K G T C"], own: Own) -> Array:
        """Softmax attention to the block's own keys and to the cache [B, K, G, T, C].

        Each device computes its own heads. Queries are scaled.
        """
        compute, mesh = self.attention.implementation(queries.shape[-1]), self.attention.mesh
        inputs = queries, own, self.keys, self.values, self.lengths, self.first, self.row
        if mesh is None:
            return compute(*inputs, self.live, self.layer)
        heads, cache = P(None, "tensor", "group"), P(None, "tensor")
        places = heads, (cache, cache, P()), cache, cache, P(), P(), P()
        split = jax.shard_map(compute, mesh=mesh, in_specs=places, out_specs=heads, check_vma=False)
        return split(*inputs)


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
    if row is not None:  # a kernel reads the cache of each row
        keys, values = (jax.lax.dynamic_slice_in_dim(slots, row, 1) for slots in (keys, values))
    return kernel(queries, own, keys, values, lengths, first)


def _by_matrices(
    kernel: Callable[..., Array],
    queries: Array,
    own: Own,
    keys: Array,
    values: Array,
    lengths: Array,
    first: Array | None,
) -> Array:
    """By a kernel that takes the queries of a key/value head as the rows of a matrix."""
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
