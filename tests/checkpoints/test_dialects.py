"""Every dialect gives the parameters that the original's files give."""

from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers.head_files import (
    NPZ,
    VOCAB,
    WIDTH,
    assert_same,
    by_name,
    edit_config,
    edit_weights,
    error_of,
    heads_directory,
    heads_file,
    random_heads,
    renamed,
    stored,
    without_projection,
)
from helpers.models import TINY
from safetensors.numpy import load_file, save_file

from medusa_jax.checkpoints.dialects import DIALECTS
from medusa_jax.checkpoints.heads import open_heads
from medusa_jax.checkpoints.load import load_model
from medusa_jax.drafting.medusa_heads import HeadsConfig
from medusa_jax.errors import InputError
from medusa_jax.training import export
from medusa_jax.training.settings import Config, Run
from medusa_jax.training.weights import Weights

MAP = np.array([5, 3, 20, 0, 11])


def ranks(directory: Path, tensors: NPZ, count: int, **config: object) -> Path:
    """TensorRT-LLM's directory: of every head tensor, each rank holds an equal part of the rows."""
    heads_directory(directory, {}, architecture="MedusaForCausalLM", **config)
    (directory / "model.safetensors").unlink()
    for rank in range(count):
        part = {name: np.split(tensor, count)[rank].copy() for name, tensor in tensors.items()}
        part["transformer.vocab_embedding.weight"] = np.ones((2, 2), np.float32)
        save_file(part, directory / f"rank{rank}.safetensors")
    return directory


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("dialect", ["v0.1", "v1.0", "tgi", "vllm", "mlc", "modelopt"])
def test_every_dialect_gives_the_same_parameters(
    saved: Path, copy: Path, tmp_path: Path, dialect: str, layers: int
):
    tensors = random_heads(3, layers)
    theirs = renamed(tensors, dialect, 3, layers)
    if DIALECTS[dialect].merged:
        edit_weights(copy / "model.safetensors", lambda old: old | theirs)
        chex.assert_trees_all_equal(load_model(copy).params, load_model(saved, copy).params)
        place = copy
    elif DIALECTS[dialect].stem == "model":
        place = heads_directory(tmp_path / "heads", theirs, num_heads=9, medusa_num_heads=9)
    else:
        place = heads_file(tmp_path, theirs).parent
    for where in (place, *place.glob("m*.safetensors")):
        heads = load_model(saved, where)
        assert (heads.heads.num_heads, heads.heads.num_layers) == (3, layers)
        assert_same(by_name(heads.params["heads"]), tensors)
    found = open_heads(place).dialect
    assert found == {"tgi": "v0.1"}.get(dialect, dialect)
    assert open_heads(place, dialect).config == open_heads(place).config


@pytest.mark.parametrize(("size", "stages"), [(1, 1), (2, 1), (2, 2)])
def test_tensorrt_llm_ranks_are_put_together_and_padding_is_cut(
    saved: Path, tmp_path: Path, size: int, stages: int
):
    tensors = random_heads(2, 2)
    padded = {
        name: np.pad(tensor, ((0, 8), (0, 0))) if tensor.shape[0] == VOCAB else tensor
        for name, tensor in tensors.items()
    }
    mapping = {"world_size": size * stages, "tp_size": size, "pp_size": stages}
    theirs = renamed(padded, "trtllm", 2, 2)
    place = ranks(tmp_path / "trt", theirs, size, mapping=mapping, vocab_size=VOCAB)
    if stages == 2:  # the first stage's files come first, and their heads do not count
        for rank in (1, 0):
            (place / f"rank{rank}.safetensors").rename(place / f"rank{rank + size}.safetensors")
            save_file({"x": np.ones(1)}, place / f"rank{rank}.safetensors")
    found = open_heads(place)
    assert (found.dialect, found.config.vocab_size) == ("trtllm", VOCAB)
    assert_same(by_name(load_model(saved, place).params["heads"]), tensors)
    part = found.tensors["head_1/vocab"].read((slice(7, 20), slice(2, 3)))
    np.testing.assert_array_equal(part, tensors["1.2.weight"][7:20, 2:3])


def test_tensorrt_llm_ranks_that_lack_something(saved: Path, tmp_path: Path):
    theirs = renamed(random_heads(2), "trtllm", 2, 1)
    place = ranks(tmp_path / "trt", theirs, 2, mapping={"tp_size": 4})
    assert "config.json has 4 ranks, no rank2.safetensors, rank3.safetensors" in error_of(
        saved, place
    )
    edit_config(place, mapping={"tp_size": 2})
    edit_weights(
        place / "rank1.safetensors",
        lambda old: {name: one for name, one in old.items() if "1.lm_head" not in name},
    )
    message = error_of(saved, place)
    assert "rank1.safetensors and rank0.safetensors hold different heads" in message
    assert "medusa_heads.1.lm_head.weight" in message


