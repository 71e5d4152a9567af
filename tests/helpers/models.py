"""Models made on the spot, which any clone can make."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from medusa_jax.drafting.medusa_heads import HeadsConfig, MedusaHeads
from medusa_jax.model import layer_stack
from medusa_jax.model.backbone import Backbone, causal_mask
from medusa_jax.model.config import ModelConfig
from medusa_jax.param_paths import flat, nested
from medusa_jax.training import scanned_backbone

TINY = ModelConfig(
    vocab_size=40,
    hidden_size=32,
    ffn_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    context=128,
)


@dataclasses.dataclass(frozen=True)
class TinyModel:
    """A random model whose heads are random too: right now and then."""

    config: ModelConfig
    heads: HeadsConfig
    params: dict[str, Any]


def random_model(config: ModelConfig, num_heads: int = 3, seed: int = 0) -> TinyModel:
    """Random weights, large enough for the next token to be far from uniform."""
    heads = HeadsConfig(num_heads, 1, config.hidden_size, config.vocab_size)
    key_backbone, key_heads = jax.random.split(jax.random.key(seed))
    tokens = jnp.zeros((1, 2), jnp.int32)
    backbone = jax.jit(Backbone(config).init)(key_backbone, tokens, tokens, causal_mask(2))
    hidden = jnp.zeros((1, config.hidden_size))
    medusa = MedusaHeads(heads).init(key_heads, hidden, lambda x: x)
    return TinyModel(
        config,
        heads,
        {
            "backbone": jax.tree.map(lambda x: 3 * x if x.ndim == 2 else x, backbone["params"]),
            "heads": medusa["params"],
        },
    )


def stacked(params: dict[str, Any], layers: int) -> dict[str, Any]:
    """Parameters [out, in] as the trainer holds them: layers stacked, heads apart."""
    single = flat(params["backbone"])
    shapes = scanned_backbone.shapes({path: leaf.shape for path, leaf in single.items()}, layers)
    leaves = {
        path: single[path]
        if path in single
        else jnp.stack([single[name] for name in layer_stack.members(path, layers)])
        for path in shapes
    }
    return params | {"backbone": nested(leaves), "heads": apart(params["heads"])}


def apart(heads: dict[str, Any]) -> dict[str, Any]:
    """Heads' parameters with the stacked blocks as blocks of each head."""
    leaves = {}
    for path, leaf in flat(heads).items():
        if path.startswith("block_"):
            leaves |= {f"head_{i}/{path}": single for i, single in enumerate(leaf)}
        else:
            leaves[path] = leaf
    return nested(leaves)
