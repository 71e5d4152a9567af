"""Hugging Face directories, GGUF and Medusa head files to a model ready for decoding.

Backbones are Llama-family directories, alone or merged with heads. `heads.py` opens the heads,
`names.py` names the tensors, and `weight_layout.py` has the layout of the parameters.
"""

import dataclasses
import functools
import hashlib
import logging
import math
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from medusa_jax import json_files
from medusa_jax.checkpoints import bigram_file, quantization
from medusa_jax.checkpoints.backbone import open_backbone, read_settings
from medusa_jax.checkpoints.finite import watched
from medusa_jax.checkpoints.generation_config import read_generation_config
from medusa_jax.checkpoints.heads import (
    StoredHeads,
    check_fit,
    head_file,
    merged_dialect,
    open_heads,
)
from medusa_jax.checkpoints.hub import resolve, shipped_heads
from medusa_jax.checkpoints.names import backbone_places, matched
from medusa_jax.checkpoints.parameters import Parameters, Part
from medusa_jax.checkpoints.stored_tensor import StoredTensor, Tensors
from medusa_jax.checkpoints.weight_layout import joined, looped, narrowed, placed, stacked, usable
from medusa_jax.distributed.rules import decode_mesh, everywhere, put, shardings
from medusa_jax.drafting.bigrams import NAME
from medusa_jax.drafting.medusa_heads import NO_HEADS, HeadsConfig
from medusa_jax.errors import InputError, listed
from medusa_jax.freed_memory import give_back
from medusa_jax.model.config import ModelConfig
from medusa_jax.param_paths import nested

__all__ = ["Model", "backbone_tensors", "check_fit", "load_model"]

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Model:
    """A loaded model.

    Attributes:
      config, heads: shapes; `NO_HEADS` where there are none.
      parameters: {"backbone": ..., "heads": ...} in the layout of decoding (`weight_layout.py`);
        also {"bigrams": ...} where a table of them is stored beside the heads.
      stop_ids, suppress, repetition_penalty: its `GenerationConfig`.
      precision: of the weights: "float32" or "bfloat16", or how they are quantized.
      directory: of the backbone and its tokenizer.
      beside: the directory of what came with its heads, such as trees that were tuned for them.
      fingerprint: a short name that other weights, shapes or heads would not have.
      mesh: the devices that the parameters are split over (`Decoder` wants to know them).
      draft: shape of a smaller model that guesses, {"draft": ...} of the parameters; None for none.
    """

    config: ModelConfig
    heads: HeadsConfig
    parameters: Parameters
    stop_ids: tuple[int, ...]
    suppress: tuple[int, ...]
    directory: Path
    beside: Path
    repetition_penalty: float = 1.0
    precision: str = "float32"
    fingerprint: str = ""
    mesh: Mesh | None = None
    draft: ModelConfig | None = None

    @property
    def params(self) -> dict[str, Any]:
        """The numbers of its parameters, which the first call reads."""
        return self.parameters.arrays


def load_model(
    model: str | Path,
    heads: str | Path | None = None,
    dtype: str = "float32",
    mesh: str | None = None,
    kernels: bool = True,
    quantize: str = quantization.NONE,
    read: bool = True,
) -> Model:
    """Loads a backbone and, where there are any, its Medusa heads.

    Args:
      model: directory or hub id of a Llama-family model, of one merged with heads,
        or of v0.1 heads whose config names their backbone.
      heads: directory, file or hub id of heads of any dialect; default: the model's own.
      dtype: of all parameters and numbers between them, "float32" or "bfloat16".
      mesh: "tensor=4" splits the parameters over that many devices, each of which
        reads its own part (`rules.decode_mesh`); one device by default.
      kernels: lays the weights out for `kernels.few_rows` where that can be used.
      quantize: "int8", "fp8", "int4" or "none"; weights of fewer bits in files stay as they are.
      read: reads the numbers at once; otherwise `Model.params` does, when they are first asked for.

    Raises:
      InputError: something is missing, unreadable, unsupported, of another shape, or not
        to be split so; one message lists everything wrong with the tensors.
    """
    quantization.check(quantize)
    directory, settings, heads = _locate(model, heads or shipped_heads(model))
    files, ruined = open_backbone(directory, settings), set[str]()
    config = files.config
    generation = read_generation_config(directory, settings, config.vocab_size)
    devices = decode_mesh(mesh, config) if mesh else None
    stored, source = _open_heads(directory, heads, files.heads)
    backbone = matched(backbone_places(config), watched(files.tensors, ruined), directory)
    digest, parts = hashlib.sha256(repr(config).encode()), dict[str, Part]()
    how = {"mesh": devices, "kernels": kernels, "quantize": quantize}
    if stored:
        check_fit(stored, config)
        tensors = watched(_with_projection(stored, backbone, config), ruined)
        parts["heads"] = _opened(tensors, dtype, digest, **how, narrow=_all_narrow(stored))
        parts |= _bigrams(source, config, digest, devices)
    rest = _opened(backbone, dtype, digest, **how, tied=config.tied)
    parts["backbone"] = Part(rest.shapes, functools.partial(_checked, rest, ruined, directory))
    loaded = Model(
        config=config,
        heads=stored.config if stored else NO_HEADS,
        parameters=Parameters(parts),
        stop_ids=generation.stop_ids,
        suppress=generation.suppress,
        repetition_penalty=generation.repetition_penalty,
        precision=_precision(backbone, dtype, quantize),
        directory=directory,
        beside=shipped_heads(model) or directory,
        fingerprint=digest.hexdigest()[:16],
        mesh=devices,
    )
    if read:
        _ = loaded.params
    return loaded


