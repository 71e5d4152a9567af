"""Trained weights to the original's formats: v0.1 heads, or a merged v1.0 directory."""

import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from medusa_jax import hf
from medusa_jax.errors import InputError
from medusa_jax.heads import HeadsConfig
from medusa_jax.places import MERGED, backbone_places, head_places
from medusa_jax.tensor_files import read_json, write_json, write_model, write_pickle
from medusa_jax.text import Text
from medusa_jax.training import lora, stack
from medusa_jax.training.settings import Config
from medusa_jax.training.weights import Weights
from medusa_jax.tree_paths import flat, joined

# What a Hugging Face directory holds beside weights and config.json.
_BESIDE = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "generation_config.json",
           "chat_template*", "vocab.json", "merges.txt")  # fmt: skip
Named = Iterator[tuple[str, tuple[int, ...], Callable[[], np.ndarray]]]


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
    params = flat({"heads": weights.trainable["heads"]})
    base = Path(config.model.path)
    named = {"base_model_name_or_path": str(base.resolve() if base.exists() else base)}
    settings = _heads_settings(weights.heads) | named
    tensors = list(_head_tensors(weights.heads, params, ""))
    with _Replacing(target, write) as directory:
        # One file, however large: no reader of heads knows of shards.
        write_model(directory, "medusa_lm_head", tensors, dtype, write, math.inf)
        if write:
            write_pickle(directory / "medusa_lm_head.safetensors")
            write_json(directory / "config.json", settings)


def _merged(config: Config, weights: Weights, target: Path, dtype: str, write: bool) -> None:
    params = flat(joined(weights.trainable, weights.frozen))
    scale = config.lora.alpha / config.lora.rank if config.adapted else 0.0
    source = hf.resolve(config.model.path)
    settings = read_json(source / "config.json") | {"torch_dtype": dtype}
    settings.pop("dtype", None)
    if weights.heads.num_heads:
        settings |= _heads_settings(weights.heads)
    if config.adapted:
        settings["tie_word_embeddings"] = False  # the adapted lm_head has left the embedding
    tensors = list(_backbone_tensors(weights, params, scale))
    tensors += _head_tensors(weights.heads, params, MERGED)
    with _Replacing(target, write) as directory:
        write_model(directory, "model", tensors, dtype, write)
        if write:
            for pattern in _BESIDE:
                for file in filter(Path.is_file, source.glob(pattern)):
                    shutil.copyfile(file, directory / file.name)
            if config.data.template:  # it was trained with another than its tokenizer's own
                template = Text(source, template=config.data.template).template
                (directory / "chat_template.jinja").write_text(template or "", encoding="utf-8")
            write_json(directory / "config.json", settings)


def _heads_settings(heads: HeadsConfig) -> dict[str, Any]:
    shared = {"version": "2"} if heads.shared else {}
    return {"medusa_num_heads": heads.num_heads, "medusa_num_layers": heads.num_layers} | shared


def _head_tensors(heads: HeadsConfig, params: dict[str, Any], prefix: str) -> Named:
    for name, place in head_places(heads, prefix).items():
        array = params["/".join(("heads", *place.path))]
        yield name, place.shape, lambda array=array: _whole(array)


def _backbone_tensors(weights: Weights, params: dict[str, Any], scale: float) -> Named:
    for name, one in backbone_places(weights.model).items():
        path, layer = stack.place("/".join(one.path))
        yield name, one.shape, _folded(params, path, path.removesuffix("/weight"), layer, scale)
    if "adapters/lm_head/a" in params and weights.model.tied:
        shape = params["backbone/embed/embedding"].shape
        yield "lm_head.weight", shape, _folded(params, "embed/embedding", "lm_head", None, scale)


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


class _Replacing:
    """A directory that takes `target`'s place once it is complete."""

    def __init__(self, target: Path, write: bool) -> None:
        self._target, self._new, self._write = target, target.with_name(f"{target.name}.tmp"), write

    def __enter__(self) -> Path:
        if self._write:
            shutil.rmtree(self._new, ignore_errors=True)
            self._new.mkdir(parents=True)
        return self._new

    def __exit__(self, kind: Any, *_: Any) -> None:
        if self._write and kind is None:
            shutil.rmtree(self._target, ignore_errors=True)
            self._new.rename(self._target)