def test_vllm_prefix_and_missing_biases(saved: Path, tmp_path: Path):
    tensors = random_heads(2, 2)
    for name in [name for name in tensors if name.endswith("bias")]:
        tensors[name] = np.zeros_like(tensors[name])
    theirs = {
        f"medusa_heads.{name}": tensor
        for name, tensor in renamed(tensors, "vllm", 2, 2).items()
        if not name.endswith("bias")
    }
    place = heads_directory(tmp_path / "vllm", theirs, model_type="medusa")
    assert_same(by_name(load_model(saved, place).params["heads"]), tensors)


@pytest.mark.parametrize("kind", [np.float16, ml_dtypes.bfloat16])
def test_biases_of_zeros_have_the_type_of_their_weights(tmp_path: Path, kind: type):
    theirs = {"blocks.0.layers.0.weight": np.ones((WIDTH, WIDTH), kind)}
    heads = open_heads(heads_directory(tmp_path / "vllm", theirs))
    bias = heads.tensors["head_0/block_0/bias"]
    assert bias.read().dtype == kind and bias.read().shape == bias.shape == (WIDTH,)
    assert (heads.config.shared, heads.config.vocab_size) == (True, 0)


@pytest.mark.parametrize("name", ["lm_head.weight", "lm_heads.0.weight"])
def test_vllm_projection_of_all_heads(saved: Path, tmp_path: Path, name: str):
    """With original_lm_head vLLM takes either name."""
    theirs = renamed(random_heads(3, vocab=None), "vllm", 3, 1)
    theirs[name] = np.random.default_rng(1).standard_normal((VOCAB, WIDTH), np.float32)
    place = heads_directory(tmp_path / "vllm", theirs)
    model = load_model(saved, place)
    assert (model.heads.shared, model.heads.truncated) == (True, 0)
    np.testing.assert_array_equal(stored(model.params["heads"])["vocab"], theirs[name])


@pytest.mark.parametrize("rows", ["all", "mapped"])
def test_vllm_truncated_projections(saved: Path, tmp_path: Path, rows: str):
    """Its reader takes the mapped rows itself where a projection has all."""
    tensors = random_heads(2)
    theirs = renamed(tensors, "vllm", 2, 1) | {"token_map": MAP}
    if rows == "mapped":
        theirs |= {f"lm_heads.{h}.weight": tensors[f"{h}.1.weight"][MAP].copy() for h in range(2)}
    place = heads_directory(tmp_path / "vllm", theirs, vocab_size=VOCAB)
    model = load_model(saved, place)
    assert (model.heads.truncated, model.heads.vocab_size) == (len(MAP), 0)
    assert model.params["heads"]["token_map"].dtype == np.int32
    np.testing.assert_array_equal(model.params["heads"]["token_map"], MAP)
    for h in range(2):
        vocab = stored(model.params["heads"])[f"head_{h}"]["vocab"]
        np.testing.assert_array_equal(vocab, tensors[f"{h}.1.weight"][MAP])


@pytest.mark.parametrize("tied", [True, False])
def test_truncated_heads_without_a_projection_take_the_backbones_rows(
    copy: Path, tmp_path: Path, tied: bool
):
    edit_config(copy, tie_word_embeddings=tied)
    if tied:
        edit_weights(copy / "model.safetensors", without_projection)
    theirs = renamed(random_heads(2, vocab=None), "vllm", 2, 1) | {"token_map": MAP}
    model = load_model(copy, heads_directory(tmp_path / "vllm", theirs))
    name = "model.embed_tokens.weight" if tied else "lm_head.weight"
    expected = load_file(copy / "model.safetensors")[name][MAP]
    np.testing.assert_array_equal(stored(model.params["heads"])["vocab"], expected)


@pytest.mark.parametrize("prefix", ["", "medusa_head."])
@pytest.mark.parametrize("shared", [True, False])
def test_our_own_truncated_heads(copy: Path, tmp_path: Path, prefix: str, shared: bool):
    """The trainer writes the original's files, and the map beside them."""
    vocab = None if shared else len(MAP)
    tensors = random_heads(2, vocab=vocab, prefix=prefix) | {f"{prefix}token_map": MAP}
    if prefix:
        edit_weights(copy / "model.safetensors", lambda old: old | tensors)
    model = load_model(copy, None if prefix else heads_file(tmp_path, tensors))
    assert (model.heads.truncated, model.heads.shared) == (len(MAP), shared)
    np.testing.assert_array_equal(model.params["heads"]["token_map"], MAP)
    vocab = stored(model.params["heads"]) if shared else stored(model.params["heads"])["head_1"]
    assert vocab["vocab"].shape == (len(MAP), WIDTH)


