"""The threshold of top-k and top-p against a sorted vocabulary."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from medusa_jax.decoding.cutoff import least_kept

NUMBERS = st.floats(-(2.0**90), 2.0**90, width=32, allow_subnormal=False)
SHAPE = 3, 17  # a single shape: it is compiled once
ROWS = arrays.arrays(
    np.float32, SHAPE, elements=NUMBERS | st.sampled_from([0.0, -0.0, -np.inf, 1.0])
)
found = jax.jit(least_kept)


def test_the_example():
    assert least_kept(jnp.array([2.0, 1, 0]), jnp.array([0.5, 0.3, 0.2]), 0.6).item() == 1


@settings(deadline=None)
@given(logits=ROWS, k=st.integers(1, SHAPE[1]))
def test_count_is_that_of_a_sort(logits: np.ndarray, k: int):
    threshold = found(jnp.array(logits), jnp.ones(SHAPE), jnp.full((3, 1), k))
    kept = jnp.array(logits) >= threshold
    np.testing.assert_array_equal(kept, logits >= np.sort(logits)[:, -k, None])


@settings(deadline=None)
@given(logits=ROWS, wanted=st.integers(1, 60))
def test_mass_is_that_of_a_sort(logits: np.ndarray, wanted: int):
    """Whole weights, so that sums in any order are equal."""
    weights = np.random.default_rng(wanted).integers(0, 4, SHAPE).astype(np.float32)
    threshold = found(jnp.array(logits), jnp.array(weights), jnp.full((3, 1), float(wanted)))
    for row, weight, kept in zip(logits, weights, jnp.array(logits) >= threshold, strict=True):
        enough = [x for x in row if weight[row >= x].sum() >= wanted]
        np.testing.assert_array_equal(kept, row >= max(enough, default=-np.inf))


@pytest.mark.parametrize("wanted", [0.5, 0.9])
def test_rows_have_thresholds_of_their_own(wanted: float):
    logits = jnp.array([[3.0, 2, 1], [1, 3, 2]])
    weights = jnp.array([[0.6, 0.3, 0.1], [0.2, 0.3, 0.5]])
    both = least_kept(logits, weights, jnp.array([[wanted], [1.0]]))
    np.testing.assert_array_equal(both[0], least_kept(logits[0], weights[0], wanted))
    np.testing.assert_array_equal(both[1], [1.0])
