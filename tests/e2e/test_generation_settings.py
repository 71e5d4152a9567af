"""Generation settings on the command line: files, flags, and what ends a run."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


@pytest.fixture
def model(shared: Path, tmp_path: Path) -> Path:
    """A copy of stories260K to spoil."""
    directory = tmp_path / "model"
    shutil.copytree(shared / "models/stories260K", directory, copy_function=shutil.copyfile)
    directory.chmod(0o755)
    return directory


def test_an_answer_that_fails_ends_the_run_after_those_before_it(run, model, tmp_path):
    weights = load_file(model / "model.safetensors")
    weights["model.embed_tokens.weight"][500] = np.nan  # tied: of every token's logits, its own
    weights["lm_head.weight"] = np.zeros_like(weights["model.embed_tokens.weight"])
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    prompts, out_file = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text("".join(f'{{"prompt_ids": [1, {token}]}}\n' for token in (9, 500, 9)))
    flags = ["--model", model, "--autoregressive", "--prompts", prompts, "--output", out_file]
    code, _, err = run(*flags, "--max_new_tokens", 4)
    assert code == 1
    assert f"{prompts}, line 2: the model's logits are not finite after 0 new tokens" in err
    assert "float32" in err
    inputs = [json.loads(line)["input"] for line in out_file.read_text().splitlines()]
    assert inputs[0] == 0 and 1 not in inputs


def test_settings_of_the_model_and_of_flags(run, model, tmp_path):
    """A penalty from the file, turned off by its flag; a warning; a stop string; a bad type."""
    settings = {"eos_token_id": 2, "repetition_penalty": 1.5, "min_length": 3}
    (model / "generation_config.json").write_text(json.dumps(settings))
    flags = ["--model", model, "--autoregressive", "--prompt", "Once upon a time"]
    flags += ["--max_new_tokens", 40]
    code, own, _ = run(*flags)
    assert code == 0 and "play outside in the park." not in own
    code, free, _ = run(*flags, "--repetition_penalty", 1, "--stop", "irl", "--stop", "zzz")
    assert (code, free) == (0, ", there was a little g\n")
    (model / "generation_config.json").write_text('{"eos_token_id": "two"}')
    code, _, err = run(*flags)
    assert code == 2 and "generation_config.json: 'eos_token_id' must be an integer" in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--stop", ""], "stop is an empty string"),
        (["--seed", 2**64], "--seed must be at most 18446744073709551615"),
        (["--num_samples", 10**12], "--num_samples must be at most 2147483647"),
        (["--stop_id", 512], "stop_id 512 must lie in 0..511"),
        (["--suppress_tokens", *range(512)], "suppress_tokens leaves no token"),
    ],
)
def test_wrong_flags_exit_with_2(run, shared, flags, message):
    model = ["--model", shared / "models/stories260K", "--autoregressive", "--prompt", "a"]
    code, _, err = run(*model, *flags)
    assert code == 2 and message in err
