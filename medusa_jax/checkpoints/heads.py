"""Heads in files: finds them, recognizes their dialect, and checks them; reads nothing yet.

All dialects are read to the paths of our parameters ("head_0/block_0/weight", "head_0/vocab").
Heads, layers and rows are counted from the tensors, because the configs of old uploads are wrong.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from medusa_jax import json_files
from medusa_jax.checkpoints.dialects import DIALECTS, MERGED, TRTLLM, VLLM, folder
from medusa_jax.checkpoints.names import (
    ORIGINAL,
    ORIGINAL_HYDRA,
    SELECTOR,
    HeadNames,
    head_places,
    matched,
)
from medusa_jax.checkpoints.stored_tensor import StoredTensor, Tensors
from medusa_jax.checkpoints.tensors import open_file, open_model
from medusa_jax.drafting.medusa_heads import HYDRA, MEDUSA, HeadsConfig
from medusa_jax.errors import InputError, listed
from medusa_jax.model.config import ModelConfig

MOST_RANKS = 4096  # processes that wrote a model together
HEAD_FILES = tuple(
    f"{kind}_lm_head.{ending}" for kind in (MEDUSA, HYDRA) for ending in ("safetensors", "pt")
)
# Prefixes of head tensors in files that hold a backbone too.
_PREFIXES = ("medusa_head.", "medusa_heads.", "hydra_head.")
_HYDRA_PLUS = "prefix_embeding_layer."  # so in the files of Hydra++


@dataclasses.dataclass(frozen=True)
class StoredHeads:
    """Heads in files, not read yet.

    Attributes:
      dialect: a key of `DIALECTS`.
      source: the file or the directory.
      config: their shape.
      tensors: by the path of their parameter; "vocab" is a stored projection
        that all heads share, "token_map" the ids of its rows.
      settings: `config.json` beside them.
      with_backbone: `source` is a Hugging Face directory that holds their backbone too.
    """

    dialect: str
    source: Path
    config: HeadsConfig
    tensors: Tensors
    settings: dict[str, Any]
    with_backbone: bool


def head_file(directory: Path) -> Path | None:
    """An original's file of heads, in a directory or its `medusa/`, where there is one."""
    files = (place / name for place in (directory, folder(directory)) for name in HEAD_FILES)
    return next((file for file in files if file.is_file()), None)


