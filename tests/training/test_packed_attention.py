"""Attention of packed rows: the plain blocks against masked attention, the kernel against both."""

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medusa_jax.kernels.heads import Heads
from medusa_jax.model.attention import attend
from medusa_jax.model.layers import within_window
from medusa_jax.model.qkv import QKV
from medusa_jax.training.packed_attention import (
    Documents,
    blocked,
    flash,
    implementation,
    seen,
    splash,
)


def inputs(length: int, width: int = 8, heads: int = 6, kv_heads: int = 2) -> list[jax.Array]:
    """Queries [B, T, H, C], keys [B, K, C, T], values [B, K, T, C], and the weights of outputs."""
    shapes = [(2, length, heads, width), (2, kv_heads, width, length)]
    shapes += [(2, kv_heads, length, width), (2, length, heads, width)]
    keys = jax.random.split(jax.random.key(length), 4)
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def documents(length: int, windows: tuple[int | None, ...], layer: int) -> Documents:
    """Rows of three documents, and of two with padding."""
    ends = [(length // 5, length // 2), (length // 3, length - 7)]
    segments = np.array([np.searchsorted(end, np.arange(length), "right") for end in ends])
    return Documents(jnp.asarray(segments), jnp.asarray(layer), windows)


def masked(queries: jax.Array, keys: jax.Array, values: jax.Array, seen: Documents) -> jax.Array:
    """With one mask of all positions; unscaled queries, as `attend` takes them."""
    order = jnp.broadcast_to(jnp.arange(queries.shape[1]), seen.segments.shape)
    mask = (seen.segments[:, :, None] == seen.segments[:, None]) & (
        order[:, :, None] >= order[:, None]
    )
    near = within_window(order, order, seen.windows[int(seen.window)])
    batch, length, _, width = queries.shape
    still = jnp.ones((batch, length, width // 2)), jnp.zeros((batch, length, width // 2))
    arrays = queries * width**0.5, keys.transpose(0, 3, 1, 2), values.swapaxes(1, 2)
    block = (Heads(array.reshape(batch, length, -1), width) for array in arrays)
    return attend(QKV(*block, still), mask & near)


def values_and_gradients(function: Callable[..., jax.Array], arrays: list, seen: Documents) -> list:
    def total(queries: jax.Array, keys: jax.Array, values: jax.Array) -> tuple:
        out = function(queries, keys, values, seen)
        return jnp.sum(out * arrays[3]), out

    (_, out), grads = jax.value_and_grad(total, (0, 1, 2), has_aux=True)(*arrays[:3])
    return [out, *grads]


@pytest.mark.slow
@pytest.mark.parametrize("length", [12, 300])
@pytest.mark.parametrize("layer", [0, 1])
def test_blocks_equal_one_mask(length: int, layer: int):
    arrays, seen = inputs(length), documents(length, (9, None), layer)
    np.testing.assert_allclose(
        jax.jit(blocked)(*arrays[:3], seen), masked(*arrays[:3], seen), atol=1e-5
    )


@pytest.mark.slow
def test_gradients_of_blocks_equal_those_of_one_mask():
    arrays, seen = inputs(140), documents(140, (None,), 0)
    for ours, theirs in zip(
        values_and_gradients(blocked, arrays, seen),
        values_and_gradients(masked, arrays, seen),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel", "width", "windows", "layer", "scale"),
    [
        (splash, 128, (70, None), 0, 1.0),
        (splash, 128, (70, None), 1, 1.0),
        (flash, 64, (None,), 0, 64**-0.5),
    ],
)
def test_a_kernel_equals_the_blocks(
    kernel: Callable, width: int, windows: tuple, layer: int, scale: float
):
    """Interpreted, with its gradients."""
    arrays, seen = inputs(256, width=width, heads=4), documents(256, windows, layer)
    arrays[0] *= scale
    kernel = functools.partial(kernel, interpret=True)
    for ours, theirs in zip(
        values_and_gradients(kernel, arrays, seen),
        values_and_gradients(blocked, arrays, seen),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize(
    ("platform", "length", "width", "dtype", "windows", "expected"),
    [
        ("tpu", 256, 128, jnp.bfloat16, (70, None), splash),
        ("tpu", 256, 64, jnp.bfloat16, (None,), blocked),
        ("tpu", 200, 128, jnp.bfloat16, (None,), blocked),
        ("gpu", 256, 64, jnp.bfloat16, (None,), flash),
        ("gpu", 256, 128, jnp.bfloat16, (256,), flash),  # which no query of the row reaches
        ("gpu", 256, 128, jnp.bfloat16, (255,), blocked),
        ("gpu", 256, 128, jnp.float32, (None,), blocked),
        ("gpu", 256, 96, jnp.bfloat16, (None,), blocked),
        ("cpu", 256, 128, jnp.bfloat16, (None,), blocked),
    ],
)
def test_a_kernel_is_used_where_it_knows_the_layers(
    platform: str, length: int, width: int, dtype: Any, windows: tuple, expected: Callable
):
    mesh: Any = SimpleNamespace(devices=np.array([SimpleNamespace(platform=platform)]))
    queries = jnp.zeros((1, length, 2, width), dtype)
    rows = Documents(jnp.zeros((1, length), int), jnp.asarray(0), windows, mesh)
    assert implementation(queries, rows) is expected


def test_what_a_block_sees():
    segments = jnp.array([[1, 1, 1, 2]])
    rows = seen(segments, jnp.asarray(2), 2, 4)
    np.testing.assert_array_equal(rows, [[[0, 1, 1, 0], [0, 0, 0, 1]]])
    np.testing.assert_array_equal(seen(segments, jnp.asarray(4), 2, 3), [[[1, 1, 1]]])
