"""Random weights of real shapes, for models that are not at hand."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from medusa_jax.checkpoints.names import backbone_places, head_places
from medusa_jax.checkpoints.weight_layout import for_decoding
from medusa_jax.distributed.rules import abstract
from medusa_jax.drafting.medusa_heads import HeadsConfig
from medusa_jax.model.config import ModelConfig
from medusa_jax.param_paths import nested


def random_params(abstract: Any) -> Any:
    """Small random numbers in the shapes and types of abstract parameters, on their devices."""

    def make(key: jax.Array, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        draw = jax.jit(_normal, static_argnums=(1, 2), out_shardings=leaf.sharding)
        return draw(key, leaf.shape, leaf.dtype)

    leaves, structure = jax.tree.flatten(abstract)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return structure.unflatten([make(key, leaf) for key, leaf in zip(keys, leaves, strict=True)])


def _normal(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    # Numbers of a quantized weight stand for multiples of a scale, which is as small.
    size = 0.02 if dtype.itemsize > 1 else 2
    return (size * jax.random.normal(key, shape)).astype(dtype)


def random_model(
    config: ModelConfig, heads: HeadsConfig, dtype: str, mesh: Mesh | None = None, **layout: Any
) -> dict[str, Any]:
    """Random {"backbone", "heads"} laid out for decoding: a model is never held twice."""
    return random_params(abstract_model(config, heads, mesh, dtype=dtype, **layout))


def abstract_model(
    config: ModelConfig, heads: HeadsConfig, mesh: Mesh | None = None, **layout: Any
) -> dict[str, Any]:
    """Abstract {"backbone", "heads"} laid out for decoding, and over a mesh where there is one.

    Args:
      layout: of `weight_layout.for_decoding`.
    """
    tables = {"backbone": backbone_places(config), "heads": head_places(heads)}
    leaves = {
        "/".join((part, *place.path)): jax.ShapeDtypeStruct(place.shape, jnp.float32)
        for part, table in tables.items()
        for place in table.values()
    }
    joint = mesh is None or mesh.size == 1  # a mesh of one absent device stands for none
    laid_out = functools.partial(for_decoding, tied=config.tied, joint=joint, **layout)
    shapes = jax.eval_shape(laid_out, nested(leaves))
    return abstract(shapes, mesh) if mesh else shapes
