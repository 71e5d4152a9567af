"""Heads, alone or merged with their backbone, from one dialect to another.

Tensors are renamed: each keeps its numbers and its type. They are read one at a time, and
compared with what was written before the output takes its place.
"""

import dataclasses
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from medusa_jax import json_files
from medusa_jax.checkpoints import bigram_file
from medusa_jax.checkpoints.atomic import Replacing, copy_beside, copy_file
from medusa_jax.checkpoints.backbone import read_settings, settings_file
from medusa_jax.checkpoints.dialects import DIALECTS, FOLDER, backbone_settings, head_settings
from medusa_jax.checkpoints.fitting import (
    Base,
    check,
    fitted,
    open_base,
    own_backbone,
    rounded,
    same,
    why_backbone,
)
from medusa_jax.checkpoints.heads import HEAD_FILES, StoredHeads, open_heads
from medusa_jax.checkpoints.hub import resolve
from medusa_jax.checkpoints.names import backbone_places, head_places
from medusa_jax.checkpoints.stored_tensor import Tensors
from medusa_jax.checkpoints.tensors import (
    SHARD_BYTES,
    open_file,
    open_model,
    write_model,
    write_pickle,
)
from medusa_jax.errors import InputError
from medusa_jax.files import check_new_directory
from medusa_jax.gguf_file import is_gguf

HF = "hf"  # a backbone alone
WRITABLE = [*(name for name, dialect in DIALECTS.items() if dialect.writable), HF]

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class _Files:
    """What is to be written.

    Attributes:
      target: a dialect, or `HF`.
      stem: of the file of tensors.
      tensors: under the names that they have there.
      settings: `config.json`.
      model: the directory whose tokenizer and generation settings go with them.
      bigrams: the table that goes with them.
      pickled: a `.pt` too, for the original.
    """

    target: str
    stem: str
    tensors: Tensors
    settings: dict[str, Any]
    model: Path | None = None
    bigrams: Path | None = None
    pickled: bool = False


def convert(
    source: str,
    target: str,
    output: Path,
    *,
    dialect: str = "",
    base: str = "",
    dtype: str = "",
    as_is: bool = False,
    save_tokenizer: Callable[[Path, Path], object] | None = None,
) -> None:
    """Writes heads in another dialect, and compares all that was written with what was read.

    Args:
      source: directory, file or hub id of heads in any dialect; for "hf", of a model.
      target: the dialect to write; "hf": the backbone alone.
      output: the directory to write, which must not exist.
      dialect: of the source; default: what its files say.
      base: directory or hub id of the backbone; default: the one stored with the source.
      dtype: to round to; default: each tensor keeps its own.
      as_is: keep projections truncated or shared, and blocks different, where the dialect's
        own readers get that wrong (medusa_jax does not).
      save_tokenizer: writes the tokenizer of a GGUF file into a directory.

    Raises:
      InputError: the source cannot be read, or the target cannot hold it.
      OutputError: a file could not be written.
    """
    check_new_directory(output)
    local = resolve(source)
    if target == HF:
        files = _backbone_alone(local, base, dtype)
    else:
        heads = open_heads(local, dialect or None)
        print(_found(heads))
        check(heads, target, as_is=as_is)
        backbone = _open_base(heads, base, why_backbone(heads, target, as_is=as_is))
        config, by_path = fitted(heads, target, backbone, as_is=as_is)
        places = head_places(config, DIALECTS[target].names, with_shared="vocab" in by_path)
        tensors = {name: by_path["/".join(place.path)] for name, place in places.items()}
        settings = head_settings(target, config)
        if DIALECTS[target].merged and backbone:
            tensors = _named(backbone) | tensors
            settings = backbone_settings(backbone.settings, dtype) | settings
        elif DIALECTS[target].single:
            settings["base_model_name_or_path"] = _base_name(heads, source, base, target, output)
        model = backbone.directory if DIALECTS[target].merged and backbone else None
        files = _Files(
            target,
            DIALECTS[target].stem,
            rounded(tensors, dtype),
            settings,
            model=model,
            bigrams=bigram_file.beside(local),
            pickled=target in ("v0.1", "v2", "hydra") and not as_is,
        )
    _write(files, output, save_tokenizer)
    print(f"wrote {target} to {output}: {_amount(files.tensors)}, all compared")


