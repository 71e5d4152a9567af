"""Hugging Face directories and Medusa head files to parameters.

Backbones are Llama-family directories, alone or merged with heads; heads come in
any dialect (`dialects.py`). `places.py` has the names of the tensors.
"""

import dataclasses
import hashlib
import math
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from medusa_jax.checkpoints import bigram_file, dialects
from medusa_jax.checkpoints.dialects import StoredHeads, head_file, open_heads
from medusa_jax.checkpoints.names import backbone_places, matched
from medusa_jax.checkpoints.tensors import StoredTensor, Tensors, open_model, read_json
from medusa_jax.distributed.rules import decode_mesh, everywhere, spec
from medusa_jax.drafting.bigrams import NAME
from medusa_jax.drafting.medusa_heads import NO_HEADS, HeadsConfig
from medusa_jax.errors import InputError
from medusa_jax.model.config import ModelConfig, from_hf
from medusa_jax.model.linear import placed, stacked
from medusa_jax.param_paths import nested

# Buffers that old checkpoints carry and nobody needs.
_NOISE = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


@dataclasses.dataclass(frozen=True)
class Model:
    """A loaded model.

    Attributes:
      config, heads: shapes; `NO_HEADS` where there are none.
      params: {"backbone": ..., "heads": ...}, laid out for decoding (`layout.py`); also
        {"bigrams": ...} where their file lies beside the heads.
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
      model: directory or hub id of a Llama-family model, of one merged with heads,
        or of v0.1 heads whose config names their backbone.
      heads: directory, file or hub id of heads of any dialect; default: those found with the model.
      dtype: of all parameters, "float32" or "bfloat16".
      mesh: "tensor=4" splits the parameters over that many devices, each of which
        reads its own part (`sharding.decode_mesh`); one device by default.

    Raises:
      InputError: something is missing, unreadable, unsupported, of another shape, or not
        to be split so; one message lists everything wrong with the tensors.
    """
    directory = resolve(model)
    settings = read_json(directory / "config.json")
    # Heads may carry a model_type of their own, but never a backbone's shape.
    if "hidden_size" not in settings and "base_model_name_or_path" in settings:
        heads = heads or directory
        directory = _backbone_of(directory, settings["base_model_name_or_path"])
        settings = read_json(directory / "config.json")
    config = from_hf(settings)
    devices = decode_mesh(mesh, config) if mesh else None
    merged, rest = dialects.divide(open_model(directory))
    stored, source = None, directory
    if heads is not None:
        source = resolve(heads)
        stored = open_heads(source)
    elif merged:
        stored = open_heads(directory, dialects.merged_dialect(merged))
    elif found := head_file(directory):
        stored = open_heads(found)
    heads_config, params, digest = NO_HEADS, {}, hashlib.sha256(repr(config).encode())
    backbone = _backbone(config, rest, directory)
    if stored:  # before the backbone, which takes long to read
        check_fit(stored, config)
        heads_config, tensors = stored.config, stored.tensors
        if heads_config.shared and heads_config.truncated and "vocab" not in tensors:
            whole = backbone["embed/embedding" if config.tied else "lm_head"]
            tensors = tensors | {"vocab": whole.rows(tensors["token_map"].read())}
        params["heads"] = _loaded(tensors, dtype, digest, devices)
        if file := bigram_file.beside(source):
            table = bigram_file.load(file, config.vocab_size)
            digest.update(table["scores"].tobytes())
            params[NAME] = everywhere(table, devices)
    params["backbone"] = _loaded(backbone, dtype, digest, devices, tied=config.tied)
    generation = directory / "generation_config.json"
    settings |= read_json(generation) if generation.is_file() else {}
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
    config = from_hf(read_json(directory / "config.json"))
    _, rest = dialects.divide(open_model(directory))
    return _backbone(config, rest, directory)


def head_tensors(source: Path, expected: HeadsConfig) -> dict[str, StoredTensor]:
    """The same of heads, which must have the expected shape.

    Heads without a projection of their own can be truncated without further ado.
    """
    stored = open_heads(source)
    found = stored.config
    if found.shared or found.truncated:  # then their tensors do not say V
        found = dataclasses.replace(found, vocab_size=expected.vocab_size)
    if found.shared and not found.truncated and "vocab" not in stored.tensors:
        found = dataclasses.replace(found, truncated=expected.truncated)
    if found != expected:
        raise InputError(f"{source} holds {found}, expected {expected}")
    return stored.tensors


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


def check_fit(heads: StoredHeads, config: ModelConfig) -> None:
    """Raises InputError unless heads were made for a backbone of this shape."""
    made, source = heads.config, heads.source
    if made.hidden_size != config.hidden_size:
        raise InputError(
            f"{source}: these heads were made for hidden size {made.hidden_size}, "
            f"the model has {config.hidden_size}"
        )
    if made.vocab_size not in (0, config.vocab_size):
        raise InputError(
            f"{source}: these heads were made for a vocabulary of {made.vocab_size}, "
            f"the model has {config.vocab_size}"
        )
    if made.truncated:
        ids = heads.tensors["token_map"].read()
        if ids.min() < 0 or ids.max() >= config.vocab_size or len(np.unique(ids)) != ids.size:
            raise InputError(
                f"{source}: token_map must hold different token ids of a vocabulary of "
                f"{config.vocab_size}"
            )


def _backbone(config: ModelConfig, tensors: Tensors, source: Path) -> Tensors:
    """A backbone's tensors by path; what old or tied models store needlessly is left out."""
    places = backbone_places(config)
    wanted = {name: one for name, one in tensors.items() if name in places or not _ignorable(name)}
    return matched(places, wanted, source)


def _loaded(
    tensors: Tensors, dtype: str, digest: Any, mesh: Mesh | None, *, tied: bool = False
) -> dict[str, Any]:
    """Nested parameters in the layout for decoding, read one tensor at a time.

    Of each, the digest gets the name, the shape and the first numbers.
    """
    leaves: Tensors = {}
    for path, tensor in tensors.items():
        kind = _kind(path, dtype)
        rows = min(-(-64 // max(math.prod(tensor.shape[1:]), 1)), tensor.shape[0])
        first = np.asarray(tensor.read((slice(0, rows),)), kind).reshape(-1)[:64]
        digest.update(f"{path} {tensor.shape}".encode() + first.tobytes())
        leaves |= placed(path, tensor, tied=tied)
    leaves = stacked(leaves, StoredTensor.stack)
    return nested({path: _put(path, one, dtype, mesh) for path, one in leaves.items()})


def _put(path: str, tensor: StoredTensor, dtype: str, mesh: Mesh | None) -> jax.Array:
    """A parameter on its devices, each of which gets no more than its part."""
    kind = _kind(path, dtype)

    def read(index: Any = ...) -> np.ndarray:
        return np.ascontiguousarray(tensor.read(index), kind)

    if mesh is None:
        return jax.device_put(read())
    place = NamedSharding(mesh, spec(path, tensor.shape, mesh))
    return jax.make_array_from_callback(tensor.shape, place, read)


def _kind(path: str, dtype: str) -> np.dtype:
    return jnp.dtype("int32" if path == "token_map" else dtype)


def _ignorable(name: str) -> bool:
    # A tied model may store its lm_head again; with `tied` off the name is placed.
    return name == "lm_head.weight" or _NOISE.fullmatch(name) is not None


def _backbone_of(directory: Path, name: str) -> Path:
    """The backbone that v0.1 heads name: a path, a neighbour of theirs, or a hub id."""
    neighbour = directory.resolve().parent / name
    return neighbour if neighbour.is_dir() else resolve(name)


def _ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)
