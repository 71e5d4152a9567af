"""Loading: what is wrong with a checkpoint is said in words, all at once."""

import json
from pathlib import Path
from typing import Any

import chex
import numpy as np
import pytest
import transformers
from helpers.head_files import (
    NPZ,
    VOCAB,
    WIDTH,
    edit_weights,
    error_of,
    heads_file,
    random_heads,
    save_bin,
)

from medusa_jax.checkpoints.load import load_model

# What is wrong


def test_all_that_is_wrong_is_listed_at_once(copy: Path):
    def spoil(tensors: NPZ) -> None:
        del tensors["model.norm.weight"], tensors["model.layers.0.mlp.up_proj.weight"]
        tensors["model.layers.9.mlp.up_proj.weight"] = np.zeros((32, WIDTH), np.float32)
        tensors["visual.weight"] = np.zeros(3, np.float32)
        tensors["lm_head.weight"] = np.zeros((VOCAB + 1, WIDTH), np.float32)
        tensors["model.layers.1.mlp.down_proj.weight"] = np.zeros((32, WIDTH), np.float32)

    edit_weights(copy / "model.safetensors", spoil)
    message = error_of(copy)
    assert str(copy) in message
    lines = [line.strip() for line in message.splitlines()[1:]]
    assert sorted(lines) == [
        "misshapen lm_head.weight: [25, 16], expected [24, 16]",
        "misshapen model.layers.1.mlp.down_proj.weight: [32, 16], expected [16, 32]",
        "missing model.layers.0.mlp.up_proj.weight [32, 16]",
        "missing model.norm.weight [16]",
        "unexpected model.layers.9.mlp.up_proj.weight [32, 16]",
        "unexpected visual.weight [3]",
    ]


@pytest.mark.parametrize("kept", [0.9, 0.5, 0.001])
def test_truncated_safetensors(copy: Path, kept: float):
    file = copy / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(kept * len(data))])
    message = error_of(copy)
    assert str(file) in message
    assert "not a complete safetensors file" in message


@pytest.mark.parametrize("kept", [0.9, 0.5, 0.001])
def test_truncated_bin(
    saved: Path, llama: transformers.PreTrainedModel, tmp_path: Path, kept: float
):
    save_bin(llama.state_dict(), saved, tmp_path)
    file = tmp_path / "pytorch_model-00002-of-00002.bin"
    data = file.read_bytes()
    file.write_bytes(data[: int(kept * len(data))])
    assert str(file) in error_of(tmp_path)


def test_missing_directory(tmp_path: Path, saved: Path):
    missing = tmp_path / "nowhere"
    assert f"{missing} does not exist" in error_of(missing)
    assert f"{missing} does not exist" in error_of(saved, missing)


def test_missing_config(copy: Path):
    (copy / "config.json").unlink()
    assert f"{copy / 'config.json'} does not exist" in error_of(copy)


@pytest.mark.parametrize("text", ["{'hidden_size': 16}", "", "[1, 2]"])
def test_config_that_is_no_json_object(copy: Path, text: str):
    (copy / "config.json").write_text(text)
    assert str(copy / "config.json") in error_of(copy)


def test_no_weights(copy: Path):
    (copy / "model.safetensors").unlink()
    message = error_of(copy)
    assert f"{copy} holds no weights" in message
    assert "model.safetensors, pytorch_model.bin" in message


def test_missing_shard(saved: Path, llama: transformers.PreTrainedModel, tmp_path: Path):
    save_bin(llama.state_dict(), saved, tmp_path)
    shard = tmp_path / "pytorch_model-00001-of-00002.bin"
    shard.unlink()
    message = error_of(tmp_path)
    assert str(shard) in message
    assert "00002-of-00002" not in message


def test_index_that_misplaces_a_tensor(
    saved: Path, llama: transformers.PreTrainedModel, tmp_path: Path
):
    save_bin(llama.state_dict(), saved, tmp_path)
    file = tmp_path / "pytorch_model.bin.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["lm_head.weight"] = "pytorch_model-00001-of-00002.bin"
    file.write_text(json.dumps(index))
    assert "lm_head.weight (in pytorch_model-00001-of-00002.bin)" in error_of(tmp_path)


@pytest.mark.parametrize("placed", [None, ["model.norm.weight"], {"model.norm.weight": 1}])
def test_index_that_is_none(copy: Path, placed: Any):
    index = copy / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": placed}))
    assert str(index) in error_of(copy)


def test_hub_id(saved: Path, monkeypatch: pytest.MonkeyPatch):
    asked = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append(name)
        for file in saved.iterdir():
            assert any(file.match(pattern) for pattern in allow_patterns)
        return str(saved)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    chex.assert_trees_all_equal(load_model("some/model").params, load_model(saved).params)
    assert asked == ["some/model"]


@pytest.mark.parametrize(
    "failure",
    [
        OSError("no route\nto host"),
        TimeoutError(),
    ],
)
def test_hub_that_cannot_be_reached(failure: OSError, monkeypatch: pytest.MonkeyPatch):
    def download(*_: Any, **__: Any) -> str:
        raise failure

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    message = error_of("some/model")
    assert "some/model is no local path and could not be had from the hub" in message
    assert "to host" not in message


def test_heads_for_another_model(saved: Path, tmp_path: Path):
    file = heads_file(tmp_path, random_heads(2, width=WIDTH + 2))
    message = error_of(saved, file)
    assert f"{file}: these heads were made for hidden size {WIDTH + 2}" in message
    assert f"the model has {WIDTH}" in message
    file = heads_file(tmp_path, random_heads(2, vocab=VOCAB + 2))
    message = error_of(saved, file)
    assert f"{file}: these heads were made for a vocabulary of {VOCAB + 2}" in message
    assert f"the model has {VOCAB}" in message


def test_unknown_head_tensors_are_named(saved: Path, tmp_path: Path):
    strange = {"blocks.0.weight": np.zeros(2, np.float32), "0.1.bias": np.zeros(2, np.float32)}
    message = error_of(saved, heads_file(tmp_path, random_heads(2) | strange))
    assert "medusa_lm_head.safetensors" in message
    assert "blocks.0.weight" in message
    assert "0.1.bias" in message
    assert "0.1.weight" not in message


def test_incomplete_heads_are_listed(saved: Path, tmp_path: Path):
    tensors = random_heads(3)
    del tensors["1.0.linear.bias"]
    tensors["2.1.weight"] = np.zeros((VOCAB, WIDTH + 1), np.float32)
    tensors["0.0.weight"] = np.zeros((VOCAB, WIDTH), np.float32)
    message = error_of(saved, heads_file(tmp_path, tensors))
    assert "missing 1.0.linear.bias [16]" in message
    assert "misshapen 2.1.weight: [24, 17], expected [24, 16]" in message
    assert "unexpected 0.0.weight [24, 16]" in message


def test_surplus_merged_heads_are_listed(copy: Path):
    tensors = random_heads(2, prefix="medusa_head.")
    tensors["medusa_head.0.0.weight"] = np.zeros((VOCAB, WIDTH), np.float32)
    edit_weights(copy / "model.safetensors", lambda old: old | tensors)
    assert "unexpected medusa_head.0.0.weight [24, 16]" in error_of(copy)


def test_directory_without_heads(saved: Path):
    message = error_of(saved, saved)
    assert f"{saved} holds no Medusa heads" in message
    assert "medusa_head.*" in message
