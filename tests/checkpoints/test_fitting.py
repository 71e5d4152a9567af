"""Projections are written out as each dialect's readers need them; the guesses stay."""

import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from helpers.head_files import (
    NPZ,
    VOCAB,
    WIDTH,
    edit_config,
    edit_weights,
    heads_directory,
    original,
    projection,
    random_heads,
    renamed,
    without_projection,
)
from safetensors.numpy import load_file

from medusa_jax.checkpoints.dialects import DIALECTS
from medusa_jax.checkpoints.fitting import with_all_rows
from medusa_jax.checkpoints.load import load_model
from medusa_jax.checkpoints.stored_tensor import StoredTensor
from medusa_jax.drafting.medusa_heads import MedusaHeads
from medusa_jax.errors import InputError
from medusa_jax.model.weight import Weight

MAP = np.array([5, 3, 20, 0, 11])
OWN = ["v0.1", "v1.0", "tgi", "vllm", "mlc", "modelopt"]


def held(array: np.ndarray) -> StoredTensor:
    return StoredTensor(array.shape, str(array.dtype), lambda index=...: array[index])


def test_missing_rows_are_the_mean_worked_example():
    rows = with_all_rows(held(np.array([[1.0, 0.0], [0.0, 3.0]])), np.array([2, 0]), 3)
    assert rows.shape == (3, 2)
    assert rows.read().tolist() == [[0, 3], [0.5, 1.5], [1, 0]]
    assert rows.read((slice(1, 2),)).tolist() == [[0.5, 1.5]]


@pytest.mark.parametrize("kind", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shift", [0.0, -30.0])
def test_no_guess_changes_whatever_the_hidden_state(kind: Any, shift: float):
    """Also where all logits are negative, so that a row of zeros would win."""
    rng = np.random.default_rng(0)
    known = (rng.standard_normal((64, 16)) + np.eye(16)[:1] * shift).astype(kind)
    ids = rng.permutation(256)[:64]
    hidden = rng.standard_normal((500, 16)).astype(np.float32)
    hidden[:, 0] = abs(hidden[:, 0]) + (4 if shift else 0)
    whole = with_all_rows(held(known), ids, 256).read().astype(np.float32)
    truncated = hidden @ known.astype(np.float32).T
    assert (truncated.max(axis=1) < 0).mean() == (1.0 if shift else 0.0)
    expected = ids[np.argsort(-truncated, axis=1)[:, :10]]
    np.testing.assert_array_equal(np.argsort(-(hidden @ whole.T), axis=1)[:, :10], expected)


def logits(model: Path, heads: Path, hidden: np.ndarray) -> np.ndarray:
    """[M, N, V or W]"""
    loaded = load_model(model, heads)
    variables = {"params": loaded.params["heads"]}
    unembed = Weight(projection(loaded.params["backbone"])).dot
    made = MedusaHeads(loaded.heads).apply(variables, jnp.asarray(hidden), unembed)
    return np.asarray(made)


@pytest.mark.parametrize("target", OWN)
def test_truncated_heads_become_whole_in_every_dialect(
    go: Any, saved: Path, tmp_path: Path, target: str
):
    tensors = random_heads(2, vocab=len(MAP)) | {"token_map": MAP}
    first = original(tmp_path / "first", tensors)
    whole = go(first, target)
    hidden = np.random.default_rng(1).standard_normal((40, WIDTH)).astype(np.float32)
    before, after = (logits(saved, heads, hidden) for heads in (first, whole))
    assert (before.shape[-1], after.shape[-1]) == (len(MAP), VOCAB)
    np.testing.assert_array_equal(MAP[before.argmax(-1)], after.argmax(-1))
    np.testing.assert_allclose(after[..., MAP], before, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("truncated", [True, False])
@pytest.mark.parametrize("target", ["v0.1", "v1.0", "mlc", "modelopt", "vllm"])
def test_shared_heads_get_the_backbones_projection(
    go: Any, copy: Path, tmp_path: Path, target: str, truncated: bool, tied: bool
):
    edit_config(copy, tie_word_embeddings=tied)
    if tied:
        edit_weights(copy / "model.safetensors", without_projection)
    heads = random_heads(2, vocab=None) | ({"token_map": MAP} if truncated else {})
    place = go(original(tmp_path / "first", heads), target, base=str(copy))
    stored = load_file(place / f"{DIALECTS[target].stem}.safetensors")
    lm_head = load_file(copy / "model.safetensors")[
        "model.embed_tokens.weight" if tied else "lm_head.weight"
    ]
    names = ["lm_head.weight"]
    if target != "vllm":
        names = [next(iter(renamed({f"{h}.1.weight": 0}, target, 2, 1))) for h in range(2)]  # pyrefly: ignore
    for name in names:
        np.testing.assert_array_equal(stored[name], lm_head)
    assert not any("token_map" in name for name in stored)


@pytest.mark.parametrize("target", ["v2", "tgi"])
def test_readers_that_share_the_projection_get_no_map(go: Any, tmp_path: Path, target: str):
    heads = random_heads(2, vocab=None)
    place = go(original(tmp_path / "first", heads | {"token_map": MAP}), target)
    assert load_file(place / "medusa_lm_head.safetensors").keys() == heads.keys()


def test_a_shared_projection_of_their_own_stays_and_becomes_whole(go: Any, tmp_path: Path):
    theirs = renamed(random_heads(2, vocab=None), "vllm", 2, 1) | {"token_map": MAP}
    rows = random_heads(1, vocab=len(MAP))["0.1.weight"]
    first = heads_directory(tmp_path / "first", theirs | {"lm_head.weight": rows}, vocab_size=VOCAB)
    written = load_file(go(first, "vllm", base="") / "model.safetensors")["lm_head.weight"]
    np.testing.assert_array_equal(written[MAP], rows)
    heads = load_file(go(first, "mlc", base="") / "model.safetensors")
    for number in range(2):
        np.testing.assert_array_equal(heads[f"medusa_head.{number}.1.weight"], written)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (20, "token_map has ids beyond a vocabulary of 20"),
        (10**9, "'vocab_size' must be an integer from 1 to 10000000, got 1000000000"),
        ("24", "'vocab_size' must be an integer"),
    ],
)
def test_a_stated_size_that_cannot_be_is_refused(go: Any, tmp_path: Path, size: Any, message: str):
    theirs = renamed(random_heads(1, vocab=len(MAP)), "vllm", 1, 1) | {"token_map": MAP}
    with pytest.raises(InputError, match=re.escape(message)):
        go(heads_directory(tmp_path / "first", theirs, vocab_size=size), "v0.1", base="")


