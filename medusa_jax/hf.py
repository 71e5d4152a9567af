"""Hugging Face directories and Medusa head files to parameters.

Dialects read here: Llama-family directories, the original's v0.1 heads (`.pt`,
`.safetensors`), its version "2" (shared lm_head) and v1.0 merged models
(`medusa_head.*` beside the backbone's tensors). `places.py` has the names.
"""

import dataclasses
import hashlib
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from medusa_jax import tensor_files
from medusa_jax.config import ModelConfig, from_hf
from medusa_jax.errors import InputError
from medusa_jax.heads import NO_HEADS, HeadsConfig
from medusa_jax.layout import placed
from medusa_jax.places import MERGED, Place, backbone_places, head_places
from medusa_jax.sharding import decode_mesh, spec
from medusa_jax.tensor_files import StoredTensor, Tensors
from medusa_jax.tree_paths import nested

HEAD_FILES = ("medusa_lm_head.safetensors", "medusa_lm_head.pt")
_HEAD_NAME = re.compile(r"(?:medusa_head\.)?(\d+)\.(\d+)\.(linear\.weight|linear\.bias|weight)")
# Buffers that old checkpoints carry and nobody needs.
_NOISE = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


@dataclasses.dataclass(frozen=True)
class Model:
    """A loaded model.

    Attributes:
      config, heads: shapes; `NO_HEADS` where there are none.
      params: {"backbone": ..., "heads": ...}, laid out for decoding (`layout.py`).
      stop_ids: end-of-sequence tokens from its generation settings.
      suppress: tokens never to produce, from the same.
      directory: where the backbone, and so its tokenizer, was found.
      fingerprint: a short name that other weights, shapes or heads would not have.
      mesh: the devices that the parameters are split over (`Decoder` wants to know them).
    """

    config: ModelConfig
    heads: HeadsConfig
    params: dict[str, Any]
    stop_ids: tuple[int, ...]
    suppress: tuple[int, ...]
    directory: Path
    fingerprint: str = ""
    mesh: Mesh | None = None


def load_model(
    model: str | Path,
    heads: str | Path | None = None,
    dtype: str = "float32",
    mesh: str | None = None,
) -> Model:
    """Loads a backbone and, where there are any, its Medusa heads.

    Args:
      model: directory or hub id of a Llama-family model, of a merged v1.0 Medusa
        model, or of v0.1 heads whose config names their backbone.
      heads: directory, file or hub id of heads; default: those found with the model.
      dtype: of all parameters, "float32" or "bfloat16".
      mesh: "tensor=4" splits the parameters over that many devices, each of which
        reads its own part (`sharding.decode_mesh`); one device by default.

    Raises:
      InputError: something is missing, unreadable, unsupported, of another shape, or not
        to be split so; one message lists everything wrong with the tensors.
    """
    directory = resolve(model)
    settings = tensor_files.read_json(directory / "config.json")
    # Heads may carry a model_type of their own, but never a backbone's shape.
    if "hidden_size" not in settings and "base_model_name_or_path" in settings:
        heads = heads or directory
        directory = _backbone_of(directory, settings["base_model_name_or_path"])
        settings = tensor_files.read_json(directory / "config.json")
    config = from_hf(settings)
    devices = decode_mesh(mesh, config) if mesh else None
    merged, rest = _divide(tensor_files.open_model(directory))
    tensors, source = merged, directory
    if heads is not None:
        source = resolve(heads)
        tensors = open_heads(source)
    elif not merged and (found := _head_file(directory)):
        tensors, source = tensor_files.open_file(found), found
    heads_config, params, digest = NO_HEADS, {}, hashlib.sha256(repr(config).encode())
    if tensors:  # before the backbone, which takes long to read
        heads_config = heads_config_of(tensors, source)
        _check_fit(heads_config, config, source)
        places = _places_of(heads_config, tensors)
        params["heads"] = _loaded(_matched(places, tensors, source), dtype, digest, devices)
    wanted = _matched(backbone_places(config), rest, directory)
    params["backbone"] = _loaded(wanted, dtype, digest, devices, tied=config.tied)
    generation = directory / "generation_config.json"
    settings |= tensor_files.read_json(generation) if generation.is_file() else {}
    return Model(
        config=config,
        heads=heads_config,
        params=params,
        stop_ids=_ids(settings.get("eos_token_id")),
        suppress=_ids(settings.get("suppress_tokens")),
        directory=directory,
        fingerprint=digest.hexdigest()[:16],
        mesh=devices,
    )


def backbone_tensors(model: str | Path) -> dict[str, StoredTensor]:
    """A backbone's tensors by the path of their parameter, unread. Raises as `load_model`."""
    directory = resolve(model)
    config = from_hf(tensor_files.read_json(directory / "config.json"))
    _, rest = _divide(tensor_files.open_model(directory))
    return _matched(backbone_places(config), rest, directory)


def head_tensors(source: Path, expected: HeadsConfig) -> dict[str, StoredTensor]:
    """The same of heads, which must have the expected shape."""
    tensors = open_heads(source)
    found = heads_config_of(tensors, source)
    if found != expected:
        raise InputError(f"{source} holds {found}, expected {expected}")
    return _matched(_places_of(found, tensors), tensors, source)


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
    heads, _ = _divide(tensor_files.open_model(source))
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
    """Raises InputError unless heads were made for a backbone of this shape."""
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


def _matched(places: Mapping[str, Place], tensors: Tensors, source: Path) -> Tensors:
    """The placed tensors by the path of their parameter.

    Raises:
      InputError: names every tensor of `source` that is missing, unexpected or misshapen.
    """
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
    return {"/".join(place.path): tensors[name] for name, place in places.items()}


def _loaded(
    tensors: Tensors, dtype: str, digest: Any, mesh: Mesh | None, *, tied: bool = False
) -> dict[str, Any]:
    """Nested parameters in the layout for decoding, read one tensor at a time.

    Of each, the digest gets the name, the shape and the first numbers.
    """
    leaves, kind = {}, jnp.dtype(dtype)
    for path, tensor in tensors.items():
        rows = min(-(-64 // max(math.prod(tensor.shape[1:]), 1)), tensor.shape[0])
        first = np.asarray(tensor.read((slice(0, rows),)), kind).reshape(-1)[:64]
        digest.update(f"{path} {tensor.shape}".encode() + first.tobytes())
        for where, one in placed(path, tensor, tied=tied).items():
            leaves[where] = _put(where, one, kind, mesh)
    return nested(leaves)


def _put(path: str, tensor: StoredTensor, kind: np.dtype, mesh: Mesh | None) -> jax.Array:
    """A parameter on its devices, each of which gets no more than its part."""

    def read(index: Any = ...) -> np.ndarray:
        return np.ascontiguousarray(tensor.read(index), kind)

    if mesh is None:
        return jax.device_put(read())
    place = NamedSharding(mesh, spec(path, tensor.shape, mesh))
    return jax.make_array_from_callback(tensor.shape, place, read)


def _divide(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """(heads, everything else) of a merged model."""
    heads = {name: tensor for name, tensor in tensors.items() if name.startswith(MERGED)}
    return heads, {name: tensor for name, tensor in tensors.items() if name not in heads}


def _places_of(heads: HeadsConfig, tensors: Tensors) -> dict[str, Place]:
    return head_places(heads, MERGED if next(iter(tensors)).startswith(MERGED) else "")


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
