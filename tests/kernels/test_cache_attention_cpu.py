"""Attention in C++: XLA's numbers, for heads of any width, by each set of instructions."""

import ctypes
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.processor import skip_without
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa_jax.kernels import cache_attention_cpu, native
from medusa_jax.model import cache_attention

pytestmark = pytest.mark.skipif(
    not native.available(), reason="no C++ compiler: XLA computes attention"
)
compute = jax.jit(cache_attention_cpu.attention)
by_xla = jax.jit(cache_attention._by_xla)


def inputs(
    batch: int, nodes: int, width: int, slots: int, lengths: Any, *, window: int | None = None,
    dtype: Any = jnp.float32, seed: int = 0,
) -> tuple[Any, ...]:  # fmt: skip
    """Arguments of attention: two key/value heads of three query heads each."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), dtype)

    mask = (rng.random((1, nodes, nodes)) < 0.5) | np.eye(nodes, dtype=bool)
    own = normal(batch, 2, width, nodes), normal(batch, 2, nodes, width), jnp.asarray(mask)
    lengths = jnp.asarray(lengths, jnp.int32)
    first = None if window is None else lengths[:, None] + jnp.arange(nodes) - window + 1
    keys, values = normal(batch, 2, width, slots), normal(batch, 2, slots, width)
    return normal(batch, 2, 3, nodes, width) * width**-0.5, own, keys, values, lengths, first


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    width=st.sampled_from([1, 8, 16, 20, 64, 80, 128]), nodes=st.sampled_from([1, 3, 40]),
    slots=st.sampled_from([17, 300]), lengths=st.lists(st.integers(0, 300), min_size=2, max_size=2),
    window=st.none() | st.integers(1, 300), dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
    seed=st.integers(0, 99),
)  # fmt: skip
@pytest.mark.slow
def test_the_numbers_of_xla(width, nodes, slots, lengths, window, dtype, seed):
    lengths = np.minimum(lengths, slots)
    case = inputs(2, nodes, width, slots, lengths, window=window, dtype=dtype, seed=seed)
    bound = 1e-5 if dtype == jnp.float32 else 3e-2
    np.testing.assert_allclose(compute(*case), by_xla(*case), atol=bound, rtol=bound)


def test_a_query_is_the_same_alone_and_among_others():
    """Not even its last bits depend on how many queries there are: tiles differ."""
    queries, (keys, values, mask), *cache = inputs(1, 45, 64, 700, [650])
    together = compute(queries, (keys, values, mask), *cache)
    for count in (1, 2, 5, 8, 9, 33):
        own = keys, values, mask[:, :count]
        some = compute(queries[:, :, :, :count], own, *cache)
        np.testing.assert_array_equal(some, together[:, :, :, :count])


def test_a_query_that_sees_nothing_gets_zeros():
    queries, (keys, values, mask), *cache = inputs(1, 4, 16, 300, [0])
    got = compute(queries, (keys, values, mask.at[:, 2].set(False)), *cache)
    assert not got[:, :, :, 2].any() and jnp.isfinite(got).all()


def test_numbers_that_are_not_finite_stay_in_their_query():
    queries, *others = inputs(1, 4, 16, 300, [290])
    got = compute(queries.at[0, 1, 2, 3, 5].set(jnp.nan), *others)
    bad = ~jnp.isfinite(got).all(axis=-1)
    assert bad.sum() == 1 and bad[0, 1, 2, 3]


def test_a_row_of_a_larger_cache():
    queries, own, keys, values, lengths, _ = inputs(3, 5, 16, 300, [0, 290, 0])
    mine = queries[1:2], (own[0][1:2], own[1][1:2], own[2])
    got = compute(*mine, keys, values, lengths[1:2], None, jnp.int32(1))
    np.testing.assert_array_equal(got, compute(queries, own, keys, values, lengths, None)[1:2])


class Queries(ctypes.Structure):
    """`Queries` of cache_attention.h."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("queries", "out", "keys", "values")]
        + [(name, ctypes.c_long) for name in ("stride", "count")]
        + [(name, ctypes.c_void_p) for name in ("own_keys", "own_values")]
        + [(name, ctypes.c_long) for name in ("own_stride", "own_count")]
        + [(name, ctypes.c_void_p) for name in ("mask", "first")]
        + [(name, ctypes.c_long) for name in ("width", "tokens", "begin", "end")]
        + [("type", ctypes.c_int)]
    )


@pytest.mark.parametrize("level", native.LEVELS)
def test_instruction_sets_agree(level: str):
    skip_without(level)
    case = inputs(1, 5, 40, 300, [290])
    queries, (keys, values, mask), *cache, _, _ = jax.tree.map(np.asarray, case)
    out = np.zeros(queries[0, 0].shape, np.float32)
    where = [array.ctypes.data for array in (queries, out, *cache, keys, values, mask)]
    given = Queries(*where[:4], 300, 290, *where[4:6], 5, 5, where[6], None, 40, 5, 0, 15, 0)
    getattr(ctypes.CDLL(str(native.library())), f"cache_attention_{level}")(ctypes.byref(given))
    np.testing.assert_allclose(out, by_xla(*case)[0, 0], atol=1e-5)


def test_queries_that_are_not_live_change_no_other():
    case = inputs(2, 45, 64, 300, [200, 17])
    live = np.arange(45)[None] < np.array([[3], [45]])
    some = compute(*case, None, jnp.asarray(live))
    np.testing.assert_array_equal(
        np.moveaxis(np.asarray(some), 3, 1)[live],
        np.moveaxis(np.asarray(compute(*case)), 3, 1)[live],
    )
    nobody = compute(*case, None, jnp.zeros((2, 45), bool))
    assert not nobody.any()
