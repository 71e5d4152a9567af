"""Weights [in, out] for decoding: the same numbers in another order."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.head_files import stored
from helpers.models import TINY, TinyModel

from medusa_jax.drafting.medusa_heads import HeadsConfig, MedusaHeads, first_heads
from medusa_jax.model.backbone import Backbone, causal_mask
from medusa_jax.model.linear import (
    for_decoding,
    multiply,
    multiply_each,
    placed,
    project,
    stacked,
)

TOKENS = jnp.array([[3, 1, 4, 1, 5]])


def logits(config, params):
    module, positions = Backbone(config), jnp.arange(5)[None]
    hidden, _ = module.apply({"params": params}, TOKENS, positions, causal_mask(5))
    return module.apply({"params": params}, hidden, method="unembed")


def test_both_products_are_one():
    x, weight = jax.random.normal(jax.random.key(0), (3, 8)), jnp.arange(40.0).reshape(5, 8)
    np.testing.assert_allclose(multiply(x, weight.T), project(x, weight), rtol=1e-5)
    kernels = jnp.stack([weight.T, -weight.T, 2 * weight.T])
    for count in (1, 3):
        each = multiply_each(x[None, :count], kernels[:count])
        expected = multiply(x, weight.T)[:count] * jnp.array([1, -1, 2])[:count, None]
        np.testing.assert_allclose(each, expected[None], rtol=1e-5)


def test_names_and_shapes():
    weight = np.zeros((5, 8))
    assert {k: v.shape for k, v in placed("mlp/up/weight", weight).items()} == {
        "mlp/up/kernel": (8, 5)
    }
    assert placed("mlp/up/bias", weight[0]).keys() == {"mlp/up/bias"}
    assert placed("embed/embedding", weight).keys() == {"embed/embedding"}
    tied = placed("embed/embedding", weight, tied=True)
    assert {k: v.shape for k, v in tied.items()} == {
        "embed/embedding": (5, 8),
        "lm_head_kernel": (8, 5),
    }


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_backbone_gives_the_same_logits(tiny: TinyModel, tied: bool):
    config = dataclasses.replace(TINY, tied=tied)
    params = dict(tiny.params["backbone"])
    if tied:
        del params["lm_head"]
    laid = for_decoding({"backbone": params}, tied=tied)["backbone"]
    np.testing.assert_allclose(logits(config, laid), logits(config, params), atol=1e-4)
    back = stored(laid)
    if tied:
        back.pop("lm_head")
    chex.assert_trees_all_equal(back, jax.tree.map(np.asarray, params))


@pytest.mark.parametrize("shared", [False, True])
def test_heads_give_the_same_logits(shared: bool):
    heads = HeadsConfig(2, 2, 8, 0 if shared else 12, shared)
    unembedding = jax.random.normal(jax.random.key(1), (12, 8))
    hidden = jax.random.normal(jax.random.key(2), (3, 8))

    def unembed(x):
        return project(x, unembedding)

    params = MedusaHeads(heads).init(jax.random.key(0), hidden, unembed)["params"]
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(3), len(leaves))
    random = [jax.random.normal(key, x.shape) for key, x in zip(keys, leaves, strict=True)]
    params = jax.tree.unflatten(structure, random)
    laid = for_decoding({"heads": params})["heads"]
    one, other = (
        MedusaHeads(heads).apply({"params": some}, hidden, unembed) for some in (params, laid)
    )
    np.testing.assert_allclose(jnp.stack(one), jnp.stack(other), atol=1e-4)
    assert len(one) == 2 and not np.allclose(one[0], one[1])
    first = MedusaHeads(dataclasses.replace(heads, num_heads=1))
    (alone,) = first.apply({"params": first_heads(laid, 1)}, hidden, unembed)
    np.testing.assert_allclose(alone, one[0], atol=1e-4)
    chex.assert_trees_all_equal(stored(laid), jax.tree.map(np.asarray, params))


def test_blocks_of_heads_are_stacked_in_order():
    leaves = {f"head_{i}/block_1/bias": i for i in (10, 2, 0)} | {"head_2/vocab": 7}
    assert stacked(leaves, sum) == {"head_2/vocab": 7, "block_1/bias": 12}
    assert stacked(leaves, list)["block_1/bias"] == [0, 2, 10]
