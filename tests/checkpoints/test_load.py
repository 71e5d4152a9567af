"""Loading: every dialect gives the same parameters, and loses nothing."""

import json
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import transformers
from helpers.head_files import (
    LAYERS,
    VOCAB,
    WIDTH,
    assert_same,
    by_name,
    edit_config,
    edit_weights,
    error_of,
    heads_file,
    one_by_one,
    projection,
    random_heads,
    save_bin,
    stored,
    writable_copy,
)
from safetensors.numpy import load_file

from medusa_jax.checkpoints.load import Model, load_model
from medusa_jax.drafting.medusa_heads import MedusaHeads
from medusa_jax.kernels import native
from medusa_jax.model.weight import Weight
from medusa_jax.param_paths import flat

# Backbones


def test_every_tensor_lands_in_its_place(saved: Path, llama: transformers.PreTrainedModel):
    theirs = {name: tensor.numpy() for name, tensor in llama.state_dict().items()}
    params = stored(load_model(saved).params["backbone"])
    ours = {
        "model.embed_tokens.weight": params["embed"]["embedding"],
        "model.norm.weight": params["final_norm"]["scale"],
        "lm_head.weight": params["lm_head"],
    }
    linears = {
        "self_attn.q_proj": ("attention", "query"),
        "self_attn.k_proj": ("attention", "key"),
        "self_attn.v_proj": ("attention", "value"),
        "self_attn.o_proj": ("attention", "out"),
        "mlp.gate_proj": ("mlp", "gate"),
        "mlp.up_proj": ("mlp", "up"),
        "mlp.down_proj": ("mlp", "down"),
    }
    for i in range(LAYERS):
        layer, there = params[f"layer_{i}"], f"model.layers.{i}"
        ours[f"{there}.input_layernorm.weight"] = layer["attention_norm"]["scale"]
        ours[f"{there}.post_attention_layernorm.weight"] = layer["mlp_norm"]["scale"]
        for name, (group, linear) in linears.items():
            for kind, weight in layer[group][linear].items():
                ours[f"{there}.{name}.{kind}"] = weight
    assert_same({name: np.asarray(weight) for name, weight in ours.items()}, theirs)


def test_safetensors_shards_equal_one_file(
    saved: Path, llama: transformers.PreTrainedModel, tmp_path: Path
):
    llama.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert not (tmp_path / "model.safetensors").exists()
    chex.assert_trees_all_equal(load_model(tmp_path).params, load_model(saved).params)


def test_bin_shards_equal_safetensors(
    saved: Path, llama: transformers.PreTrainedModel, tmp_path: Path
):
    directory = save_bin(llama.state_dict(), saved, tmp_path)
    chex.assert_trees_all_equal(load_model(directory).params, load_model(saved).params)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bfloat16_files_of_both_kinds(
    saved: Path, llama: transformers.PreTrainedModel, tmp_path: Path, dtype: str
):
    halves = {name: tensor.bfloat16() for name, tensor in llama.state_dict().items()}
    pickled = save_bin(halves, saved, tmp_path / "bin")
    mapped = writable_copy(saved, tmp_path / "safetensors")
    edit_weights(
        mapped / "model.safetensors",
        lambda tensors: {n: t.astype(ml_dtypes.bfloat16) for n, t in tensors.items()},
    )
    ours = load_model(pickled, dtype=dtype).params
    chex.assert_trees_all_equal_dtypes(ours, load_model(mapped, dtype=dtype).params)
    chex.assert_trees_all_equal(ours, load_model(mapped, dtype=dtype).params)
    expected = halves["model.layers.1.mlp.up_proj.weight"].float().numpy()
    got = one_by_one(ours["backbone"])["layer_1"]["mlp"]["gate_up"]["weight"]
    assert got.few_rows == (got.order == "out_in")
    np.testing.assert_array_equal(
        stored(ours["backbone"])["layer_1"]["mlp"]["up"]["weight"], expected
    )


def test_bfloat16_casts_every_leaf_to_the_nearest(saved: Path):
    tensors = random_heads(2)
    (saved.parent / "heads").mkdir(exist_ok=True)
    file = heads_file(saved.parent / "heads", tensors)
    wide, narrow = load_model(saved, file), load_model(saved, file, dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(wide.params)} == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(narrow.params)} == {jnp.dtype("bfloat16")}
    nearest = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), wide.params)
    chex.assert_trees_all_equal(narrow.params, nearest)


@pytest.mark.skipif(not native.available(), reason="the kernels cannot be built here")
def test_heads_of_bfloat16_files_stay_narrow_and_lose_nothing(saved: Path, tmp_path: Path):
    tensors = {name: one.astype(ml_dtypes.bfloat16) for name, one in random_heads(2).items()}
    hidden, logits = jax.random.normal(jax.random.key(0), (3, WIDTH)), []
    for dtype in (ml_dtypes.bfloat16, np.float32):
        (place := tmp_path / np.dtype(dtype).name).mkdir()
        file = heads_file(place, {name: one.astype(dtype) for name, one in tensors.items()})
        model = load_model(saved, file)
        held = flat(model.params["heads"]).values()
        assert {one.data.dtype for one in held if isinstance(one, Weight)} == {np.dtype(dtype)}
        heads = MedusaHeads(model.heads)
        logits.append(heads.apply({"params": model.params["heads"]}, hidden, None))
    chex.assert_trees_all_equal(*logits)


