"""benchmarks/vllm_peer.py, with transformers behind vLLM's interface."""

import json
import runpy
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.paths import ROOT
from safetensors.numpy import load_file

SCRIPT = ROOT / "benchmarks/vllm_peer.py"


class LLM:
    """Greedy texts of transformers; of heads, the checks of vLLM's own loader."""

    def __init__(self, model: str, speculative_config: dict[str, Any] | None, **how: Any):
        assert [path.name for path in Path(model).glob("*.safetensors")] == ["model.safetensors"]
        self.model, found = transformers.AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, output_loading_info=True
        )
        assert not found["unexpected_keys"]
        self.drafts = 0
        if speculative_config:
            place = Path(speculative_config["model"])
            config = json.loads((place / "config.json").read_text())
            assert config["truncated_vocab_size"] == config["vocab_size"]
            tensors = load_file(place / "model.safetensors")
            assert "token_map" not in tensors
            assert tensors["lm_head.weight"].shape == (config["vocab_size"], config["hidden_size"])
            self.drafts = 10

    def generate(self, batch: list[dict[str, Any]], how: Any, use_tqdm: bool) -> list[Any]:
        made = []
        for prompt in batch:
            ids = torch.tensor([prompt["prompt_token_ids"]])
            text = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=how.max_tokens,
                eos_token_id=how.stop_token_ids,
            )[0, ids.shape[1] :].tolist()
            made.append(types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=text)]))
        return made

    def get_metrics(self) -> list[Any]:
        self.drafts *= 2
        values = {"num_drafts": self.drafts, "num_accepted_tokens": self.drafts / 2}
        return [
            types.SimpleNamespace(name=f"vllm:spec_decode_{name}", value=value)
            for name, value in values.items()
        ]


@pytest.mark.slow
def test_it_compares_texts_lengths_and_speeds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    fake: Any = types.ModuleType("vllm")
    fake.LLM, fake.SamplingParams, fake.__version__ = LLM, types.SimpleNamespace, "0"
    monkeypatch.setitem(sys.modules, "vllm", fake)

    def run(command: list[Any], **_: Any) -> None:
        monkeypatch.setattr(sys, "argv", [str(part) for part in command[1:]])
        runpy.run_path(str(command[1]), run_name="__main__")

    monkeypatch.setattr(subprocess, "run", run)
    script = runpy.run_path(str(SCRIPT))
    output = tmp_path / "peer.json"
    script["measure"](
        script["Options"](
            python=sys.executable,
            number=2,
            batch_sizes=[2],
            max_new_tokens=8,
            output=str(output),
        )
    )
    rows = json.loads(output.read_text())["rows"]
    assert [(row["system"], row["batch_size"]) for row in rows] == [("plain", 2), ("Medusa", 2)]
    assert all(row["same_texts"] == row["texts"] == 2 for row in rows)
    assert [row["vllm_mean_accepted_length"] for row in rows] == [1, 1.5]
    assert rows[1]["mean_accepted_length"] > 1.5
    assert "| Medusa | 2 | 2 of 2 |" in capsys.readouterr().out
