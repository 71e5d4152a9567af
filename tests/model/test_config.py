"""`config.from_hf`: rope spellings, each family's switches, and errors people can act on."""

import dataclasses
import re

import pytest
from transformers import AutoConfig

from medusa_jax.errors import InputError
from medusa_jax.model.config import FAMILIES, ModelConfig, RopeScaling, from_hf

# All values differ, so that no two fields can be swapped unnoticed.
BASE = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 40,
    "max_position_embeddings": 128,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.5,
    "high_freq_factor": 4.5,
    "original_max_position_embeddings": 32,
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
        RopeScaling(factor=4.0),
    ),
    "linear, both names": (
        {
            "rope_theta": 5e5,
            "rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 4.0},
        },
        {"rope_theta": 5e5, "rope_type": "linear", "factor": 4.0},
        RopeScaling(factor=4.0),
    ),
    "llama3": (
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        {"rope_theta": 5e5, "rope_type": "llama3", **LLAMA3},
        RopeScaling(factor=8.0, low_freq_factor=1.5, high_freq_factor=4.5, original_context=32),
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("four", "five", "scaling"), ROPE.values(), ids=ROPE)
def test_rope_spellings_of_transformers_4_and_5_agree(family, four, five, scaling):
    old, new = read(family, **four), read(family, rope_parameters=five)
    assert old == new
    assert (new.rope_theta, new.rope_scaling) == (5e5, scaling)


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


REQUIRED = [key for key in BASE if key != "num_key_value_heads"]


@pytest.mark.parametrize("key", REQUIRED)
def test_missing_key_is_named(key):
    config = {"model_type": "mistral", **BASE}
    message = f"config.json has no '{key}', which a mistral model needs"
    with pytest.raises(InputError, match=re.escape(message)):
        from_hf(config | {key: None})
    del config[key]
    with pytest.raises(InputError, match=re.escape(message)):
        from_hf(config)


ERRORS = {
    "family": ({"model_type": "gpt2"}, ["'gpt2'", *FAMILIES]),
    "no family": ({"model_type": None}, ["model_type", "None", *FAMILIES]),
    "yarn, 4": ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, ["rope type 'yarn'", "llama3"]),
    "yarn, 5": (
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}},
        ["rope type 'yarn'", "linear"],
    ),
    "dynamic": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ["'dynamic'"]),
    "linear lacks factor": ({"rope_scaling": {"type": "linear"}}, ["'linear'", "'factor'"]),
    "partial rotary": ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
    "partial rotary, 5": (
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        ["partial_rotary_factor"],
    ),
    "quantised": ({"quantization_config": {"quant_method": "gptq"}}, ["quantised", "gptq"]),
    "quantised somehow": ({"quantization_config": {"bits": 4}}, ["quantised"]),
    "activation": ({"hidden_act": "gelu"}, ["hidden_act", "'gelu'", "'silu'"]),
    "groups": ({"num_key_value_heads": 4}, ["num_key_value_heads", "6 query heads", "4 key"]),
    "odd head_dim": ({"head_dim": 15}, ["head_dim", "15"]),
}


@pytest.mark.parametrize(("changes", "words"), ERRORS.values(), ids=ERRORS)
def test_errors_name_the_culprit(changes, words):
    with pytest.raises(InputError) as error:
        read(**changes)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("key", LLAMA3)
def test_llama3_rope_names_the_key_it_lacks(key):
    scaling = {"rope_type": "llama3", **LLAMA3}
    del scaling[key]
    with pytest.raises(InputError, match=rf"'llama3' in config.json lacks '{key}'"):
        read(rope_scaling=scaling)


def test_windows_default_to_none_in_every_layer():
    config = read("mistral", sliding_window=8)
    assert dataclasses.replace(config, windows=()).windows == (None, None, None)
