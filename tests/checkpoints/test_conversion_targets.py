"""What is written is what the others' loaders read: names, shapes and settings."""

import json
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers.head_files import VOCAB, WIDTH, original, random_heads
from safetensors.numpy import load_file

from medusa_jax.checkpoints import conversion
from medusa_jax.checkpoints.load import load_model
from medusa_jax.checkpoints.tensors import open_file
from medusa_jax.drafting.medusa_heads import MedusaHeads


def test_a_vllm_directory_is_what_vllm_documents(go: Any, tmp_path: Path):
    first = original(tmp_path / "first", random_heads(2, 1))
    place = go(first, "vllm", base="")
    assert {file.name for file in place.iterdir()} == {"config.json", "model.safetensors"}
    assert json.loads((place / "config.json").read_text()) == {
        "model_type": "medusa",
        "architectures": ["MedusaModel"],
        "hidden_size": 16,
        "vocab_size": 24,
        "num_heads": 2,
        "num_hidden_layers": 1,
        "max_paths": 64,
        "topk": 10,
        "truncated_vocab_size": 24,
        "original_lm_head": False,
        "medusa_fc_bias": True,
        "logit_scale": 1.0,
    }
    shapes = {name: t.shape for name, t in load_file(place / "model.safetensors").items()}
    assert shapes == {
        "blocks.0.layers.0.weight": (16, 16),
        "blocks.0.layers.0.bias": (16,),
        "blocks.1.layers.0.weight": (16, 16),
        "blocks.1.layers.0.bias": (16,),
        "lm_heads.0.weight": (24, 16),
        "lm_heads.1.weight": (24, 16),
    }
    shared = go(original(tmp_path / "second", random_heads(1, 2, vocab=None)), "vllm")
    settings = json.loads((shared / "config.json").read_text())
    assert settings["original_lm_head"] is True
    assert (settings["vocab_size"], settings["num_hidden_layers"]) == (24, 2)
    assert {name: t.shape for name, t in load_file(shared / "model.safetensors").items()} == {
        "blocks.0.layers.0.weight": (16, 16),
        "blocks.0.layers.0.bias": (16,),
        "blocks.0.layers.1.weight": (16, 16),
        "blocks.0.layers.1.bias": (16,),
        "lm_head.weight": (24, 16),
    }


@pytest.mark.parametrize(
    ("vocab", "projections"), [(VOCAB, {"0.1.weight", "1.1.weight"}), (None, set())]
)
def test_a_tgi_directory_is_what_tgi_documents(
    go: Any, tmp_path: Path, vocab: int | None, projections: set[str]
):
    first = original(tmp_path / "first", random_heads(2, 1, vocab=vocab))
    place = go(first, "tgi", base="owner/name")
    assert {file.name for file in place.iterdir()} == {"config.json", "medusa_lm_head.safetensors"}
    assert json.loads((place / "config.json").read_text()) == {  # no "architectures"
        "base_model_name_or_path": "owner/name",
        "medusa_num_heads": 2,
        "medusa_num_layers": 1,
    }
    assert load_file(place / "medusa_lm_head.safetensors").keys() == projections | {
        "0.0.linear.weight",
        "0.0.linear.bias",
        "1.0.linear.weight",
        "1.0.linear.bias",
    }


CONFIGS = {
    "v0.1": {
        "base_model_name_or_path": "some/model",
        "medusa_num_heads": 2,
        "medusa_num_layers": 1,
    },
    "mlc": {
        "model_type": "medusa",
        "medusa_num_heads": 2,
        "medusa_num_layers": 1,
        "hidden_size": WIDTH,
        "vocab_size": VOCAB,
    },
}


@pytest.mark.parametrize("target", list(CONFIGS))
def test_configs_of_heads_alone(go: Any, tmp_path: Path, target: str):
    first = original(tmp_path / "first", random_heads(2), base_model_name_or_path="some/model")
    place = go(first, target, base="")
    assert json.loads((place / "config.json").read_text()) == CONFIGS[target]
    if target == "v0.1":
        both = (place / f"medusa_lm_head.{end}" for end in ("pt", "safetensors"))
        chex.assert_trees_all_equal(
            *({name: t.read() for name, t in open_file(one).items()} for one in both)
        )


