"""Cosines and sines of each kind of scaling, against transformers, beyond the original context."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from medusa_jax.model.config import ModelConfig, from_hf
from medusa_jax.model.layers import rope_tables
from medusa_jax.model.rope import plain_frequencies

BASE = {
    "vocab_size": 40,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
# As Qwen2.5 and Qwen3 write it; one counts the stretch in the context in part, one not at all.
QWEN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
WIDE = {"rope_theta": 1e6, "head_dim": 128}


def yarn(**changes: Any) -> dict[str, Any]:
    scaling = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16}
    return {"rope_scaling": scaling | changes}


CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "both spellings": {
        "rope_scaling": {"type": "linear", "factor": 4.0},
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5.0},
    },
    "llama3, no original context": {
        "rope_scaling": {
            "type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        }
    },
    "yarn": yarn(),
    "yarn, no original context": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    "yarn, null factor": yarn(factor=None),
    "yarn, betas, not truncated": yarn(beta_fast=16, beta_slow=0.5, truncate=False),
    "yarn, betas 0 and null": yarn(beta_fast=0, beta_slow=None),
    "yarn, mscale": yarn(mscale=0.7, mscale_all_dim=1.3),
    "yarn, half of mscale": yarn(mscale=0.7, mscale_all_dim=0),
    "yarn, attention factor": yarn(attention_factor=0.5, mscale=0.7, mscale_all_dim=1.3),
    "yarn, factor below 1": yarn(factor=0.5),
    "yarn, ramp of no width": yarn(beta_fast=1.0, beta_slow=1.0, truncate=False),
    "yarn, original context outside": yarn() | {"original_max_position_embeddings": 20},
    "yarn, Qwen2.5": {"rope_scaling": QWEN, "max_position_embeddings": 32768, **WIDE},
    "yarn, Qwen3": {"rope_scaling": QWEN, "max_position_embeddings": 40960, **WIDE},
    "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 4.0}},
    "dynamic, wide": {"rope_scaling": {"type": "dynamic", "factor": 1.5}, **WIDE},
}


def both(changes: dict[str, Any]) -> tuple[ModelConfig, LlamaRotaryEmbedding]:
    config = from_hf({"model_type": "llama"} | BASE | changes)
    return config, LlamaRotaryEmbedding(LlamaConfig(**BASE | changes))


def theirs(rotary: LlamaRotaryEmbedding, positions: np.ndarray) -> tuple[np.ndarray, ...]:
    """cos and sin [T, C / 2] of a pass over these positions."""
    tables = rotary(torch.zeros(1), torch.from_numpy(positions)[None])
    return tuple(table[0, :, : table.shape[-1] // 2].numpy() for table in tables)


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_tables_of_a_whole_text_equal_transformers(changes):
    config, rotary = both(changes)
    most = 131_072 if "head_dim" in changes and config.context > 1000 else 500
    positions = np.unique(np.linspace(0, most - 1, 500).astype(np.int64))
    ours = rope_tables(config, jnp.asarray(positions), jnp.asarray(most))
    for table, expected in zip(ours, theirs(rotary, positions), strict=True):
        np.testing.assert_allclose(table, expected, atol=1e-5)


@pytest.mark.parametrize("factor", [1.5, 4.0])
def test_dynamic_ntk_turns_a_new_token_by_the_length_that_ends_with_it(factor):
    config, rotary = both({"rope_scaling": {"type": "dynamic", "factor": factor}})
    positions = np.arange(100, 300)
    steps = [theirs(rotary, positions[i : i + 1]) for i in range(len(positions))]
    ours = rope_tables(config, jnp.asarray(positions))
    for number, table in enumerate(ours):
        expected = np.concatenate([step[number] for step in steps])
        np.testing.assert_allclose(table, expected, atol=1e-5)
    # It is neither the plain table nor that of the whole text.
    whole = rope_tables(config, jnp.asarray(positions), jnp.asarray(300))
    assert np.abs(np.asarray(ours[0] - whole[0]))[:100].max() > 0.05


def test_frequencies_example():
    np.testing.assert_allclose(plain_frequencies(100.0, 4), [1, 0.1], rtol=1e-7)
