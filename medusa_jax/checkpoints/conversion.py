"""Medusa heads, alone or merged with their backbone, from one dialect to another.

Tensors are only renamed: each keeps its numbers and its type. They are read one at a time, and
compared with what was written before the output takes its place.
"""

import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from medusa_jax import json_files
from medusa_jax.checkpoints import bigram_file
from medusa_jax.checkpoints.atomic import Replacing, copy_beside
from medusa_jax.checkpoints.backbone import EMBEDDING, PROJECTION, open_backbone
from medusa_jax.checkpoints.dialects import DIALECTS, head_settings
from medusa_jax.checkpoints.heads import HEAD_FILES, StoredHeads, check_fit, open_heads
from medusa_jax.checkpoints.hub import resolve
from medusa_jax.checkpoints.names import ORIGINAL, head_places
from medusa_jax.checkpoints.tensors import (
    SHARD_BYTES,
    StoredTensor,
    Tensors,
    open_file,
    open_model,
    write_model,
    write_pickle,
)
from medusa_jax.drafting.medusa_heads import HeadsConfig
from medusa_jax.errors import InputError
from medusa_jax.model.config import ModelConfig

WRITABLE = [name for name, dialect in DIALECTS.items() if dialect.writable]
# What merged models' configs say of heads.
_HEAD_KEYS = ("medusa_num_heads", "medusa_num_layers", "version", "medusa")


@dataclasses.dataclass(frozen=True)
class Base:
    """A backbone in files, not read yet.

    Attributes:
      directory: where it lies.
      settings: its `config.json`.
      config: the same, understood.
      tensors: under their own names, without heads that lie among them.
      unembedding: its projection to the vocabulary [V, D].
    """

    directory: Path
    settings: dict[str, Any]
    config: ModelConfig
    tensors: Tensors
    unembedding: StoredTensor


def convert(
    source: str, target: str, output: Path, *, dialect: str = "", base: str = "", dtype: str = ""
) -> None:
    """Writes heads in another dialect, and compares all that was written with what was read.

    Args:
      source: directory, file or hub id of heads in any dialect.
      target: the dialect to write.
      output: the directory to write, which must not exist.
      dialect: of the source; default: what its files say.
      base: directory or hub id of the backbone; default: the one merged with the source.
      dtype: to round to; default: each tensor keeps its own.

    Raises:
      InputError: the source cannot be read, or the target cannot hold it.
    """
    if output.exists():
        raise InputError(f"{output} exists already; give another --output")
    local = resolve(source)
    heads = open_heads(local, dialect or None)
    print(_found(heads))
    _refuse(heads, target)
    reason = _why_backbone(heads, target)
    backbone = _open_base(heads, base, reason) if reason else None
    config, by_path = _with_projection(heads, target, backbone)
    kind = DIALECTS[target]
    places = head_places(config, kind.names, with_shared="vocab" in by_path)
    tensors = {name: by_path["/".join(place.path)] for name, place in places.items()}
    settings = head_settings(target, config)
    if kind.merged and backbone:
        tensors = backbone.tensors | tensors
        rest = {key: value for key, value in backbone.settings.items() if key not in _HEAD_KEYS}
        settings = rest | settings
    elif kind.names is ORIGINAL:
        settings["base_model_name_or_path"] = _base_name(heads, source, base, target)
    if dtype:
        tensors = {name: _rounded(tensor, dtype) for name, tensor in tensors.items()}
        if kind.merged:
            settings.pop("dtype", None)  # transformers 5's name of the same
            settings["torch_dtype"] = dtype
    with Replacing(output) as directory:
        # No reader of the original's heads knows of shards.
        shard_bytes = math.inf if kind.names is ORIGINAL else SHARD_BYTES
        write_model(directory, kind.stem, tensors, shard_bytes=shard_bytes)
        if target == "v0.1":
            write_pickle(directory / f"{kind.stem}.safetensors")
        if kind.merged and backbone:
            copy_beside(backbone.directory, directory)
        if table := bigram_file.beside(local):
            shutil.copyfile(table, directory / table.name)
        json_files.write(directory / "config.json", settings)
        _verify(directory, target, tensors)
    size = sum(math.prod(one.shape) * jnp.dtype(one.dtype).itemsize for one in tensors.values())
    print(f"wrote {target} to {output}: {len(tensors)} tensors, {size / 1e6:.1f} MB, all compared")


def _found(heads: StoredHeads) -> str:
    """What was read, for a person."""
    config, dtypes = heads.config, sorted({one.dtype for one in heads.tensors.values()})
    rows = config.truncated or config.vocab_size
    projections = f"projections of their own to {rows} tokens"
    if config.shared:
        projections = "the backbone's projection"
    if "vocab" in heads.tensors:
        projections = f"one projection to {rows} tokens for all"
    return (
        f"found {heads.dialect} in {heads.source}: {config.num_heads} heads, residual blocks in "
        f"each: {config.num_layers}, width {config.hidden_size}, {projections}, {', '.join(dtypes)}"
    )


