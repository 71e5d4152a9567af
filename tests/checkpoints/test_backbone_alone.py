"""`convert --to hf`: a backbone as a plain Hugging Face directory, from any full checkpoint."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from helpers.head_files import (
    LAYERS,
    edit_config,
    edit_weights,
    heads_directory,
    original,
    random_heads,
    renamed,
)
from safetensors.numpy import load_file

from medusa_jax.checkpoints import bigram_file, conversion
from medusa_jax.checkpoints.dialects import backbone_settings
from medusa_jax.checkpoints.heads import open_heads
from medusa_jax.checkpoints.hub import shipped
from medusa_jax.checkpoints.load import load_model
from medusa_jax.errors import InputError


def logits(directory: Path, **options: Any) -> np.ndarray:
    """transformers' logits of some tokens; asserts that each tensor of the files was wanted."""
    model, found = transformers.AutoModelForCausalLM.from_pretrained(
        directory, output_loading_info=True, dtype=torch.float32, **options
    )
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        return model(torch.tensor([[1, 5, 9, 2]])).logits.numpy()


@pytest.mark.parametrize("dialect", ["v1.0", "modelopt", "none"])
def test_transformers_reads_the_backbone_of_a_merged_model(
    go: Any, saved: Path, copy: Path, tmp_path: Path, dialect: str
):
    expected = logits(saved)
    if dialect != "none":
        heads = renamed(random_heads(2), dialect, 2, 1)
        edit_weights(copy / "model.safetensors", lambda old: old | heads)
        edit_config(
            copy,
            architectures=["MedusaModelLlama"],
            medusa_num_heads=2,
            medusa_num_layers=1,
            version="2",
            medusa={"num_medusa_heads": 2},
        )
    noise = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(2) for i in range(LAYERS)}
    edit_weights(copy / "model.safetensors", lambda old: old | noise)
    bigram_file.save(copy, np.array([1, 2]), np.zeros((2, 2)))
    (copy / "tokenizer.json").write_text("{}")
    place = go(copy, "hf", base="")
    np.testing.assert_array_equal(logits(place), expected)
    written = json.loads((place / "config.json").read_text())
    assert written["architectures"] == ["LlamaForCausalLM"]
    assert not [key for key in written if "medusa" in key or key == "version"]
    assert {file.name for file in place.iterdir()} == {
        "config.json",
        "model.safetensors",
        "generation_config.json",
        "tokenizer.json",
    }
    with pytest.raises(InputError, match="holds no Medusa heads"):
        open_heads(place)


def test_the_shipped_backbone_comes_out_alone(tmp_path: Path):
    conversion.convert(str(shipped()), "hf", tmp_path / "out", dtype="float32")
    np.testing.assert_array_equal(logits(tmp_path / "out"), logits(shipped()))
    assert not (tmp_path / "out" / "medusa").exists()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["torch_dtype"], config["tie_word_embeddings"]) == ("float32", True)


def test_tied_models_store_their_embedding_once(go: Any, copy: Path):
    edit_config(copy, tie_word_embeddings=True)
    edit_weights(
        copy / "model.safetensors",
        lambda old: {name: tensor for name, tensor in old.items() if name != "lm_head.weight"},
    )
    place = go(copy, "hf", base="")
    assert "lm_head.weight" not in load_file(place / "model.safetensors")
    np.testing.assert_array_equal(logits(place), logits(copy))


@pytest.mark.parametrize("source", ["original", "vllm"])
def test_heads_have_no_backbone_to_write(go: Any, saved: Path, tmp_path: Path, source: str):
    if source == "original":
        heads = original(tmp_path / "heads", random_heads(1))
    else:
        theirs = renamed(random_heads(1), "vllm", 1, 1)
        heads = heads_directory(tmp_path / "heads", theirs, model_type="medusa")
    with pytest.raises(InputError, match=f"--to hf writes a backbone, and {heads} holds none"):
        go(heads, "hf", base="")
    place = go(heads, "hf", base=str(saved))
    np.testing.assert_array_equal(logits(place), logits(saved))


@pytest.mark.parametrize(
    ("rope", "theta", "scaling"),
    [
        ({"rope_type": "default", "rope_theta": 5e5}, 5e5, None),
        (
            {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
            1e4,
            {"rope_type": "linear", "factor": 2.0},
        ),
    ],
)
def test_settings_are_spelled_for_older_readers_too(
    go: Any, copy: Path, rope: dict[str, Any], theta: float, scaling: dict[str, Any] | None
):
    """transformers 4 takes its default for a theta that it does not find."""
    edit_config(copy, rope_parameters=rope)
    place = go(copy, "hf", base="")
    written = json.loads((place / "config.json").read_text())
    assert (written["rope_theta"], written.get("rope_scaling")) == (theta, scaling)
    assert (written["torch_dtype"], written.get("dtype")) == ("float32", None)
    np.testing.assert_array_equal(logits(place), logits(copy))
    assert load_model(place).config == load_model(copy).config


def test_settings_of_transformers_4_stay():
    old = {"rope_theta": 3e4, "torch_dtype": "float16", "rope_scaling": None}
    assert backbone_settings(old) == old
    assert backbone_settings(old, "bfloat16") == old | {"torch_dtype": "bfloat16"}