def _amount(tensors: Tensors) -> str:
    """How much was written, for a person."""
    size = sum(math.prod(t.shape) * jnp.dtype(t.dtype).itemsize for t in tensors.values())
    return f"{len(tensors)} tensors, {size / 1e6:.1f} MB"


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


def _backbone_alone(local: Path, base: str, dtype: str) -> _Files:
    """A model without its heads, as a plain Hugging Face directory."""
    directory = resolve(base) if base else local
    there = settings_file(directory).is_file()
    family = read_settings(directory).get("model_type") if there else None
    if family in (None, "medusa"):
        raise InputError(f"--to hf writes a backbone, and {directory} holds none: give --base")
    backbone = open_base(directory)
    tensors, settings = _named(backbone), backbone_settings(backbone.settings, dtype)
    settings["tie_word_embeddings"] = "lm_head" not in backbone.tensors
    # Merged models name the class of their own program here.
    settings["architectures"] = [f"{str(family).capitalize()}ForCausalLM"]
    return _Files(HF, "model", rounded(tensors, dtype), settings, backbone.directory)


def _named(backbone: Base) -> Tensors:
    """A backbone's tensors under Hugging Face's names."""
    paths = {n: "/".join(place.path) for n, place in backbone_places(backbone.config).items()}
    return {name: backbone.tensors[path] for name, path in paths.items()}


def _open_base(heads: StoredHeads, base: str, reason: str) -> Base | None:
    """The backbone that was given, or else the one stored with the heads; None without reason."""
    if not reason:
        return None
    directory = base or own_backbone(heads)
    if not directory:
        raise InputError(f"{reason}: give the backbone with --base")
    return open_base(directory)


def _base_name(heads: StoredHeads, source: str, base: str, target: str, output: Path) -> str:
    """What `config.json` is to say of the backbone: a hub id, or an absolute path."""
    if output.name == FOLDER:
        return "."  # below its backbone, wherever that goes
    beside = own_backbone(heads)
    name = base or (source if heads.with_backbone else str(beside) if beside else "")
    if not name:
        name = heads.settings.get("base_model_name_or_path")
        if not name:
            raise InputError(
                f"--to {target} names the backbone, and {heads.source} does not: give --base"
            )
        neighbor = Path(source).resolve().parent / name
        name = str(neighbor) if neighbor.is_dir() else name
    return str(Path(name).resolve()) if Path(name).exists() else name


def _write(
    files: _Files, output: Path, save_tokenizer: Callable[[Path, Path], object] | None
) -> None:
    """Writes all into a new directory, which takes its place once it was compared."""
    single = files.target != HF and DIALECTS[files.target].single
    with Replacing(output) as directory:
        shard_bytes = math.inf if single else SHARD_BYTES
        write_model(directory, files.stem, files.tensors, shard_bytes=shard_bytes)
        if files.pickled and not write_pickle(directory / f"{files.stem}.safetensors"):
            log.warning("no %s.pt, which alone the original reads: torch is missing", files.stem)
        if files.model:
            copy_beside(files.model, directory)
            if save_tokenizer and is_gguf(files.model):
                save_tokenizer(files.model, directory)
        if files.bigrams:
            table = bigram_file.place(output).relative_to(output)
            copy_file(files.bigrams, directory / table)
        json_files.write(directory / "config.json", files.settings)
        _verify(directory, files)


def _verify(directory: Path, files: _Files) -> None:
    """Reads all back. Raises RuntimeError where anything differs from what was to be written."""
    if files.target != HF:
        open_heads(directory, files.target)
    if files.target != HF and DIALECTS[files.target].single:
        paths = (directory / name for name in HEAD_FILES)
        written = {file: open_file(file) for file in paths if file.is_file()}
    else:
        written = {directory: open_model(directory)}
    for place, found in written.items():
        if found.keys() != files.tensors.keys():
            raise RuntimeError(f"{place}: {sorted(found.keys() ^ files.tensors.keys())} went wrong")
    for name, tensor in files.tensors.items():
        for place, found in written.items():
            if not same(found[name], tensor):
                raise RuntimeError(f"{place}: {name} is not what was to be written")
