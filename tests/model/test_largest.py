"""The best few of a vocabulary, in stages and for other devices."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medusa_jax.model.largest import by_groups, largest, largest_of_each


def scores(*shape: int, levels: int = 5) -> jax.Array:
    """Few different numbers, so most are equal to others; the lowest is that of a hidden token."""
    drawn = np.random.default_rng(0).integers(0, levels, shape)
    return jnp.where(drawn == 0, -jnp.inf, jnp.asarray(drawn, jnp.float32))


def assert_equal(got: Any, wanted: Any):
    for one, other in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("width", "k", "size"),
    [(12, 3, 3), (13, 3, 3), (15, 2, 2), (13, 9, 4), (13, 13, 4), (9, 2, 1), (700, 10, None)],
    ids=["divides", "filled up", "many groups", "k over groups", "all", "groups of one", "default"],
)
def test_stages_give_what_one_stage_gives(width: int, k: int, size: int | None):
    given = scores(40, 2, width)
    assert_equal(by_groups(given, k, size), jax.lax.top_k(given, k))


def test_the_example():
    got = by_groups(jnp.array([1.0, 3.0, 3.0, 0.0, 2.0, 2.0]), 2, size=2)
    assert_equal(got, ([3.0, 3.0], [1, 2]))


def test_arrays_together_give_what_each_gives():
    each = [scores(3, 12), -scores(3, 12)]
    values, places = largest_of_each(each, 4)
    for number, array in enumerate(each):
        assert_equal((values[:, number], places[:, number]), jax.lax.top_k(array, 4))


@pytest.mark.parametrize(("platform", "calls"), [("cpu", 3), ("tpu", 3), ("cuda", 4)])
def test_only_a_gpu_takes_two_stages(platform: str, calls: int):
    def pair(one: jax.Array, other: jax.Array) -> Any:
        return largest(one, 3), largest_of_each([one, other], 3)

    wide = jax.ShapeDtypeStruct((1, 4096), jnp.float32)
    text = jax.jit(pair).trace(wide, wide).lower(lowering_platforms=(platform,)).as_text()
    # A GPU has a call for each stage, of two arrays together too; others have a call an array.
    assert text.count("chlo.top_k") == calls
