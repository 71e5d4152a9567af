"""`config.from_hf`: rope spellings, each family's switches, and errors people can act on."""

import dataclasses

import pytest
from helpers.configs import BASE, LLAMA3
from transformers import AutoConfig

from medusa_jax.model.config import FAMILIES, ModelConfig, from_hf
from medusa_jax.model.rope import DynamicNTK, Linear, Llama3, Yarn

YARN = {
    "original_max_position_embeddings": 64,
    "beta_fast": 16,
    "beta_slow": None,
    "attention_factor": 1.5,
    "truncate": False,
}


def read(family: str = "llama", **changes) -> ModelConfig:
    return from_hf({"model_type": family, **BASE, **changes})


def test_shape_comes_from_the_right_keys():
    assert read(rms_norm_eps=1e-5, rope_theta=5e5, tie_word_embeddings=True) == ModelConfig(
        vocab_size=40,
        hidden_size=96,
        ffn_size=160,
        num_layers=3,
        num_heads=6,
        num_kv_heads=2,
        head_dim=16,
        context=128,
        norm_eps=1e-5,
        rope_theta=5e5,
        tied=True,
    )


def test_configs_are_hashable_and_compare_by_value():
    assert hash(read(rope_scaling={"rope_type": "llama3", **LLAMA3})) == hash(
        read(rope_scaling={"rope_type": "llama3", **LLAMA3})
    )
    assert read() != read(rope_theta=1.0)


@pytest.mark.parametrize("absent", [{}, {"num_key_value_heads": None, "head_dim": None}])
def test_llama_without_groups_or_head_dim(absent):
    config = {"model_type": "llama", **BASE}
    del config["num_key_value_heads"]
    got = from_hf(config | absent)
    assert (got.num_kv_heads, got.head_dim) == (6, 16)


def test_explicit_head_dim():
    assert [read(family, head_dim=8).head_dim for family in FAMILIES] == [8] * len(FAMILIES)


ROPE = {
    "plain": ({"rope_theta": 5e5}, {"rope_theta": 5e5, "rope_type": "default"}, None),
    "null": (
        {"rope_theta": 5e5, "rope_scaling": None},
        {"rope_theta": 5e5, "rope_type": "default"},
        None,
    ),
    "linear": (
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4}},
        {"rope_theta": 5e5, "rope_type": "linear", "factor": 4.0},
        Linear(factor=4.0),
    ),
    "linear, both names": (
        {
            "rope_theta": 5e5,
            "rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 4.0},
        },
        {"rope_theta": 5e5, "rope_type": "linear", "factor": 4.0},
        Linear(factor=4.0),
    ),
    "llama3": (
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        {"rope_theta": 5e5, "rope_type": "llama3", **LLAMA3},
        Llama3(factor=8.0, low_freq_factor=1.5, high_freq_factor=4.5, original_context=32),
    ),
    "yarn": (
        {"rope_theta": 5e5, "rope_scaling": {"type": "yarn", "factor": 4, **YARN}},
        {"rope_theta": 5e5, "rope_type": "yarn", "factor": 4.0, **YARN},
        Yarn(4.0, 64, beta_fast=16.0, amplitude=1.5, truncate=False),
    ),
    "dynamic": (
        {"rope_theta": 5e5, "rope_scaling": {"type": "dynamic", "factor": 4}},
        {"rope_theta": 5e5, "rope_type": "dynamic", "factor": 4.0},
        DynamicNTK(4.0, 128),
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("four", "five", "scaling"), ROPE.values(), ids=ROPE)
def test_rope_spellings_of_transformers_4_and_5_agree(family, four, five, scaling):
    old, new = read(family, **four), read(family, rope_parameters=five)
    assert old == new
    assert (new.rope_theta, new.rope_scaling) == (5e5, scaling)