def test_stop_and_suppressed_ids(copy: Path):
    (copy / "generation_config.json").unlink()
    edit_config(copy, eos_token_id=7)
    model = load_model(copy)
    assert (model.stop_ids, model.suppress) == ((7,), ())
    settings = {"eos_token_id": [3, 4], "suppress_tokens": [0, 5]}
    (copy / "generation_config.json").write_text(json.dumps(settings))
    model = load_model(copy)
    assert (model.stop_ids, model.suppress) == ((3, 4), (0, 5))


# Heads


def test_a_model_alone_has_no_heads(saved: Path):
    model = load_model(saved)
    assert not (model.heads and model.heads.num_heads)
    assert not model.params.get("heads")


def test_real_heads_of_both_files_lose_nothing(shared: Path):
    model, heads = shared / "models/stories260K", shared / "models/stories260K-medusa"
    file = heads / "medusa_lm_head.safetensors"
    mapped, pickled = load_model(model, file), load_model(model, heads / "medusa_lm_head.pt")
    chex.assert_trees_all_equal(mapped.params, pickled.params)
    assert mapped.heads == pickled.heads
    assert_same(by_name(mapped.params["heads"]), load_file(file))


def test_heads_are_counted_from_the_weights(shared: Path, stories: Model, tmp_path: Path):
    heads = writable_copy(shared / "models/stories260K-medusa", tmp_path / "heads")
    edit_config(heads, medusa_num_heads=2)
    model = load_model(shared / "models/stories260K", heads)
    assert model.heads == stories.heads
    assert (model.heads.num_heads, model.heads.num_layers, model.heads.shared) == (5, 1, False)
    chex.assert_trees_all_equal(model.params, stories.params)


def test_heads_directory_names_its_backbone(shared: Path, stories: Model, tmp_path: Path):
    source = shared / "models/stories260K-medusa"
    beside = load_model(source)  # by its neighbour's name
    heads = writable_copy(source, tmp_path / "heads")
    edit_config(heads, base_model_name_or_path=str(shared / "models/stories260K"))
    for model in (beside, load_model(heads)):
        assert (model.config, model.heads) == (stories.config, stories.heads)
        chex.assert_trees_all_equal(model.params, stories.params)
    edit_config(heads, base_model_name_or_path="no-such-backbone")
    assert "no-such-backbone does not exist" in error_of(heads)


def test_heads_config_may_carry_a_model_type(saved: Path, tmp_path: Path):
    tensors = random_heads(2)
    heads_file(tmp_path, tensors)
    config = {"base_model_name_or_path": str(saved), "medusa_num_heads": 2, "model_type": "llama"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_same(by_name(load_model(tmp_path).params["heads"]), tensors)


def test_merged_model_equals_backbone_and_heads(shared: Path, stories: Model):
    merged = load_model(shared / "models/stories260K-medusa-1.0")
    assert merged.heads == stories.heads
    assert merged.heads.num_heads == 5
    # The merged file stores the lm_head that the original ties to the embedding.
    assert (merged.config.tied, stories.config.tied) == (False, True)
    ours, whole = stored(merged.params["backbone"]), stored(stories.params["backbone"])
    whole["lm_head"] = projection(stories.params["backbone"])
    heads = merged.params["heads"], stories.params["heads"]
    for got, exact in ((ours, whole), heads):
        rounded = jax.tree.map(lambda x: np.asarray(x, np.float16).astype(np.float32), exact)
        chex.assert_trees_all_equal(got, rounded)


def test_merged_model_gives_its_heads_to_another_backbone(shared: Path, stories: Model):
    models = shared / "models"
    mixed = load_model(models / "stories260K", models / "stories260K-medusa-1.0")
    merged = load_model(models / "stories260K-medusa-1.0")
    chex.assert_trees_all_equal(mixed.params["backbone"], stories.params["backbone"])
    chex.assert_trees_all_equal(mixed.params["heads"], merged.params["heads"])


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("vocab", [VOCAB, None], ids=["own", "shared"])
def test_layers_and_shared_lm_head_are_read_from_the_names(
    saved: Path, tmp_path: Path, layers: int, vocab: int | None
):
    tensors = random_heads(3, layers, vocab=vocab)
    model = load_model(saved, heads_file(tmp_path, tensors))
    assert (model.heads.num_heads, model.heads.num_layers) == (3, layers)
    assert model.heads.shared == (vocab is None)
    assert model.heads.hidden_size == WIDTH
    assert_same(by_name(model.params["heads"]), tensors)


def test_a_head_file_beside_the_model_is_found(copy: Path):
    tensors = random_heads(3)
    heads_file(copy, tensors)
    assert_same(by_name(load_model(copy).params["heads"]), tensors)


def test_merged_safetensors(copy: Path, saved: Path):
    tensors = random_heads(3, 2)
    named = {f"medusa_head.{name}": tensor for name, tensor in tensors.items()}
    edit_weights(copy / "model.safetensors", lambda old: old | named)
    model = load_model(copy)
    assert_same(by_name(model.params["heads"]), tensors)
    chex.assert_trees_all_equal(model.params["backbone"], load_model(saved).params["backbone"])
