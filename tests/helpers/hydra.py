"""Hydra heads made on the spot, as training and files hold them."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

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


def hydra_of_medusa(medusa: Path, directory: Path, noise: float = 0.5) -> Path:
    """Writes Hydra heads that guess as Medusa heads do, but for some say of the tokens between.

    Args:
      medusa: directory of Medusa heads.
      noise: of the weights that read tokens, beside those that read the hidden state.
    """
    tensors, rng = load_file(medusa / "medusa_lm_head.safetensors"), np.random.default_rng(0)
    made = {name: tensor for name, tensor in tensors.items() if name == "token_map"}
    for name, tensor in tensors.items():
        if found := re.fullmatch(r"(\d+)\.(\d+)\.(linear\.)?(weight|bias)", name):
            head, layer, linear, what = found.groups()
            part = f"hydra_mlp.{head}.{layer}.linear" if linear else f"hydra_lm_head.{head}"
            made[f"{part}.{what}"] = tensor = tensor.astype(np.float32)
            if linear and what == "weight" and layer == "0":
                width = len(tensor)
                shape = (width, (int(head) + 1) * width)
                between = noise * tensor.std() * rng.standard_normal(shape, np.float32)
                first = np.eye(*shape, dtype=np.float32)
                nothing = np.zeros((width, width), np.float32)
                residual = f"hydra_mlp.{head}.0.res_connection"
                made[f"{part}.weight"] = np.concatenate((tensor, between), axis=1)
                made[f"{residual}.weight"] = np.concatenate((first, nothing), axis=1)
                made[f"{residual}.bias"] = np.zeros(width, np.float32)
            elif not linear:
                made[f"{part}.bias"] = np.zeros(len(tensor), np.float32)
    directory.mkdir()
    save_file(made, directory / "hydra_lm_head.safetensors")
    (directory / "config.json").write_text(json.dumps({"base_model_name_or_path": ""}))
    return directory
