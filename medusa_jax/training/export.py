"""Trained weights to the original's formats: v0.1 heads, or a merged v1.0 directory."""

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from medusa_jax.checkpoints.atomic import Replacing, copy_beside
from medusa_jax.checkpoints.dialects import DIALECTS, head_settings
from medusa_jax.checkpoints.load import resolve
from medusa_jax.checkpoints.names import backbone_places, head_places
from medusa_jax.checkpoints.tensors import (
    StoredTensor,
    Tensors,
    read_json,
    write_json,
    write_model,
    write_pickle,
)
from medusa_jax.data.tokenizer import ChatTokenizer
from medusa_jax.drafting.medusa_heads import HeadsConfig
from medusa_jax.errors import InputError
from medusa_jax.param_paths import flat, joined
from medusa_jax.training import lora, scanned_backbone
from medusa_jax.training.settings import Config
from medusa_jax.training.weights import Weights


def export(config: Config, weights: Weights, target: Path, *, write: bool = True) -> Path:
    """Writes what a run has trained under `target`, one tensor at a time.

    `heads/` gets the heads (v0.1), `model/`, where the backbone has learnt
    too, backbone and heads as one model (v1.0), adapters folded in.

    Args:
      write: whether this process writes; all must call, since each holds a part.

    Returns:
      the directory written.

    Raises:
      InputError: see `destination`.
    """
    dtype, made = config.run.export_dtype or config.model.dtype, destination(config, target)
    if config.mode == "medusa1":
        _heads(config, weights, made, dtype, write)
    else:
        _merged(config, weights, made, dtype, write)
    return made


def destination(config: Config, target: Path) -> Path:
    """The directory that `export` writes, and replaces if it is there.

    Raises:
      InputError: it is what the run started from.
    """
    made = target / ("heads" if config.mode == "medusa1" else "model")
    for name, source in (("model.path", config.model.path), ("heads.path", config.heads.path)):
        if source and Path(source).resolve() == made.resolve():
            raise InputError(f"{name} {source} is where the result goes; give another --workdir")
    return made


def _heads(config: Config, weights: Weights, target: Path, dtype: str, write: bool) -> None:
    params = flat(joined(weights.trainable, weights.frozen))
    base = Path(config.model.path)
    named = {"base_model_name_or_path": str(base.resolve() if base.exists() else base)}
    dialect = "v2" if weights.heads.shared else "v0.1"
    tensors = _head_tensors(dialect, weights.heads, params, dtype)
    with Replacing(target, write) as directory:
        # One file, however large: no reader of heads knows of shards.
        write_model(directory, DIALECTS[dialect].stem, tensors, write, math.inf)
        if write:
            write_pickle(directory / "medusa_lm_head.safetensors")
            write_json(directory / "config.json", head_settings(dialect, weights.heads) | named)


def _merged(config: Config, weights: Weights, target: Path, dtype: str, write: bool) -> None:
    params = flat(joined(weights.trainable, weights.frozen))
    scale = config.lora.alpha / config.lora.rank if config.adapted else 0.0
    source = resolve(config.model.path)
    settings = read_json(source / "config.json") | {"torch_dtype": dtype}
    settings.pop("dtype", None)
    if weights.heads.num_heads:
        settings |= head_settings("v1.0", weights.heads)
    if config.adapted:
        settings["tie_word_embeddings"] = False  # the adapted lm_head has left the embedding
    tensors = _backbone_tensors(weights, params, scale, dtype)
    tensors |= _head_tensors("v1.0", weights.heads, params, dtype)
    with Replacing(target, write) as directory:
        write_model(directory, DIALECTS["v1.0"].stem, tensors, write)
        if write:
            copy_beside(source, directory)
            if config.data.template:  # it was trained with another than its tokenizer's own
                template = ChatTokenizer(source, template=config.data.template).template
                (directory / "chat_template.jinja").write_text(template or "", encoding="utf-8")
            write_json(directory / "config.json", settings)


def _given(shape: tuple[int, ...], dtype: str, give: Callable[[], np.ndarray]) -> StoredTensor:
    return StoredTensor(shape, dtype, lambda index=...: give()[index]).cast(dtype)


def _head_tensors(dialect: str, heads: HeadsConfig, params: dict[str, Any], dtype: str) -> Tensors:
    tensors = {}
    for name, place in head_places(heads, DIALECTS[dialect].names).items():
        array = params["/".join(("heads", *place.path))]
        kind = "int64" if place.path == ("token_map",) else dtype  # as vLLM has it
        tensors[name] = _given(place.shape, kind, functools.partial(_whole, array))
    return tensors


def _backbone_tensors(
    weights: Weights, params: dict[str, Any], scale: float, dtype: str
) -> Tensors:
    tensors = {}
    for name, one in backbone_places(weights.model).items():
        path, layer = scanned_backbone.place("/".join(one.path))
        give = _folded(params, path, path.removesuffix("/weight"), layer, scale)
        tensors[name] = _given(one.shape, dtype, give)
    if "adapters/lm_head/a" in params and weights.model.tied:
        shape = params["backbone/embed/embedding"].shape
        give = _folded(params, "embed/embedding", "lm_head", None, scale)
        tensors["lm_head.weight"] = _given(shape, dtype, give)
    return tensors


def _folded(
    params: dict[str, Any], path: str, adapted: str, layer: int | None, scale: float
) -> Callable[[], np.ndarray]:
    """What gives a backbone tensor, its adapter, if any, folded in."""

    def single(name: str) -> jax.Array:
        return params[name] if layer is None else params[name][layer]

    def give() -> np.ndarray:
        weight = single(f"backbone/{path}")
        if f"adapters/{adapted}/a" not in params:
            return _whole(weight)
        factors = {key: single(f"adapters/{adapted}/{key}") for key in ("a", "b")}
        return _whole(lora.folded(weight, factors, scale))

    return give


def _whole(array: jax.Array) -> np.ndarray:
    """The array on this host, wherever its parts lie."""
    if array.is_fully_addressable:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
