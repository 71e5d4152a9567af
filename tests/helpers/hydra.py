"""Random Hydra heads of a tiny model, as training and files hold them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from helpers.models import TinyModel
from medusa_jax.checkpoints.names import head_places
from medusa_jax.drafting.medusa_heads import HYDRA, HeadsConfig
from medusa_jax.param_paths import nested


def hydra_shape(tiny: TinyModel, **changes: Any) -> HeadsConfig:
    return dataclasses.replace(tiny.heads, architecture=HYDRA, **changes)


def random_heads(heads: HeadsConfig, seed: int = 0) -> dict[str, Any]:
    """Nested parameters [out, in], right now and then; of shared heads no projection."""
    places = head_places(heads).values()
    keys = jax.random.split(jax.random.key(seed), len(places))
    leaves = {
        "/".join(place.path): jax.random.normal(key, place.shape) / place.shape[-1] ** 0.5
        for key, place in zip(keys, places, strict=True)
    }
    if heads.truncated:
        ids = jax.random.permutation(jax.random.key(seed), 40)[: heads.truncated]
        leaves["token_map"] = ids.astype(jnp.int32)
    return nested(leaves)


def with_hydra(tiny: TinyModel, seed: int = 0, **changes: Any) -> TinyModel:
    """The same backbone with random Hydra heads."""
    heads = hydra_shape(tiny, **changes)
    params = tiny.params | {"heads": random_heads(heads, seed)}
    return dataclasses.replace(tiny, heads=heads, params=params)