def backbone_tensors(model: str | Path) -> Tensors:
    """A backbone's tensors by the path of their parameter, unread. Raises as `load_model`."""
    files = open_backbone(resolve(model))
    return matched(backbone_places(files.config), files.tensors, files.directory)


def _locate(
    model: str | Path, heads: str | Path | None
) -> tuple[Path, dict[str, Any], str | Path | None]:
    """The backbone's directory, its `config.json`, and where to look for heads."""
    directory = resolve(model)
    settings = read_settings(directory)
    # Heads may carry a model_type of their own, but never a backbone's shape.
    if "hidden_size" not in settings and "base_model_name_or_path" in settings:
        heads = heads or directory
        name = json_files.Fields(settings, str(directory / "config.json"))
        directory = _backbone_of(directory, name.text("base_model_name_or_path"))
        settings = read_settings(directory)
    return directory, settings, heads


def _backbone_of(directory: Path, name: str) -> Path:
    """The backbone that v0.1 heads name: a path, a neighbor of theirs, or a hub id."""
    neighbor = directory.resolve().parent / name
    return neighbor if os.path.isdir(neighbor) else resolve(name)


def _open_heads(
    directory: Path, heads: str | Path | None, merged: Tensors
) -> tuple[StoredHeads | None, Path]:
    """The heads that were asked for, or else the model's own, and where they are stored."""
    if heads is not None:
        source = resolve(heads)
        return open_heads(source), source
    if merged:
        return open_heads(directory, merged_dialect(merged)), directory
    file = head_file(directory if directory.is_dir() else directory.parent)  # beside a GGUF file
    return (open_heads(file) if file else None), directory


def _with_projection(stored: StoredHeads, backbone: Tensors, config: ModelConfig) -> Tensors:
    """The heads' tensors; truncated heads that share the lm_head get their rows of it."""
    tensors = stored.tensors
    if not (stored.config.shared and stored.config.truncated) or "vocab" in tensors:
        return tensors
    whole = backbone["embed/embedding" if config.tied else "lm_head"]
    return tensors | {"vocab": whole.rows(tensors["token_map"].read())}


def _bigrams(source: Path, config: ModelConfig, digest: Any, mesh: Mesh | None) -> dict[str, Part]:
    """The table of bigrams beside the heads, where there is a table; the digest gets its scores."""
    file = bigram_file.beside(source)
    if file is None:
        return {}
    table = bigram_file.load(file, config.vocab_size)
    digest.update(table["scores"].tobytes())
    return {NAME: Part(everywhere(table, mesh))}


def _all_narrow(stored: StoredHeads) -> bool:
    """Whether heads are stored in bfloat16, and so lose nothing in it."""
    own = {one.dtype for path, one in stored.tensors.items() if path.endswith(("weight", "vocab"))}
    return own == {"bfloat16"}


def _precision(backbone: Tensors, dtype: str, quantize: str) -> str:
    """How the backbone is held: as it is stored if that is quantized, as asked, or in `dtype`."""
    pairs = (tensor.quantized for tensor in backbone.values() if tensor.quantized)
    in_files = next((quantization.name_of(values.dtype) for values, _ in pairs), None)
    return in_files or (dtype if quantize == quantization.NONE else quantize)


def _opened(
    tensors: Tensors,
    dtype: str,
    digest: Any,
    *,
    mesh: Mesh | None,
    kernels: bool,
    quantize: str,
    tied: bool = False,
    narrow: bool = False,
) -> Part:
    """Nested parameters in the layout of decoding, which are read one tensor at a time.

    If `narrow`, weights that the kernel of few rows reads are in bfloat16, however stored.

    Of each tensor, the digest gets the name, the shape and the first numbers.
    """
    how = {"tied": tied, "few_rows": kernels and usable(mesh), "quantize": quantize}
    for path, tensor in tensors.items():
        leaf_dtype = "int32" if path == "token_map" else dtype
        rows = min(-(-64 // max(math.prod(tensor.shape[1:]), 1)), tensor.shape[0])
        first = tensor.cast(leaf_dtype).read((slice(0, rows),)).reshape(-1)[:64]
        digest.update(f"{path} {tensor.shape}".encode() + first.tobytes())
    whole = joined(tensors, StoredTensor.concatenate) if mesh is None else tensors
    leaves: dict[str, Any] = {}
    for path, tensor in whole.items():
        leaves |= placed(path, tensor, **how)
    leaves = stacked(leaves, StoredTensor.stack)
    types = dtype, "bfloat16" if narrow else dtype
    leaves = {path: narrowed(path, leaf, quantize, *types) for path, leaf in leaves.items()}
    if how["few_rows"]:
        leaves = looped(leaves, StoredTensor.stack)
    tree = nested(leaves)
    if mesh is not None and any(leaf.dtype == "int4" for leaf in jax.tree.leaves(tree)):
        raise InputError("weights of int4 cannot be split over a mesh")
    unread, structure = jax.tree.flatten(tree)
    split = structure.flatten_up_to(shardings(tree, mesh)) if mesh else [None] * len(unread)
    shapes = [
        jax.ShapeDtypeStruct(one.shape, jnp.dtype(one.dtype), sharding=place)
        for one, place in zip(unread, split, strict=True)
    ]

    def read() -> Any:
        pairs = zip(unread, split, strict=True)
        loaded = [put(one.read, one.shape, place) for one, place in pairs]
        give_back()
        return structure.unflatten(loaded)

    return Part(structure.unflatten(shapes), read)


def _checked(backbone: Part, ruined: set[str], directory: Path) -> Any:
    """The backbone's numbers; says which tensors, those of heads among them, are not finite."""
    arrays = backbone.arrays
    if ruined:
        which = len(ruined), listed(sorted(ruined))
        log.warning("%s: %d tensors hold NaN or infinity: %s", directory, *which)
    return arrays
