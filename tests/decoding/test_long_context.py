"""Greedy text beyond the original context, token for token that of transformers' `generate`."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers
from helpers.head_files import edit_config, writable_copy

from medusa_jax.checkpoints.load import load_model
from medusa_jax.decoding import prefill as prefill_module
from medusa_jax.decoding.decoder import Decoder
from medusa_jax.decoding.state import outputs
from medusa_jax.drafting.drafter import NoDraft
from medusa_jax.drafting.medusa_heads import HeadsConfig, MedusaHeads
from medusa_jax.drafting.of_heads import drafter_of_heads
from medusa_jax.drafting.tree import Tree
from medusa_jax.model.config import ModelConfig

ORIGINAL, NEW_TOKENS = 32, 24
LENGTHS = (20, 33, 70)  # of prompts; the text of the first crosses the original context
SCALINGS: dict[str, dict[str, Any]] = {
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL},
    "yarn, sharper": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": ORIGINAL,
        "beta_fast": 8.0,
        "attention_factor": 1.3,
    },
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
}
TREE = Tree.from_lists([[0], [1], [2], [0, 0], [0, 1], [1, 0], [0, 0, 0]])


def generated(directory: Path, prompt: list[int]) -> list[int]:
    """The text of transformers, by a new model: dynamic NTK remembers the last text's length."""
    torch.set_num_threads(1)  # more only wait for each other at these sizes
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        min_new_tokens=NEW_TOKENS,
        max_new_tokens=NEW_TOKENS,
        pad_token_id=0,
        suppress_tokens=None,
    )
    return out[0, len(prompt) :].tolist()


def random_heads(config: ModelConfig) -> tuple[HeadsConfig, dict[str, Any]]:
    heads = HeadsConfig(3, 1, config.hidden_size, config.vocab_size)
    hidden = np.zeros((1, config.hidden_size), np.float32)
    return heads, MedusaHeads(heads).init(jax.random.key(0), hidden, lambda x: x)["params"]


def assert_equal_to_transformers(directory: Path, vocab: range, ways: list[str]) -> None:
    """Decodes with a tree and plainly, and all prompts as a batch or the longest alone."""
    model = load_model(directory)
    assert model.config.context >= 3 * ORIGINAL
    rng = np.random.default_rng(0)
    prompts = [rng.choice(vocab, length).tolist() for length in LENGTHS]
    expected = [generated(directory, prompt) for prompt in prompts]
    heads, head_params = random_heads(model.config)
    params = model.params | {"heads": head_params}
    for way in ways:
        drafter = drafter_of_heads(heads, TREE) if "tree" in way else NoDraft()
        # transformers suppresses EOS where a minimum of new tokens is asked for
        decoder = Decoder(model.config, drafter, suppress=(2,))
        rows = slice(0 if "batch" in way else -1, None)
        state = decoder.prefill(params, prompts[rows], max_new_tokens=NEW_TOKENS)
        found = [row.token_ids for row in outputs(decoder.generate(params, state))]
        assert found == expected[rows], way


def stretched(directory: Path, scaling: dict[str, Any]) -> Path:
    """The model with this scaling, which was made for ORIGINAL tokens by its config."""
    config = json.loads((directory / "config.json").read_text())
    config.pop("rope_parameters", None)
    context = ORIGINAL if scaling["rope_type"] == "dynamic" else 4 * ORIGINAL
    edit_config(directory, rope_scaling=scaling, max_position_embeddings=context)
    (directory / "generation_config.json").unlink(missing_ok=True)
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("scaling", ["yarn, sharper", "dynamic"])
def test_random_models_and_prompts_in_blocks(copy: Path, scaling: str, monkeypatch):
    monkeypatch.setattr(prefill_module, "PREFILL_BLOCK", 16)
    directory = stretched(copy, SCALINGS[scaling])
    assert_equal_to_transformers(directory, range(3, 24), ["tree, batch"])


WAYS = {
    "stories260K": ["tree", "plain, batch"],
    "babyllama105": ["tree, batch", "plain"],
    "poem": ["tree", "plain, batch"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WAYS)
def test_real_models_with_yarn(shared: Path, tmp_path: Path, name: str):
    directory = writable_copy(shared / "models" / name, tmp_path / name)
    stretched(directory, SCALINGS["yarn"])
    assert_equal_to_transformers(directory, range(3, 100), WAYS[name])


@pytest.mark.slow
def test_a_real_model_with_dynamic_ntk(shared: Path, tmp_path: Path):
    directory = writable_copy(shared / "models/poem", tmp_path / "poem")
    stretched(directory, SCALINGS["dynamic"])
    assert_equal_to_transformers(directory, range(3, 100), ["tree, batch"])
