"""Hydra heads in files: both dialects give the same heads, and what is none is refused."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.head_files import (
    NPZ,
    VOCAB,
    WIDTH,
    edit_config,
    edit_weights,
    projection,
    random_heads,
)
from safetensors.numpy import load_file, save_file

from medusa_jax.checkpoints.heads import head_tensors, open_heads
from medusa_jax.checkpoints.load import load_model
from medusa_jax.drafting.hydra_heads import HydraHead
from medusa_jax.drafting.medusa_heads import HYDRA, HeadsConfig
from medusa_jax.errors import InputError
from medusa_jax.model.weight import Weight

MAP = np.array([5, 3, 20, 0, 11])


def hydra_tensors(heads: int, layers: int = 1, rows: int | None = VOCAB) -> NPZ:
    """Tensors under the names of zankner/Hydra; without `rows`, of shared heads."""
    rng, tensors = np.random.default_rng(0), {}
    for i in range(heads):
        parts = {"0.res_connection": i + 2, "0.linear": i + 2}
        for name, inputs in (parts | {f"{j}.linear": 1 for j in range(1, layers)}).items():
            shape = (WIDTH, inputs * WIDTH)
            tensors[f"hydra_mlp.{i}.{name}.weight"] = rng.standard_normal(shape, np.float32)
            tensors[f"hydra_mlp.{i}.{name}.bias"] = rng.standard_normal(WIDTH, np.float32)
        if rows:
            tensors[f"hydra_lm_head.{i}.weight"] = rng.standard_normal((rows, WIDTH), np.float32)
            tensors[f"hydra_lm_head.{i}.bias"] = rng.standard_normal(rows, np.float32)
    return tensors


def saved_heads(directory: Path, tensors: NPZ, **config: Any) -> Path:
    directory.mkdir()
    save_file(tensors, directory / "hydra_lm_head.safetensors")
    (directory / "config.json").write_text("{}")
    edit_config(directory, **config)
    return directory


def guesses(saved: Path, heads: Path) -> list[list[int]]:
    """The best token of each head for some inputs."""
    model, best = load_model(saved, heads), []
    backbone, own = model.params["backbone"], model.params["heads"]
    unembed = Weight(projection(backbone)).dot
    if "vocab" in own:
        unembed = own["vocab"].dot
    for i in range(model.heads.num_heads):
        z = np.random.default_rng(i).standard_normal((40, (i + 2) * WIDTH), np.float32)
        variables: Any = {"params": own[f"head_{i}"]}
        logits: Any = HydraHead(model.heads).apply(variables, jnp.asarray(z), unembed)
        ranked = np.argsort(-np.asarray(logits), axis=1)[:, :1]
        best += np.asarray(own.get("token_map", np.arange(VOCAB)))[ranked].tolist()
    return best


def test_there_and_back_between_both_dialects(saved: Path, tmp_path: Path, go: Any):
    heads = saved_heads(tmp_path / "heads", hydra_tensors(3, 2))
    merged = go(heads, "hydra_merged")
    assert open_heads(merged).dialect == "hydra_merged"
    assert load_model(merged).heads == HeadsConfig(3, 2, WIDTH, VOCAB, architecture=HYDRA)
    again = go(merged, "hydra")
    before, after = (load_file(d / "hydra_lm_head.safetensors") for d in (heads, again))
    assert {n: t.tobytes() for n, t in before.items()} == {n: t.tobytes() for n, t in after.items()}
    assert (again / "hydra_lm_head.pt").is_file()
    assert guesses(saved, again) == guesses(merged, merged)


@pytest.mark.parametrize("shared", [True, False])
def test_projections_are_written_out_for_the_original(
    saved: Path, tmp_path: Path, go: Any, shared: bool
):
    """It knows neither shared nor truncated projections."""
    tensors = hydra_tensors(2, rows=None if shared else len(MAP)) | {"token_map": MAP}
    heads = saved_heads(tmp_path / "heads", tensors, vocab_size=VOCAB)
    shape = load_model(saved, heads).heads
    assert (shape.shared, shape.truncated, shape.vocab_size) == (shared, len(MAP), 0)
    kept, written = go(heads, "hydra", as_is=True), go(heads, "hydra")
    assert load_model(saved, kept).heads == shape
    whole = load_model(saved, written).heads
    assert (whole.shared, whole.truncated, whole.vocab_size) == (False, 0, VOCAB)
    if not shared:  # rows that are missing are never the best
        assert guesses(saved, written) == guesses(saved, heads)
    assert guesses(saved, kept) == guesses(saved, heads)


def test_heads_of_another_kind_are_refused(saved: Path, tmp_path: Path, go: Any):
    heads = saved_heads(tmp_path / "heads", hydra_tensors(2))
    with pytest.raises(
        InputError, match=r"--to v0\.1 holds medusa heads, and these are hydra heads"
    ):
        go(heads, "v0.1")
    (tmp_path / "medusa").mkdir()
    save_file(random_heads(2), tmp_path / "medusa/medusa_lm_head.safetensors")
    with pytest.raises(InputError, match="--to hydra holds hydra heads, and these are medusa"):
        go(tmp_path / "medusa", "hydra")
    expected = HeadsConfig(2, 1, WIDTH, VOCAB)
    with pytest.raises(InputError, match=r"architecture='hydra'.*, expected .*'medusa'"):
        head_tensors(heads, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prefix_embeding_layer.norm.weight": np.ones(WIDTH)}, "these are Hydra.. heads"),
        ({"hydra_mlp.1.0.linear.weight": np.ones((WIDTH, WIDTH))}, r"misshapen .*\[16, 48\]"),
        ({"hydra_lm_head.0.bias": np.ones((VOCAB, 1))}, "misshapen hydra_lm_head.0.bias"),
        ({"hydra_mlp.1.0.res_connection.bias": None}, "missing hydra_mlp.1.0.res_connection.bias"),
        ({"hydra_mlp.7.0.linear.weight": np.ones((1, 1))}, "too few tensors|missing"),
        ({"other.weight": np.ones((2, 2))}, "unknown tensors: other.weight"),
    ],
)
def test_files_that_are_no_hydra_heads(saved: Path, tmp_path: Path, change: Any, message: str):
    heads = saved_heads(tmp_path / "heads", hydra_tensors(2))

    def spoil(tensors: NPZ) -> NPZ:
        changed = tensors | {n: t for n, t in change.items() if t is not None}
        return {n: t for n, t in changed.items() if change.get(n, t) is not None}

    edit_weights(heads / "hydra_lm_head.safetensors", spoil)
    with pytest.raises(InputError, match=message):
        load_model(saved, heads)