def test_configs_of_merged_models(go: Any, saved: Path, tmp_path: Path):
    settings = json.loads((saved / "config.json").read_text())
    # As transformers 4 spells what 5 calls dtype and rope_parameters.
    settings |= {"torch_dtype": settings.pop("dtype"), "rope_theta": 10000.0}
    first = original(tmp_path / "first", random_heads(2))
    merged = go(first, "v1.0")
    counted = {"medusa_num_heads": 2, "medusa_num_layers": 1}
    assert json.loads((merged / "config.json").read_text()) == settings | counted
    other = go(merged, "modelopt", base="", dtype="bfloat16")  # its own backbone
    found = json.loads((other / "config.json").read_text())
    medusa = {"num_medusa_heads": 2, "num_medusa_layers": 1}
    assert found == settings | {"medusa": medusa, "torch_dtype": "bfloat16"}
    assert (other / "generation_config.json").read_bytes() == (
        saved / "generation_config.json"
    ).read_bytes()
    heads = go(other, "v0.1", base="")
    named = json.loads((heads / "config.json").read_text())["base_model_name_or_path"]
    assert named == str(other.resolve())


def test_a_backbone_beside_the_heads_is_named_by_its_path(go: Any, copy: Path, tmp_path: Path):
    first = original(tmp_path / "first", random_heads(2), base_model_name_or_path=copy.name)
    (tmp_path / "elsewhere").mkdir()
    output = tmp_path / "elsewhere" / "heads"
    conversion.convert(str(first), "v0.1", output)
    assert json.loads((output / "config.json").read_text())["base_model_name_or_path"] == str(copy)
    chex.assert_trees_all_equal(load_model(output).params, load_model(first).params)


class Blocks(torch.nn.Module):
    """x <- x + SiLU(W x + b), under vLLM's names."""

    def __init__(self, layers: int):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(WIDTH, WIDTH) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + torch.nn.functional.silu(layer(x))
        return x


class Heads(torch.nn.Module):
    """Heads with their own projections, under vLLM's names."""

    def __init__(self, heads: int, layers: int):
        super().__init__()
        self.blocks = torch.nn.ModuleList(Blocks(layers) for _ in range(heads))
        linears = (torch.nn.Linear(WIDTH, VOCAB, bias=False) for _ in range(heads))
        self.lm_heads = torch.nn.ModuleList(linears)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        pairs = zip(self.blocks, self.lm_heads, strict=True)
        return [head(block(x)) for block, head in pairs]


def test_a_torch_module_with_vllms_names_gives_our_logits(go: Any, saved: Path, tmp_path: Path):
    tensors = {name: 0.3 * tensor for name, tensor in random_heads(2, 2).items()}
    first = original(tmp_path / "first", tensors)
    theirs = Heads(2, 2)
    state = load_file(go(first, "vllm") / "model.safetensors")
    theirs.load_state_dict({name: torch.from_numpy(t) for name, t in state.items()}, strict=True)
    model = load_model(saved, first)
    hidden = np.random.default_rng(2).standard_normal((5, WIDTH), np.float32)
    variables = {"params": model.params["heads"]}
    ours = MedusaHeads(model.heads).apply(variables, jnp.asarray(hidden), lambda x: x)
    with torch.no_grad():
        expected = [logits.numpy() for logits in theirs(torch.from_numpy(hidden))]
    np.testing.assert_allclose(jax.device_get(ours), expected, rtol=1e-4, atol=1e-5)


def test_vllms_own_config_reads_it(go: Any, tmp_path: Path):
    medusa = pytest.importorskip("vllm.transformers_utils.configs.medusa", reason="needs vllm")
    config = medusa.MedusaConfig.from_pretrained(
        go(original(tmp_path / "first", random_heads(3, 2)), "vllm")
    )
    assert (config.num_heads, config.num_hidden_layers, config.vocab_size) == (3, 2, VOCAB)