def divide(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """(heads, everything else) of a merged model."""
    heads = {name: tensor for name, tensor in tensors.items() if name.startswith(_PREFIXES)}
    return heads, {name: tensor for name, tensor in tensors.items() if name not in heads}


def merged_dialect(heads: Tensors) -> str:
    """The dialect of head tensors in a backbone's files."""
    prefix = next(iter(heads)).split(".")[0]
    return {"medusa_heads": "modelopt", "hydra_head": "hydra_merged"}.get(prefix, "v1.0")


def open_heads(source: Path, dialect: str | None = None) -> StoredHeads:
    """Head tensors of a file or a directory, whatever their dialect.

    Args:
      dialect: to read it as, where a directory holds several; default: the
        original's file, else what the names of the tensors say.

    Raises:
      InputError: no heads, unknown or missing tensors, or what no reader of
        ours supports; the message names the file and the tensors.
    """
    directory = source if source.is_dir() else source.parent
    config = directory / "config.json"
    settings = json_files.read_object(config) if config.is_file() else {}
    _check_settings(json_files.Fields(settings, str(config)))
    wanted = DIALECTS[dialect].names if dialect else None
    file = head_file(source) if wanted in (None, ORIGINAL, ORIGINAL_HYDRA) else None
    if source.is_file():
        tensors = open_file(source)
    elif (source / "rank0.safetensors").is_file() and wanted in (None, TRTLLM):
        tensors = _join_ranks(source, settings)
    elif file:
        source, tensors = file, open_file(file)
    else:
        tensors = open_model(source)
    # vLLM's reader drops this prefix too.
    prefix = re.compile(r"medusa_heads\.(?=blocks|lm_head|token_map)")
    tensors = {prefix.sub("", name): tensor for name, tensor in tensors.items()}
    known = [dialect.names for dialect in DIALECTS.values()]
    names = wanted or max(known, key=lambda names: _seen(names, tensors))
    if not _seen(names, tensors):
        of = f" of dialect {dialect}" if dialect else ""
        raise InputError(
            f"{source} holds no Medusa heads{of}: expected {' or '.join(HEAD_FILES)}, or tensors "
            f"named medusa_head.*, medusa_heads.* or blocks.*; its tensors: {listed(tensors, 5)}"
        )
    if any(name.startswith(_HYDRA_PLUS) for name in tensors):
        raise InputError(
            f"{source}: these are Hydra++ heads, which read a layer of their own (prefix-mlp); "
            "expected Hydra heads without it (mlp)"
        )
    rest: Tensors = {}
    if names not in (ORIGINAL, ORIGINAL_HYDRA, VLLM):  # those with a prefix
        tensors, rest = divide(tensors)
    _check_kinds(names, tensors, source)
    if names is VLLM:
        tensors = _vllm(tensors, source, settings)
    config, by_path = _counted(names, tensors, source)
    if not dialect:
        dialect = next(name for name, known in DIALECTS.items() if known.names is names)
    if names is MERGED:
        dialect = "v1.0" if rest else "mlc"
    elif dialect in ("v0.1", "v2"):
        dialect = "v2" if config.shared else "v0.1"
    with_backbone = bool(rest) and names is not TRTLLM and source.is_dir()
    return StoredHeads(dialect, source, config, by_path, settings, with_backbone)


def _check_settings(fields: json_files.Fields) -> None:
    """Raises InputError unless what `config.json` says of heads has the right types."""
    fields.integer("vocab_size", 0)
    name = fields.text("base_model_name_or_path", "")
    if any(len(part.encode()) > 255 for part in name.split("/")):  # no file system has such names
        shown = json_files.short(name)
        raise InputError(f"{fields.origin}: 'base_model_name_or_path' must be a name, got {shown}")


def check_fit(heads: StoredHeads, config: ModelConfig) -> None:
    """Raises InputError unless heads were made for a backbone of this shape."""
    shape, source = heads.config, heads.source
    if shape.hidden_size != config.hidden_size:
        raise InputError(
            f"{source}: these heads were made for hidden size {shape.hidden_size}, "
            f"the model has {config.hidden_size}"
        )
    if shape.vocab_size not in (0, config.vocab_size):
        raise InputError(
            f"{source}: these heads were made for a vocabulary of {shape.vocab_size}, "
            f"the model has {config.vocab_size}"
        )
    if shape.truncated:
        ids = heads.tensors["token_map"].read()
        if ids.min() < 0 or ids.max() >= config.vocab_size or len(np.unique(ids)) != ids.size:
            raise InputError(
                f"{source}: token_map must hold different token ids of a vocabulary of "
                f"{config.vocab_size}"
            )


def head_tensors(source: Path, expected: HeadsConfig) -> Tensors:
    """Tensors of heads by the path of their parameter, unread.

    Whole heads without a projection of their own serve as truncated ones too: they hold no rows.
    Heads without a selector serve as heads to which one is added; one that is not expected is
    left out.

    Raises:
      InputError: they cannot be opened, or have another shape than expected.
    """
    stored = open_heads(source)
    shape, tensors = stored.config, stored.tensors
    if shape.shared or shape.truncated:  # then their tensors do not say V
        shape = dataclasses.replace(shape, vocab_size=expected.vocab_size)
    if shape.shared and not shape.truncated and "vocab" not in tensors:
        shape = dataclasses.replace(shape, truncated=expected.truncated)
    if not expected.selector:
        tensors = {path: one for path, one in tensors.items() if not path.startswith("selector/")}
    elif shape.selector not in (0, expected.selector):
        raise InputError(
            f"{source}: these heads have a selector of {shape.selector} ranks; set "
            f"heads.selector={shape.selector}"
        )
    shape = dataclasses.replace(shape, selector=expected.selector)
    if shape != expected:
        raise InputError(f"{source} holds {shape}, expected {expected}")
    return tensors


def _seen(names: HeadNames, tensors: Tensors) -> int:
    """How many tensors have the name of a head's own tensor."""
    parsed = (_role(names, name) for name in tensors)
    return sum(role is not None and "h" in role[1] for role in parsed)


def _role(names: HeadNames, tensor: str) -> tuple[str, dict[str, str]] | None:
    """The part of a head that a tensor is, and the numbers in its name; None for no part."""
    templates = {
        "weight": f"{names.linear}.weight",
        "bias": f"{names.linear}.bias",
        "vocab": names.vocab,
        "vocab_bias": names.vocab_bias,
        "shared": names.shared,
        "token_map": names.token_map,
    }
    if names.residual:
        templates |= {f"residual.{part}": f"{names.residual}.{part}" for part in ("weight", "bias")}
    if names.selector:
        templates |= {f"selector.{part}": f"{names.selector}.{part}" for part in SELECTOR}
    for role, template in templates.items():
        pattern = re.sub(r"\\{(\w)\\}", r"(?P<\1>\\d{1,9})", re.escape(template))
        if template and (match := re.fullmatch(pattern, tensor)):
            return role, match.groupdict()
    return None


def _check_kinds(names: HeadNames, tensors: Tensors, source: Path) -> None:
    """Raises InputError where a tensor is no matrix, no vector or no list of ids, as its name says.

    What follows counts rows and columns.
    """
    for name, tensor in tensors.items():
        role = (_role(names, name) or ("",))[0]
        vector = role == "token_map" or role.endswith("bias")
        dimensions = len(tensor.shape) if not role else 1 if vector else 2
        ids = role != "token_map" or "int" in tensor.dtype
        if len(tensor.shape) != dimensions or not ids:
            raise InputError(f"{source}: misshapen {name}: {tensor.dtype} {list(tensor.shape)}")


def _counted(names: HeadNames, tensors: Tensors, source: Path) -> tuple[HeadsConfig, Tensors]:
    """The shape of the heads, counted from the tensors, and the tensors by parameter path."""
    parsed = {name: role for name in tensors if (role := _role(names, name))}
    if unknown := sorted(tensors.keys() - parsed.keys()):
        layout = "the original's" if names is ORIGINAL else "a known"
        raise InputError(f"{source}: not {layout} head layout; unknown tensors: {listed(unknown)}")

    def named(role: str) -> list[str]:
        return [name for name, (its, _) in parsed.items() if its == role]

    def count(letter: str) -> int:
        numbers = (int(n[letter]) for _, n in parsed.values() if letter in n)
        return 1 + max(numbers, default=-1)

    num_heads, num_layers = count("h"), count("l")
    if num_heads * num_layers > len(tensors):  # before they are looped over
        raise InputError(
            f"{source}: too few tensors ({len(tensors)}) for heads up to number {num_heads - 1} "
            f"of {num_layers} blocks"
        )
    if not named("bias"):  # the dialect allows heads without biases
        none = {name.replace("weight", "bias"): zeros(tensors[name]) for name in named("weight")}
        tensors = tensors | none
    projections = named("vocab") + named("shared")
    rows = tensors[projections[0]].shape[0] if projections else 0
    truncated = tensors[names.token_map].shape[0] if named("token_map") else 0
    ranks = [tensors[name].shape[0] for name in named("selector.before.weight")]
    width = tensors[(named("weight") + projections)[0]].shape[-1]
    if names.residual:  # its heads have inputs of several times that
        width = next((tensors[name].shape[0] for name in named("weight")), width)
    config = HeadsConfig(
        num_heads=num_heads,
        num_layers=num_layers,
        hidden_size=width,
        vocab_size=0 if truncated else rows,
        shared=not named("vocab"),
        truncated=truncated,
        selector=next(iter(ranks), 0),
        architecture=HYDRA if names.residual else MEDUSA,
    )
    places = head_places(config, names, with_shared=bool(named("shared")))
    return config, matched(places, tensors, source)


def _vllm(tensors: Tensors, source: Path, settings: dict[str, Any]) -> Tensors:
    """vLLM's tensors as it understands them."""
    if (scale := settings.get("logit_scale", 1.0)) != 1.0:
        raise InputError(f"{source}: logit_scale {json_files.short(scale)} is not supported")
    # With original_lm_head the first head's projection is that of all.
    several, second = "blocks.1.layers.0.weight" in tensors, "lm_heads.1.weight" in tensors
    if several and not second and "lm_head.weight" not in tensors:
        shared = {"lm_heads.0.weight": "lm_head.weight"}
        tensors = {shared.get(name, name): tensor for name, tensor in tensors.items()}
    if "token_map" not in tensors:
        return tensors
    ids = tensors["token_map"].read()

    def shortened(name: str, tensor: StoredTensor) -> StoredTensor:
        if not name.startswith("lm_head") or tensor.shape[0] <= ids.size:
            return tensor
        if not 0 <= ids.min() <= ids.max() < tensor.shape[0]:
            raise InputError(f"{source}: token_map has ids beyond the rows of {name}")
        return tensor.rows(ids)

    return {name: shortened(name, tensor) for name, tensor in tensors.items()}


def _join_ranks(directory: Path, settings: dict[str, Any]) -> Tensors:
    """TensorRT-LLM's heads from the rows that each rank holds; padded vocabularies are cut."""
    fields = json_files.Fields(settings, str(directory / "config.json"))
    mapping = fields.inner("mapping")
    size = mapping.integer("tp_size", 1, most=MOST_RANKS)
    # The last pipeline stage has the heads.
    first = (mapping.integer("pp_size", 1, most=MOST_RANKS) - 1) * size
    vocab_size = fields.integer("vocab_size", 2**31 - 1)
    files = [directory / f"rank{rank}.safetensors" for rank in range(first, first + size)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise InputError(f"{directory}: config.json has {size} ranks, no {listed(missing)}")
    ranks = [divide(open_file(file))[0] for file in files]
    for file, rank in zip(files, ranks, strict=True):
        columns, first_columns = (
            {name: tensor.shape[1:] for name, tensor in one.items() if tensor.shape}
            for one in (rank, ranks[0])
        )
        if columns != first_columns or len(columns) < len(rank):
            differing = listed(sorted({n for n, _ in columns.items() ^ first_columns.items()}))
            raise InputError(f"{file} and {files[0].name} hold different heads: {differing}")

    def joined(name: str) -> StoredTensor:
        parts = [rank[name] for rank in ranks]
        rows = sum(part.shape[0] for part in parts)
        if name.endswith(".lm_head.weight"):
            rows = min(rows, vocab_size)

        def read(index: Any = ...) -> np.ndarray:
            return np.concatenate([part.read() for part in parts])[:rows][index]

        return StoredTensor((rows, *parts[0].shape[1:]), parts[0].dtype, read)

    return {name: joined(name) for name in ranks[0]}


def zeros(weight: StoredTensor) -> StoredTensor:
    """A bias that adds nothing to W x."""
    shape, dtype = weight.shape[:1], weight.dtype
    return StoredTensor(shape, dtype, lambda index=...: np.zeros(shape, jnp.dtype(dtype))[index])
