"""Attention of training rows, in which several documents lie one behind the other.

On a TPU it is JAX's splash attention (jax.experimental.pallas.ops.tpu.splash_attention), on a GPU
JAX's flash attention (jax.experimental.pallas.ops.gpu.attention): their scores stay on the chip.
Elsewhere blocks of queries meet the keys before them in plain products. The mesh says which: its
devices need not be those of this machine.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from medusa_jax.model.qkv import QKV
from medusa_jax.shapes import typed
from medusa_jax.training.mesh import ROWS

LEAST_BLOCK, MOST_BLOCKS = 128, 8  # of queries, whose scores exist at a time
TILE = 128  # which the kernels' lengths are multiples of, and a TPU's widths too
TPU_BLOCKS = (512, 256, TILE)  # queries and keys of the kernel's inner products
GPU_WIDTHS = (64, 128)  # of heads


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Documents:
    """What each position of a row sees: itself and those before it, of its own document.

    Attributes:
      segments: the document of each position [B, T].
      window: index in `windows` of this layer's [].
      windows: sliding windows that layers have, in positions; None sees all of a document.
      mesh: with the axes (data, fsdp, tensor); None for the default device.
    """

    segments: Array
    window: Array
    windows: tuple[int | None, ...] = dataclasses.field(metadata={"static": True})
    mesh: Mesh | None = dataclasses.field(default=None, metadata={"static": True})


def attend(block: QKV, documents: Documents, past: None = None) -> Float[Array, "B T H C"]:
    """Softmax attention within documents, in the place of `model.attention.attend`.

    Returns:
      [B, T, H, C] in the queries' dtype; scores and softmax are float32.
    """
    queries, keys, values = block.turned
    attention = implementation(queries, documents)
    return attention(queries * queries.shape[-1] ** -0.5, keys, values, documents)


def implementation(queries: Array, documents: Documents) -> Callable[..., Array]:
    """What computes `attend` on the devices of the mesh."""
    _, length, _, width = queries.shape
    if documents.mesh is None or length % TILE:
        return blocked
    platform = documents.mesh.devices.flat[0].platform
    if platform == "tpu" and not width % TILE:
        return splash
    # The kernel of a GPU knows no windows, and rounds float32 before it multiplies.
    whole = all(window is None or window >= length for window in documents.windows)
    if platform == "gpu" and width in GPU_WIDTHS and whole and queries.dtype == jnp.bfloat16:
        return flash
    return blocked


def blocked(queries: Array, keys: Array, values: Array, documents: Documents) -> Array:
    """Blocks of scaled queries [B, T, H, C], each with all keys up to its last [B, T, H, C]."""
    batch, length, heads, width = queries.shape
    kv_heads = keys.shape[1]
    # A [G*T, C] matrix per key/value head gives plain products of contiguous matrices.
    grouped = queries.reshape(batch, length, kv_heads, -1, width).transpose(0, 2, 3, 1, 4)
    window = jnp.asarray([window or length for window in documents.windows])[documents.window]
    size = max(LEAST_BLOCK, -(-length // MOST_BLOCKS))

    @functools.partial(jax.checkpoint, static_argnums=(0, 1))
    def block(start: int, stop: int, queries: Array, keys: Array, values: Array) -> Array:
        mask = seen(documents.segments, window, start, stop)
        rows = queries.reshape(batch, kv_heads, -1, width)
        scores = jnp.einsum("bkqc,bkcu->bkqu", rows, keys, preferred_element_type=jnp.float32)
        scores = scores.reshape(*queries.shape[:-1], stop)
        scores = jnp.where(mask[:, None, None], scores, -jnp.inf)
        weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
        total = weights.sum(axis=-1, keepdims=True)
        rows = weights.reshape(*rows.shape[:-1], stop).astype(values.dtype)
        mixed = jnp.einsum("bkqu,bkuc->bkqc", rows, values, preferred_element_type=jnp.float32)
        return (mixed.reshape(queries.shape) / total).astype(queries.dtype)

    mixed = [
        block(start, stop, grouped[..., start:stop, :], keys[..., :stop], values[..., :stop, :])
        for start in range(0, length, size)
        for stop in (min(start + size, length),)
    ]
    return jnp.concatenate(mixed, axis=3).transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, -1)


@typed
def seen(segments: Int[Array, "B T"], window: Int[Array, ""], start: int, stop: int) -> Array:
    """True where the queries of a block see a key [B, stop - start, stop].

    segments (1 1 1 2), window 2, queries 2 and 3 -> rows (0 1 1 0) and (0 0 0 1).
    """
    query, key = jnp.arange(start, stop)[:, None], jnp.arange(stop)
    near = (key <= query) & (key > query - window)
    return (segments[:, start:stop, None] == segments[:, None, :stop]) & near


def splash(
    queries: Array, keys: Array, values: Array, documents: Documents, *, interpret: bool = False
) -> Array:
    """The TPU's kernel for scaled queries [B, T, H, C]; each device has its own rows and heads.

    Args:
      interpret: run the kernel on another device, as a test.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    length, heads = queries.shape[1], queries.shape[2] // _ways(documents.mesh, keys.shape[1])
    kernels = [_kernel(heads, length, window, interpret) for window in documents.windows]

    def local(queries: Array, keys: Array, values: Array, segments: Array, window: Array) -> Array:
        def with_kernel(kernel: Callable[..., Array], *arrays: Array) -> Array:
            row = lambda q, k, v, ids: kernel(q, k, v, SegmentIds(ids, ids))  # noqa: E731
            return jax.vmap(row)(*arrays)

        branches = [functools.partial(with_kernel, kernel) for kernel in kernels]
        return jax.lax.switch(window, branches, queries, keys, values, segments)

    arrays = queries.swapaxes(1, 2), keys.swapaxes(2, 3), values
    return _by_device(local, *arrays, documents).swapaxes(1, 2)


