"""Trained weights to the originals' formats: a file of heads, or a merged directory."""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from medusa_jax import json_files
from medusa_jax.checkpoints.atomic import Replacing, copy_beside
from medusa_jax.checkpoints.backbone import read_settings
from medusa_jax.checkpoints.dialects import (
    DIALECTS,
    backbone_settings,
    dialect_of,
    head_settings,
    misread,
)
from medusa_jax.checkpoints.hub import resolve
from medusa_jax.checkpoints.names import backbone_places, head_places
from medusa_jax.checkpoints.stored_tensor import StoredTensor, Tensors
from medusa_jax.checkpoints.tensors import write_model, write_pickle
from medusa_jax.data.gguf_tokenizer import save_tokenizer
from medusa_jax.data.tokenizer import ChatTokenizer
from medusa_jax.drafting.medusa_heads import HeadsConfig
from medusa_jax.errors import InputError
from medusa_jax.files import writing
from medusa_jax.gguf_file import is_gguf
from medusa_jax.model import layer_stack
from medusa_jax.model.config import ModelConfig
from medusa_jax.model.weight import Weight
from medusa_jax.param_paths import flat, joined
from medusa_jax.training import lora
from medusa_jax.training.settings import Config
from medusa_jax.training.weights import Weights

log = logging.getLogger(__name__)


def export(config: Config, weights: Weights, target: Path, *, write: bool = True) -> Path:
    """Writes what a run has trained under `target`, one tensor at a time.

    `heads/` gets the heads (v0.1, or hydra), `model/`, where the backbone has learnt
    too, backbone and heads as one model (v1.0, or hydra_merged), adapters folded in.

    Args:
      write: whether this process writes; all must call, since each holds a part.

    Returns:
      the directory written.

    Raises:
      InputError: see `destination`.
    """
    dtype, directory = config.run.export_dtype or config.model.dtype, destination(config, target)
    if config.mode == "medusa1":
        _heads(config, weights, directory, dtype, write)
    else:
        _merged(config, weights, directory, dtype, write)
    return directory


def destination(config: Config, target: Path) -> Path:
    """The directory that `export` writes, and replaces if it is there.

    Raises:
      InputError: it is what the run started from.
    """
    directory = target / ("heads" if config.mode == "medusa1" else "model")
    for name, source in (("model.path", config.model.path), ("heads.path", config.heads.path)):
        if source and Path(source).resolve() == directory.resolve():
            raise InputError(f"{name} {source} is where the result goes; give another --workdir")
    return directory


def _heads(config: Config, weights: Weights, target: Path, dtype: str, write: bool) -> None:
    params = flat(joined(weights.trainable, weights.frozen))
    base = Path(config.model.path)
    named = {"base_model_name_or_path": str(base.resolve() if base.exists() else base)}
    dialect = dialect_of(weights.heads)
    tensors = _head_tensors(dialect, weights.heads, params, dtype)
    _warn(dialect, weights.heads, write)
    with Replacing(target, write) as directory:
        # One file, however large: no reader of heads knows of shards.
        write_model(directory, DIALECTS[dialect].stem, tensors, write, math.inf)
        if write:
            write_pickle(directory / f"{DIALECTS[dialect].stem}.safetensors")
            json_files.write(
                directory / "config.json", head_settings(dialect, weights.heads) | named
            )


def _merged(config: Config, weights: Weights, target: Path, dtype: str, write: bool) -> None:
    params = joined(weights.trainable, weights.frozen)
    source = resolve(config.model.path)
    settings = backbone_settings(read_settings(source), dtype)
    dialect = dialect_of(weights.heads, merged=True)
    if weights.heads.num_heads:
        settings |= head_settings(dialect, weights.heads)
        _warn(dialect, weights.heads, write)
    if config.adapted:
        scale = config.lora.alpha / config.lora.rank
        params["backbone"] = lora.attached(params["backbone"], params["adapters"], scale)
    if config.adapted or not weights.model.tied:
        settings["tie_word_embeddings"] = False  # the lm_head has left the embedding
    tensors = _backbone_tensors(weights.model, flat(params), dtype)
    tensors |= _head_tensors(dialect, weights.heads, flat(params), dtype)
    with Replacing(target, write) as directory:
        write_model(directory, DIALECTS[dialect].stem, tensors, write)
        if write:
            copy_beside(source, directory)
            if is_gguf(source):
                save_tokenizer(source, directory)
            if config.data.template:  # training used another template than the tokenizer's
                template = ChatTokenizer(source, template=config.data.template).template
                file = directory / "chat_template.jinja"
                with writing(file):
                    file.write_text(template or "", encoding="utf-8")
            json_files.write(directory / "config.json", settings)


def _warn(dialect: str, heads: HeadsConfig, write: bool) -> None:
    """Says what the readers of the other programs would get wrong."""
    if write and (wrong := misread(dialect, heads)):
        log.warning("written for medusa_jax: %s; `convert` writes other dialects", wrong)


def _head_tensors(dialect: str, heads: HeadsConfig, params: dict[str, Any], dtype: str) -> Tensors:
    tensors = {}
    for name, place in head_places(heads, DIALECTS[dialect].names).items():
        array = params["/".join(("heads", *place.path))]
        # vLLM stores its map as int64.
        stored_dtype = "int64" if place.path == ("token_map",) else dtype
        tensors[name] = _given(place.shape, stored_dtype, functools.partial(_whole, array))
    return tensors


def _backbone_tensors(model: ModelConfig, params: dict[str, Any], dtype: str) -> Tensors:
    """The backbone's tensors; a weight with an adapter is written with the adapter folded in."""
    places = backbone_places(dataclasses.replace(model, tied="backbone/lm_head" not in params))
    tensors = {}
    for name, place in places.items():
        path, layer = layer_stack.place("/".join(place.path))
        leaf = params[f"backbone/{path}"]
        tensors[name] = _given(place.shape, dtype, functools.partial(_single, leaf, layer))
    return tensors


def _single(leaf: jax.Array | Weight, layer: int | None) -> np.ndarray:
    """One layer's part of a parameter, or, with None, a parameter that is no stack."""
    if layer is not None:
        leaf = jax.tree.map(lambda stack: stack[layer], leaf)
    return _whole(lora.folded(leaf) if isinstance(leaf, Weight) else leaf)


def _given(shape: tuple[int, ...], dtype: str, give: Callable[[], np.ndarray]) -> StoredTensor:
    return StoredTensor(shape, dtype, lambda index=...: give()[index]).cast(dtype)


def _whole(array: jax.Array) -> np.ndarray:
    """The array on this host, gathered from the devices of all processes."""
    if array.is_fully_addressable:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
