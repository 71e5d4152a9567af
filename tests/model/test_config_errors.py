"""`config.from_hf`: whatever a config.json holds, the message names the file and the field."""

import re

import pytest
from helpers.configs import BASE, LLAMA3

from medusa_jax.errors import InputError
from medusa_jax.model.config import FAMILIES, ModelConfig, from_hf


def read(family: str = "llama", **changes) -> ModelConfig:
    return from_hf({"model_type": family, **BASE, **changes})


REQUIRED = [key for key in BASE if key != "num_key_value_heads"]


@pytest.mark.parametrize("key", REQUIRED)
def test_missing_key_is_named(key):
    config = {"model_type": "mistral", **BASE}
    for lacking in (config | {key: None}, {k: v for k, v in config.items() if k != key}):
        with pytest.raises(InputError, match=re.escape(f"here/config.json has no '{key}'")):
            from_hf(lacking, "here/config.json")


ERRORS = {
    "family": ({"model_type": "gpt2"}, ["'gpt2'", *FAMILIES]),
    "no family": ({"model_type": None}, ["model_type", "None", *FAMILIES]),
    "longrope": ({"rope_scaling": {"type": "longrope"}}, ["rope type 'longrope'", "yarn"]),
    "ntk, 5": (
        {"rope_parameters": {"rope_type": "ntk", "factor": 2.0, "rope_theta": 1e4}},
        ["'rope_parameters'", "rope type 'ntk'", "linear"],
    ),
    "dynamic of width 2": (
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "head_dim": 2},
        ["dynamic NTK", "head_dim"],
    ),
    "yarn, theta 1": (
        {"rope_scaling": {"type": "yarn", "factor": 2.0}, "rope_theta": 1},
        ["YaRN", "'rope_theta'"],
    ),
    "linear lacks factor": ({"rope_scaling": {"type": "linear"}}, ["'rope_scaling'", "'factor'"]),
    "rope of layers": (
        {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
        ["'rope_parameters'", "some layers"],
    ),
    "partial rotary": ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
    "partial rotary, 5": (
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        ["partial_rotary_factor"],
    ),
    "quantized": (
        {"quantization_config": {"quant_method": "hqq"}},
        ["quantized", "hqq", "gptq, awq"],
    ),
    "quantized somehow": ({"quantization_config": {"bits": 4}}, ["quantized"]),
    "activation": ({"hidden_act": "gelu"}, ["hidden_act", "'gelu'", "'silu'"]),
    "groups": ({"num_key_value_heads": 4}, ["num_key_value_heads", "6 query heads", "4 key"]),
    "odd head_dim": ({"head_dim": 15}, ["config.json", "head_dim", "15"]),
    "no width": ({"hidden_size": 5}, ["config.json", "head_dim", "got 0"]),
}


@pytest.mark.parametrize(("changes", "words"), ERRORS.values(), ids=ERRORS)
def test_errors_name_the_culprit(changes, words):
    with pytest.raises(InputError) as error:
        read(**changes)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("key", [key for key in LLAMA3 if "original" not in key])
def test_llama3_rope_names_the_key_it_lacks(key):
    scaling = {"rope_type": "llama3", **LLAMA3}
    del scaling[key]
    with pytest.raises(InputError, match=rf"config.json: 'rope_scaling' has no '{key}'"):
        read(rope_scaling=scaling)


NAN, INF, HUGE = float("nan"), float("inf"), 10**31
# Values that each field refuses, beside those that no field takes.
WRONG = {
    "hidden_size": [0, -1, "64", 10**12, 0.5],
    "intermediate_size": [0, True],
    "num_hidden_layers": [0, 10**9, 10_001],
    "num_attention_heads": [0, "4"],
    "num_key_value_heads": [0, -1, "2"],
    "vocab_size": [0, 10**12],
    "max_position_embeddings": [0, 10**12],
    "head_dim": [0, "8", -2],
    "rms_norm_eps": [0, -1e-6, "x", NAN, INF, 2],
    "rope_theta": [0, -1, "x", NAN, INF, 1e300],
    "rope_scaling": ["linear", [1]],
    "rope_parameters": ["linear", [1]],
    "partial_rotary_factor": ["x", NAN],
    "quantization_config": ["awq", [4]],
    "tie_word_embeddings": ["false", 1, "no"],
    "hidden_act": [1],
    "attention_bias": ["no", 0],
    "mlp_bias": [0],
}


@pytest.mark.parametrize("key", WRONG)
def test_wrong_values_are_refused_by_file_and_field(key):
    for value in [*WRONG[key], HUGE, [[]], {"a": {"b": 1}}]:
        if value == {"a": {"b": 1}} and key in ("rope_scaling", "rope_parameters"):
            continue  # another message
        with pytest.raises(InputError, match=r"config\.json") as error:
            read(**{key: value})
        assert key in str(error.value) or "quantized" in str(error.value)
        assert len(str(error.value)) < 200


WRONG_ROPE = {
    "factor": [0, -1, "a", NAN, INF, 1e300, True],
    "original_max_position_embeddings": [0, -1, "a", 0.5, HUGE],
    "beta_fast": [-1, "a", NAN],
    "beta_slow": [-1, []],
    "attention_factor": [0, "a", INF],
    "mscale": [-1, NAN],
    "mscale_all_dim": ["x"],
    "truncate": [0, "false"],
    "rope_type": [1, []],
}


@pytest.mark.parametrize("key", WRONG_ROPE)
def test_wrong_rope_values_are_refused_by_file_and_field(key):
    for value in WRONG_ROPE[key]:
        scaling = {"rope_type": "yarn", "factor": 2.0, key: value}
        with pytest.raises(InputError, match=rf"config\.json: 'rope_scaling': '{key}'"):
            read(rope_scaling=scaling)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("sliding_window", value) for value in (0, -1, "a", HUGE)],
        *[("max_window_layers", value) for value in (-1, "a")],
        *[("use_sliding_window", value) for value in ("no", 1)],
        ("layer_types", ["full_attention"]),  # for three layers
        ("layer_types", ["full_attention", "sliding_attention", "chunked_attention"]),
        ("layer_types", ["full_attention", [], 1]),
        ("layer_types", "full_attention"),
        ("layer_types", {"a": 1}),
    ],
)
def test_wrong_windows_are_refused_by_file_and_field(key, value):
    with pytest.raises(InputError, match=rf"config\.json: '{key}' must be"):
        read("qwen3", **{"use_sliding_window": True, key: value})