def flash(
    queries: Array, keys: Array, values: Array, documents: Documents, *, interpret: bool = False
) -> Array:
    """The GPU's kernel for scaled queries [B, T, H, C] of layers without a window; as `splash`."""
    with warnings.catch_warnings():
        # JAX 0.12 points to tokamax, which chooses its kernel by a GPU that must be there.
        warnings.simplefilter("ignore", DeprecationWarning)
        from jax.experimental.pallas.ops.gpu.attention import mha

    def local(queries: Array, keys: Array, values: Array, segments: Array, window: Array) -> Array:
        group = queries.shape[1] // keys.shape[1]
        keys, values = (jnp.repeat(array, group, axis=1) for array in (keys, values))
        arrays = (array.swapaxes(1, 2) for array in (queries, keys, values))
        return mha(*arrays, segments, causal=True, interpret=interpret).swapaxes(1, 2)

    arrays = queries.swapaxes(1, 2), keys.swapaxes(2, 3), values
    return _by_device(local, *arrays, documents).swapaxes(1, 2)


def _by_device(
    local: Callable[..., Array], queries: Array, keys: Array, values: Array, documents: Documents
) -> Array:
    """What a kernel makes of arrays [B, heads, T, C], on each device of its rows and heads."""
    mesh = documents.mesh
    if mesh is not None:
        by_head = "tensor" if _ways(mesh, keys.shape[1]) > 1 else None
        arrays = P(ROWS, by_head, None, None)
        places = (arrays, arrays, arrays, P(ROWS, None), P())
        local = jax.shard_map(local, mesh=mesh, in_specs=places, out_specs=arrays, check_vma=False)
    return local(queries, keys, values, documents.segments, documents.window)


def _ways(mesh: Mesh | None, kv_heads: int) -> int:
    """Devices that the heads are split over."""
    ways = mesh.shape["tensor"] if mesh else 1
    return 1 if kv_heads % ways else ways


def _kernel(heads: int, length: int, window: int | None, interpret: bool) -> Any:
    """Splash attention of a device's heads over whole rows."""
    from jax.experimental.pallas.ops.tpu import splash_attention as library

    shape = (length, length)
    mask = library.CausalMask(shape)
    if window is not None:
        mask = library.LocalMask(shape, window_size=(window - 1, 0), offset=0)
    size = next(size for size in TPU_BLOCKS if length % size == 0)
    return library.make_splash_mha_single_device(
        library.MultiHeadMask([mask] * heads),
        block_sizes=library.BlockSizes(
            block_q=size,
            block_kv=size,
            block_q_dq=size,
            block_kv_dq=size,
            block_q_dkv=size,
            block_kv_dkv=size,
            block_kv_dkv_compute=size,
        ),
        interpret=interpret,
    )
