"""Attention to a block and to a cache, by XLA and by kernels, against softmax in float64."""

import functools
import itertools
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.played import ABSENT_GPU
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa_jax.cli import flags
from medusa_jax.kernels import (
    NAMES,
    cache_attention_cpu,
    cache_attention_gpu,
    cache_attention_tpu,
    native,
    projected_attention_tpu,
    used,
)
from medusa_jax.kernels.heads import Heads
from medusa_jax.model import cache_attention
from medusa_jax.model.attention import QUERY_BLOCK, attend
from medusa_jax.model.cache_attention import Past
from medusa_jax.model.kernel_choice import KernelChoice
from medusa_jax.model.layers import rotate
from medusa_jax.model.qkv import QKV
from medusa_jax.serving.options import DecodingOptions

B, C = 2, 16
TPU = functools.partial(cache_attention_tpu.attention, interpret=True)
LAYERS = 2


def by_projections(
    kernel: Callable[..., Any], queries: Any, own: Any, keys: Any, values: Any, lengths: Any,
    first: Any, layers: int = 0,
) -> Any:  # fmt: skip
    """A kernel that turns and scales queries; they and the keys are turned back first.

    Queries, keys and values lie in a single array; of several layers, the last is the cache.
    """
    (batch, heads, _, count, width), (own_keys, own_values, mask) = queries.shape, own
    queries = queries.transpose(0, 3, 1, 2, 4).reshape(batch, count, -1, width) * width**0.5
    angles = jnp.arange(count * width / 2).reshape(1, count, -1)
    cos, sin = (jnp.broadcast_to(f(angles), (batch, count, width // 2)) for f in (jnp.cos, jnp.sin))
    back = (rotate(part, cos, -sin) for part in (queries, own_keys.transpose(0, 3, 1, 2)))
    joint = jnp.concatenate((*back, own_values.swapaxes(1, 2)), axis=2).reshape(batch, count, -1)
    starts = np.cumsum([0, queries.shape[2], heads])
    counts = queries.shape[2], heads, heads
    places = zip(starts, counts, strict=True)
    block = tuple(Heads(joint, width, int(start), n) for start, n in places)
    cache, layer = [keys, values], None
    if layers:
        others = range(layers - 1)
        cache = [jnp.stack((*(slots + 1 for _ in others), slots), axis=1) for slots in cache]
        layer = jnp.int32(layers - 1)
    mixed = kernel(block, (cos, sin), mask, *cache, lengths, first, layer)
    return mixed.reshape(batch, count, heads, -1, width).transpose(0, 2, 3, 1, 4)


def by_gpu(*inputs: Any, interpret: bool = True) -> Any:
    kernel = functools.partial(cache_attention_gpu.attention, interpret=interpret)
    return by_projections(kernel, *inputs, layers=LAYERS)


def by_tpu(*inputs: Any, interpret: bool = True) -> Any:
    kernel = functools.partial(projected_attention_tpu.attention, interpret=interpret)
    return by_projections(kernel, *inputs)


WAYS = {
    "xla": cache_attention._by_xla,
    "tpu": functools.partial(cache_attention._by_kernel, TPU),
    "tpu, projections": by_tpu,
    "gpu": by_gpu,
}
if native.available():
    WAYS["cpu"] = cache_attention_cpu.attention
COMPILED = {name: jax.jit(way) for name, way in WAYS.items()}


# (K, G, nodes, S) and the type of the numbers; few, as each is compiled.
SHAPES = [
    ((2, 1, 5, 64), jnp.float32),
    ((1, 3, 1, 320), jnp.float32),
    ((2, 2, 20, 320), jnp.bfloat16),
    ((1, 3, 70, 128), jnp.float32),
]


@st.composite
def cases(draw: Any) -> dict[str, Any]:
    """Lengths and windows of any size."""
    shape, dtype = draw(st.sampled_from(SHAPES))
    slots = shape[-1]
    lengths = draw(st.lists(st.integers(0, slots), min_size=B, max_size=B))
    window = draw(st.none() | st.integers(1, slots))
    about = {"shape": shape, "dtype": dtype, "window": window, "seed": draw(st.integers(0, 99))}
    return about | {"lengths": np.array(lengths, np.int32)}


def inputs_of(case: dict[str, Any]) -> tuple[Any, ...]:
    """Arguments of a way; slots beyond a length hold numbers that would show."""
    heads, group, nodes, slots = case["shape"]
    rng = np.random.default_rng(case["seed"])
    lengths = case["lengths"]

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32)

    queries, keys = normal(B, heads, group, nodes, C), normal(B, heads, C, slots)
    values, own_keys = normal(B, heads, slots, C), normal(B, heads, C, nodes)
    for row, length in enumerate(lengths):
        keys[row, :, :, length:] += 1e3
        values[row, :, length:] += 1e3
    mask = (rng.random((1, nodes, nodes)) < 0.5) | np.eye(nodes, dtype=bool)
    arrays = (queries, own_keys, normal(B, heads, nodes, C), keys, values)
    queries, own_keys, own_values, keys, values = (jnp.asarray(a, case["dtype"]) for a in arrays)
    first = None
    if case["window"] is not None:
        depths = rng.integers(0, 3, (1, nodes))
        first = jnp.asarray(lengths[:, None] + depths - case["window"] + 1, jnp.int32)
    own = own_keys, own_values, jnp.asarray(mask)
    return queries, own, keys, values, jnp.asarray(lengths), first


def expected(
    queries: Any, own: Any, keys: Any, values: Any, lengths: Any, first: Any
) -> np.ndarray:
    """Softmax over all keys that are seen, in float64."""
    queries, keys, values = (np.asarray(a, np.float64) for a in (queries, keys, values))
    own_keys, own_values, mask = (np.asarray(a, np.float64) for a in own)
    seen = np.arange(keys.shape[3]) < np.asarray(lengths)[:, None, None]
    if first is not None:
        seen = seen & (np.arange(keys.shape[3]) >= np.asarray(first)[:, :, None])
    nodes = mask.shape[1]
    whole = (np.broadcast_to(m, (B, nodes, m.shape[2])) for m in (mask.astype(bool), seen))
    mask = np.concatenate(tuple(whole), axis=2)[:, None, None]
    scores = queries @ np.concatenate((own_keys, keys), axis=3)[:, :, None]
    scores = np.where(mask, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return weights @ np.concatenate((own_values, values), axis=2)[:, :, None]


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(case=cases())
def test_each_way_equals_softmax_over_all_keys(way: str, case: dict[str, Any]):
    inputs = inputs_of(case)
    got = np.asarray(COMPILED[way](*inputs), np.float32)
    tolerance = 1e-5 if case["dtype"] == jnp.float32 else 3e-2
    np.testing.assert_allclose(got, expected(*inputs), atol=tolerance, rtol=tolerance)


CASE = {"window": None, "dtype": jnp.float32, "seed": 0}


@pytest.mark.parametrize("way", WAYS)
def test_a_row_does_not_depend_on_the_length_of_another(way: str):
    """Not even in its last bits."""
    case = CASE | {"shape": SHAPES[1][0], "lengths": np.array([70, 320], np.int32)}
    queries, own, keys, values, lengths, _ = inputs_of(case)
    compute = COMPILED[way]
    together = compute(queries, own, keys, values, lengths, None)[0]
    alone = compute(queries, own, keys, values, lengths.at[1].set(0), None)[0]
    np.testing.assert_array_equal(together, alone)


def test_large_scores_stay_finite():
    """Softmax subtracts the largest score of all keys, whichever part holds it."""
    for way, large in itertools.product(WAYS.keys() & {"xla", "cpu"}, (0, 1)):
        key, slot = jnp.full((1, 1, 2, 1), 90.0 + 10 * large), jnp.full((1, 1, 2, 64), 100.0)
        own = key, jnp.full((1, 1, 1, 2), 3.0), jnp.ones((1, 1, 1), bool)
        cache = slot - 20 * large, jnp.full((1, 1, 64, 2), 5.0), jnp.full(1, 64)
        got = COMPILED[way](jnp.full((1, 1, 1, 1, 2), 100.0), own, *cache, None)
        np.testing.assert_allclose(got, 3.0 if large else 5.0)


@pytest.mark.parametrize("way", sorted(WAYS.keys() & {"xla", "cpu"}))
def test_queries_of_a_single_row_meet_this_row(way: str):
    queries, (keys, values, mask), *cache, lengths, _ = inputs_of(
        CASE | {"shape": (2, 2, 5, 320), "lengths": np.array([310, 70], np.int32)}
    )
    own = keys[1:], values[1:], mask
    alone = [slots[1:] for slots in cache]
    wanted = COMPILED[way](queries[1:], own, *alone, lengths[1:], None)
    got = COMPILED[way](queries[1:], own, *cache, lengths[1:], None, jnp.int32(1))
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.slow
def test_long_blocks_equal_short_blocks():
    """Queries beyond QUERY_BLOCK take turns; each sees its own mask and window."""
    length, slots = QUERY_BLOCK + 70, 320
    case = CASE | {"shape": (1, 2, length, slots), "lengths": np.array([310, 5], np.int32)}
    queries, (keys, values, mask), *cache, first = inputs_of(case | {"window": 40})
    queries = queries.transpose(0, 3, 1, 2, 4).reshape(B, length, 2, C)
    still = jnp.ones((B, length, C // 2)), jnp.zeros((B, length, C // 2))
    parts = queries, keys.transpose(0, 3, 1, 2), values.swapaxes(1, 2)
    block = QKV(*(Heads(part.reshape(B, length, -1), C) for part in parts), still)
    whole = attend(block, mask, Past(*cache, first, KernelChoice()))
    scaled = (queries * C**-0.5).reshape(B, length, 1, 2, C).transpose(0, 2, 3, 1, 4)
    wanted = expected(scaled, (keys, values, mask), *cache, first).transpose(0, 3, 1, 2, 4)
    np.testing.assert_allclose(whole, wanted.reshape(whole.shape), atol=1e-5)


@pytest.mark.parametrize(
    ("platform", "way", "call", "width"),
    [
        ("tpu", "tpu", "tpu_custom_call", 64),
        ("tpu", "tpu, projections", "tpu_custom_call", 128),
        ("cuda", "gpu", "triton", 64),
    ],
)
def test_kernels_are_lowered_for_devices_that_are_not_here(
    platform: str, way: str, call: str, width: int
):
    ways = {
        "tpu": functools.partial(cache_attention._by_kernel, cache_attention_tpu.attention),
        "tpu, projections": functools.partial(by_tpu, interpret=False),
        "gpu": functools.partial(by_gpu, interpret=False),
    }
    shapes = (3, 2, 3, 4, width), (3, 2, width, 640), (3, 2, 640, width)
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    shapes = (3, 2, width, 4), (3, 2, 4, width)
    own = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    own.append(jax.ShapeDtypeStruct((1, 4, 4), bool))
    numbers = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((3,), (3, 4))]
    with jax.sharding.use_abstract_mesh(ABSENT_GPU) if platform == "cuda" else nullcontext():
        traced = jax.jit(ways[way]).trace(arrays[0], tuple(own), *arrays[1:], *numbers)
        assert call in traced.lower(lowering_platforms=(platform,)).as_text()


def test_the_platform_chooses_the_kernel():
    def choice(platform: str, used: tuple[str, ...] = NAMES) -> KernelChoice:
        mesh: Any = SimpleNamespace(devices=np.array([SimpleNamespace(platform=platform)]), size=1)
        return KernelChoice(used, mesh)

    (kernel,) = cache_attention.implementation(choice("tpu")).args
    assert kernel is cache_attention_tpu.attention
    for other in (choice("cpu"), choice("gpu"), choice("tpu", used=())):
        assert cache_attention.implementation(other) is cache_attention._by_xla
    here = cache_attention.implementation(KernelChoice(NAMES))
    assert (here is cache_attention._by_cpu) == native.available()
    for platform, widths in (("gpu", {32, 64, 128}), ("tpu", {128}), ("cpu", set())):
        found = {n for n in (16, 32, 64, 80, 128) if choice(platform).reads_projections(n)}
        assert found == widths
        assert choice(platform).stacks_cache({}, 64) == (platform == "gpu")
        assert choice(platform).multiplies == (platform == "gpu")
        assert not choice(platform, used=()).reads_projections(128)
    assert choice("tpu").of_projections() is projected_attention_tpu.attention
    assert choice("gpu").of_projections() is cache_attention_gpu.attention


@pytest.mark.parametrize(
    ("given", "left"),
    [
        ([], NAMES),
        (["--no_kernels", "products"], ("attention",)),
        (["--no_kernels", "attention"], ("products",)),
        (["--no_kernels"], ()),
    ],
)
def test_kernels_are_switched_off_by_name(given: list[str], left: tuple[str, ...]):
    parser = flags.parser("", "")
    flags.add_flags(parser, DecodingOptions)
    assert used(parser.parse_args(given).no_kernels) == left
