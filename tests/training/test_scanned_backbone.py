"""The backbone in a loop over stacked layers, against the backbone itself."""

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.models import TINY, random_model, stacked
from helpers.tiers import slow_except

from medusa_jax.model.backbone import Backbone, causal_mask
from medusa_jax.training import flops, scanned_backbone
from medusa_jax.training.remat import Remat

CONFIGS = {
    "plain": TINY,
    "tied, biases, qk-norm": dataclasses.replace(
        TINY, tied=True, qkv_bias=True, out_bias=True, mlp_bias=True, qk_norm=True
    ),
    "one windowed layer": dataclasses.replace(TINY, windows=(None, 3)),
}


@pytest.mark.parametrize("name", slow_except(CONFIGS, "plain"))
def test_hidden_states_and_logits_equal_the_backbones(name: str):
    config = CONFIGS[name]
    model = random_model(config)
    tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, config.vocab_size)
    positions = jnp.broadcast_to(jnp.arange(12), (2, 12))
    batch = {"tokens": tokens, "positions": positions, "segments": jnp.ones_like(tokens)}
    backbone: Any = Backbone(config)
    variables = {"params": model.params["backbone"]}
    expected, _ = jax.jit(backbone.apply)(variables, tokens, positions, causal_mask(12))
    params = stacked(model.params, config.num_layers)["backbone"]

    def ours(params: Any) -> Any:
        hidden = scanned_backbone.hidden_states(config, params, batch)
        return hidden, backbone.apply({"params": params}, hidden, method="unembed")

    hidden, logits = jax.jit(ours)(params)
    np.testing.assert_allclose(hidden, expected, atol=1e-5)
    unembed = jax.jit(lambda v, h: backbone.apply(v, h, method="unembed"))
    np.testing.assert_allclose(logits, unembed(variables, expected), atol=1e-4)


@pytest.mark.slow
def test_kept_products_change_no_gradient_and_are_not_computed_again():
    params = stacked(random_model(TINY).params, TINY.num_layers)["backbone"]
    tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, TINY.vocab_size)
    positions = jnp.broadcast_to(jnp.arange(12), (2, 12))
    batch = {"tokens": tokens, "positions": positions, "segments": jnp.ones_like(tokens)}

    def gradient(remat: Remat | None) -> tuple[Any, float]:
        def loss(params: Any) -> jax.Array:
            return (scanned_backbone.hidden_states(TINY, params, batch, remat=remat) ** 2).sum()

        made = jax.grad(loss)
        return jax.jit(made)(params), flops.traced(jax.make_jaxpr(made)(params).jaxpr)

    plain, least = gradient(None)
    recomputed, most = gradient(Remat())
    names = ("query", "key", "value", "gate", "up")
    kept, less = gradient(Remat(kept=names))
    offloaded, same = gradient(Remat(kept=names[:2], offloaded=("input", *names[2:])))
    for ours in (kept, recomputed, offloaded):
        chex.assert_trees_all_close(ours, plain, rtol=1e-4, atol=1e-5)
    assert same == less
    positions_in_all, width = TINY.num_layers * tokens.size, TINY.hidden_size
    heads = TINY.num_heads + 2 * TINY.num_kv_heads
    saved = 2 * positions_in_all * width * (heads * TINY.head_dim + 2 * TINY.ffn_size)
    assert most - less == saved
    assert least < less


@pytest.mark.slow
def test_documents_of_one_row_do_not_see_each_other():
    """Two documents packed in a row have the hidden states they have alone."""
    params = stacked(random_model(TINY).params, TINY.num_layers)["backbone"]
    tokens = jax.random.randint(jax.random.key(1), (1, 12), 0, TINY.vocab_size)
    packed = {
        "tokens": tokens,
        "segments": jnp.array([[1] * 7 + [2] * 5]),
        "positions": jnp.array([[*range(7), *range(5)]]),
    }
    run = jax.jit(lambda batch: scanned_backbone.hidden_states(TINY, params, batch))
    together = run(packed)
    for part in (slice(0, 7), slice(7, 12)):
        alone = run({key: array[:, part] for key, array in packed.items()})
        np.testing.assert_allclose(together[:, part], alone, atol=1e-5)
