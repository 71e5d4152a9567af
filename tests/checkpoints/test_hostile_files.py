"""Files that are not what they seem: refused with a message, before memory or time is lost."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.head_files import (
    NPZ,
    edit_config,
    edit_weights,
    error_of,
    heads_directory,
    heads_file,
    random_heads,
    renamed,
)
from safetensors.numpy import load_file
from safetensors.torch import save_file

from medusa_jax.checkpoints.heads import open_heads
from medusa_jax.checkpoints.load import load_model
from medusa_jax.errors import InputError

LFS = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)


def indexed(directory: Path, file: str) -> Path:
    """An index that places all tensors in one file, wherever that is."""
    names = list(random_heads(1))
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, file)}))
    return index


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "/etc/passwd",
        "",
        ".",
        "..",
        "a/b.bin",
        "a\\b",
        "a\0b",
        "a" * 10**4,
    ],
)
def test_an_index_does_not_lead_out_of_its_directory(copy: Path, saved: Path, name: str):
    (copy.parent / "outside.safetensors").write_bytes((copy / "model.safetensors").read_bytes())
    index = indexed(copy, name)
    message = error_of(copy)
    assert f"{index} names files that are not beside it" in message
    assert len(message) < 400


def test_an_index_follows_the_links_of_a_hub_cache(copy: Path, saved: Path):
    blob = copy.parent / "blobs" / "0123abc"
    blob.parent.mkdir()
    (copy / "model.safetensors").rename(blob)
    (copy / "model-1.safetensors").symlink_to(blob)
    placed = dict.fromkeys(load_file(blob), "model-1.safetensors")
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    assert load_model(copy).fingerprint == load_model(saved).fingerprint


@pytest.mark.parametrize("name", ["medusa_lm_head.safetensors", "medusa_lm_head.pt"])
def test_a_pointer_of_git_lfs_is_called_that(saved: Path, tmp_path: Path, name: str):
    (tmp_path / name).write_text(LFS)
    assert f"{tmp_path / name} is a Git LFS pointer" in error_of(saved, tmp_path)


@pytest.mark.parametrize("name", ["medusa_lm_head.safetensors", "medusa_lm_head.pt"])
def test_empty_tensors_are_called_that(saved: Path, tmp_path: Path, name: str):
    tensors = {key: torch.zeros(0) for key in random_heads(2)}
    if name.endswith(".pt"):
        torch.save(tensors, tmp_path / name)
    else:
        save_file(tensors, tmp_path / name)
    message = error_of(saved, tmp_path)
    assert f"{tmp_path / name}: empty tensors, as ZeRO-3 leaves them: 0.0.linear.bias" in message


@pytest.mark.parametrize("name", ["model.safetensors", "medusa_lm_head.pt"])
def test_eight_bit_floats_are_refused_by_name(copy: Path, saved: Path, tmp_path: Path, name: str):
    tensors = {key: torch.from_numpy(array) for key, array in random_heads(2).items()}
    tensors["1.1.weight"] = tensors["1.1.weight"].to(torch.float8_e4m3fn)
    place = tmp_path / "eight"
    place.mkdir()
    if name.endswith(".pt"):
        torch.save(tensors, place / name)
    else:
        save_file(tensors, place / name)
    message = error_of(saved, place)
    assert message.startswith(f"{place / name}: 1.1.weight is of type ")
    assert "not supported (quantized?)" in message


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "module", "model"])
def test_a_state_dict_inside_a_checkpoint(saved: Path, tmp_path: Path, key: str):
    tensors = {f"module.{name}": torch.from_numpy(t) for name, t in random_heads(2).items()}
    file = tmp_path / "medusa_lm_head.pt"
    torch.save({key: tensors, "step": 7}, file)
    assert load_model(saved, file).heads.num_heads == 2
    torch.save({"weights": tensors, "step": 7}, file)
    assert f"{file} holds no named tensors; its keys: weights, step" in error_of(saved, file)


@pytest.mark.parametrize(
    "wrapper", ["module.", "_orig_mod.", "base_model.model.", "module._orig_mod.base_model.model."]
)
@pytest.mark.parametrize("prefix", ["", "medusa_head.", "medusa_heads."])
def test_heads_of_wrapped_models(saved: Path, tmp_path: Path, wrapper: str, prefix: str):
    plain = random_heads(2, prefix=prefix)
    theirs = {f"{wrapper}{name}": tensor for name, tensor in plain.items()}
    wrapped = load_model(saved, heads_directory(tmp_path / "wrapped", theirs))
    bare = load_model(saved, heads_directory(tmp_path / "bare", plain))
    assert wrapped.fingerprint == bare.fingerprint


def test_names_that_mean_nothing_are_told(tmp_path: Path):
    theirs = {f"head{i}.weight": np.ones((2, 2), np.float32) for i in range(100)}
    place = heads_directory(tmp_path / "heads", theirs)
    with pytest.raises(InputError, match=r"its tensors: head0\.weight, .* and 95 more"):
        open_heads(place)


@pytest.mark.parametrize("number", [10**12, 10**8, 999])
@pytest.mark.parametrize("place", ["head", "block"])
def test_numbers_of_heads_and_blocks_are_bounded_by_the_tensors(
    saved: Path, tmp_path: Path, number: int, place: str
):
    tensors = random_heads(2)
    name = f"{number}.0.linear.weight" if place == "head" else f"0.{number}.linear.weight"
    tensors[name] = tensors.pop("1.0.linear.weight")
    message = error_of(saved, heads_file(tmp_path, tensors))
    assert "too few tensors" in message or f"unknown tensors: {name}" in message


@pytest.mark.parametrize(
    "mapping", [{"tp_size": 10**12}, {"tp_size": 0}, {"tp_size": "2"}, {"pp_size": -1}, [1], "a"]
)
def test_numbers_of_ranks_are_bounded(saved: Path, tmp_path: Path, mapping: Any):
    theirs = renamed(random_heads(2), "trtllm", 2, 1)
    place = heads_directory(tmp_path / "trt", theirs, mapping=mapping)
    (place / "model.safetensors").rename(place / "rank0.safetensors")
    assert f"{place / 'config.json'}: 'mapping'" in error_of(saved, place)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("0.1.weight", np.float32(1)),
        ("0.0.linear.weight", np.ones(3, np.float32)),
        ("0.0.linear.bias", np.ones((3, 3), np.float32)),
        ("token_map", np.array([0.5], np.float32)),
        ("token_map", np.array(1)),
    ],
)
def test_tensors_of_other_dimensions(saved: Path, tmp_path: Path, name: str, tensor: np.ndarray):
    theirs = random_heads(2) | {name: np.asarray(tensor)}
    assert f"misshapen {name}" in error_of(saved, heads_file(tmp_path, theirs))


def test_more_layers_than_tensors_are_refused_in_few_lines(copy: Path):
    edit_config(copy, num_hidden_layers=9_999)
    message = error_of(copy)
    assert "missing model.layers.2.input_layernorm.weight" in message or "and " in message
    assert len(message.splitlines()) < 40
    edit_config(copy, num_hidden_layers=10**9)
    assert f"{copy / 'config.json'}: 'num_hidden_layers' must be" in error_of(copy)


@pytest.mark.parametrize("name", [5, ["x"], "a" * 10**4, "a\0b", "x/" + "y" * 300])
def test_the_backbone_that_heads_name(tmp_path: Path, name: Any):
    heads_file(tmp_path, random_heads(2))
    (tmp_path / "config.json").write_text(json.dumps({"base_model_name_or_path": name}))
    message = error_of(tmp_path)
    assert "base_model_name_or_path" in message or "does not exist" in message
    assert len(message) < 400


def test_vocabularies_beyond_the_tensors(copy: Path):
    edit_config(copy, vocab_size=2**31 - 1, hidden_size=2**31 - 1, head_dim=4)
    assert "misshapen model.embed_tokens.weight" in error_of(copy)


def test_a_scalar_in_place_of_an_embedding(copy: Path):
    edit_config(copy, tie_word_embeddings=True)

    def spoil(tensors: NPZ) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = np.array(1, np.float32)

    edit_weights(copy / "model.safetensors", spoil)
    assert "misshapen model.embed_tokens.weight: []" in error_of(copy)