def _refuse(heads: StoredHeads, target: str) -> None:
    """Raises InputError where the target has no place for something."""
    config, kind = heads.config, DIALECTS[target]
    # v1.0 holds a map for us; its other readers, who do not see it, guess among all tokens.
    held = kind.truncated or (target == "v1.0" and config.shared)
    if config.truncated and not held:
        raise InputError(
            f"--to {target}: its readers know no token_map, and these heads guess only "
            f"{config.truncated} of the tokens; vllm can hold them"
        )
    if config.shared and not kind.shared:
        can = ", ".join(name for name in WRITABLE if DIALECTS[name].shared)
        raise InputError(
            f"--to {target}: there each head has its own projection, and these heads share one; "
            f"{can} can hold them"
        )
    if not config.shared and not kind.own:
        raise InputError(
            f"--to {target}: there heads share the backbone's projection, and these heads have "
            "their own; v0.1 is the same with them"
        )
    if target == "tgi" and config.shared and config.num_layers != 1:
        raise InputError(
            f"--to tgi: TGI reads shared heads of one block only, these have {config.num_layers}"
        )


def _why_backbone(heads: StoredHeads, target: str) -> str:
    """What the backbone's weights are needed for; empty: nothing."""
    lies = "vocab" in heads.tensors
    if DIALECTS[target].merged:
        return f"--to {target} holds the backbone too"
    if heads.config.shared and lies != (target == "vllm"):
        if lies:
            return f"--to {target} has no projection, so that of these heads must be the backbone's"
        return "--to vllm stores the projection that these heads share"
    if heads.config.truncated and "vocab_size" not in heads.settings:
        return "--to vllm says the size of the vocabulary, and these heads are truncated"
    return ""


def _open_base(heads: StoredHeads, base: str, reason: str) -> Base:
    """The backbone that was given, or else the one that lies with the heads."""
    if not base and not heads.with_backbone:
        raise InputError(f"{reason}: give the backbone with --base")
    directory = resolve(base) if base else heads.source
    files = open_backbone(directory)
    settings, config, tensors = files.settings, files.config, files.tensors
    check_fit(heads, config)
    name = EMBEDDING if config.tied else PROJECTION
    if name not in tensors:
        raise InputError(f"{directory} has no {name}")
    return Base(directory, settings, config, tensors, tensors[name])


def _with_projection(
    heads: StoredHeads, target: str, backbone: Base | None
) -> tuple[HeadsConfig, Tensors]:
    """The heads and V, the projection that they share put in or left out as the target wants."""
    config, tensors = heads.config, dict(heads.tensors)
    if backbone:
        config = dataclasses.replace(config, vocab_size=backbone.config.vocab_size)
    elif config.truncated:
        config = dataclasses.replace(config, vocab_size=heads.settings["vocab_size"])
    if not (config.shared and backbone):
        return config, tensors
    if target == "vllm" and "vocab" not in tensors:
        whole = backbone.unembedding
        tensors["vocab"] = whole.rows(tensors["token_map"].read()) if config.truncated else whole
    elif target != "vllm" and "vocab" in tensors:
        own, whole = tensors.pop("vocab"), backbone.unembedding
        if config.truncated:
            whole = whole.rows(tensors["token_map"].read())
        if not _same(own, whole.cast(own.dtype)):
            raise InputError(
                f"--to {target}: the projection that these heads share is not that of "
                f"{backbone.directory}; vllm can hold it"
            )
    return config, tensors


def _base_name(heads: StoredHeads, source: str, base: str, target: str) -> str:
    """What `config.json` is to say of the backbone: a hub id, or an absolute path."""
    name = base or (source if heads.with_backbone else "")
    if not name:
        name = heads.settings.get("base_model_name_or_path")
        if not name:
            raise InputError(
                f"--to {target} names the backbone, and {heads.source} does not: give --base"
            )
        neighbour = Path(source).resolve().parent / name
        name = str(neighbour) if neighbour.is_dir() else name
    return str(Path(name).resolve()) if Path(name).exists() else name


def _rounded(tensor: StoredTensor, dtype: str) -> StoredTensor:
    return tensor.cast(dtype) if "float" in tensor.dtype else tensor


def _verify(directory: Path, target: str, tensors: Tensors) -> None:
    """Reads all back. Raises RuntimeError where anything differs from what was to be written."""
    open_heads(directory, target)
    if DIALECTS[target].names is ORIGINAL:
        files = (directory / name for name in HEAD_FILES)
        written = {file: open_file(file) for file in files if file.is_file()}
    else:
        written = {directory: open_model(directory)}
    for place, found in written.items():
        if found.keys() != tensors.keys():
            raise RuntimeError(f"{place}: {sorted(found.keys() ^ tensors.keys())} went wrong")
    for name, tensor in tensors.items():
        for place, found in written.items():
            if not _same(found[name], tensor):
                raise RuntimeError(f"{place}: {name} is not what was to be written")


def _same(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors have the same type, shape and bytes."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    ours, theirs = (np.ascontiguousarray(x.read()).reshape(-1).view(np.uint8) for x in (one, other))
    return np.array_equal(ours, theirs)
