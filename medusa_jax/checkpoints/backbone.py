"""A backbone's files: its shape, and its tensors under Hugging Face's names, not read yet."""

import dataclasses
import logging
import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from medusa_jax import json_files
from medusa_jax.checkpoints import compressed_tensors, gguf_backbone, packed_weights
from medusa_jax.checkpoints.heads import divide
from medusa_jax.checkpoints.stored_tensor import StoredTensor, Tensors
from medusa_jax.checkpoints.tensors import open_model
from medusa_jax.gguf_file import is_gguf, open_gguf
from medusa_jax.model.config import ModelConfig, from_hf

log = logging.getLogger(__name__)

EMBEDDING, PROJECTION = "model.embed_tokens.weight", "lm_head.weight"
# Rotary embeddings are computed from `config.json`; many writers store them in some spelling.
_BUFFER = re.compile(r"(.+\.)?rotary_emb\.\w+")
_INNER = re.compile(r"(embed_tokens|layers|norm)\.")
_BLOCK = 2**22  # numbers of two tensors that are compared together


@dataclasses.dataclass(frozen=True)
class StoredBackbone:
    """A backbone in files.

    Attributes:
      directory: where it lies; of a GGUF file, the file.
      settings, config: its `config.json` and its shape; not tied where the files hold a
        projection of its own.
      tensors: by Hugging Face's names.
      heads: tensors of Medusa heads in the same files.
    """

    directory: Path
    settings: dict[str, Any]
    config: ModelConfig
    tensors: Tensors
    heads: Tensors


def settings_file(model: Path) -> Path:
    """The file that says what a model is: its `config.json`, or the GGUF file that it is."""
    return model if is_gguf(model) else model / "config.json"


def read_settings(model: Path) -> dict[str, Any]:
    """A model's settings as `config.json` spells them. Raises InputError."""
    if is_gguf(model):
        return gguf_backbone.settings(open_gguf(model))
    return json_files.read_object(settings_file(model))


def open_backbone(directory: Path, settings: dict[str, Any] | None = None) -> StoredBackbone:
    """A backbone's shape and tensors.

    Args:
      directory: or its GGUF file.
      settings: its `read_settings`, where they were read before.

    Raises:
      InputError: its config is not supported, or its files cannot be opened.
    """
    settings = read_settings(directory) if settings is None else settings
    origin = str(settings_file(directory))
    config = from_hf(settings, origin)
    if is_gguf(directory):
        tensors = gguf_backbone.tensors(open_gguf(directory))
        return StoredBackbone(directory, settings, config, tensors, {})
    quantized = settings.get(compressed_tensors.KEY)
    tensors = open_model(directory, quantized=bool(quantized))
    if quantized:
        known = quantized["quant_method"] == compressed_tensors.METHOD
        reader = compressed_tensors if known else packed_weights
        tensors = reader.joined(tensors, settings, origin)
        # What is read, and perhaps written again, is their products.
        settings = {key: settings[key] for key in settings if key != compressed_tensors.KEY}
    heads, tensors = divide(tensors)
    tensors = {name: t for name, t in tensors.items() if not _BUFFER.fullmatch(name)}
    if not any(name.startswith("model.") for name in tensors):  # saved from the inner module
        tensors = {_INNER.sub(r"model.\1.", name, count=1): t for name, t in tensors.items()}
    config, tensors = _tied(config, tensors, directory)
    if not config.tied:
        settings = settings | {"tie_word_embeddings": False}
    return StoredBackbone(directory, settings, config, tensors, heads)


def _tied(config: ModelConfig, tensors: Tensors, directory: Path) -> tuple[ModelConfig, Tensors]:
    """Decides whether a tied model that stores a projection is tied.

    As in transformers 5, the files decide: an equal projection is left out, another is used,
    and a projection without an embedding serves as both.
    """
    if not config.tied or PROJECTION not in tensors:
        return config, tensors
    rest = {name: tensor for name, tensor in tensors.items() if name != PROJECTION}
    projection, embedding = tensors[PROJECTION], tensors.get(EMBEDDING)
    if embedding is None:
        return config, rest | {EMBEDDING: projection}
    if _equal(projection, embedding):
        return config, rest
    log.warning(
        "%s: config.json says tie_word_embeddings, but %s differs from %s: the model is not tied",
        directory,
        PROJECTION,
        EMBEDDING,
    )
    return dataclasses.replace(config, tied=False), tensors


def _equal(ours: StoredTensor, theirs: StoredTensor) -> bool:
    """Whether two tensors hold the same numbers; a part of each is in memory at a time."""
    if ours.shape != theirs.shape or not ours.shape:
        return False
    rows = max(_BLOCK // max(math.prod(ours.shape[1:]), 1), 1)
    length = ours.shape[0]
    parts = (slice(start, min(start + rows, length)) for start in range(0, length, rows))
    return all(np.array_equal(ours.read((part,)), theirs.read((part,))) for part in parts)
