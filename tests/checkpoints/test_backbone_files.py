"""Backbones as all kinds of writers leave them, against transformers and against a plain file."""

import logging
from pathlib import Path

import chex
import numpy as np
import pytest
import torch
import transformers
from helpers.head_files import (
    NPZ,
    VOCAB,
    WIDTH,
    edit_config,
    edit_weights,
    error_of,
    heads_file,
    projection,
    random_heads,
    stored,
    without_projection,
)
from safetensors.numpy import load_file

from medusa_jax.checkpoints import backbone
from medusa_jax.checkpoints.backbone import open_backbone
from medusa_jax.checkpoints.finite import finite
from medusa_jax.checkpoints.load import backbone_tensors, load_model
from medusa_jax.training import settings, weights

EMBEDDING, PROJECTION = "model.embed_tokens.weight", "lm_head.weight"
Logged = pytest.LogCaptureFixture


# Tied models


def test_a_tied_model_needs_no_projection(copy: Path):
    edit_config(copy, tie_word_embeddings=True)
    edit_weights(copy / "model.safetensors", without_projection)
    tied = load_model(copy).params["backbone"]
    np.testing.assert_array_equal(projection(tied), stored(tied)["embed"]["embedding"])
    edit_config(copy, tie_word_embeddings=False)
    assert f"missing lm_head.weight [{VOCAB}, {WIDTH}]" in error_of(copy)


@pytest.mark.parametrize("block", [2**22, 3 * WIDTH])
@pytest.mark.parametrize("changed", [None, 0, VOCAB * WIDTH - 1])
def test_a_tied_model_with_a_projection_is_what_transformers_makes_of_it(
    copy: Path, caplog: Logged, monkeypatch: pytest.MonkeyPatch, block: int, changed: int | None
):
    """Equal to the embedding, or other in its first or its last number; compared by blocks."""
    monkeypatch.setattr(backbone, "_BLOCK", block)
    edit_config(copy, tie_word_embeddings=True)

    def equal_but(tensors: NPZ) -> None:
        tensors[PROJECTION] = tensors[EMBEDDING].copy()
        if changed is not None:
            tensors[PROJECTION].flat[changed] += 1

    edit_weights(copy / "model.safetensors", equal_but)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(copy, dtype=torch.float32)
    model = load_model(copy)
    assert model.config.tied == (changed is None)
    ours = projection(model.params["backbone"])
    np.testing.assert_array_equal(ours, theirs.lm_head.weight.detach().numpy())
    said = [record.getMessage() for record in caplog.records if "medusa_jax" in record.name]
    if changed is None:
        assert not said
    else:
        assert len(said) == 1
        assert "tie_word_embeddings" in said[0] and PROJECTION in said[0]
        assert "lm_head" in backbone_tensors(copy)
    config = settings.Config(model=settings.Backbone(path=str(copy)))
    assert weights.model_shape(config) == model.config  # what is trained is the same model
    assert open_backbone(copy).settings["tie_word_embeddings"] == model.config.tied


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_a_tied_model_with_a_projection_alone_uses_it_for_both(copy: Path, prefix: str):
    """As transformers does. The names of a model without its prefix are not mistaken."""
    edit_config(copy, tie_word_embeddings=True)

    def alone(tensors: NPZ) -> NPZ:
        kept = {name: t for name, t in tensors.items() if name != EMBEDDING}
        return {name.replace("model.", prefix): t for name, t in kept.items()}

    alone_there = load_file(copy / "model.safetensors")[PROJECTION]
    edit_weights(copy / "model.safetensors", alone)
    model = load_model(copy)
    np.testing.assert_array_equal(projection(model.params["backbone"]), alone_there)
    embedding = stored(model.params["backbone"])["embed"]["embedding"]
    np.testing.assert_array_equal(embedding, alone_there)
    assert model.config.tied


# Names


@pytest.mark.parametrize(
    "name",
    [
        "model.rotary_emb.inv_freq",
        "rotary_emb.inv_freq",
        "model.layers.1.self_attn.rotary_emb.inv_freq",
        "model.layers.0.self_attn.rotary_emb.cos_cached",
        "model.layers.0.self_attn.rotary_emb.sin_cached",
        "module.model.layers.0.self_attn.rotary_emb.original_inv_freq",
    ],
)
def test_rotary_buffers_are_left_out(copy: Path, saved: Path, name: str):
    edit_weights(copy / "model.safetensors", lambda t: t | {name: np.ones(2, np.float32)})
    chex.assert_trees_all_equal(load_model(copy).params, load_model(saved).params)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.k_scale", "v_head.weight"])
def test_other_tensors_are_refused(copy: Path, name: str):
    edit_weights(copy / "model.safetensors", lambda t: t | {name: np.ones(2, np.float32)})
    assert f"unexpected {name} [2]" in error_of(copy)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("model.", ""),
        ("", "module."),
        ("", "_orig_mod."),
        ("", "module._orig_mod."),
        ("", "base_model.model."),
        ("model.", "module.model._orig_mod."),
        ("self_attn.", "_fsdp_wrapped_module.self_attn._checkpoint_wrapped_module."),
    ],
)
def test_wrapped_and_bare_backbones(copy: Path, saved: Path, old: str, new: str):
    def renamed(tensors: NPZ) -> NPZ:
        return {name.replace(old, new, 1): tensor for name, tensor in tensors.items()}

    edit_weights(copy / "model.safetensors", renamed)
    chex.assert_trees_all_equal(load_model(copy).params, load_model(saved).params)


def test_a_backbone_wrapped_and_bare_at_once_is_refused(copy: Path):
    name = f"module.{PROJECTION}"
    edit_weights(copy / "model.safetensors", lambda t: t | {name: t[PROJECTION].copy()})
    assert f"holds tensors twice, under several names: {name}" in error_of(copy)


# Numbers


def test_finite_example():
    for kind in ("float16", "float32", "float64"):
        assert finite(np.array([1.0, -2.0, np.finfo(kind).max], kind))
        for bad in (np.nan, np.inf, -np.inf):
            assert not finite(np.array([[1.0, bad]], kind))
    assert finite(np.array([2**31 - 1], np.int32))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_numbers_that_are_not_finite_are_warned_of_by_tensor(
    copy: Path, caplog: Logged, dtype: str, bad: float
):
    ruined = [f"model.layers.{i}.mlp.{kind}_proj.weight" for i in (0, 1) for kind in ("up", "down")]

    def ruin(tensors: NPZ) -> None:
        for name in ruined:
            tensors[name][-1, -1] = bad

    edit_weights(copy / "model.safetensors", ruin)
    heads = random_heads(2)
    heads["1.1.weight"][0, 0] = bad
    load_model(copy, heads_file(copy, heads), dtype)
    (said,) = [record for record in caplog.records if "infinity" in record.getMessage()]
    assert said.levelno == logging.WARNING
    assert f"{copy}: 5 tensors hold NaN or infinity: head_1/vocab, {ruined[1]}" in said.getMessage()


def test_finite_models_are_loaded_without_a_word(saved: Path, caplog: Logged):
    load_model(saved)
    assert not [record for record in caplog.records if "medusa_jax" in record.name]
