"""Hugging Face directories and Medusa head files to parameters.

One table says, for every tensor name of a checkpoint, where it goes in our
parameters; shapes are the same on both sides. Dialects read here: Llama-family directories, the
original's v0.1 heads (`.pt`, `.safetensors`), its version "2" (shared lm_head)
and v1.0 merged models (`medusa_head.*` beside the backbone's tensors).
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from medusa_jax import tensor_files
from medusa_jax.config import ModelConfig, from_hf
from medusa_jax.errors import InputError
from medusa_jax.heads import NO_HEADS, HeadsConfig
from medusa_jax.tensor_files import Tensors

HEAD_FILES = ("medusa_lm_head.safetensors", "medusa_lm_head.pt")
_HEAD_NAME = re.compile(r"(?:medusa_head\.)?(\d+)\.(\d+)\.(linear\.weight|linear\.bias|weight)")
# Buffers that old checkpoints carry and nobody needs.
_NOISE = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a stored tensor goes.

    Attributes:
      path: keys in the nested parameter dict.
      shape: the same there and here.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Model:
    """A loaded model.

    Attributes:
      config, heads: shapes; `NO_HEADS` where there are none.
      params: {"backbone": ..., "heads": ...}.
      stop_ids: end-of-sequence tokens from its generation settings.
      suppress: tokens never to produce, from the same.
      directory: where the backbone, and so its tokenizer, was found.
    """

    config: ModelConfig
    heads: HeadsConfig
    params: dict[str, Any]
    stop_ids: tuple[int, ...]
    suppress: tuple[int, ...]
    directory: Path


def load_model(model: str | Path, heads: str | Path | None = None, dtype: str = "float32") -> Model:
    """Loads a backbone and, where there are any, its Medusa heads.

    Args:
      model: directory or hub id of a Llama-family model, of a merged v1.0 Medusa
        model, or of v0.1 heads whose config names their backbone.
      heads: directory, file or hub id of heads; default: those found with the model.
      dtype: of all parameters, "float32" or "bfloat16".

    Raises:
      InputError: something is missing, unreadable, unsupported or of another
        shape; one message lists everything wrong with the tensors.
    """
    directory = resolve(model)
    settings = tensor_files.read_json(directory / "config.json")
    # Heads may carry a model_type of their own, but never a backbone's shape.
    if "hidden_size" not in settings and "base_model_name_or_path" in settings:
        heads = heads or directory
        directory = _backbone_of(directory, settings["base_model_name_or_path"])
        settings = tensor_files.read_json(directory / "config.json")
    config = from_hf(settings)
    tensors = tensor_files.open_model(directory)
    merged = {name: tensor for name, tensor in tensors.items() if name.startswith("medusa_head.")}
    rest = {name: tensor for name, tensor in tensors.items() if name not in merged}
    head_tensors, source = merged, directory
    if heads is not None:
        source = resolve(heads)
        head_tensors = open_heads(source)
    elif not merged and (found := _head_file(directory)):
        head_tensors, source = tensor_files.open_file(found), found
    heads_config, params = NO_HEADS, {}
    if head_tensors:  # before the backbone, which takes long to read
        heads_config = heads_config_of(head_tensors, source)
        _check_fit(heads_config, config, source)
        places = _head_places(heads_config, head_tensors)
        params["heads"] = _fill(places, head_tensors, source, dtype)
    params["backbone"] = _fill(_backbone_places(config), rest, directory, dtype)
    generation = directory / "generation_config.json"
    settings |= tensor_files.read_json(generation) if generation.is_file() else {}
    return Model(
        config=config,
        heads=heads_config,
        params=params,
        stop_ids=_ids(settings.get("eos_token_id")),
        suppress=_ids(settings.get("suppress_tokens")),
        directory=directory,
    )


def resolve(name: str | Path) -> Path:
    """A local path as it is; anything that looks like `owner/name` from the hub."""
    path = Path(name)
    if path.exists():
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) or str(name).startswith("."):
        raise InputError(f"{name} does not exist (and is not a hub id of the form owner/name)")
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.pt", "*.bin"]
    try:
        return Path(snapshot_download(str(name), allow_patterns=wanted))
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{name} is no local path and could not be had from the hub: {reason}"
        ) from None


def open_heads(source: Path) -> Tensors:
    """Head tensors of a file, of a directory with a head file, or of a merged model."""
    if source.is_file():
        return tensor_files.open_file(source)
    if found := _head_file(source):
        return tensor_files.open_file(found)
    tensors = tensor_files.open_model(source)
    heads = {name: tensor for name, tensor in tensors.items() if name.startswith("medusa_head.")}
    if not heads:
        raise InputError(
            f"{source} holds no Medusa heads: expected {' or '.join(HEAD_FILES)}, or tensors "
            "named medusa_head.*"
        )
    return heads


def heads_config_of(tensors: Tensors, source: Path) -> HeadsConfig:
    """Counts heads and layers from the tensors themselves; a checkpoint's config may lie.

    Raises:
      InputError: a name that is no head's, or an incomplete set.
    """
    matches = {name: _HEAD_NAME.fullmatch(name) for name in tensors}
    unknown = [name for name, match in matches.items() if match is None]
    if unknown:
        raise InputError(
            f"{source}: not the original's head layout; unknown tensors: {', '.join(unknown)}"
        )
    parsed = [match.groups() for match in matches.values() if match]
    num_heads = 1 + max(int(head) for head, _, _ in parsed)
    num_layers = max((1 + int(layer) for _, layer, kind in parsed if kind != "weight"), default=0)
    vocab_shapes = {
        tensor.shape for name, tensor in tensors.items() if name.split(".")[-2] != "linear"
    }
    first = next(iter(tensors.values()))
    vocab_size = next(iter(vocab_shapes))[0] if vocab_shapes else 0
    return HeadsConfig(
        num_heads=num_heads,
        num_layers=num_layers,
        hidden_size=first.shape[-1],
        vocab_size=vocab_size,
        shared=not vocab_shapes,
    )


def _check_fit(heads: HeadsConfig, config: ModelConfig, source: Path) -> None:
    if heads.hidden_size != config.hidden_size:
        raise InputError(
            f"{source}: these heads were made for hidden size {heads.hidden_size}, "
            f"the model has {config.hidden_size}"
        )
    if not heads.shared and heads.vocab_size != config.vocab_size:
        raise InputError(
            f"{source}: these heads were made for a vocabulary of {heads.vocab_size}, "
            f"the model has {config.vocab_size}"
        )


def _backbone_places(config: ModelConfig) -> dict[str, Place]:
    width, ffn = config.hidden_size, config.ffn_size
    query_width = config.num_heads * config.head_dim
    kv_width = config.num_kv_heads * config.head_dim
    places = {
        "model.embed_tokens.weight": Place(("embed", "embedding"), (config.vocab_size, width)),
        "model.norm.weight": Place(("final_norm", "scale"), (width,)),
    }
    if not config.tied:
        places["lm_head.weight"] = Place(("lm_head",), (config.vocab_size, width))
    linears = {
        "self_attn.q_proj": ("attention", "query", query_width, width, config.qkv_bias),
        "self_attn.k_proj": ("attention", "key", kv_width, width, config.qkv_bias),
        "self_attn.v_proj": ("attention", "value", kv_width, width, config.qkv_bias),
        "self_attn.o_proj": ("attention", "out", width, query_width, config.out_bias),
        "mlp.gate_proj": ("mlp", "gate", ffn, width, config.mlp_bias),
        "mlp.up_proj": ("mlp", "up", ffn, width, config.mlp_bias),
        "mlp.down_proj": ("mlp", "down", width, ffn, config.mlp_bias),
    }
    norms: dict[str, tuple[tuple[str, ...], int]] = {
        "input_layernorm": (("attention_norm",), width),
        "post_attention_layernorm": (("mlp_norm",), width),
    }
    if config.qk_norm:
        norms["self_attn.q_norm"] = (("attention", "query_norm"), config.head_dim)
        norms["self_attn.k_norm"] = (("attention", "key_norm"), config.head_dim)
    for i in range(config.num_layers):
        stored, layer = f"model.layers.{i}", f"layer_{i}"
        for name, (group, ours, out, into, bias) in linears.items():
            path = (layer, group, ours)
            places[f"{stored}.{name}.weight"] = Place((*path, "weight"), (out, into))
            if bias:
                places[f"{stored}.{name}.bias"] = Place((*path, "bias"), (out,))
        for name, (path, size) in norms.items():
            places[f"{stored}.{name}.weight"] = Place((layer, *path, "scale"), (size,))
    return places


def _head_places(config: HeadsConfig, names: Iterable[str]) -> dict[str, Place]:
    width = config.hidden_size
    prefix = "medusa_head." if next(iter(names)).startswith("medusa_head.") else ""
    places = {}
    for i in range(config.num_heads):
        stored, head = f"{prefix}{i}", f"head_{i}"
        for j in range(config.num_layers):
            linear, path = f"{stored}.{j}.linear", (head, f"block_{j}")
            places[f"{linear}.weight"] = Place((*path, "weight"), (width, width))
            places[f"{linear}.bias"] = Place((*path, "bias"), (width,))
        if not config.shared:
            shape = (config.vocab_size, width)
            places[f"{stored}.{config.num_layers}.weight"] = Place((head, "vocab"), shape)
    return places


def _fill(places: Mapping[str, Place], tensors: Tensors, source: Path, dtype: str) -> dict:
    """Reads every placed tensor, one at a time, cast to `dtype`; checks all of them first."""
    wrong = [f"missing {name} {list(p.shape)}" for name, p in places.items() if name not in tensors]
    for name, tensor in tensors.items():
        if name not in places:
            if not _ignorable(name):
                wrong.append(f"unexpected {name} {list(tensor.shape)}")
        elif tensor.shape != places[name].shape:
            wrong.append(
                f"misshapen {name}: {list(tensor.shape)}, expected {list(places[name].shape)}"
            )
    if wrong:
        raise InputError(
            f"{source}: tensors do not fit what was expected:\n  " + "\n  ".join(wrong)
        )
    params: dict = {}
    for name, place in places.items():
        array = tensors[name].read()
        array = np.asarray(array, dtype=jnp.dtype(dtype))
        inner = params
        for key in place.path[:-1]:
            inner = inner.setdefault(key, {})
        inner[place.path[-1]] = jax.device_put(array)
    return params


def _ignorable(name: str) -> bool:
    # A tied model may store its lm_head again; with `tied` off the name is placed.
    return name == "lm_head.weight" or _NOISE.fullmatch(name) is not None


def _head_file(directory: Path) -> Path | None:
    files = (directory / name for name in HEAD_FILES)
    return next((file for file in files if file.is_file()), None)


def _backbone_of(directory: Path, name: str) -> Path:
    """The backbone that v0.1 heads name: a path, a neighbour of theirs, or a hub id."""
    neighbour = directory.resolve().parent / name
    return neighbour if neighbour.is_dir() else resolve(name)


def _ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)
