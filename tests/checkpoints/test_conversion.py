"""Conversion changes names and nothing else: round trips of random and real heads."""

import json
from pathlib import Path
from typing import Any

import chex
import ml_dtypes
import numpy as np
import pytest
from helpers.head_files import (
    NPZ,
    VOCAB,
    assert_same,
    heads_directory,
    original,
    random_heads,
    renamed,
)
from safetensors.numpy import load_file, save_file

from medusa_jax.checkpoints.load import Model, load_model
from medusa_jax.decoding.decoder import Decoder
from medusa_jax.decoding.state import outputs
from medusa_jax.drafting.of_heads import drafter_of_heads
from medusa_jax.drafting.tree import Tree

OWN = ["v0.1", "v1.0", "tgi", "vllm", "mlc", "modelopt"]
SHARED = ["v2", "v1.0", "tgi", "vllm"]
MAP = np.array([5, 3, 20, 0, 11])


def typed(tensors: NPZ, kind: Any) -> NPZ:
    return {name: tensor.astype(kind) for name, tensor in tensors.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layers", "kind"), [(1, np.float32), (2, ml_dtypes.bfloat16), (1, np.float16)]
)
def test_own_projections_through_every_pair_of_dialects(
    go: Any, tmp_path: Path, layers: int, kind: Any
):
    tensors = typed(random_heads(3, layers), kind)
    first = original(tmp_path / "first", tensors)
    for one in OWN:
        place = go(first, one, as_is=layers > 1)
        for other in OWN:
            back = go(go(place, other, as_is=layers > 1), "v0.1", as_is=layers > 1)
            assert_same(load_file(back / "medusa_lm_head.safetensors"), tensors)


@pytest.mark.parametrize("layers", [1, 2])
def test_shared_heads_through_every_pair_of_dialects(go: Any, tmp_path: Path, layers: int):
    tensors = typed(random_heads(3, layers, vocab=None), np.float16)
    first = original(tmp_path / "first", tensors)
    for one in SHARED:
        place = go(first, one, as_is=True)
        for other in SHARED:
            back = go(go(place, other, as_is=True), "v2", as_is=True)
            assert_same(load_file(back / "medusa_lm_head.safetensors"), tensors)


@pytest.mark.parametrize("shared", [True, False])
def test_truncated_heads(go: Any, tmp_path: Path, shared: bool):
    tensors = random_heads(2, 2, vocab=None if shared else len(MAP))
    theirs = renamed(tensors, "vllm", 2, 2) | {"token_map": MAP}
    if shared:
        theirs["lm_head.weight"] = random_heads(1, vocab=len(MAP))["0.1.weight"]
    theirs = {n: t if n == "token_map" else t.astype(np.float16) for n, t in theirs.items()}
    first = heads_directory(tmp_path / "first", theirs, vocab_size=VOCAB)
    again = go(first, "vllm", as_is=True)
    assert_same(load_file(again / "model.safetensors"), theirs)
    settings = json.loads((again / "config.json").read_text())
    assert (settings["vocab_size"], settings["truncated_vocab_size"]) == (VOCAB, len(MAP))
    halves = load_file(go(again, "vllm", dtype="bfloat16", as_is=True) / "model.safetensors")
    assert halves.pop("token_map").tolist() == MAP.tolist()
    assert {str(tensor.dtype) for tensor in halves.values()} == {"bfloat16"}


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("target", ["vllm", "v1.0", "v0.1"])
def test_truncated_heads_of_our_trainer_stay_as_they_are_on_request(
    go: Any, saved: Path, tmp_path: Path, shared: bool, target: str
):
    tensors = random_heads(2, vocab=None if shared else len(MAP)) | {"token_map": MAP}
    first = original(tmp_path / "first", tensors)
    place = go(first, target, as_is=True)
    settings = json.loads((place / "config.json").read_text())
    if target == "vllm":
        assert (settings["vocab_size"], settings["truncated_vocab_size"]) == (VOCAB, len(MAP))
    again = go(place, "v1.0", as_is=True)
    for model in (load_model(saved, place), load_model(again)):
        chex.assert_trees_all_equal(model.params, load_model(saved, first).params)


def test_tensorrt_llm_to_the_original(go: Any, tmp_path: Path):
    tensors = random_heads(2)
    place = heads_directory(tmp_path / "trt", {"x": np.ones(1)}, mapping={"tp_size": 2})
    for rank in range(2):
        theirs = renamed(tensors, "trtllm", 2, 1)
        half = {name: np.split(tensor, 2)[rank].copy() for name, tensor in theirs.items()}
        save_file(half, place / f"rank{rank}.safetensors")
    assert_same(load_file(go(place, "v0.1") / "medusa_lm_head.safetensors"), tensors)


def test_each_tensor_keeps_its_own_type(go: Any, saved: Path, tmp_path: Path):
    kinds = [np.float16, ml_dtypes.bfloat16, np.float32]
    tensors = {
        name: tensor.astype(kinds[i % 3])
        for i, (name, tensor) in enumerate(random_heads(3).items())
    }
    first = original(tmp_path / "first", tensors)
    merged = load_file(go(first, "v1.0") / "model.safetensors")
    backbone = load_file(saved / "model.safetensors")
    assert_same(merged, backbone | {f"medusa_head.{name}": t for name, t in tensors.items()})
    rounded = load_file(go(first, "v0.1", dtype="float16") / "medusa_lm_head.safetensors")
    assert_same(rounded, typed(tensors, np.float16))


@pytest.mark.slow
def test_recorded_runs_come_out_after_three_conversions(
    go: Any, shared: Path, stories: Model, golden: list[dict[str, Any]]
):
    place = shared / "models/stories260K-medusa"
    for target in ("vllm", "mlc", "modelopt", "v1.0", "tgi", "v0.1"):
        place = go(place, target, base=str(shared / "models/stories260K"))
    file = "medusa_lm_head.safetensors"
    assert_same(load_file(place / file), load_file(shared / "models/stories260K-medusa" / file))
    model = load_model(place)
    chex.assert_trees_all_equal(model.params, stories.params)
    records = [one for one in golden if (one.get("tree"), one["mode"]) == ("chain4", "greedy")]
    decoder = Decoder(model.config, drafter_of_heads(model.heads, Tree.chain(4)))
    state = decoder.prefill(
        model.params,
        [record["prompt_ids"] for record in records],
        max_new_tokens=[len(record["output_ids"]) for record in records],
    )
    results = outputs(decoder.generate(model.params, state))
    for record, result in zip(records, results, strict=True):
        assert result.token_ids == record["output_ids"]
        assert result.tokens_per_step == record["tokens_per_step"]


def test_the_merged_real_model(go: Any, shared: Path):
    """Its `.bin` shards of float16 become safetensors, and its heads come out alone."""
    source = shared / "models/stories260K-medusa-1.0"
    again = go(source, "v1.0", base="")
    chex.assert_trees_all_equal(load_model(again).params, load_model(source).params)
    for name in ("tokenizer.model", "tokenizer_config.json", "generation_config.json"):
        assert (again / name).read_bytes() == (source / name).read_bytes()
    heads = load_file(go(source, "v0.1", base="") / "medusa_lm_head.safetensors")
    whole = load_file(shared / "models/stories260K-medusa/medusa_lm_head.safetensors")
    assert_same(heads, typed(whole, np.float16))