def test_a_run_exports_truncated_heads_with_their_map(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    tensors = random_heads(1, vocab=len(MAP))
    linear = {kind: tensors[f"0.0.linear.{kind}"] for kind in ("weight", "bias")}
    trained = {"head_0": {"block_0": linear, "vocab": tensors["0.1.weight"]}}
    trained = jax.tree.map(jnp.asarray, trained)
    frozen = {"heads": {"token_map": jnp.asarray(MAP, jnp.int32)}}
    weights = Weights(
        TINY, HeadsConfig(1, 1, WIDTH, 0, False, len(MAP)), {"heads": trained}, frozen
    )
    config = Config(mode="medusa1", run=Run(export_dtype="bfloat16"))
    found = open_heads(export.export(config, weights, tmp_path))
    assert found.config == weights.heads
    assert {path: tensor.dtype for path, tensor in found.tensors.items()} == {
        "token_map": "int64",
        "head_0/block_0/weight": "bfloat16",
        "head_0/block_0/bias": "bfloat16",
        "head_0/vocab": "bfloat16",
    }
    assert found.tensors["token_map"].read().tolist() == MAP.tolist()
    assert "no other program loads the token_map of truncated heads" in caplog.text


@pytest.mark.parametrize("ids", [[0, 1, 1], [-1, 2, 1], [0, 1, VOCAB]])
def test_maps_that_are_none(saved: Path, tmp_path: Path, ids: list[int]):
    theirs = renamed(random_heads(1, vocab=3), "vllm", 1, 1) | {"token_map": np.array(ids)}
    place = heads_directory(tmp_path / "vllm", theirs)
    assert error_of(saved, place) == (
        f"{place}: token_map must hold different token ids of a vocabulary of {VOCAB}"
    )


def test_a_map_beyond_the_rows_it_picks(saved: Path, tmp_path: Path):
    theirs = renamed(random_heads(1), "vllm", 1, 1) | {"token_map": MAP + 10}
    place = heads_directory(tmp_path / "vllm", theirs)
    assert "token_map has ids beyond the rows of lm_heads.0.weight" in error_of(saved, place)


def test_what_vllm_scales_is_refused(saved: Path, tmp_path: Path):
    theirs = renamed(random_heads(1), "vllm", 1, 1)
    place = heads_directory(tmp_path / "vllm", theirs, logit_scale=0.5)
    assert f"{place}: logit_scale 0.5 is not supported" in error_of(saved, place)


def test_quantized_heads_are_refused_by_name(saved: Path, tmp_path: Path):
    theirs = renamed(random_heads(1), "modelopt", 1, 1)
    theirs["medusa_heads.0.0.linear.weight_scale"] = np.ones(1, np.float32)
    place = heads_directory(tmp_path / "modelopt", theirs)
    message = error_of(saved, place)
    assert f"{place}: not a known head layout" in message
    assert "unknown tensors: medusa_heads.0.0.linear.weight_scale" in message


@pytest.mark.parametrize("dialect", ["vllm", "mlc", "modelopt", "trtllm"])
def test_what_is_missing_is_said_in_the_files_own_names(saved: Path, tmp_path: Path, dialect: str):
    theirs = renamed(random_heads(2), dialect, 2, 1)
    lost = next(name for name in theirs if "1" in name and name.endswith("bias"))
    del theirs[lost]
    place = heads_directory(tmp_path / "heads", theirs)
    if dialect == "trtllm":
        place = ranks(tmp_path / "trt", theirs, 1)
    assert f"{place}: tensors do not fit what was expected:\n  missing {lost} [16]" in error_of(
        saved, place
    )


def test_a_directory_of_several_is_read_as_asked(tmp_path: Path):
    one, other = random_heads(2), random_heads(3)
    place = heads_directory(tmp_path, renamed(one, "mlc", 2, 1))
    heads_file(place, other)
    assert open_heads(place).config.num_heads == 3
    assert open_heads(place, "mlc").config.num_heads == 2
    with pytest.raises(InputError, match=f"{place} holds no Medusa heads of dialect vllm"):
        open_heads(place, "vllm")


def test_heads_are_counted_from_the_weights_in_every_dialect(tmp_path: Path):
    theirs = renamed(random_heads(5), "vllm", 5, 1)
    place = heads_directory(tmp_path / "vllm", theirs, num_heads=2, truncated_vocab_size=4)
    config = open_heads(place).config
    assert (config.num_heads, config.truncated, config.vocab_size) == (5, 0, VOCAB)
