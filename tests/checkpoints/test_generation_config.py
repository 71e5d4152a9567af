"""A model's own settings of generation: types, bounds, and what is not applied."""

import json
import logging
from pathlib import Path

import pytest

from medusa_jax.checkpoints.generation_config import (
    GenerationConfig,
    not_applied,
    read_generation_config,
)
from medusa_jax.errors import InputError

VOCAB = 50


def read(tmp_path: Path, config: dict, generation: dict | str | None) -> GenerationConfig:
    if generation is not None:
        text = generation if isinstance(generation, str) else json.dumps(generation)
        (tmp_path / "generation_config.json").write_text(text)
    return read_generation_config(tmp_path, config, VOCAB)


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({}, None, GenerationConfig()),
        ({"eos_token_id": 7}, None, GenerationConfig((7,))),
        ({"eos_token_id": 7}, {"eos_token_id": [3, 4]}, GenerationConfig((3, 4))),
        ({"eos_token_id": 7}, {"suppress_tokens": [0]}, GenerationConfig((7,), (0,))),
        ({"repetition_penalty": 1.2}, None, GenerationConfig(repetition_penalty=1.2)),
        ({"repetition_penalty": 1.2}, {"top_k": 20}, GenerationConfig()),
        ({}, {"repetition_penalty": 1.05, "eos_token_id": None}, GenerationConfig((), (), 1.05)),
        ({}, {"repetition_penalty": 2}, GenerationConfig(repetition_penalty=2.0)),
    ],
)
def test_settings_that_are_read(tmp_path: Path, config, generation, expected):
    assert read(tmp_path, config, generation) == expected


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("eos_token_id", '"</s>"'),
        ("eos_token_id", "[[2]]"),
        ("eos_token_id", "1" + "0" * 30),
        ("eos_token_id", "NaN"),
        ("eos_token_id", "[2, -1]"),
        ("eos_token_id", "true"),
        ("suppress_tokens", str(VOCAB)),
        ("suppress_tokens", '{"0": 1}'),
        ("repetition_penalty", "0"),
        ("repetition_penalty", "-1.5"),
        ("repetition_penalty", "NaN"),
        ("repetition_penalty", '"1.1"'),
    ],
)
def test_a_wrong_setting_is_named_with_its_file(tmp_path: Path, field: str, value: str):
    with pytest.raises(InputError, match=rf"generation_config.json: '{field}' must be "):
        read(tmp_path, {}, f'{{"{field}": {value}}}')


@pytest.mark.parametrize("text", ["[2]", "{", "[" * 100_000])
def test_a_file_that_is_no_object_is_refused(tmp_path: Path, text: str):
    with pytest.raises(InputError, match=r"generation_config.json"):
        read(tmp_path, {}, text)


def test_what_is_not_applied_is_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    settings = {
        "no_repeat_ngram_size": 3,
        "bad_words_ids": [[5]],
        "forced_eos_token_id": 2,
        "num_beams": 1,
        "typical_p": 1.0,
        "min_length": 0,
        "do_sample": True,
        "temperature": 0.7,
    }
    with caplog.at_level(logging.WARNING):
        read(tmp_path, {"min_length": 9}, settings)
    (record,) = caplog.records
    assert record.message == (
        f"{tmp_path}/generation_config.json: settings that decoding does not apply: "
        "bad_words_ids [[5]], forced_eos_token_id 2, no_repeat_ngram_size 3"
    )


def test_not_applied_docstring_example():
    assert not_applied({"min_length": 5, "num_beams": 1, "top_k": 20}) == "min_length 5"
    assert not_applied({"sequence_bias": [[[5], -1.0]], "min_new_tokens": None}).startswith("seq")
