"""Random weights of real shapes, for models that are not at hand."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from medusa_jax.distributed.rules import abstract
from medusa_jax.drafting.medusa_heads import HeadsConfig, MedusaHeads
from medusa_jax.model.backbone import Backbone, causal_mask
from medusa_jax.model.config import ModelConfig
from medusa_jax.model.linear import for_decoding


def random_params(abstract: Any, dtype: str) -> Any:
    """Small random numbers in the shape of abstract parameters, made on their devices."""

    def make(key: jax.Array, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        draw = jax.jit(_normal, static_argnums=(1, 2), out_shardings=leaf.sharding)
        return draw(key, leaf.shape, dtype)

    leaves, structure = jax.tree.flatten(abstract)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return structure.unflatten([make(key, leaf) for key, leaf in zip(keys, leaves, strict=True)])


def _normal(key: jax.Array, shape: tuple[int, ...], dtype: str) -> jax.Array:
    return (0.02 * jax.random.normal(key, shape)).astype(dtype)


def abstract_backbone(config: ModelConfig) -> Any:
    """Abstract parameters of a backbone."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    init = jax.eval_shape(
        lambda: Backbone(config).init(jax.random.key(0), tokens, tokens, causal_mask(2))
    )
    return init["params"]


def abstract_heads(heads: HeadsConfig) -> Any:
    """Abstract parameters of heads."""
    hidden = jnp.zeros((1, heads.hidden_size))
    init = jax.eval_shape(
        lambda: MedusaHeads(heads).init(
            jax.random.key(0), hidden, lambda x: jnp.zeros((*x.shape[:-1], heads.vocab_size))
        )
    )
    return init["params"]


def random_model(
    config: ModelConfig, heads: HeadsConfig, dtype: str, mesh: Mesh | None = None
) -> dict[str, Any]:
    """Random {"backbone", "heads"} laid out for decoding: a model is never held twice."""
    return random_params(abstract_model(config, heads, mesh), dtype)


def abstract_model(
    config: ModelConfig, heads: HeadsConfig, mesh: Mesh | None = None
) -> dict[str, Any]:
    """Abstract {"backbone", "heads"} laid out for decoding, and over a mesh where there is one."""
    parts = {"backbone": abstract_backbone(config), "heads": abstract_heads(heads)}
    shapes = jax.eval_shape(functools.partial(for_decoding, tied=config.tied), parts)
    return abstract(shapes, mesh) if mesh else shapes