class Block(torch.nn.Module):
    """x + SiLU(W x + b), as the original writes it."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.nn.functional.silu(self.linear(x))


def original_heads(number: int, layers: int, projection: bool) -> torch.nn.ModuleList:
    """The original's heads: `[ResBlock(hidden)] * layers` is one block, repeated."""

    def last() -> list[torch.nn.Module]:
        return [torch.nn.Linear(WIDTH, VOCAB, bias=False)] if projection else []

    return torch.nn.ModuleList(
        torch.nn.Sequential(*[Block()] * layers, *last()) for _ in range(number)
    )


def tied_blocks(heads: NPZ) -> NPZ:
    """Heads whose second blocks are their first."""
    return {name: heads[name.replace(".1.linear", ".0.linear")] for name in heads}


@pytest.mark.parametrize(
    ("target", "heads", "layers"),
    [
        ("v0.1", random_heads(3), 1),
        ("v0.1", tied_blocks(random_heads(2, 2)), 2),
        ("v0.1", random_heads(2, vocab=len(MAP)) | {"token_map": MAP}, 1),
        ("v1.0", random_heads(2, vocab=None) | {"token_map": MAP}, 1),
        ("v1.0", tied_blocks(random_heads(3, 2)), 2),
        ("v2", tied_blocks(random_heads(2, 2, vocab=None)), 2),
    ],
)
def test_the_original_reads_what_is_written(
    go: Any, saved: Path, tmp_path: Path, target: str, heads: NPZ, layers: int
):
    """Its loaders, as in medusa_model.py and medusa_model_legacy.py, give the logits of ours."""
    place = go(original(tmp_path / "first", heads), target)
    number = len({name[0] for name in heads} - {"t"})
    theirs = original_heads(number, layers, projection=target != "v2")
    if target == "v1.0":
        named = {n: torch.from_numpy(t) for n, t in load_file(place / "model.safetensors").items()}
        state = {
            name.removeprefix("medusa_head."): t
            for name, t in named.items()
            if name.startswith("medusa_head.")
        }
    else:
        state = torch.load(place / "medusa_lm_head.pt")
    theirs.load_state_dict(state, strict=True)
    hidden = np.random.default_rng(2).standard_normal((5, WIDTH)).astype(np.float32)
    with torch.no_grad():
        made = torch.stack([head(torch.from_numpy(hidden)) for head in theirs]).numpy()
    if target == "v2":
        made = made @ load_file(saved / "model.safetensors")["lm_head.weight"].T
    np.testing.assert_allclose(logits(saved, place, hidden), made, rtol=1e-3, atol=1e-4)
