"""Tokens that nothing comes of: padding, and rows that have ended. They are zeros all the way."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.models import TINY, TinyModel

from medusa_jax.checkpoints.weight_layout import for_decoding
from medusa_jax.decoding.network import Network
from medusa_jax.kernels import native
from medusa_jax.model.backbone import causal_mask
from medusa_jax.model.kv_cache import init_cache


@pytest.mark.slow
@pytest.mark.skipif(not native.available(), reason="no C++ compiler: nothing leaves out zeros")
@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_tokens_that_are_not_live_are_zeros_and_change_no_other(tiny: TinyModel, quantize: str):
    params = for_decoding(tiny.params, few_rows=True, quantize=quantize)
    rng = np.random.default_rng(0)
    cache = init_cache(TINY, 3, 32, jnp.float32, stacked=True)
    filled = [
        jnp.asarray(rng.normal(size=one.shape), one.dtype) for one in (cache.keys, cache.values)
    ]
    cache = dataclasses.replace(cache, keys=filled[0], values=filled[1])
    cache = dataclasses.replace(cache, length=jnp.array([5, 20, 0]))
    tokens = jnp.asarray(rng.integers(0, TINY.vocab_size, (3, 6)))
    inputs = tokens, cache.length[:, None] + jnp.arange(6), causal_mask(6), cache
    # Padding on the right, a row that has ended, and a row that is all of use.
    live = jnp.array([[True] * 4 + [False] * 2, [False] * 6, [True] * 6])
    network = Network(TINY)
    want, block = network.hidden(params, *inputs)
    got, live_block = network.hidden(params, *inputs, live=live)
    np.testing.assert_array_equal(got[live], want[live])
    assert not got[~live].any()
    for ours, theirs, tokens_at in zip(live_block.turned(), block.turned(), (-1, -2), strict=True):
        ours, theirs = (jnp.moveaxis(one, tokens_at, 1) for one in (ours, theirs))
        np.testing.assert_array_equal(ours[live], theirs[live])
        assert not ours[~live].any()


@pytest.mark.slow
@pytest.mark.skipif(not native.available(), reason="no C++ compiler: nothing leaves out zeros")
def test_the_last_layer_computes_keys_and_values_alone_of_tokens_that_are_not_wanted(
    tiny: TinyModel,
):
    params = for_decoding(tiny.params, few_rows=True)
    empty = init_cache(TINY, 1, 32, jnp.float32, stacked=True)
    cache = dataclasses.replace(empty, length=jnp.array([7]))
    inputs = jnp.arange(6)[None], 7 + jnp.arange(6)[None], causal_mask(6), cache
    live, wanted = jnp.arange(6)[None] < 5, jnp.arange(6)[None] == 4
    network = Network(TINY)
    whole, block = network.hidden(params, *inputs, live=live)
    some, same = network.hidden(params, *inputs, live=live, wanted=wanted)
    np.testing.assert_array_equal(some[wanted], whole[wanted])
    assert not some[~wanted].any()
    jax.tree.map(np.testing.assert_array_equal, same, block)


@pytest.mark.slow
def test_products_of_xla_are_not_told(tiny: TinyModel):
    """They take no less time for zeros, so their numbers stay as they were."""
    params = for_decoding(tiny.params)
    inputs = jnp.ones((1, 2), jnp.int32), jnp.arange(2)[None], causal_mask(2)
    cache = init_cache(TINY, 1, 8, jnp.float32)
    hidden, _ = Network(TINY).hidden(params, *inputs, cache, live=jnp.array([[True, False]]))
    assert hidden[0, 1].any()