def test_stretched_contexts():
    """What YaRN and dynamic NTK stretch the context to, whether or not the file counts it in."""
    for kind, context in {"linear": 128, "llama3": 128, "yarn": 256, "dynamic": 512}.items():
        scaling = {
            "rope_type": kind,
            **LLAMA3,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        }
        assert read(rope_scaling=scaling).context == context
        assert read(rope_scaling=scaling, max_position_embeddings=1024).context == (
            4096 if kind == "dynamic" else 1024
        )


def test_rope_theta_beside_rope_parameters_and_by_default():
    parameters = {"rope_type": "linear", "factor": 2.0}
    assert read(rope_parameters=parameters, rope_theta=7e3).rope_theta == 7e3
    assert read(rope_parameters=parameters).rope_theta == 1e4
    assert read().rope_theta == 1e4


def biases(config: ModelConfig) -> tuple[bool, bool, bool]:
    return config.qkv_bias, config.out_bias, config.mlp_bias


def test_biases():
    assert biases(read("llama")) == (False, False, False)
    assert biases(read("llama", attention_bias=True)) == (True, True, False)
    assert biases(read("llama", mlp_bias=True)) == (False, False, True)
    assert biases(read("mistral", attention_bias=True, mlp_bias=True)) == (False, False, False)
    assert biases(read("qwen2")) == (True, False, False)
    assert biases(read("qwen2", attention_bias=False)) == (True, False, False)
    assert biases(read("qwen3")) == (False, False, False)
    assert biases(read("qwen3", attention_bias=True)) == (True, True, False)


def test_only_qwen3_has_qk_norm_and_a_fixed_head_dim():
    assert {family: read(family).qk_norm for family in FAMILIES} == {
        "llama": False,
        "mistral": False,
        "qwen2": False,
        "qwen3": True,
    }
    assert {family: read(family).head_dim for family in FAMILIES} == {
        "llama": 16,
        "mistral": 16,
        "qwen2": 16,
        "qwen3": 128,
    }


WINDOWS = {
    "llama has none": ("llama", {"sliding_window": 8}, (None, None, None)),
    "mistral": ("mistral", {"sliding_window": 8}, (8, 8, 8)),
    "mistral, absent": ("mistral", {}, (4096, 4096, 4096)),
    "mistral, null": ("mistral", {"sliding_window": None}, (None, None, None)),
    "qwen2, unasked": ("qwen2", {"sliding_window": 8}, (None, None, None)),
    "qwen2, off": (
        "qwen2",
        {"sliding_window": 8, "use_sliding_window": False, "max_window_layers": 0},
        (None, None, None),
    ),
    "qwen2, from layer 1": (
        "qwen2",
        {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1},
        (None, 8, 8),
    ),
    "qwen2, default first layer": (
        "qwen2",
        {"sliding_window": 8, "use_sliding_window": True},
        (None, None, None),
    ),
    "qwen2, default first layer, deep": (
        "qwen2",
        {"use_sliding_window": True, "num_hidden_layers": 30},
        (*[None] * 28, 4096, 4096),
    ),
    "qwen2, layer types": (
        "qwen2",
        {
            "sliding_window": 8,
            "use_sliding_window": True,
            "max_window_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        (8, None, 8),
    ),
    "qwen3, from layer 2": (
        "qwen3",
        {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 2},
        (None, None, 8),
    ),
}


@pytest.mark.parametrize(("family", "changes", "expected"), WINDOWS.values(), ids=WINDOWS)
def test_windows(family, changes, expected):
    assert read(family, **changes).windows == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_absent_keys_mean_what_transformers_means_by_them(family):
    # Hugging Face writes every key it knows; from BASE alone we must reach the same config.
    written = AutoConfig.for_model(family, **BASE).to_dict()
    assert "rms_norm_eps" in written  # not just BASE again
    assert read(family) == from_hf(written)


def test_windows_default_to_none_in_every_layer():
    config = read("mistral", sliding_window=8)
    assert dataclasses.replace(config, windows=()).windows == (None, None, None)
