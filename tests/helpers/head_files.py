"""Makes, spoils and compares checkpoint files for the tests of loading."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from helpers.models import apart
from medusa_jax.checkpoints.load import load_model
from medusa_jax.errors import InputError
from medusa_jax.model.weight import Weight
from medusa_jax.param_paths import flat, nested

WIDTH, VOCAB, LAYERS = 16, 24, 2
NPZ = dict[str, np.ndarray]


def random_llama() -> transformers.PreTrainedModel:
    """An untied Llama with biases, so that all kinds of tensor occur."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attention_bias=True,
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_()
    return model


def edit_config(directory: Path, **changes: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_weights(file: Path, change: Callable[[NPZ], NPZ | None]) -> None:
    tensors = load_file(file)
    save_file(change(tensors) or tensors, file)


def without_projection(tensors: NPZ) -> NPZ:
    """A backbone's tensors as a tied model stores them."""
    return {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}


def writable_copy(source: Path, target: Path) -> Path:
    """Copies a read-only directory's files."""
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def save_bin(tensors: dict[str, torch.Tensor], config: Path, directory: Path) -> Path:
    """Writes two `.bin` shards, their index and the config."""
    directory.mkdir(exist_ok=True)
    names = list(tensors)
    half = len(names) // 2
    shards = {
        "pytorch_model-00001-of-00002.bin": names[:half],
        "pytorch_model-00002-of-00002.bin": names[half:],
    }
    for shard, inside in shards.items():
        torch.save({name: tensors[name] for name in inside}, directory / shard)
    placed = {name: shard for shard, inside in shards.items() for name in inside}
    index = {"metadata": {"total_size": 0}, "weight_map": placed}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    shutil.copy(config / "config.json", directory)
    return directory


def random_heads(
    heads: int, layers: int = 1, width: int = WIDTH, vocab: int | None = VOCAB, prefix: str = ""
) -> NPZ:
    """Head tensors under the original's names; without `vocab`, those of its version 2."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32)

    tensors = {}
    for i in range(heads):
        for j in range(layers):
            tensors[f"{prefix}{i}.{j}.linear.weight"] = normal(width, width)
            tensors[f"{prefix}{i}.{j}.linear.bias"] = normal(width)
        if vocab:
            tensors[f"{prefix}{i}.{layers}.weight"] = normal(vocab, width)
    return tensors


def heads_file(directory: Path, tensors: NPZ) -> Path:
    file = directory / "medusa_lm_head.safetensors"
    save_file(tensors, file)
    return file


def stored(params: dict[str, Any]) -> dict[str, Any]:
    """Nested NumPy parameters [out, in], as in files, of those that are laid out for decoding."""

    def plain(leaf: Any) -> np.ndarray:
        turned = isinstance(leaf, Weight) and leaf.order == "in_out"
        array = np.asarray(leaf.data if isinstance(leaf, Weight) else leaf)
        return array.mT if turned else array

    leaves = {path: plain(leaf) for path, leaf in flat(one_by_one(params)).items()}
    for path in list(leaves):
        if "gate_up" in path:
            split(leaves, path, ("gate", "up"), [leaves[path].shape[0] // 2])
        if "query_key_value" in path:
            layer = path.split("query_key_value")[0]
            queries = leaves[f"{layer}out/weight"].shape[1]
            keys = (leaves[path].shape[0] - queries) // 2
            split(leaves, path, ("query", "key", "value"), [queries, queries + keys])
    return apart(nested(leaves))


def one_by_one(params: dict[str, Any]) -> dict[str, Any]:
    """Parameters whose layers are no stack: "layers/..." becomes "layer_0/..." and on."""
    if "layers" not in params:
        return params
    rest = {name: inner for name, inner in params.items() if name != "layers"}
    count = len(jax.tree.leaves(params["layers"])[0])
    layers = [jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"]) for i in range(count)]
    return rest | {f"layer_{i}": layer for i, layer in enumerate(layers)}


def split(leaves: dict[str, np.ndarray], path: str, names: Any, places: list[int]) -> None:
    """Replaces a joint layer's parameter by those of its layers."""
    for name, part in zip(names, np.split(leaves.pop(path), places), strict=True):
        leaves[path.replace("_".join(names), name)] = part


def projection(backbone: dict[str, Any]) -> np.ndarray:
    """A loaded backbone's projection [V, D], which is the embedding of a tied model."""
    plain = stored(backbone)
    return plain.get("lm_head", plain["embed"]["embedding"])


def by_name(params: dict[str, Any]) -> NPZ:
    """Head parameters under the names of the original's files."""
    tensors, params = {}, stored(params)
    for i in range(len(params)):
        head = params[f"head_{i}"]
        blocks = [name for name in head if name.startswith("block_")]
        for j in range(len(blocks)):
            for kind in ("weight", "bias"):
                tensors[f"{i}.{j}.linear.{kind}"] = np.asarray(head[f"block_{j}"][kind])
        if "vocab" in head:
            tensors[f"{i}.{len(blocks)}.weight"] = np.asarray(head["vocab"])
    return tensors


def assert_same(ours: NPZ, theirs: NPZ) -> None:
    """Equal names, types, shapes and bits."""
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape)
        assert ours[name].tobytes() == tensor.tobytes(), name


def error_of(*arguments: Any) -> str:
    with pytest.raises(InputError) as error:
        load_model(*arguments)
    return str(error.value)


def names_in(dialect: str, head: int, layers: int) -> dict[str, str]:
    """One head's tensor names in a dialect, by those of the original, written out."""
    prefix = {"v1.0": "medusa_head.", "mlc": "medusa_head.", "modelopt": "medusa_heads."}
    block, vocab = {
        "vllm": (f"blocks.{head}.layers.%d", f"lm_heads.{head}.weight"),
        "trtllm": (
            f"medusa_heads.{head}.medusa_layers.%d.linear",
            f"medusa_heads.{head}.lm_head.weight",
        ),
    }.get(
        dialect,
        (
            f"{prefix.get(dialect, '')}{head}.%d.linear",
            f"{prefix.get(dialect, '')}{head}.{layers}.weight",
        ),
    )
    names = {f"{head}.{layers}.weight": vocab}
    for layer in range(layers):
        for kind in ("weight", "bias"):
            names[f"{head}.{layer}.linear.{kind}"] = f"{block % layer}.{kind}"
    return names


def renamed(tensors: NPZ, dialect: str, heads: int, layers: int) -> NPZ:
    """The original's head tensors under a dialect's names; others keep theirs."""
    names: dict[str, str] = {}
    for head in range(heads):
        names |= names_in(dialect, head, layers)
    return {names.get(name, name): tensor for name, tensor in tensors.items()}


def heads_directory(directory: Path, tensors: NPZ, **config: Any) -> Path:
    """A directory of `model.safetensors` and a config."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def original(place: Path, tensors: NPZ, **config: Any) -> Path:
    """A v0.1 or v2 directory."""
    place.mkdir()
    heads_file(place, tensors)
    (place / "config.json").write_text(json.dumps(config))
    return place
